"""Reads CSV files strictly: the records of a file, each with the number of its first line.

RFC 4180, with any of four separators. Anything else is an error that names the line and the cause, because a lenient
reader would silently change captions.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence

from sora_train.errors import RecipeError

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
MAX_CELL = 2**31 - 1  # characters; Python's default limit is 131072, and this is a C long's on Windows
BACKSLASHES = (
    'a quotation mark is escaped by a backslash (\\"), which CSV does not know. Double the mark instead (""), or write '
    "JSON lines. pandas: to_csv without escapechar; Spark: option('escape', '\"')"
)
UNCLOSED = "Close it, or double a mark that belongs to the text"


class Records:
    """The records of a CSV that are not blank. The first one is the header."""

    def __init__(self, place: str, text: str, wanted: Sequence[str]):
        csv.field_size_limit(MAX_CELL)
        self.place = place
        self.lines = io.StringIO(text, newline="").readlines()  # ended by \n, \r\n or a single \r
        self.skipped, self.separator = _dialect(self.lines, wanted)
        self._records = self._read()
        first = next(self._records, (1, []))
        self.header = [name.strip() for name in first[1]]

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """Yields the number of a record's first line, and its cells. Raises RecipeError."""
        for number, cells in self._records:
            cells = [cell.strip() for cell in cells]
            if [cell.removeprefix("\ufeff") for cell in cells] == self.header:
                raise self._error(number, "the header again. Remove that line; it is left from joining files")
            if any(cells[len(self.header) :]):
                raise self._error(number, self._too_many(number, cells))
            yield number, cells

    def _read(self) -> Iterator[tuple[int, list[str]]]:
        table = csv.reader(self.lines[self.skipped :], delimiter=self.separator, skipinitialspace=True, strict=True)
        begin = self.skipped + 1
        try:
            for cells in table:
                end = self.skipped + table.line_num
                # A \" in a cell is text if the file doubles its mark, as in RFC 4180; else it was meant as an escape.
                if sum(cell.count('\\"') for cell in cells) > self._raw(begin, end).count('\\""'):
                    raise self._error(begin, BACKSLASHES)
                if any(cell.strip() for cell in cells):
                    yield begin, cells
                begin = end + 1  # a cell may contain line ends
        except csv.Error as error:
            raise self._error(begin, self._explain(str(error), begin, self.skipped + table.line_num)) from None

    def _raw(self, begin: int, end: int) -> str:
        return "".join(self.lines[begin - 1 : end])

    def _explain(self, error: str, begin: int, end: int) -> str:
        """The cause of an error of Python's csv module, and what to do."""
        if '\\"' in self._raw(begin, end):
            return BACKSLASHES
        if "end of data" in error:
            return f"a quotation mark is never closed, so the rest of the file is one cell. {UNCLOSED}"
        if end > begin:
            return f"a quotation mark is not closed before line {end}. {UNCLOSED}"
        if "expected after" in error:
            return (
                "text follows a closing quotation mark. Put the whole cell between marks and double those that belong "
                'to the text, such as """Hello"" she said"'
            )
        return f"{error}. Correct that line"

    def _too_many(self, number: int, cells: list[str]) -> str:
        name, raw = SEPARATORS.get(self.separator, repr(self.separator)), self.lines[number - 1]
        why = ""
        if f"\\{self.separator}" in raw:
            why = f": a {name} is escaped by a backslash, which CSV does not know"
        elif "\u201c" in raw or "\u201d" in raw:
            why = ": \u201c and \u201d are text in CSV, not quotation marks"
        return (
            f"{len(cells)} cells, but the header has {len(self.header)}{why}. Put a caption with a {name} in it "
            'between quotation marks, "so, for instance"'
        )

    def _error(self, number: int, sentence: str) -> RecipeError:
        return RecipeError(f"data.captions: {self.place}, line {number}: {sentence}")


def _dialect(lines: list[str], wanted: Sequence[str]) -> tuple[int, str]:
    """The number of lines before the header, and the separator.

    That is what Excel's line `sep=` names, or the one that gives the wanted names, or else the most names.
    """
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    if not lines:
        return 0, ","
    if excel := re.fullmatch(r'"?sep=(.)"?[\r\n]*', lines[first], re.IGNORECASE):
        return first + 1, excel[1]
    found: dict[str, tuple[bool, int]] = {}
    for separator in SEPARATORS:
        names = [name.strip() for name in next(csv.reader([lines[first]], delimiter=separator, skipinitialspace=True))]
        found[separator] = set(wanted) <= set(names), len(names)
    return 0, max(found, key=found.__getitem__)
