"""The lines of `data.captions`, each with its file below the data root, or the reason why it has none."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import NamedTuple

from pyarrow import fs

from data_prep.captions import CaptionLine, read_captions, read_folder
from data_prep.files import File, FileFinder, relative_name, root_prefixes
from sora_train.data.config import DataConfig
from sora_train.errors import RecipeError, UserError
from sora_train.storage import hint, resolve, storage_errors

LINES, REMOTE_LINES = 2**15, 2**20
"""Lines whose files are looked up together. More on remote storage, where a folder from which many are wanted is
listed."""
PLAIN_NAME = re.compile(r"(?!\.)[^/\\:\0]+(?:/(?!\.)[^/\\:\0]+)*")


class FoundLine(NamedTuple):
    """A line of the captions with its file, or the reason why it has none. `identity` is that of the file, if any."""

    where: str
    source: str
    captions: tuple[str, ...]
    path: str
    size: int
    version: str
    reason: str
    message: str
    identity: str = ""


def found_lines(data: DataConfig) -> Iterator[list[FoundLine]]:
    """Yields the lines of `data.captions` with their files, which are looked up, not opened; some at a time.

    Raises RecipeError if the captions are invalid, or storage can't be reached.
    """
    if not data.captions:
        raise RecipeError(
            f"data.captions is empty; name a CSV with the columns {data.file_column},{data.caption_column}"
        )
    with _errors_name("data.root"):
        yield from _look_up_files(data, _read_lines(data))


def _look_up_files(data: DataConfig, lines: Iterator[CaptionLine]) -> Iterator[list[FoundLine]]:
    lines = chain([next(lines)], lines)  # errors of the captions come first
    place, is_root_known = data_root(data), False
    system, root = resolve(place)
    prefixes, finder = root_prefixes(system, root, place), FileFinder(system, root)
    below, size = f"{root.rstrip('/')}/", LINES if isinstance(system, fs.LocalFileSystem) else REMOTE_LINES
    while batch := list(islice(lines, size)):
        names = [
            line.source if PLAIN_NAME.fullmatch(line.source) else relative_name(line.source, prefixes) for line in batch
        ]
        paths = [
            (root if name == "." else below + name) if name and not line.reason else ""
            for line, name in zip(batch, names, strict=True)
        ]
        with storage_errors(place, "reached"):
            files = finder.find(filter(None, paths))
        has_none = files and not is_root_known and all(file.missing for file in files.values())
        if has_none and _look_up(place)[0] != fs.FileType.Directory:
            raise RecipeError(f"data.root: there is no folder {place}; name the folder of the files{hint(place)}")
        is_root_known |= bool(files)
        yield [
            _with_file(line, name, files.get(path), root) for line, name, path in zip(batch, names, paths, strict=True)
        ]


def _with_file(line: CaptionLine, name: str | None, file: File | None, root: str) -> FoundLine:
    """The line with its relative name and its file; each may be None."""
    if file and name and file.size and not (file.missing or line.reason):
        return FoundLine(line.where, name, line.captions, file.path, file.size, file.version, "", "", file.identity)
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
    identity = file.identity if file and not file.missing else ""
    return FoundLine(line.where, source, line.captions, path, size, version, reason, message, identity)


def _read_lines(data: DataConfig) -> Iterator[CaptionLine]:
    place = data.captions
    with _errors_name("data.captions"):
        kind, system, path = _look_up(place)
        if kind == fs.FileType.Directory:
            yield from read_folder(place, system, path)
            return
        if kind != fs.FileType.File:
            raise RecipeError(f"data.captions: {place} is not a file; set data.captions to yours{hint(place)}")
        yield from read_captions(data, system, path)


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


def _look_up(place: str) -> tuple[fs.FileType, fs.FileSystem, str]:
    system, path = resolve(place)
    with storage_errors(place, "reached"):
        return system.get_file_info(path).type, system, path


@contextmanager
def _errors_name(key: str) -> Iterator[None]:
    """Puts the recipe's key in front of the message of a UserError."""
    try:
        yield
    except RecipeError:
        raise
    except UserError as error:
        raise RecipeError(f"{key}: {error}") from None
