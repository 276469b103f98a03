"""Streams file names and captions: from CSV, JSON lines or Parquet, or from a folder with a `.txt` next to each video.

Other columns are ignored. In JSON lines and Parquet a caption may be a list of captions.
"""

from __future__ import annotations

import json
import math
import os
import posixpath
import reprlib
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from data_prep.csv_records import SEPARATORS, Records
from sora_train.data.config import DataConfig
from sora_train.errors import RecipeError, UserError
from sora_train.log import log
from sora_train.storage import hint, storage_errors
from sora_train.text_files import decode_text, decoded_lines

JSON_LINES, PARQUET = (".jsonl", ".ndjson", ".json"), (".parquet", ".pq")
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
NO_CAPTION = frozenset(("nan", "NaN", "NAN", "null", "NULL", "None", "<NA>", "NA", "N/A", "n/a", "#N/A", "\\N"))
"""What pandas, SQL and Excel write for a missing value. Such a caption counts as missing."""
MAX_COLUMNS_SHOWN = 12  # in a message
IMAGES = "avif bmp heic heif jpeg jpg png tif tiff webp"
VIDEOS = "3g2 3gp apng asf avi f4v flv gif m2ts m4v mkv mov mp4 mpe mpeg mpg mts mxf ogg ogv ts vob webm wmv y4m"
MEDIA = frozenset(f".{name}" for name in f"{IMAGES} {VIDEOS}".split())
READERS, FOLDER_BATCH = 16, 4096  # threads that read `.txt` files, and how many of these they read at a time
CHUNK, PARQUET_ROWS = 2**20, 2**15  # bytes or rows that are read at a time


class CaptionLine(NamedTuple):
    """A file name with its captions. `where` names the line in messages; an unusable line has a `reason`."""

    where: str
    source: str
    captions: tuple[str, ...]
    reason: str = ""
    message: str = ""


def read_captions(data: DataConfig, system: fs.FileSystem, path: str) -> Iterator[CaptionLine]:
    """Yields the lines of the file `data.captions`, in order. A line without a caption is `no_caption`.

    Raises RecipeError for an invalid file or line, UserError if the file can't be read.
    """
    stem, ending = posixpath.splitext(path.lower())
    ending = posixpath.splitext(stem)[1] if ending in COMPRESSED else ending
    if ending in PARQUET:
        lines = _read_parquet(data, system, path)
    else:
        text = _read_text(data, system, path)
        lines = (_read_json_lines if ending in JSON_LINES else _read_csv)(data, text)
    line = None
    for line in lines:
        yield line
    if line is None:
        raise RecipeError(f"data.captions: {data.captions} has no rows; add one per clip")


def _read_text(data: DataConfig, system: fs.FileSystem, path: str) -> Iterator[str]:
    def chunks() -> Iterator[bytes]:
        with storage_errors(path, "read", system), system.open_input_stream(path) as file:
            while chunk := file.read(CHUNK):
                yield chunk

    try:
        yield from decoded_lines(chunks())
    except UserError:
        raise
    except ValueError as error:
        raise RecipeError(f"data.captions: {data.captions} {error}") from None


def _read_csv(data: DataConfig, text: Iterator[str]) -> Iterator[CaptionLine]:
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
    for number, cells in records:
        source, caption = (cells[column] if column < len(cells) else "" for column in columns)
        line = _line(f"line {number}", source, caption)
        if line.reason and len(cells) < len(records.header):
            counts = f"line {number} has {len(cells)} cells of the header's {len(records.header)}"
            line = line._replace(message=f"{counts}, and no caption")
        yield line


def _read_json_lines(data: DataConfig, text: Iterator[str]) -> Iterator[CaptionLine]:
    place = data.captions
    example = json.dumps({data.file_column: "a.mp4", data.caption_column: "a caption"})
    advice = f"write one object per line, such as {example}"
    found: dict[str, None] = {}  # keys in the order of their first use
    is_first = True
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        if is_first and line.lstrip().startswith("["):
            raise RecipeError(
                f"data.captions: {place} is one JSON array, not JSON lines. Convert it, for example by `jq -c '.[]'`; "
                f"{advice}"
            )
        is_first, where = False, f"line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"data.captions: {place}, {where} is not JSON ({error}); {advice}") from None
        if not isinstance(row, dict):
            raise RecipeError(f"data.captions: {place}, {where} is {reprlib.repr(row)}, not an object; {advice}")
        found |= dict.fromkeys(row)
        if data.file_column not in row:
            _find_columns(data, list(row), where)
        yield _checked_line(place, where, row.get(data.file_column), row.get(data.caption_column))
    if found:
        _find_columns(data, list(found))


