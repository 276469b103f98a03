"""CSV as programs and people write it: the records of a file, each with the line on which it begins.

RFC 4180, with any of four separators. What RFC 4180 does not allow is an error that names its line, because a lenient
reader would change captions without a word.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence

from sora_train.errors import RecipeError

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
LONGEST = 2**31 - 1  # characters of a cell; Python's own limit is 131072, and a C long's is this on Windows


class Records:
    """The records of a CSV that are not blank. The first is the header, its names without blanks around them."""

    def __init__(self, place: str, text: str, wanted: Sequence[str]):
        csv.field_size_limit(LONGEST)
        self.place = place
        self.lines = io.StringIO(text, newline="").readlines()  # ended by \n, \r\n or a bare \r
        self.skipped, self.separator = _dialect(self.lines, wanted)
        self._escapes = '\\"' in text
        self._records = self._read()
        first = next(self._records, (1, []))
        self.header = [name.strip() for name in first[1]]

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """The number of the line on which a record begins, and its cells. Raises RecipeError."""
        for number, cells in self._records:
            cells = [cell.strip() for cell in cells]
            if [cell.removeprefix("\ufeff") for cell in cells] == self.header:
                raise self._error(number, "the header again. Remove that line; it is left from joining files")
            if any(cells[len(self.header) :]):
                raise self._error(number, self._too_many(number, cells))
            yield number, cells

    def _read(self) -> Iterator[tuple[int, list[str]]]:
        table = csv.reader(
            self.lines[self.skipped :], delimiter=self.separator, skipinitialspace=True, strict=True
        )  # ', "a, b"' is one cell
        begin = self.skipped + 1
        try:
            for cells in table:
                end = self.skipped + table.line_num
                if self._escapes:
                    self._refuse_backslashes(begin, "".join(self.lines[begin - 1 : end]), cells)
                if any(cell.strip() for cell in cells):
                    yield begin, cells
                begin = end + 1  # a cell may reach over several lines
        except csv.Error as error:
            raise self._error(begin, self._why(str(error), begin, self.skipped + table.line_num)) from None

    def _refuse_backslashes(self, number: int, raw: str, cells: list[str]) -> None:
        """A cell's `\\"` is text where the file doubles its mark, as RFC 4180 does; else it was meant as an escape."""
        if sum(cell.count('\\"') for cell in cells) > raw.count('\\""'):
            raise self._error(number, BACKSLASHES)

    def _why(self, said: str, begin: int, end: int) -> str:
        """The cause of csv's complaint about a record of these lines, and the remedy."""
        raw = "".join(self.lines[begin - 1 : end])
        if '\\"' in raw:
            return BACKSLASHES
        if "end of data" in said:
            return (
                "a quotation mark is never closed, so the rest of the file is one cell. Close it, or double a mark "
                "that belongs to the text"
            )
        if end > begin:
            return (
                f"a quotation mark is not closed before line {end}. Close it, or double a mark that belongs to the text"
            )
        if "expected after" in said:
            return (
                "text follows a closing quotation mark. Put the whole cell between marks and double those that belong "
                'to the text, such as """Hello"" she said"'
            )
        return f"{said}. Correct that line"

    def _too_many(self, number: int, cells: list[str]) -> str:
        name, raw = SEPARATORS.get(self.separator, repr(self.separator)), self.lines[number - 1]
        has, remedy = f"{len(cells)} cells, but the header has {len(self.header)}", QUOTE_IT.format(name)
        if f"\\{self.separator}" in raw:
            return f"{has}: a {name} is escaped by a backslash, which CSV does not know. {remedy}"
        if "\u201c" in raw or "\u201d" in raw:
            return f"{has}: \u201c and \u201d are text in CSV, not quotation marks. {remedy}"
        return f"{has}. {remedy}"

    def _error(self, number: int, sentence: str) -> RecipeError:
        return RecipeError(f"data.captions: {self.place}, line {number}: {sentence}")


BACKSLASHES = (
    'a quotation mark is escaped by a backslash (\\"), which CSV does not know. Double the mark instead (""), or write '
    "JSON lines. pandas: to_csv without escapechar; Spark: option('escape', '\"')"
)
QUOTE_IT = 'Put a caption with a {} in it between quotation marks, "so, for instance"'


def _dialect(lines: list[str], wanted: Sequence[str]) -> tuple[int, str]:
    """Lines to skip before the header, and the separator: what Excel's `sep=` line says, or else the one that gives
    the header the wanted names, or else most names.
    """
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    if not lines:
        return 0, ","
    if said := re.fullmatch(r'"?sep=(.)"?[\r\n]*', lines[first], re.IGNORECASE):
        return first + 1, said[1]
    found: dict[str, tuple[bool, int]] = {}
    for separator in SEPARATORS:
        names = [name.strip() for name in next(csv.reader([lines[first]], delimiter=separator, skipinitialspace=True))]
        found[separator] = set(wanted) <= set(names), len(names)
    return 0, max(found, key=found.__getitem__)
