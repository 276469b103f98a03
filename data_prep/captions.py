"""A file of captions, line by line: CSV, JSONL or Parquet, with a column of file names and one of captions.

Other columns are ignored. In JSONL and Parquet a caption may be a list of them.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from sora_train.data.config import DataConfig
from sora_train.errors import RecipeError
from sora_train.places import read_bytes, remedy

JSON_LINES, PARQUET = (".jsonl", ".ndjson", ".json"), (".parquet", ".pq")
PACKED = (".gz", ".bz2", ".zst", ".lz4")


@dataclass(frozen=True, slots=True)
class Line:
    """A source as it is named, with its captions. `where` says so in a message; `reason` is set where it is no good."""

    where: str
    source: str
    captions: tuple[str, ...]
    reason: str = ""
    message: str = ""


def read_captions(data: DataConfig, system: fs.FileSystem, path: str) -> list[Line]:
    """The lines of data.captions, in its order. RecipeError says what is wrong with it and where.

    A line without a caption is `no_caption`; one that is nonsense, such as a number for a file name, is an error.
    Raises UserError where the file can't be read.
    """
    place, ending = data.captions, _ending(path)
    if ending in PARQUET:
        lines = _parquet(place, system, path, data)
    else:
        lines = (_json_lines if ending in JSON_LINES else _csv)(place, read_bytes(system, path) or b"", data)
    if not lines:
        raise RecipeError(f"data.captions: {place} has no rows; add one per clip")
    return lines


def _ending(path: str) -> str:
    stem, ending = posixpath.splitext(path.lower())
    return posixpath.splitext(stem)[1] if ending in PACKED else ending


def _text(place: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"data.captions: {place} is not UTF-8 text ({error}); save it as UTF-8") from None


def _csv(place: str, content: bytes, data: DataConfig) -> list[Line]:
    records = _records(place, io.StringIO(_text(place, content), newline="").readlines())
    _, header = next(records, (1, None))
    if header is None:
        raise RecipeError(
            f"data.captions: {place} is empty; its first line must be {data.file_column},{data.caption_column}"
        )
    header = [name.strip() for name in header]
    columns = _columns(place, header, data)
    lines: list[Line] = []
    for number, cells in records:
        if any(cell.strip() for cell in cells[len(header) :]):
            raise RecipeError(
                f"data.captions: {place}, line {number} has {len(cells)} cells, the header {len(header)}: put a "
                'caption with a comma in it between quotation marks, "so, for instance"'
            )
        source, caption = (cells[column].strip() if column < len(cells) else "" for column in columns)
        lines.append(_line(f"line {number}", source, caption))
    return lines


def _records(place: str, text: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Cells of each record of a CSV that isn't blank, with the number of the line on which it begins."""
    table, begin, last = csv.reader(text), 1, 1
    try:
        for cells in table:
            if cells:
                yield begin, cells
                last = begin
            begin = table.line_num + 1  # a cell may reach over several lines
    except csv.Error as error:
        raise RecipeError(f"data.captions: {place}, line {table.line_num}: {error}; mend that line") from None
    try:
        list(csv.reader(text[last - 1 :], strict=True))
    except csv.Error as error:
        if "end of data" in str(error):
            raise RecipeError(
                f"data.captions: {place}, line {last}: a quotation mark is never closed, so that the rest of the file "
                "is one cell; close it, or double a mark that belongs to the text"
            ) from None


def _json_lines(place: str, content: bytes, data: DataConfig) -> list[Line]:
    lines: list[Line] = []
    found: dict[str, None] = {}  # in the order of first mention
    for number, text in enumerate(_text(place, content).split("\n"), start=1):
        if not text.strip():
            continue
        where = f"line {number}"
        try:
            content_of = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"data.captions: {place}, {where} is no JSON ({error}); {_example(data)}") from None
        if not isinstance(content_of, dict):
            raise RecipeError(
                f"data.captions: {place}, {where} is {reprlib.repr(content_of)}, not an object; {_example(data)}"
            )
        found |= dict.fromkeys(content_of)
        if data.file_column not in content_of:
            _columns(place, list(content_of), data, where)
        lines.append(_checked(place, where, content_of.get(data.file_column), content_of.get(data.caption_column)))
    if lines:
        _columns(place, list(found), data)
    return lines


def _example(data: DataConfig) -> str:
    example = json.dumps({data.file_column: "a.mp4", data.caption_column: "what is seen"})
    return f"write one object per line, such as {example}"


def _parquet(place: str, system: fs.FileSystem, path: str, data: DataConfig) -> list[Line]:
    try:
        with system.open_input_file(path) as opened:
            file = pq.ParquetFile(opened)
            _columns(place, file.schema_arrow.names, data)
            names = [data.file_column, data.caption_column]
            table = file.read(columns=names)  # these alone: others may hold the videos themselves
    except (OSError, pa.ArrowException) as error:
        raise RecipeError(
            f"data.captions: {place} can't be read as Parquet ({error}); write it anew{remedy(place)}"
        ) from None
    pairs: Iterable[tuple[object, object]] = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    return [_checked(place, f"row {number}", *pair) for number, pair in enumerate(pairs, start=1)]


def _columns(place: str, found: list[str], data: DataConfig, where: str = "") -> tuple[int, int]:
    """Where the columns of file names and captions stand; RecipeError where they don't, or stand twice."""
    wanted = (data.file_column, data.caption_column)
    at = f"{place}, {where}" if where else place
    if missing := [name for name in wanted if name not in found]:
        raise RecipeError(
            f"data.captions: {at} has no column {' and no '.join(missing)}; its columns are {', '.join(found)}; rename "
            "them, or set data.file_column and data.caption_column to what they are called"
        )
    if twice := [name for name in wanted if found.count(name) > 1]:
        raise RecipeError(f"data.captions: {at} has the column {twice[0]} twice; rename one of them")
    return found.index(wanted[0]), found.index(wanted[1])


def _checked(place: str, where: str, source: object, caption: object) -> Line:
    """The line of a file name and what stands for its captions: a text, a list of texts, or nothing."""
    texts = caption if isinstance(caption, list) else [] if caption is None else [caption]
    for what, value in (("file name", source), *(("caption", text) for text in texts)):
        if not isinstance(value, str):
            raise RecipeError(
                f"data.captions: {place}, {where}: the {what} is {reprlib.repr(value)}, not text; write a file name "
                "and a caption, or a list of captions"
            )
        if any("\ud800" <= sign <= "\udfff" for sign in value):
            raise RecipeError(f"data.captions: {place}, {where}: the {what} {value!a} has half a character; mend it")
    return _line(where, str(source).strip(), *(str(text).strip() for text in texts))


def _line(where: str, source: str, *captions: str) -> Line:
    captions = tuple(caption for caption in captions if caption)
    if captions:
        return Line(where, source, captions)
    return Line(where, source, (), "no_caption", f"{where} of the captions file has no caption")
