"""Reads file names and captions: from CSV, JSON lines or Parquet, or from a folder with a `.txt` next to each video.

Other columns are ignored. In JSON lines and Parquet a caption may be a list of captions.
"""

from __future__ import annotations

import io
import json
import math
import os
import posixpath
import reprlib
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from data_prep.csv_records import SEPARATORS, Records
from sora_train.data.config import DataConfig
from sora_train.errors import RecipeError
from sora_train.log import log
from sora_train.storage import decode_text, hint, read_bytes, storage_errors

JSON_LINES, PARQUET = (".jsonl", ".ndjson", ".json"), (".parquet", ".pq")
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
NO_CAPTION = frozenset(("nan", "NaN", "NAN", "null", "NULL", "None", "<NA>", "NA", "N/A", "n/a", "#N/A", "\\N"))
"""What pandas, SQL and Excel write for a missing value. Such a caption counts as missing."""
MAX_COLUMNS_SHOWN = 12  # in a message
IMAGES = "avif bmp heic heif jpeg jpg png tif tiff webp"
VIDEOS = "3g2 3gp apng asf avi f4v flv gif m2ts m4v mkv mov mp4 mpe mpeg mpg mts mxf ogg ogv ts vob webm wmv y4m"
MEDIA = frozenset(f".{name}" for name in f"{IMAGES} {VIDEOS}".split())
READERS = 16  # threads that read `.txt` files


@dataclass(frozen=True, slots=True)
class CaptionLine:
    """A file name with its captions. `where` names the line in messages; an unusable line has a `reason`."""

    where: str
    source: str
    captions: tuple[str, ...]
    reason: str = ""
    message: str = ""


def read_captions(data: DataConfig, system: fs.FileSystem, path: str) -> list[CaptionLine]:
    """The lines of the file `data.captions`, in order. A line without a caption is `no_caption`.

    Raises RecipeError for an invalid file or line, UserError if the file can't be read.
    """
    place = data.captions
    stem, ending = posixpath.splitext(path.lower())
    ending = posixpath.splitext(stem)[1] if ending in COMPRESSED else ending
    if ending in PARQUET:
        lines = _read_parquet(data, system, path)
    else:
        try:
            text = decode_text(read_bytes(system, path) or b"")
        except ValueError as error:
            raise RecipeError(f"data.captions: {place} {error}") from None
        lines = (_read_json_lines if ending in JSON_LINES else _read_csv)(data, text)
    if not lines:
        raise RecipeError(f"data.captions: {place} has no rows; add one per clip")
    return lines


def _read_csv(data: DataConfig, text: str) -> list[CaptionLine]:
    place, wanted = data.captions, (data.file_column, data.caption_column)
    records = Records(place, text, wanted)
    if not any(records.header):
        raise RecipeError(f"data.captions: {place} is empty; its first line must be {','.join(wanted)}")
    if not set(wanted) & set(records.header):
        raise RecipeError(
            f"data.captions: {place} has no column {wanted[0]} and no {wanted[1]}; the header, its first line, is "
            f"{_shortened(records.header)}. Add a header, or set data.file_column and data.caption_column to its names"
        )
    columns = _find_columns(data, records.header)
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


def _read_json_lines(data: DataConfig, text: str) -> list[CaptionLine]:
    place = data.captions
    example = json.dumps({data.file_column: "a.mp4", data.caption_column: "a caption"})
    advice = f"write one object per line, such as {example}"
    if text.lstrip().startswith("["):
        raise RecipeError(
            f"data.captions: {place} is one JSON array, not JSON lines. Convert it, for example by `jq -c '.[]'`; "
            f"{advice}"
        )
    lines: list[CaptionLine] = []
    found: dict[str, None] = {}  # keys in the order of their first use
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"data.captions: {place}, {where} is not JSON ({error}); {advice}") from None
        if not isinstance(row, dict):
            raise RecipeError(f"data.captions: {place}, {where} is {reprlib.repr(row)}, not an object; {advice}")
        found |= dict.fromkeys(row)
        if data.file_column not in row:
            _find_columns(data, list(row), where)
        lines.append(_checked_line(place, where, row.get(data.file_column), row.get(data.caption_column)))
    if lines:
        _find_columns(data, list(found))
    return lines


def _read_parquet(data: DataConfig, system: fs.FileSystem, path: str) -> list[CaptionLine]:
    place, names = data.captions, [data.file_column, data.caption_column]
    try:
        with system.open_input_file(path) as opened:
            file = pq.ParquetFile(opened)
            _find_columns(data, file.schema_arrow.names)
            table = file.read(columns=names)  # not the others, which may hold the videos themselves
    except (OSError, pa.ArrowException) as error:
        raise RecipeError(
            f"data.captions: {place} can't be read as Parquet ({error}); write it again{hint(place)}"
        ) from None
    pairs = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    return [_checked_line(place, f"row {number}", *pair) for number, pair in enumerate(pairs, start=1)]


def _find_columns(data: DataConfig, found: list[str], where: str = "") -> tuple[int, int]:
    """The indices of the columns of file names and captions. Raises RecipeError if one is missing or repeated."""
    wanted = (data.file_column, data.caption_column)
    at = f"{data.captions}, {where}" if where else data.captions
    if missing := [name for name in wanted if name not in found]:
        raise RecipeError(
            f"data.captions: {at} has no column {' and no '.join(missing)}; its columns are {_shortened(found)}; "
            "rename them, or set data.file_column and data.caption_column to their names"
        )
    if repeated := [name for name in wanted if found.count(name) > 1]:
        raise RecipeError(f"data.captions: {at} has the column {repeated[0]} twice; rename one of them")
    return found.index(wanted[0]), found.index(wanted[1])


