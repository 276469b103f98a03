"""CSV to rows: each with a stable id, the place of its file, and, where there is none to have, the reason.

The header is the earlier trainer's, `video_file_name,prompt`; other columns are ignored. Names are relative to the data
root and may not leave it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import posixpath
from dataclasses import dataclass, replace

from pyarrow import fs

from data_prep.buckets import Bucket
from sora_train.errors import RecipeError
from sora_train.places import read_bytes, resolve
from sora_train.recipe import DataConfig

COLUMNS = ("video_file_name", "prompt")


@dataclass(frozen=True)
class Row:
    """A clip that is asked for. `path` is on the data root's filesystem; `reason` is set where it can't be had."""

    sample_id: str
    source: str
    captions: tuple[str, ...]
    start_s: float
    end_s: float
    path: str = ""
    size: int = 0
    version: str = ""
    reason: str = ""
    message: str = ""


def read_rows(data: DataConfig, bucket: Bucket) -> list[Row]:
    """The rows of `data.captions`, their files looked up, not opened. Raises RecipeError where the CSV is no good."""
    system, root = resolve(data_root(data))
    rows: list[Row] = []
    seen: set[str] = set()
    for line, (source, caption) in enumerate(read_csv(data.captions), start=2):
        row = Row(sample_id(source, 0.0, bucket.seconds, (caption,)), source, (caption,), 0.0, bucket.seconds)
        if not caption:
            row = replace(row, reason="no_caption", message=f"line {line} of the captions file has no prompt")
        elif row.sample_id in seen:
            row = replace(row, reason="duplicate_row", message=f"line {line} repeats an earlier file and prompt")
        elif (path := inside(root, source)) is None:
            row = replace(row, reason="outside_root", message=f"line {line}: {source!r} leaves the data root {root}")
        else:
            row = replace(row, path=path)
        seen.add(row.sample_id)
        rows.append(row)
    if not rows:
        raise RecipeError(f"data.captions: {data.captions} has a header but no rows; add a line per clip")
    return look_up(system, rows)


def data_root(data: DataConfig) -> str:
    """`data.root`, or else the folder that the captions file lies in."""
    return data.root or (posixpath.dirname(data.captions) or ".")


def read_csv(place: str) -> list[tuple[str, str]]:
    """File name and prompt of each line, stripped. RecipeError names the file and what is wrong with it."""
    if not place:
        raise RecipeError("data.captions is empty; name a CSV with the columns video_file_name,prompt")
    try:
        system, path = resolve(place)
        content = read_bytes(system, path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"data.captions: {place} can't be read: {error}") from None
    if content is None:
        raise RecipeError(f"data.captions: {place} is no file; set data.captions to your CSV")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"data.captions: {place} is not UTF-8 text ({error}); save it as UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    found = [name.strip() for name in reader.fieldnames or ()]
    if not found:
        raise RecipeError(f"data.captions: {place} is empty; its first line must be {','.join(COLUMNS)}")
    if missing := [name for name in COLUMNS if name not in found]:
        raise RecipeError(
            f"data.captions: {place} has no column {' and no '.join(missing)}; its columns are {', '.join(found)}; "
            f"the first line must name {' and '.join(COLUMNS)}"
        )
    reader.fieldnames = found
    try:
        return [((line[COLUMNS[0]] or "").strip(), (line[COLUMNS[1]] or "").strip()) for line in reader]
    except csv.Error as error:
        raise RecipeError(f"data.captions: {place}, line {reader.line_num}: {error}") from None


def sample_id(source: str, start_s: float, end_s: float, captions: tuple[str, ...]) -> str:
    """Hex hash of source as named, span and captions: known before a byte of video is read, the same everywhere."""
    content = json.dumps([source, start_s, end_s, list(captions)], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def inside(root: str, name: str) -> str | None:
    """The path of a name under the root, or None where the name would leave it."""
    path = posixpath.normpath(name)
    if not name or "://" in name or "\0" in name or path == ".." or path.startswith(("/", "../")):
        return None
    return posixpath.join(root, path)


def look_up(system: fs.FileSystem, rows: list[Row], at_once: int = 1000) -> list[Row]:
    """Rows with size and version (modification time) of their files, or with the reason why there is no file."""
    paths = sorted({row.path for row in rows if not row.reason})
    infos = {}
    for start in range(0, len(paths), at_once):
        part = paths[start : start + at_once]
        infos |= dict(zip(part, system.get_file_info(part), strict=True))
    return [row if row.reason else _with_file(row, infos[row.path]) for row in rows]


def _with_file(row: Row, info: fs.FileInfo) -> Row:
    if info.type != fs.FileType.File:
        what = "a folder, not a file" if info.type == fs.FileType.Directory else "no such file"
        return replace(row, reason="missing_file", message=f"{what}: {row.path}")
    if not info.size:
        return replace(row, reason="empty_file", message="the file has 0 bytes")
    return replace(row, size=info.size, version=str(info.mtime_ns or ""))
