"""Sources: each with a stable id, the place of its file, and, where there is none to have, the reason.

A file is one source, however captions spell its name: its clips have ids of one name, and are on one side of the
held-out split. Names may not leave the data root; links below it are followed, wherever they lead.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pyarrow import fs

from data_prep.captions import CaptionLine, read_captions
from data_prep.files import find_files, relative_name, root_prefixes
from data_prep.folder import read_folder
from sora_train.data.config import DataConfig
from sora_train.errors import RecipeError, UserError
from sora_train.storage import hint, resolve, storage_errors


@dataclass(frozen=True, slots=True)
class SourceRow:
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


def read_rows(data: DataConfig) -> list[SourceRow]:
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


def _lines(data: DataConfig) -> list[CaptionLine]:
    place = data.captions
    kind, system, path = _kind(place)
    if kind == fs.FileType.Directory:
        return read_folder(place, system, path)
    if kind != fs.FileType.File:
        raise RecipeError(f"data.captions: {place} is no file; set data.captions to yours{hint(place)}")
    return read_captions(data, system, path)


def _kind(place: str) -> tuple[fs.FileType, fs.FileSystem, str]:
    system, path = resolve(place)
    with storage_errors(place, "reached"):
        return system.get_file_info(path).type, system, path


def _rows(data: DataConfig, lines: list[CaptionLine]) -> list[SourceRow]:
    place = data_root(data)
    system, root = resolve(place)
    roots = root_prefixes(system, root, place)
    rows = [_row(line, root, roots) for line in lines]
    with storage_errors(place, "reached"):
        rows = _looked_up(system, root, rows)
    if {row.reason for row in rows if row.path} == {"missing_file"} and _kind(place)[0] != fs.FileType.Directory:
        raise RecipeError(f"data.root: there is no folder {place}; name the one that the files lie in{hint(place)}")
    seen: dict[str, str] = {}
    for i, (line, row) in enumerate(zip(lines, rows, strict=True)):
        first = seen.setdefault(row.row_id, line.where)
        if not line.reason and first != line.where:
            message = f"{line.where} repeats {first}: the same file and captions"
            rows[i] = replace(row, path="", reason="duplicate_row", message=message)
    return rows


def _row(line: CaptionLine, root: str, roots: tuple[str, ...]) -> SourceRow:
    """The row of a line, not looked up yet."""
    name = relative_name(line.source, roots)
    row = SourceRow(row_id(name or line.source, line.captions), name or line.source, line.captions)
    if line.reason:
        return replace(row, reason=line.reason, message=line.message)
    if not line.source:
        return replace(row, reason="outside_root", message=f"{line.where} names no file")
    if name is None:
        message = f"{line.where}: {line.source!r} is outside the data root {root}; name files relative to it"
        return replace(row, reason="outside_root", message=message)
    return replace(row, path=posixpath.normpath(posixpath.join(root, name)))


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


def _looked_up(system: fs.FileSystem, root: str, rows: list[SourceRow]) -> list[SourceRow]:
    """Rows with their files, or with the reason why there is no file. Of several names of a file the first counts."""
    files = find_files(system, root, (row.path for row in rows if not row.reason))
    names: dict[object, str] = {}
    found: list[SourceRow] = []
    for row in rows:
        if not row.reason:
            file = files[row.path]
            if file.missing:
                hint = "; write / between folders" if "\\" in row.source else ""
                row = replace(row, reason="missing_file", message=f"{file.missing}: {row.path}{hint}")
            else:
                name = names.setdefault(file.identity, row.source)
                row = replace(row, row_id=row_id(name, row.captions), source=name, path=file.path)
                if file.size:
                    row = replace(row, size=file.size, version=file.version)
                else:
                    row = replace(row, reason="empty_file", message="the file has 0 bytes")
        found.append(row)
    return found