def _shortened(columns: list[str]) -> str:
    more = len(columns) - MAX_COLUMNS_SHOWN
    return ", ".join(columns[:MAX_COLUMNS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _checked_line(place: str, where: str, source: object, caption: object) -> CaptionLine:
    """A line from values of JSON or Parquet: the caption may be a text, a list of texts, null, or pandas' NaN."""
    texts = [text for text in (caption if isinstance(caption, list) else [caption])
             if not (text is None or (isinstance(text, float) and math.isnan(text)))]  # fmt: skip
    for what, value in (("file name", source), *(("caption", text) for text in texts)):
        at = f"data.captions: {place}, {where}: the {what}"
        if not isinstance(value, str):
            raise RecipeError(
                f"{at} is {reprlib.repr(value)}, not text; write a file name and a caption, or a list of captions"
            )
        if "\0" in value and what == "caption":
            raise RecipeError(f"{at} {reprlib.repr(value)} has a NUL character; remove it")
        if any("\ud800" <= sign <= "\udfff" for sign in value):
            raise RecipeError(f"{at} {value!a} has half of a surrogate pair; fix that character")
    return _line(where, str(source).strip(), *(str(text).strip() for text in texts))


def _line(where: str, source: str, *captions: str) -> CaptionLine:
    found = tuple(caption for caption in captions if is_visible(caption) and caption not in NO_CAPTION)
    word = next(filter(None, captions), "")
    why = f"the caption {word!r}, which stands for a missing one" if word else "no caption"
    if found:
        return CaptionLine(where, source, found)
    return CaptionLine(where, source, (), "no_caption", f"{where} has {why}")


def is_visible(text: str) -> bool:
    """Whether a text has a character besides white space, control and format characters (zero-width ones)."""
    return any(not sign.isspace() and unicodedata.category(sign) not in ("Cc", "Cf") for sign in text)


def read_folder(place: str, system: fs.FileSystem, path: str) -> list[CaptionLine]:
    """A line for every video and image below a folder, by name, with the caption from the `.txt` next to it.

    Hidden files are skipped. A file without a text is `no_caption`; texts without a file are counted in a printed line.
    Raises RecipeError if there is no video or image, UserError if the folder can't be read.
    """
    with storage_errors(place, "read", system):
        names = sorted(_walk(path) if isinstance(system, fs.LocalFileSystem) else _list(system, path))
    media = [name for name in names if posixpath.splitext(name)[1].lower() in MEDIA]
    texts: dict[str, list[str]] = {}  # by stem in one Unicode normal form, since macOS and zip use another
    for name in names:
        if name.lower().endswith(".txt"):
            texts.setdefault(unicodedata.normalize("NFC", name[:-4]), []).append(name)
    stems = [unicodedata.normalize("NFC", posixpath.splitext(name)[0]) for name in media]
    if not media:
        raise RecipeError(
            f"data.captions: {place} is a folder without a video or image; name one with media and a .txt of the same "
            "name next to each, or a CSV, JSONL or Parquet file"
        )
    if unused := sorted(set(texts) - set(stems)):
        example = _printable(texts[unused[0]][0])
        log.info(f"{place}: {len(unused)} .txt without a video or image, such as {example}")
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda name, stem: _media_line(system, path, name, texts.get(stem, [])), media, stems))


def _media_line(system: fs.FileSystem, path: str, name: str, texts: list[str]) -> CaptionLine:
    """The line of a file, whose caption is the whole text next to it."""
    if (printable := _printable(name)) != name:
        return CaptionLine(printable, printable, (), "missing_file", "the file's name is not UTF-8; rename it")
    why = f"there is no {posixpath.basename(posixpath.splitext(name)[0])}.txt next to it"
    if len(texts) > 1:
        why = f"{' and '.join(texts)} are both next to it; remove one"
    if len(texts) != 1:
        return CaptionLine(name, name, (), "no_caption", why)
    try:
        with system.open_input_stream(f"{path}/{texts[0]}", compression=None) as file:
            return replace(_line(texts[0], name, decode_text(file.read()).strip()), where=name)
    except ValueError as error:
        return CaptionLine(name, name, (), "no_caption", f"{texts[0]} {error}")
    except OSError as error:
        return CaptionLine(name, name, (), "fetch_failed", f"its caption {texts[0]} can't be read: {error}")


def _printable(name: str) -> str:
    """The name with a replacement character for every byte that is not UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _walk(root: str, below: str = "", parents: tuple[str, ...] = ()) -> Iterator[str]:
    """Names below a local folder. pyarrow would loop on a circle of links, and fail on names that are not UTF-8."""
    real = os.path.realpath(os.path.join(root, below))
    if real in parents:
        return
    with os.scandir(real) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(root, f"{below}{entry.name}/", (*parents, real))
            else:
                yield f"{below}{entry.name}"


def _list(system: fs.FileSystem, root: str) -> Iterator[str]:
    """Names below a remote folder."""
    for info in system.get_file_info(fs.FileSelector(root, recursive=True)):
        name = posixpath.relpath(info.path, root)
        if info.type == fs.FileType.File and not any(part.startswith(".") for part in name.split("/")):
            yield name
