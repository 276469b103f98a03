"""A file of captions, line by line: CSV, JSONL or Parquet, with a column of file names and one of captions.

Other columns are ignored. In JSONL and Parquet a caption may be a list of them.
"""

from __future__ import annotations

import io
import json
import math
import posixpath
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from data_prep.csv_records import SEPARATORS, Records
from sora_train.data.config import DataConfig
from sora_train.errors import RecipeError
from sora_train.log import log
from sora_train.storage import decode_text, hint, read_bytes

JSON_LINES, PARQUET = (".jsonl", ".ndjson", ".json"), (".parquet", ".pq")
PACKED = (".gz", ".bz2", ".zst", ".lz4")
NO_CAPTION = frozenset(("nan", "NaN", "NAN", "null", "NULL", "None", "<NA>", "NA", "N/A", "n/a", "#N/A", "\\N"))
"""What pandas, SQL and Excel write for a missing value. A caption that is one of these counts as missing."""
MAX_COLUMNS_SHOWN = 12  # columns in a message


@dataclass(frozen=True, slots=True)
class CaptionLine:
    """A source as it is named, with its captions. `where` says so in a message; `reason` is set where it is no good."""

    where: str
    source: str
    captions: tuple[str, ...]
    reason: str = ""
    message: str = ""


def read_captions(data: DataConfig, system: fs.FileSystem, path: str) -> list[CaptionLine]:
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
        return decode_text(content)
    except ValueError as error:
        raise RecipeError(f"data.captions: {place} {error}") from None


def _csv(place: str, content: bytes, data: DataConfig) -> list[CaptionLine]:
    wanted = (data.file_column, data.caption_column)
    records = Records(place, _text(place, content), wanted)
    if not any(records.header):
        raise RecipeError(f"data.captions: {place} is empty; its first line must be {','.join(wanted)}")
    if not set(wanted) & set(records.header):
        raise RecipeError(
            f"data.captions: {place} has no column {wanted[0]} and no {wanted[1]}; the header, its first line, is "
            f"{_named(records.header)}. Add a header, or set data.file_column and data.caption_column to its names"
        )
    columns = _columns(place, records.header, data)
    if records.separator != ",":
        log.info(f"{place}: cells are separated by {SEPARATORS.get(records.separator, records.separator)}s")
    lines: list[CaptionLine] = []
    for number, cells in records:
        source, caption = (cells[column] if column < len(cells) else "" for column in columns)
        line = _line(f"line {number}", source, caption)
        if line.reason and len(cells) < len(records.header):
            counts = f"line {number} has {len(cells)} cells of the header's {len(records.header)}"
            line = replace(line, message=f"{counts}, and no caption")
        lines.append(line)
    return lines


def _json_lines(place: str, content: bytes, data: DataConfig) -> list[CaptionLine]:
    lines: list[CaptionLine] = []
    found: dict[str, None] = {}  # in the order of first mention
    whole = _text(place, content)
    if whole.lstrip().startswith("["):
        raise RecipeError(
            f"data.captions: {place} is one JSON array, not JSON lines. Convert it, for instance by `jq -c '.[]'`; "
            f"{_example(data)}"
        )
    for number, text in enumerate(io.StringIO(whole, newline=None), start=1):
        if not text.strip():
            continue
        where = f"line {number}"
        try:
            content_of = json.loads(text, object_pairs_hook=_Object)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"data.captions: {place}, {where} is no JSON ({error}); {_example(data)}") from None
        if not isinstance(content_of, _Object):
            raise RecipeError(
                f"data.captions: {place}, {where} is {reprlib.repr(content_of)}, not an object; {_example(data)}"
            )
        if twice := content_of.twice & {data.file_column, data.caption_column}:
            raise RecipeError(f"data.captions: {place}, {where} has the key {twice.pop()} twice. Remove one of them")
        found |= dict.fromkeys(content_of)
        if data.file_column not in content_of:
            _columns(place, list(content_of), data, where)
        lines.append(_checked(place, where, content_of.get(data.file_column), content_of.get(data.caption_column)))
    if lines:
        _columns(place, list(found), data)
    return lines


