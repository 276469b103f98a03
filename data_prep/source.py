"""Sources: each with a stable id, the place of its file, and, where there is none to have, the reason.

Names are relative to the data root and may not leave it. Files are looked up, not opened.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby

from pyarrow import fs

from data_prep.captions import Line, read_captions
from data_prep.folder import read_folder
from sora_train.data.config import DataConfig
from sora_train.errors import RecipeError, UserError
from sora_train.places import named, remedy, resolve

LIST_ABOVE = 100
"""A remote folder of which more files are wanted is listed, 1000 names a request; else each is a request of its own."""
REQUESTS = 24  # at a time; pyarrow itself asks for one file after the other


@dataclass(frozen=True, slots=True)
class Row:
    """A source with its captions. `path` is on the data root's filesystem; `reason` is set where it can't be had."""

    row_id: str
    """Names the source as a whole."""
    source: str
    captions: tuple[str, ...]
    path: str = ""
    size: int = 0
    version: str = ""
    """Modification time in nanoseconds; whole seconds of remote files, of which requests and listings differ."""
    reason: str = ""
    message: str = ""


def read_rows(data: DataConfig) -> list[Row]:
    """The sources that `data.captions` names, their files looked up, not opened.

    Raises RecipeError where the captions are no good, or a place can't be reached.
    """
    if not data.captions:
        raise RecipeError(
            f"data.captions is empty; name a CSV with the columns {data.file_column},{data.caption_column}"
        )
    with _of_key("data.captions"):
        lines = _lines(data)
    with _of_key("data.root"):
        return _rows(data, lines)


@contextmanager
def _of_key(key: str) -> Iterator[None]:
    """Where a place can't be reached within, RecipeError says of which key it is."""
    try:
        yield
    except RecipeError:
        raise
    except UserError as error:
        raise RecipeError(f"{key}: {error}") from None


def _lines(data: DataConfig) -> list[Line]:
    place = data.captions
    kind, system, path = _kind(place)
    if kind == fs.FileType.Directory:
        return read_folder(place, system, path)
    if kind != fs.FileType.File:
        raise RecipeError(f"data.captions: {place} is no file; set data.captions to yours{remedy(place)}")
    return read_captions(data, system, path)


def _kind(place: str) -> tuple[fs.FileType, fs.FileSystem, str]:
    system, path = resolve(place)
    with named(place, "reached"):
        return system.get_file_info(path).type, system, path


def _rows(data: DataConfig, lines: list[Line]) -> list[Row]:
    place = data_root(data)
    system, root = resolve(place)
    seen: set[str] = set()
    rows = [_row(line, root, seen) for line in lines]
    with named(place, "reached"):
        rows = look_up(system, rows)
    if {row.reason for row in rows if row.path} == {"missing_file"} and _kind(place)[0] != fs.FileType.Directory:
        raise RecipeError(f"data.root: there is no folder {place}; name the one that the files lie in{remedy(place)}")
    return rows


def _row(line: Line, root: str, seen: set[str]) -> Row:
    """The row of a line, not looked up yet. Adds its id to those that were seen."""
    row = Row(row_id(line.source, line.captions), line.source, line.captions)
    is_new = row.row_id not in seen
    seen.add(row.row_id)
    if line.reason:
        return replace(row, reason=line.reason, message=line.message)
    if not is_new:
        return replace(row, reason="duplicate_row", message=f"{line.where} repeats an earlier file and its captions")
    if not line.source:
        return replace(row, reason="outside_root", message=f"{line.where} names no file")
    path = inside(root, line.source)
    if path is None:
        message = f"{line.where}: {line.source!r} leaves the data root {root}; name files relative to it"
        return replace(row, reason="outside_root", message=message)
    return replace(row, path=path)


