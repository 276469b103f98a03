"""Places that may be remote: a local path or a URI such as `s3://bucket/folder`, always as a string.

Folders and files are named by what is put behind a place, so that a place has no query string: another S3 store than
Amazon's is set by the environment variable AWS_ENDPOINT_URL, which pyarrow reads.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlsplit

import pyarrow as pa
from pyarrow import fs

from sora_train.errors import UserError

OBJECT_STORES = ("s3", "gcs", "abfs")
"""Filesystems, by pyarrow's names, where an upload is there whole or not at all, and a rename is a copy."""
JOBS_FOLDER = "working_dir_files"
"""Where Ray unpacks what `ray job submit --working-dir` uploaded."""
UNFINISHED = ".unfinished-"
"""How the names of files begin that are being written."""
GCS_PATIENCE_S = 60  # else a store that can't be reached is tried for a quarter of an hour


def resolve(place: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a place and its path there; a local path is made absolute.

    Strings and not `Path`: `Path("s3://b/x")` becomes `s3:/b/x`. Raises UserError where the place is none, or its
    bucket can't be reached.
    """
    scheme, mark, rest = place.partition("://")
    if not mark:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(place))
    if "?" in rest:
        raise UserError(
            f"{place} has a query string, and shards and files are named by what is put behind a place: leave out "
            f"{place[place.index('?') :]}, and set the environment variable AWS_ENDPOINT_URL for another S3 store"
        )
    authority, slash, path = rest.partition("/")
    path = path.rstrip("/")  # or an object's name had two
    path = quote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", path), safe="/:@!$&'()*+,;=~%")  # as people write names
    limit = f"?retry_limit_seconds={GCS_PATIENCE_S}" if scheme.lower() in ("gs", "gcs") else ""
    with named(place, "reached"):
        return fs.FileSystem.from_uri(f"{scheme}://{authority}{slash}{path}{limit}")


def lasting(key: str, place: str) -> None:
    """Raises UserError where the place that a recipe's key names would go with a submitted job's own working folder."""
    if "://" in place or os.path.isabs(os.path.expanduser(place)) or JOBS_FOLDER not in Path.cwd().parts:
        return
    raise UserError(
        f"{key} is {place}, which in a submitted job lies in the job's own working folder and is removed with it; give "
        f"an absolute path on storage that every node sees, such as --{key} /shared/{Path(place).name}"
    )


@contextmanager
def named(place: str, what: str, system: fs.FileSystem | None = None) -> Iterator[None]:
    """Turns what storage raises within into one UserError: the place can't be `what`, why, and what to look at.

    The place may be a path on the system.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        if system and "://" not in place and not isinstance(system, fs.LocalFileSystem):
            place = f"{system.type_name}://{place}"
        said = " ".join(str(error).split()).replace(place, without_password(place))
        raise UserError(f"{without_password(place)} can't be {what}: {said}{remedy(place)}") from None


def without_password(place: str) -> str:
    """A place as messages show it: `user:password@` in front of a host or bucket is left out."""
    return re.sub(r"^(\w+://)[^/@]*:[^/]*@", r"\1", place)


def remedy(place: str) -> str:
    """What to look at where a place can't be reached, to be put behind a message; empty for a local one."""
    scheme = place.partition("://")[0].lower() if "://" in place else ""
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        return (
            "; look at the bucket's name, the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile) "
            "and the network; the environment variable AWS_ENDPOINT_URL, which names another store than Amazon's, is "
            + (_host(endpoint) if endpoint else "not set")
        )
    if scheme in ("gs", "gcs"):
        return "; look at the bucket's name, the credentials (GOOGLE_APPLICATION_CREDENTIALS) and the network"
    return ""


def _host(endpoint: str) -> str:
    """Scheme, host and port of an endpoint: the rest may be a secret."""
    parts = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}".removeprefix("://")


def read_bytes(system: fs.FileSystem, path: str) -> bytes | None:
    """The whole of a file, unpacked where its name ends in `.gz` or the like, or None where there is none.

    Raises UserError where it can't be read.
    """
    with named(path, "read", system):
        if system.get_file_info(path).type != fs.FileType.File:
            return None
        with system.open_input_stream(path) as file:
            return file.read()