class _Object(dict):
    """A JSON object that knows which of its keys are written more than once; the last value counts."""

    def __init__(self, pairs: list[tuple[str, object]]):
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.twice = {name for name in names if names.count(name) > 1} if len(self) < len(names) else set()


def _example(data: DataConfig) -> str:
    example = json.dumps({data.file_column: "a.mp4", data.caption_column: "what is seen"})
    return f"write one object per line, such as {example}"


def _parquet(place: str, system: fs.FileSystem, path: str, data: DataConfig) -> list[CaptionLine]:
    try:
        with system.open_input_file(path) as opened:
            file = pq.ParquetFile(opened)
            _columns(place, file.schema_arrow.names, data)
            names = [data.file_column, data.caption_column]
            table = file.read(columns=names)  # these alone: others may hold the videos themselves
    except (OSError, pa.ArrowException) as error:
        raise RecipeError(
            f"data.captions: {place} can't be read as Parquet ({error}); write it anew{hint(place)}"
        ) from None
    pairs: Iterable[tuple[object, object]] = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    return [_checked(place, f"row {number}", *pair) for number, pair in enumerate(pairs, start=1)]


def _columns(place: str, found: list[str], data: DataConfig, where: str = "") -> tuple[int, int]:
    """Where the columns of file names and captions stand; RecipeError where they don't, or stand twice."""
    wanted = (data.file_column, data.caption_column)
    at = f"{place}, {where}" if where else place
    if missing := [name for name in wanted if name not in found]:
        raise RecipeError(
            f"data.captions: {at} has no column {' and no '.join(missing)}; its columns are {_named(found)}; rename "
            "them, or set data.file_column and data.caption_column to what they are called"
        )
    if twice := [name for name in wanted if found.count(name) > 1]:
        raise RecipeError(f"data.captions: {at} has the column {twice[0]} twice; rename one of them")
    return found.index(wanted[0]), found.index(wanted[1])


def _named(columns: list[str]) -> str:
    """The columns, of many the first."""
    return ", ".join(columns[:MAX_COLUMNS_SHOWN]) + (
        f" and {len(columns) - MAX_COLUMNS_SHOWN} more" if len(columns) > MAX_COLUMNS_SHOWN else ""
    )


def _checked(place: str, where: str, source: object, caption: object) -> CaptionLine:
    """The line of a file name and what stands for its captions: a text, a list of texts, or nothing."""
    texts = [text for text in (caption if isinstance(caption, list) else [caption]) if not _is_none(text)]
    for what, value in (("file name", source), *(("caption", text) for text in texts)):
        if not isinstance(value, str):
            raise RecipeError(
                f"data.captions: {place}, {where}: the {what} is {reprlib.repr(value)}, not text; write a file name "
                "and a caption, or a list of captions"
            )
        if "\0" in value and what == "caption":
            raise RecipeError(f"data.captions: {place}, {where}: the caption {reprlib.repr(value)} has a NUL character")
        if any("\ud800" <= sign <= "\udfff" for sign in value):
            raise RecipeError(f"data.captions: {place}, {where}: the {what} {value!a} has half a character; mend it")
    return _line(where, str(source).strip(), *(str(text).strip() for text in texts))


def _is_none(value: object) -> bool:
    """Whether a value of JSON or Parquet stands for no caption: null, or the NaN that pandas makes of it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _line(where: str, source: str, *captions: str) -> CaptionLine:
    there = tuple(caption for caption in captions if caption and caption not in NO_CAPTION)
    if there:
        return CaptionLine(where, source, there)
    return CaptionLine(where, source, (), "no_caption", f"{where} of the captions file has {no_caption(captions)}")


def no_caption(texts: Iterable[str]) -> str:
    """How a message names texts that hold no caption."""
    word = next(filter(None, texts), "")
    return f"the caption {word!r}, which stands for a missing one" if word else "no caption"
