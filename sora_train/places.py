"""Places that may be remote: a local path or a URI such as `s3://bucket/folder`, always as a string."""

from __future__ import annotations

import os

from pyarrow import fs


def resolve(place: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a place and its path there; a local path is made absolute.

    Strings and not `Path`: `Path("s3://b/x")` becomes `s3:/b/x`.
    """
    if "://" in place:
        return fs.FileSystem.from_uri(place)
    return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(place))


def read_bytes(system: fs.FileSystem, path: str) -> bytes | None:
    """The whole of a file, or None where there is none."""
    if system.get_file_info(path).type != fs.FileType.File:
        return None
    with system.open_input_stream(path) as file:
        return file.read()


def write_whole(system: fs.FileSystem, path: str, content: bytes) -> None:
    """Writes a file that is there whole or not at all: under another name first, then renamed."""
    folder, _, name = path.rpartition("/")
    system.create_dir(folder, recursive=True)
    unfinished = f"{folder}/.unfinished-{name}"
    with system.open_output_stream(unfinished) as file:
        file.write(content)
    system.move(unfinished, path)