def data_root(data: DataConfig) -> str:
    """`data.root`, or else the folder that the captions lie in: theirs, or the one that they are.

    Raises RecipeError where `data.captions` is a folder and `data.root` another, UserError where it can't be reached.
    """
    if data.captions:
        kind, _, path = _kind(data.captions)
        if kind == fs.FileType.Directory:
            if data.root and resolve(data.root)[1] != path:
                raise RecipeError(
                    f"data.root {data.root} is not data.captions {data.captions}, a folder, whose media lie beside "
                    "their .txt: leave data.root out"
                )
            return data.captions
    return data.root or (posixpath.dirname(data.captions) or ".")


def row_id(source: str, captions: tuple[str, ...]) -> str:
    """Hex hash that names a source as a whole; never that of a clip."""
    return _hash([source, list(captions)])


def sample_id(source: str, start_s: float, end_s: float, captions: tuple[str, ...]) -> str:
    """Hex hash of source as named, span and captions: known before a byte of video is read, the same everywhere."""
    return _hash([source, start_s, end_s, list(captions)])


def _hash(parts: list) -> str:
    content = json.dumps(parts, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def inside(root: str, name: str) -> str | None:
    """The path of a name under the root, or None where the name would leave it, here or on Windows."""
    if not name or "://" in name or "\0" in name or re.match(r"[A-Za-z]:[\\/]", name):
        return None
    for path in {posixpath.normpath(name), posixpath.normpath(name.replace("\\", "/"))}:
        if path == ".." or path.startswith(("/", "../")):
            return None
    return posixpath.normpath(posixpath.join(root, name))


def look_up(system: fs.FileSystem, rows: list[Row]) -> list[Row]:
    """Rows with size and version of their files, or with the reason why there is no file.

    Raises OSError where remote storage doesn't answer; a local file that can't be looked up is `missing_file`.
    """
    paths = sorted({row.path for row in rows if not row.reason})
    if isinstance(system, fs.LocalFileSystem):
        infos = {path: _local(system, path) for path in paths}
    else:
        infos = _remote(system, paths)
    return [row if row.reason else _with_file(row, infos[row.path]) for row in rows]


@dataclass(frozen=True, slots=True)
class File:
    """Size and version of a file, or why there is none."""

    size: int = 0
    version: str = ""
    missing: str = ""


def _local(system: fs.FileSystem, path: str) -> File:
    try:
        return _file(system.get_file_info(path), 1)
    except OSError as error:  # a name that is longer than names may be, for instance
        return File(missing=f"can't be looked up: {error}")


def _remote(system: fs.FileSystem, paths: list[str]) -> dict[str, File]:
    files: dict[str, File] = {}
    single: list[str] = []
    for folder, names in groupby(sorted(paths, key=posixpath.dirname), key=posixpath.dirname):
        wanted = list(names)
        if len(wanted) <= LIST_ABOVE:
            single += wanted
            continue
        files |= dict.fromkeys(wanted, File(missing="no such file"))
        listed = system.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        files |= {info.path: _file(info, 10**9) for info in listed if info.path in files}
    with ThreadPoolExecutor(REQUESTS) as pool:
        found = pool.map(lambda path: _file(system.get_file_info(path), 10**9), single)
        return files | dict(zip(single, found, strict=True))


def _file(info: fs.FileInfo, grain_ns: int) -> File:
    if info.type != fs.FileType.File:
        names = {fs.FileType.Directory: "a folder, not a file", fs.FileType.NotFound: "no such file"}
        what = names.get(info.type, "no regular file")
        return File(missing=what)
    return File(info.size or 0, str(info.mtime_ns // grain_ns * grain_ns) if info.mtime_ns else "")


def _with_file(row: Row, file: File) -> Row:
    if file.missing:
        hint = "; write / between folders" if "\\" in row.source else ""
        return replace(row, reason="missing_file", message=f"{file.missing}: {row.path}{hint}")
    if not file.size:
        return replace(row, reason="empty_file", message="the file has 0 bytes")
    return replace(row, size=file.size, version=file.version)