def _read_parquet(data: DataConfig, system: fs.FileSystem, path: str) -> Iterator[CaptionLine]:
    place, names, number = data.captions, [data.file_column, data.caption_column], 0
    try:
        with system.open_input_file(path) as opened:
            file = pq.ParquetFile(opened, pre_buffer=False)
            _find_columns(data, file.schema_arrow.names)
            # Not the other columns, which may hold the videos themselves.
            for batch in file.iter_batches(PARQUET_ROWS, columns=names, use_threads=False):
                pairs = zip(*(batch.column(name).to_pylist() for name in names), strict=True)
                for source, caption in pairs:
                    number += 1
                    if type(source) is type(caption) is str and source.isprintable() and caption.isprintable():
                        yield _line(f"row {number}", source.strip(), caption.strip())  # the usual case
                    else:
                        yield _checked_line(place, f"row {number}", source, caption)
    except (OSError, pa.ArrowException) as error:
        raise RecipeError(
            f"data.captions: {place} can't be read as Parquet ({error}); write it again{hint(place)}"
        ) from None


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
    if len(captions) == 1 and captions[0][:1].isalnum() and captions[0] not in NO_CAPTION:
        return CaptionLine(where, source, captions)  # the usual case, since there may be millions
    found = tuple(caption for caption in captions if is_visible(caption) and caption not in NO_CAPTION)
    if found:
        return CaptionLine(where, source, found)
    word = next(filter(None, captions), "")
    why = f"the caption {word!r}, which stands for a missing one" if word else "no caption"
    return CaptionLine(where, source, (), "no_caption", f"{where} has {why}")


def is_visible(text: str) -> bool:
    """Whether a text has a character besides white space, control and format characters (zero-width ones)."""
    return any(not sign.isspace() and unicodedata.category(sign) not in ("Cc", "Cf") for sign in text)


def read_folder(place: str, system: fs.FileSystem, path: str) -> Iterator[CaptionLine]:
    """Yields a line for every video and image below a folder, by name, with the caption from the `.txt` next to it.

    Hidden files are skipped. A file without a text is `no_caption`; texts without a file are counted in a printed line.
    Raises RecipeError if there is no video or image, UserError if the folder can't be read.
    """
    unused: list[str] = []
    is_local, found = isinstance(system, fs.LocalFileSystem), False
    files = _walk(path, unused) if is_local else _pairs(_list(system, path), unused)
    with storage_errors(place, "read", system), ThreadPoolExecutor(READERS) as pool:
        while media := list(islice(files, FOLDER_BATCH)):
            yield from pool.map(lambda pair: _media_line(system, path, *pair), media)
            found = True
    if not found:
        raise RecipeError(
            f"data.captions: {place} is a folder without a video or image; name one with media and a .txt of the same "
            "name next to each, or a CSV, JSONL or Parquet file"
        )
    if unused:
        log.info(f"{place}: {len(unused)} .txt without a video or image, such as {_printable(min(unused))}")


def _pairs(names: Iterable[str], unused: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields the media among the names, sorted, each with the texts of its stem. Other texts are added to `unused`."""
    names = sorted(names)
    texts: dict[str, list[str]] = {}  # by stem in one Unicode normal form, since macOS and zip use another
    for name in names:
        if name.lower().endswith(".txt"):
            texts.setdefault(unicodedata.normalize("NFC", name[:-4]), []).append(name)
    stems: set[str] = set()
    for name in names:
        stem, ending = posixpath.splitext(name)
        if ending.lower() in MEDIA:
            stems.add(stem := unicodedata.normalize("NFC", stem))
            yield name, texts.get(stem, [])
    unused += [found[0] for stem, found in texts.items() if stem not in stems]


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
            return _line(texts[0], name, decode_text(file.read()).strip())._replace(where=name)
    except ValueError as error:
        return CaptionLine(name, name, (), "no_caption", f"{texts[0]} {error}")
    except OSError as error:
        return CaptionLine(name, name, (), "fetch_failed", f"its caption {texts[0]} can't be read: {error}")


def _printable(name: str) -> str:
    """The name with a replacement character for every byte that is not UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _walk(
    root: str, unused: list[str], below: str = "", parents: tuple[str, ...] = ()
) -> Iterator[tuple[str, list[str]]]:
    """`_pairs` of a local folder and those below it, sorted by name. At most a folder's names are in memory at a time.

    pyarrow would loop on a circle of links, and fail on names that are not UTF-8.
    """
    real = os.path.realpath(os.path.join(root, below))
    if real in parents:
        return
    with os.scandir(real) as entries:
        names = [f"{below}{entry.name}{'/' * entry.is_dir()}" for entry in entries if not entry.name.startswith(".")]
    media = dict(_pairs((name for name in names if not name.endswith("/")), unused))
    for name in sorted(names):
        if name.endswith("/"):
            yield from _walk(root, unused, name, (*parents, real))
        elif name in media:
            yield name, media[name]


def _list(system: fs.FileSystem, root: str) -> Iterator[str]:
    """Names below a remote folder."""
    for info in system.get_file_info(fs.FileSelector(root, recursive=True)):
        name = posixpath.relpath(info.path, root)
        if info.type == fs.FileType.File and not any(part.startswith(".") for part in name.split("/")):
            yield name
