"""Sources: the rows of `data.captions`, each with a stable id and its file, or the reason why there is none.

A file is one source, however captions spell its name: its clips have ids of one name, and are on one side of the
held-out split. Names may not leave the data root; links below it are followed wherever they lead.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pyarrow import fs

from data_prep.captions import CaptionLine, read_captions, read_folder
from data_prep.files import File, find_files, relative_name, root_prefixes
from sora_train.data.config import DataConfig
from sora_train.errors import RecipeError, UserError
from sora_train.storage import hint, resolve, storage_errors


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A source with its captions. `path` is on the data root's filesystem; an unusable source has a `reason`."""

    row_id: str
    """Hash of source and captions."""
    source: str
    captions: tuple[str, ...]
    path: str = ""
    size: int = 0
    version: str = ""
    """Modification time in nanoseconds; of remote files in whole seconds, since requests and listings differ."""
    reason: str = ""
    message: str = ""


def read_rows(data: DataConfig) -> list[SourceRow]:
    """The sources that `data.captions` names. Their files are looked up, not opened.

    Raises RecipeError if the captions are invalid, or storage can't be reached.
    """
    if not data.captions:
        raise RecipeError(
            f"data.captions is empty; name a CSV with the columns {data.file_column},{data.caption_column}"
        )
    with _errors_name("data.captions"):
        lines = _read_lines(data)
    with _errors_name("data.root"):
        return _to_rows(data, lines)


@contextmanager
def _errors_name(key: str) -> Iterator[None]:
    """Puts the recipe's key in front of the message of a UserError."""
    try:
        yield
    except RecipeError:
        raise
    except UserError as error:
        raise RecipeError(f"{key}: {error}") from None


def _read_lines(data: DataConfig) -> list[CaptionLine]:
    place = data.captions
    kind, system, path = _look_up(place)
    if kind == fs.FileType.Directory:
        return read_folder(place, system, path)
    if kind != fs.FileType.File:
        raise RecipeError(f"data.captions: {place} is not a file; set data.captions to yours{hint(place)}")
    return read_captions(data, system, path)


def _look_up(place: str) -> tuple[fs.FileType, fs.FileSystem, str]:
    system, path = resolve(place)
    with storage_errors(place, "reached"):
        return system.get_file_info(path).type, system, path


def _to_rows(data: DataConfig, lines: list[CaptionLine]) -> list[SourceRow]:
    place = data_root(data)
    system, root = resolve(place)
    prefixes = root_prefixes(system, root, place)
    names = [relative_name(line.source, prefixes) for line in lines]
    paths = [
        posixpath.normpath(posixpath.join(root, name)) if name and not line.reason else ""
        for line, name in zip(lines, names, strict=True)
    ]
    with storage_errors(place, "reached"):
        files = find_files(system, root, filter(None, paths))
    if files and all(file.missing for file in files.values()) and _look_up(place)[0] != fs.FileType.Directory:
        raise RecipeError(f"data.root: there is no folder {place}; name the folder of the files{hint(place)}")
    first_names: dict[object, str] = {}
    first_lines: dict[str, str] = {}
    rows: list[SourceRow] = []
    for line, name, path in zip(lines, names, paths, strict=True):
        row = _to_row(line, name, files.get(path), root)
        if row.path and not files[path].missing:  # of several names of a file, the first one counts
            source = first_names.setdefault(files[path].identity, row.source)
            row = replace(row, source=source, row_id=row_id(source, row.captions))
        first = first_lines.setdefault(row.row_id, line.where)
        if not line.reason and first != line.where:
            message = f"{line.where} repeats {first}: the same file and captions"
            row = replace(row, path="", reason="duplicate_row", message=message)
        rows.append(row)
    return rows


def _to_row(line: CaptionLine, name: str | None, file: File | None, root: str) -> SourceRow:
    """The row of a line with this relative name, or none, and file, or none."""
    reason, message, source = line.reason, line.message, name or line.source
    if not reason:
        if not line.source:
            reason, message = "outside_root", f"{line.where} names no file"
        elif file is None:
            reason = "outside_root"
            message = f"{line.where}: {source!r} is outside the data root {root}; name files relative to it"
        elif file.missing:
            advice = "; write / between folders" if "\\" in source else ""
            reason, message = "missing_file", f"{file.missing}: {file.path}{advice}"
        elif not file.size:
            reason, message = "empty_file", "the file has 0 bytes"
    path, size, version = (file.path, file.size, file.version) if file else ("", 0, "")
    return SourceRow(row_id(source, line.captions), source, line.captions, path, size, version, reason, message)


def data_root(data: DataConfig) -> str:
    """`data.root`, or else the folder of the captions.

    Raises RecipeError if `data.captions` is a folder and `data.root` another one, UserError if it can't be reached.
    """
    if data.captions:
        kind, _, path = _look_up(data.captions)
        if kind == fs.FileType.Directory:
            if data.root and resolve(data.root)[1] != path:
                raise RecipeError(
                    f"data.root is {data.root}, but data.captions is the folder {data.captions}, whose media are next "
                    "to their .txt; leave data.root out"
                )
            return data.captions
    return data.root or (posixpath.dirname(data.captions) or ".")


def row_id(source: str, captions: tuple[str, ...]) -> str:
    """Hex hash that identifies a source with its captions; never equal to a clip's `sample_id`."""
    return _hash([source, list(captions)])


def sample_id(source: str, start_s: float, end_s: float, captions: tuple[str, ...]) -> str:
    """Hex hash of source name, span and captions: the same everywhere, and known before the video is read."""
    return _hash([source, start_s, end_s, list(captions)])


def _hash(parts: list) -> str:
    content = json.dumps(parts, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]
