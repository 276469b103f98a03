"""Reads CSV files strictly: the records of a file, each with the number of its first line.

RFC 4180, with any of four separators. Anything else is an error that names the line and the cause, because a lenient
reader would silently change captions.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from sora_train.errors import RecipeError

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
MAX_CELL = 2**31 - 1  # characters; Python's default limit is 131072, and this is a C long's on Windows
BACKSLASHES = (
    'a quotation mark is escaped by a backslash (\\"), which CSV does not know. Double the mark instead (""), or write '
    "JSON lines. pandas: to_csv without escapechar; Spark: option('escape', '\"')"
)
UNCLOSED = "Close it, or double a mark that belongs to the text"


class Records:
    """The records of a CSV that are not blank, read as they are needed. The first one is the header."""

    def __init__(self, place: str, lines: Iterable[str], wanted: Sequence[str]):
        """`lines` end with a line feed, a carriage return or both, except the last one."""
        csv.field_size_limit(MAX_CELL)
        self.place, lines, head = place, iter(lines), list[str]()
        while not (head and head[-1].strip()) and (line := next(lines, "")):
            head.append(line)
        has_sep_line, self.separator = _dialect(head[-1] if head else "", wanted)
        self._skipped, self._lines = (len(head), lines) if has_sep_line else (0, chain(head, lines))
        self._raw: list[str] = []  # lines of the current record
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
        table = csv.reader(self._remembered(), delimiter=self.separator, skipinitialspace=True, strict=True)
        begin = self._skipped + 1
        try:
            for cells in table:
                # A \" in a cell is text if the file doubles its mark, as in RFC 4180; else it was meant as an escape.
                escaped = sum(cell.count('\\"') for cell in cells)
                if escaped and escaped > "".join(self._raw).count('\\""'):
                    raise self._error(begin, BACKSLASHES)
                if any(cell.strip() for cell in cells):
                    yield begin, cells
                begin = self._skipped + table.line_num + 1  # a cell may contain line ends
                self._raw.clear()
        except csv.Error as error:
            raise self._error(begin, self._explain(str(error), begin, self._skipped + table.line_num)) from None

    def _remembered(self) -> Iterator[str]:
        for line in self._lines:
            self._raw.append(line)
            yield line

    def _explain(self, error: str, begin: int, end: int) -> str:
        """The cause of an error of Python's csv module, and what to do."""
        if '\\"' in "".join(self._raw):
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
        name, raw = SEPARATORS.get(self.separator, repr(self.separator)), self._raw[0]
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


def _dialect(first: str, wanted: Sequence[str]) -> tuple[bool, str]:
    """Whether the first line is Excel's `sep=`, and the separator.

    The separator is the one that this line names, or that finds the wanted column names, or that finds the most names.
    """
    if excel := re.fullmatch(r'"?sep=(.)"?[\r\n]*', first, re.IGNORECASE):
        return True, excel[1]
    if not first:
        return False, ","
    found: dict[str, tuple[bool, int]] = {}
    for separator in SEPARATORS:
        names = [name.strip() for name in next(csv.reader([first], delimiter=separator, skipinitialspace=True))]
        found[separator] = set(wanted) <= set(names), len(names)
    return False, max(found, key=found.__getitem__)
