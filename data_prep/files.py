"""Finds the files that captions name, on local disks and in remote storage, and says why one can't be had.

Files are looked up, not opened. A name may be in another Unicode normal form than the file's: macOS and zip archives
write accents apart from their letters, and both look alike.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from unicodedata import normalize
from urllib.parse import quote, unquote

from pyarrow import fs

LIST_ABOVE = 100
"""A remote folder of which more files are wanted is listed, 1000 names a request; else each is a request of its own."""
REQUESTS = 24  # at a time; pyarrow itself asks for one file after the other


@dataclass(frozen=True, slots=True)
class File:
    """Where a file is, its size and version; or why there is none. Names of one file have the same `identity`."""

    path: str
    size: int = 0
    version: str = ""
    identity: object = None
    missing: str = ""


def root_prefixes(system: fs.FileSystem, root: str, place: str) -> tuple[str, ...]:
    """What absolute names of files under the root may begin with: its path and URI, and its real path where links lead
    there.
    """
    if isinstance(system, fs.LocalFileSystem):
        paths = dict.fromkeys((root, os.path.realpath(root)))
        return (*(f"file://{path}" for path in paths), *paths)
    return (place.rstrip("/"), f"{place.partition('://')[0]}://{root}")


def relative_name(name: str, roots: Iterable[str]) -> str | None:
    """The one spelling of a name relative to the data root, which begins as in `roots`; None where it is outside.

    `./a.mp4`, `b//../a.mp4` and absolute names under the root are `a.mp4`. What leaves the root on Windows is outside.
    """
    if "://" in name or name.startswith("/"):
        name = name if "://" in name else posixpath.normpath(name)
        root = next((root for root in roots if name.startswith(f"{root.rstrip('/')}/")), None)
        if root is None:
            return None
        name = name[len(root.rstrip("/")) :].lstrip("/")
    if not name or "://" in name or "\0" in name or re.match(r"[A-Za-z]:[\\/]", name):
        return None
    for path in {posixpath.normpath(name), posixpath.normpath(name.replace("\\", "/"))}:
        if path == ".." or path.startswith(("/", "../")):
            return None
    return posixpath.normpath(name)


def find_files(system: fs.FileSystem, root: str, paths: Iterable[str]) -> dict[str, File]:
    """The files of paths under the root. Raises OSError where remote storage doesn't answer; a local file that can't
    be looked up is missing.
    """
    paths = sorted(set(paths))
    if isinstance(system, fs.LocalFileSystem):
        files = {path: _local(path) for path in paths}
        return files | _local_near(root, [path for path in paths if files[path].missing == NO_FILE])
    return _remote(system, paths)


NO_FILE = "no such file"


def _local(path: str) -> File:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return File(path, missing=NO_FILE)
    except OSError as error:  # a name that is longer than names may be, for instance
        return File(path, missing=f"can't be looked up: {error}")
    if not stat.S_ISREG(found.st_mode):
        return File(path, missing="a folder, not a file" if stat.S_ISDIR(found.st_mode) else "no regular file")
    version = str(found.st_mtime_ns) if found.st_mtime_ns else ""
    # Size and time too: some network file systems number files by a short hash of their names.
    numbers = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    return File(path, found.st_size, version, numbers if found.st_ino else path)


def _local_near(root: str, missing: list[str]) -> dict[str, File]:
    """Files whose names differ from the missing ones by normal form alone, and hints where they differ otherwise."""
    folders: dict[str, tuple[str | None, str]] = {root: (root, "")}

    def on_disk(folder: str) -> tuple[str | None, str]:
        if folder not in folders:
            if os.path.isdir(folder) or not folder.startswith(root):
                folders[folder] = folder, ""
            else:
                above, hint = on_disk(posixpath.dirname(folder))
                name = posixpath.basename(folder)
                folders[folder] = _chosen(above, name, _listed(above, {name})[name]) if above else (None, hint)
        return folders[folder]

    files: dict[str, File] = {}
    for folder, group in groupby(sorted(missing, key=posixpath.dirname), key=posixpath.dirname):
        paths = list(group)
        there, hint = on_disk(folder)
        near = _listed(there, {posixpath.basename(path) for path in paths}) if there else {}
        for path in paths:
            name = posixpath.basename(path)
            found, hint = _chosen(there, name, near[name]) if there else (None, hint)
            file = _local(found) if found else File(path, missing=NO_FILE + hint)
            files[path] = file
    return files


def _listed(folder: str, wanted: set[str]) -> dict[str, list[str]]:
    """Of each wanted name the entries of a local folder that look like it."""
    try:
        with os.scandir(folder) as entries:
            return near_names((entry.name for entry in entries), wanted)
    except OSError:
        return {name: [] for name in wanted}


def near_names(names: Iterable[str], wanted: set[str]) -> dict[str, list[str]]:
    """Of each wanted name those that differ only in case, normal form, blanks at the ends, or codes such as %20."""
    found: dict[str, list[str]] = {_folded(name): [] for name in wanted}
    for name in names:
        if (key := _folded(name)) in found:
            found[key].append(name)
    return {name: sorted(found[_folded(name)]) for name in wanted}


def _folded(name: str) -> str:
    return normalize("NFC", normalize("NFC", unquote(name)).casefold().strip())


def _chosen(folder: str, name: str, near: list[str]) -> tuple[str | None, str]:
    """The path of the one near name that differs by normal form alone; or None and a hint, for a message."""
    same = [other for other in near if normalize("NFC", other) == normalize("NFC", name)]
    if len(same) == 1:
        return f"{folder.rstrip('/')}/{same[0]}", ""
    return None, f" (there is {' and '.join(map(repr, near))})" if near else ""


def _remote(system: fs.FileSystem, paths: list[str]) -> dict[str, File]:
    files: dict[str, File] = {}
    single: list[str] = []
    for folder, group in groupby(sorted(paths, key=posixpath.dirname), key=posixpath.dirname):
        wanted = list(group)
        if len(wanted) <= LIST_ABOVE:
            single += wanted
            continue
        listed = {info.path: info for info in system.get_file_info(fs.FileSelector(folder, allow_not_found=True))}
        files |= {path: _file(listed[path]) for path in wanted if path in listed}
        missing = {posixpath.basename(path) for path in wanted if path not in listed}
        near = near_names(map(posixpath.basename, listed), missing) if missing else {}
        for name in missing:
            found, hint = _chosen(folder, name, near[name])
            path = f"{folder}/{name}"
            files[path] = _file(listed[found]) if found else File(path, missing=NO_FILE + hint)
    with ThreadPoolExecutor(REQUESTS) as pool:
        found = pool.map(lambda path: _single(system, path), single)
        return files | dict(zip(single, found, strict=True))


def _single(system: fs.FileSystem, path: str) -> File:
    """A remote file by requests of its own: of one that is missing, its other spellings are asked for."""
    file = _file(system.get_file_info(path))
    if file.missing != NO_FILE:
        return file
    for other in {normalize("NFC", path), normalize("NFD", path)} - {path}:
        if not (found := _file(system.get_file_info(other))).missing:
            return found
    for other in {unquote(path), quote(path)} - {path}:
        if not _file(system.get_file_info(other)).missing:
            return File(path, missing=f"{NO_FILE} (there is {posixpath.basename(other)!r})")
    return file


def _file(info: fs.FileInfo) -> File:
    """A remote file. Its version is in whole seconds, since requests and listings differ in fractions."""
    if info.type != fs.FileType.File:
        names = {fs.FileType.Directory: "a folder, not a file", fs.FileType.NotFound: NO_FILE}
        return File(info.path, missing=names.get(info.type, "no regular file"))
    version = str(info.mtime_ns // 10**9 * 10**9) if info.mtime_ns else ""
    return File(info.path, info.size or 0, version, info.path)
