"""Storage: a local path or a URI such as `s3://bucket/folder`, always as a string; atomic writes.

A file's name is appended to its folder's URI, so a URI has no query string. For an S3 store that is not Amazon's, set
the environment variable AWS_ENDPOINT_URL, which pyarrow reads.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

import pyarrow as pa
from pyarrow import fs

from sora_train.errors import Code, UserError, one_line

OBJECT_STORES = ("s3", "gcs", "abfs")
"""Filesystems, by pyarrow's names, where an upload is atomic and a rename is a copy."""
JOB_DIR_PARENT = "working_dir_files"
"""The folder that Ray unpacks the upload of `ray job submit --working-dir` into."""
DRAFT_PREFIX = ".unfinished-"
"""Prefix of the names of files that are being written."""
GCS_RETRY_S = 60  # pyarrow's default is a quarter of an hour


def resolve(place: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a path or URI, and the path on it; a local path is made absolute.

    Takes strings, because `Path("s3://b/x")` becomes `s3:/b/x`. Raises UserError for a URI that is not valid or a
    bucket that can't be reached.
    """
    scheme, mark, rest = place.partition("://")
    if not mark:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(place))
    if "?" in rest:
        raise UserError(
            f"{place} has a query string, but file names are appended to this URI. Leave out "
            f"{place[place.index('?') :]}; for another S3 store set the environment variable AWS_ENDPOINT_URL",
            code="storage",
        )
    authority, slash, path = rest.partition("/")
    path = path.rstrip("/")  # otherwise an object would have two names
    path = quote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", path), safe="/:@!$&'()*+,;=~%")  # people write names unquoted
    limit = f"?retry_limit_seconds={GCS_RETRY_S}" if scheme.lower() in ("gs", "gcs") else ""
    with storage_errors(place, "reached"):
        return fs.FileSystem.from_uri(f"{scheme}://{authority}{slash}{path}{limit}")


def reject_job_dir(key: str, place: str) -> None:
    """Raises UserError if a recipe's key names a folder that is deleted with a submitted job's working folder."""
    if "://" in place or os.path.isabs(os.path.expanduser(place)) or JOB_DIR_PARENT not in Path.cwd().parts:
        return
    raise UserError(
        f"{key} is {place}, which is in the submitted job's working folder and is deleted with it. Give an absolute "
        f"path on storage that every node sees, such as --{key} /shared/{Path(place).name}",
        code="paths",
    )


@contextmanager
def storage_errors(place: str, what: str, system: fs.FileSystem | None = None) -> Iterator[None]:
    """Turns errors of the storage into a UserError: `place` can't be `what` (read, written, ...), the cause, a hint.

    `place` may be a path on `system`.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        if system and "://" not in place and not isinstance(system, fs.LocalFileSystem):
            place = f"{system.type_name}://{place}"
        said = one_line(str(error)).replace(place, hide_password(place))
        code: Code = "not_writable" if what == "written" else "storage"
        remedy = ". Free space there or make it writable" if what == "written" and "://" not in place else hint(place)
        raise UserError(f"{hide_password(place)} can't be {what}: {said}{remedy}", code=code) from None


def hide_password(place: str) -> str:
    """A URI without the `user:password@` in front of its host or bucket, for messages."""
    return re.sub(r"^(\w+://)[^/@]*:[^/]*@", r"\1", place)


def hint(place: str) -> str:
    """What to check if a URI can't be reached, to be appended to a message; empty for a local path."""
    scheme = place.partition("://")[0].lower() if "://" in place else ""
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        return (
            ". Check the bucket's name, the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile) "
            "and the network; AWS_ENDPOINT_URL, the environment variable for stores other than Amazon's, is "
            + (_host(endpoint) if endpoint else "not set")
        )
    if scheme in ("gs", "gcs"):
        return ". Check the bucket's name, the credentials (GOOGLE_APPLICATION_CREDENTIALS) and the network"
    return ""


def _host(endpoint: str) -> str:
    """Scheme, host and port of an endpoint; the rest may be secret."""
    parts = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}".removeprefix("://")


