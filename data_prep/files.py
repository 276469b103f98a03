"""Looks up the files that captions name, on local disks and remote storage, and says why one is missing.

Files are not opened. A name may differ from the file's in its Unicode normal form, since macOS and zip archives write
accents as separate characters; any other difference, such as case, becomes a hint in the message.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain, groupby
from typing import NamedTuple
from unicodedata import normalize
from urllib.parse import unquote

from pyarrow import fs

LIST_ABOVE = 100
"""A remote folder from which more files are wanted is listed, at 1000 names per request; else one request per file."""
REQUESTS = 24  # in parallel; pyarrow itself looks up one file after the other
FIRST_FILES, SLOW_STAT_S = 128, 5e-5
"""The disk is slow if looking up so many files takes longer than this for each; with a warm local disk it is 5e-6."""
NO_FILE = "no such file"


class File(NamedTuple):
    """Where a file is, its size and version; or why it is missing. Names of one file have the same `identity`."""

    path: str
    size: int = 0
    version: str = ""
    identity: str = ""
    missing: str = ""


def root_prefixes(system: fs.FileSystem, root: str, place: str) -> tuple[str, ...]:
    """What absolute names of files below the root may begin with: its path, real path and URI."""
    if isinstance(system, fs.LocalFileSystem):
        paths = dict.fromkeys((root, os.path.realpath(root)))
        return (*(f"file://{path}" for path in paths), *paths)
    return (place.rstrip("/"), f"{place.partition('://')[0]}://{root}")


def relative_name(name: str, prefixes: Iterable[str]) -> str | None:
    """The one spelling of a name, relative to the data root; None if it is outside, on Linux or on Windows.

    `./a.mp4`, `b//../a.mp4` and absolute names that begin with one of the prefixes are `a.mp4`.
    """
    if "://" in name or name.startswith("/"):
        name = name if "://" in name else posixpath.normpath(name)
        prefix = next((prefix for prefix in prefixes if name.startswith(f"{prefix.rstrip('/')}/")), None)
        if prefix is None:
            return None
        name = name[len(prefix.rstrip("/")) :].lstrip("/")
    if not name or "://" in name or "\0" in name or re.match(r"[A-Za-z]:[\\/]", name):
        return None
    for path in {posixpath.normpath(name), posixpath.normpath(name.replace("\\", "/"))}:
        if path == ".." or path.startswith(("/", "../")):
            return None
    return posixpath.normpath(name)


class FileFinder:
    """Looks up files below a data root. It caches the listings of folders for later calls."""

    def __init__(self, system: fs.FileSystem, root: str):
        self.system, self.root = system, root
        self.is_local = isinstance(system, fs.LocalFileSystem)
        self._listing = lru_cache(maxsize=1)(self._list_folder)
        self._names_in = lru_cache(maxsize=4)(self._folded_names)
        self._spelling_on_disk = lru_cache(maxsize=1024)(self._find_spelling)

    def find(self, paths: Iterable[str]) -> dict[str, File]:
        """The file of each path below the root. Raises OSError if remote storage does not answer."""
        paths = sorted(set(paths))
        files = find_local(paths) if self.is_local else self._find_remote(paths)
        return files | self._find_similar([path for path in paths if files[path].missing == NO_FILE])

    def _find_similar(self, missing: list[str]) -> dict[str, File]:
        """Files whose names differ from the missing ones in normal form only; hints for other differences."""
        files: dict[str, File] = {}
        for path in missing:
            found, hint = self._spelling_on_disk(path)
            if found:
                files[path] = _local_file(found) if self.is_local else _remote_file(self.system.get_file_info(found))
            else:
                files[path] = File(path, missing=NO_FILE + hint)
        return files

    def _folded_names(self, folder: str) -> dict[str, list[str]]:
        try:
            names = (
                os.listdir(folder)
                if self.is_local
                else [info.base_name for info in self.system.get_file_info(fs.FileSelector(folder))]
            )
        except OSError:
            return {}
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(_folded(name), []).append(name)
        return found

    def _find_spelling(self, path: str) -> tuple[str | None, str]:
        if self.is_local and (os.path.lexists(path) or not path.startswith(f"{self.root.rstrip('/')}/")):
            return path, ""
        above = posixpath.dirname(path)
        folder, hint = self._spelling_on_disk(above) if self.is_local else (above, "")
        return _choose(folder, posixpath.basename(path), self._names_in(folder)) if folder else (None, hint)

    def _find_remote(self, paths: list[str]) -> dict[str, File]:
        single: list[str] = []
        files: dict[str, File] = {}
        for folder, group in groupby(sorted(paths, key=posixpath.dirname), key=posixpath.dirname):
            wanted = list(group)
            if len(wanted) <= LIST_ABOVE:
                single += wanted
                continue
            listed = self._listing(folder)
            files |= {path: listed.get(path) or File(path, missing=NO_FILE) for path in wanted}
        with ThreadPoolExecutor(REQUESTS) as pool:
            found = pool.map(lambda path: _remote_file(self.system.get_file_info(path)), single)
            return files | dict(zip(single, found, strict=True))

    def _list_folder(self, folder: str) -> dict[str, File]:
        infos = self.system.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        return {info.path: _remote_file(info) for info in infos}


def find_local(paths: list[str]) -> dict[str, File]:
    """The file of each path. In threads if the disk is slow, as over a network."""
    began = time.monotonic()
    files = [_local_file(path) for path in paths[:FIRST_FILES]]
    rest = paths[FIRST_FILES:]
    if time.monotonic() - began < SLOW_STAT_S * len(files) or not rest:
        return dict(zip(paths, chain(files, map(_local_file, rest)), strict=True))
    with ThreadPoolExecutor(REQUESTS) as pool:
        found = pool.map(lambda start: [_local_file(path) for path in rest[start : start + FIRST_FILES]],
                         range(0, len(rest), FIRST_FILES))  # fmt: skip
        return dict(zip(paths, chain(files, *found), strict=True))


def _local_file(path: str) -> File:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return File(path, missing=NO_FILE)
    except OSError as error:  # such as a name that is too long
        return File(path, missing=f"can't be looked up: {error}")
    if not stat.S_ISREG(found.st_mode):
        return File(path, missing="a folder, not a file" if stat.S_ISDIR(found.st_mode) else "not a regular file")
    version = str(found.st_mtime_ns) if found.st_mtime_ns else ""
    # Size and time too, since some network file systems number files by a short hash of their names.
    identity = f"{found.st_dev} {found.st_ino} {found.st_size} {version}" if found.st_ino else path
    return File(path, found.st_size, version, identity)


def _folded(name: str) -> str:
    """The same for names that differ in case, normal form, blanks at the ends, or codes such as %20."""
    return normalize("NFC", normalize("NFC", unquote(name)).casefold().strip())


def _choose(folder: str, name: str, names: dict[str, list[str]]) -> tuple[str | None, str]:
    """The path of the one file whose name differs in normal form only; or None and a hint for the message."""
    similar = sorted(names.get(_folded(name), []))
    same = [other for other in similar if normalize("NFC", other) == normalize("NFC", name)]
    if len(same) == 1:
        return f"{folder.rstrip('/')}/{same[0]}", ""
    return None, f" (there is {' and '.join(map(repr, similar))})" if similar else ""


def _remote_file(info: fs.FileInfo) -> File:
    """A remote file. Its version is in whole seconds, since requests and listings differ in fractions."""
    if info.type != fs.FileType.File:
        names = {fs.FileType.Directory: "a folder, not a file", fs.FileType.NotFound: NO_FILE}
        return File(info.path, missing=names.get(info.type, "not a regular file"))
    version = str(info.mtime_ns // 10**9 * 10**9) if info.mtime_ns else ""
    return File(info.path, info.size or 0, version, info.path)