def as_text(content: bytes) -> str:
    """UTF-8, or what a byte order mark says (Excel and Windows write UTF-16). Raises ValueError, whose message is the
    predicate of a sentence about the file: what is wrong, in which line, what to do.
    """
    marks = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
             (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
    encoding = next((name for mark, name in marks if content.startswith(mark)), "utf-8")
    if content.startswith(b"PK\3\4"):
        raise ValueError("is a zip archive or an Excel workbook; save it as CSV in UTF-8")
    if encoding == "utf-8" and content[:2].count(0) == 1:
        raise ValueError("is UTF-16 without a byte order mark; save it as UTF-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = len((content[: error.start] + b"x").splitlines())
        where = f"in line {line} (byte 0x{content[error.start]:02x})" if encoding.startswith("utf-8") else ""
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(f"is not {name} text {where}".rstrip() + "; save it as UTF-8") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"has a NUL byte in line {line}, so it is damaged; write it again")
    return text.removeprefix("\ufeff")  # some writers put two


def write_whole(system: fs.FileSystem, path: str, content: bytes) -> None:
    """Writes a file that is there whole or not at all. Raises UserError where it can't be written.

    On an object store an upload is so by itself; elsewhere the file is written under another name, brought to the disk
    (or a power cut leaves it empty), and renamed.
    """
    with named(path, "written", system):
        if system.type_name in OBJECT_STORES:
            # A stream that is closed before its time leaves half an object, so that Ctrl-C must not come between: it
            # interrupts the main thread only, and leaving the pool waits for the other.
            with ThreadPoolExecutor(1) as pool:
                pool.submit(_write, system, path, content).result()
            return
        folder, _, name = path.rpartition("/")
        system.create_dir(folder, recursive=True)
        if isinstance(system, fs.LocalFileSystem):
            with replacing(Path(path)) as draft:
                draft.write_bytes(content)
            return
        unfinished = f"{folder}/{unfinished_name(name)}"
        _write(system, unfinished, content)
        system.move(unfinished, path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the name of a draft to write. After the block it is on the disk under `path`, or removed if that failed.

    Two writers of one file never share a draft. The file's mode is that of any new file of this process (umask), also
    where a library makes its own file for the owner alone, as safetensors does.
    """
    draft = path.with_name(unfinished_name(path.name))
    try:
        draft.touch(exist_ok=False)
        mode = draft.stat().st_mode
        yield draft
        _set_mode(draft, mode)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def follow_umask(folder: Path) -> None:
    """Gives all files of a new folder the mode of any new file of this process."""
    with replacing(folder / "mode") as draft:
        mode = draft.stat().st_mode
    (folder / "mode").unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            _set_mode(path, mode)


def _set_mode(path: Path, mode: int) -> None:
    if path.stat().st_mode != mode:
        with contextlib.suppress(OSError):  # a file system without modes
            path.chmod(mode & 0o7777)


def unfinished_name(name: str) -> str:
    """A draft's name, unique and recognisable: a killed process leaves it behind."""
    return f"{UNFINISHED}{uuid.uuid4().hex[:12]}-{name}"[:255]


def _write(system: fs.FileSystem, path: str, content: bytes) -> None:
    with system.open_output_stream(path, compression=None) as file:
        file.write(content)


def broken_link(path: Path) -> str:
    """The symbolic link of a path that leads nowhere, in words; an empty string where there is none."""
    for place in (path, *path.parents):
        if place.is_symlink() and not os.path.exists(place):
            return f"{place} is a symbolic link to {os.readlink(place)}, which does not exist"
    return ""


def free_bytes(path: str) -> int:
    """Free bytes of the disk of a local path that need not exist yet."""
    place = Path(path).absolute()
    return shutil.disk_usage(next(above for above in (place, *place.parents) if above.is_dir())).free


def in_bytes(count: int | float) -> str:
    """`1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"