def read_bytes(system: fs.FileSystem, path: str) -> bytes | None:
    """A file's content, decompressed if its name ends in `.gz` or similar; None if it does not exist.

    Raises UserError if it can't be read.
    """
    with storage_errors(path, "read", system):
        if system.get_file_info(path).type != fs.FileType.File:
            return None
        with system.open_input_stream(path) as file:
            return file.read()


def atomic_write(system: fs.FileSystem, path: str, content: bytes | memoryview) -> None:
    """Writes a file, on any storage, completely or not at all. Raises UserError if it can't be written."""
    with atomic_output(system, path) as file:
        file.write(content)


@contextmanager
def atomic_output(system: fs.FileSystem, path: str) -> Iterator[BinaryIO]:
    """Yields a file to write to. It appears under `path` after the block, and not at all if the block raises.

    An object store gets the content as a whole, from memory; elsewhere a draft is written and renamed. Raises
    UserError if it can't be written.
    """
    with storage_errors(path, "written", system):
        if system.type_name in OBJECT_STORES:
            buffer = io.BytesIO()
            yield buffer
            # Closing the stream early would leave half an object, so Ctrl-C must not interrupt the upload. It
            # interrupts only the main thread, and leaving the pool waits for the other one.
            with ThreadPoolExecutor(1) as pool:
                pool.submit(_write, system, path, buffer.getbuffer()).result()
            return
        folder, _, name = path.rpartition("/")
        system.create_dir(folder, recursive=True)
        if isinstance(system, fs.LocalFileSystem):
            with atomic_file(Path(path)) as draft, _open(system, str(draft)) as file:
                yield file
            return
        draft = f"{folder}/{draft_name(name)}"
        with _open(system, draft) as file:
            yield file
        system.move(draft, path)


def atomic_write_text(path: Path, text: str) -> None:
    """Replaces a small local text file. A kill leaves the old one. Raises OSError if it can't be written."""
    with atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a draft's name to write to. After the block the draft is synced to disk and renamed to `path`.

    If the block raises, the draft is removed. Two writers of one file never share a draft. The file gets the mode of
    any new file of this process (umask), even if a library creates it for the owner alone, as safetensors does.
    """
    draft = path.with_name(draft_name(path.name))
    try:
        draft.touch(exist_ok=False)
        mode = draft.stat().st_mode
        yield draft
        _set_mode(draft, mode)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())  # otherwise a power cut may leave an empty file
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def follow_umask(folder: Path) -> None:
    """Gives all files in a new folder the mode of any new file of this process."""
    with atomic_file(folder / "mode") as draft:
        mode = draft.stat().st_mode
    (folder / "mode").unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            _set_mode(path, mode)


def _set_mode(path: Path, mode: int) -> None:
    if path.stat().st_mode != mode:
        with contextlib.suppress(OSError):  # a file system without modes
            path.chmod(mode & 0o7777)


def draft_name(name: str) -> str:
    """A draft's name: unique, and recognisable if a killed process leaves it behind."""
    return f"{DRAFT_PREFIX}{uuid.uuid4().hex[:12]}-{name}"[:255]


def _write(system: fs.FileSystem, path: str, content: memoryview) -> None:
    with _open(system, path) as file:
        file.write(content)


def _open(system: fs.FileSystem, path: str) -> Any:
    return system.open_output_stream(path, compression=None)


def broken_link(path: Path) -> str:
    """Names the broken symbolic link in a path, if any; otherwise an empty string."""
    for place in (path, *path.parents):
        if place.is_symlink() and not os.path.exists(place):
            return f"{place} is a symbolic link to {os.readlink(place)}, which does not exist"
    return ""


def why_not_writable(folder: Path) -> str:
    """Why no file can be created in a folder, which need not exist; empty if one can. Leaves nothing behind."""
    above = folder
    try:
        above = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryFile(dir=above) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        return broken_link(folder) or f"{error.strerror or error} ({above})"
    return broken_link(folder)


def free_bytes(path: str) -> int:
    """Free bytes on the disk of a local path, which need not exist yet."""
    place = Path(path).absolute()
    return shutil.disk_usage(next(above for above in (place, *place.parents) if above.is_dir())).free


def in_bytes(count: int | float) -> str:
    """`1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"
