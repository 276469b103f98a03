"""Locks on shared folders, by files that only one process can create, and on object stores.

`flock` is local to a node, or does nothing, on some cluster file systems (Lustre without `-o flock`, some NFS).
Exclusive creation (`O_EXCL`) works on all of them. Object stores have neither: see `OwnerObject`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow.fs import FileSystem, LocalFileSystem

from sora_train.errors import UserError
from sora_train.log import log
from sora_train.storage import atomic_write, broken_link, hide_password, resolve, storage_errors

OWNER_FILE = ".owner"
"""Name of the file or object in a locked folder that describes the owner process."""
HEARTBEAT_S, STALE_S = 5.0, 30.0
"""An owner rewrites its file every `HEARTBEAT_S`. An owner on another machine is dead after `STALE_S` without one."""
SETTLE_S = 2.0
"""In an object store an owner reads its object back after this time."""
ABANDONED_S, POLL_S = 10.0, 0.02
"""A file lock is held for milliseconds; one that stays for `ABANDONED_S` belongs to a killed process."""
INSTEAD = {
    "sora prep": "give this one another folder (data.output)",
    "sora train": "give this one another name (--name)",
}
"""What to do instead of waiting, for each command that takes a `run_lock`."""


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Excludes other threads, processes and nodes from a file for a short block. Raises OSError if it can't."""
    lock, token = path.with_name(f".{path.name}.lock"), uuid.uuid4().hex
    seen, waited = "", 0.0
    while not _create(lock, token):
        if (found := _read(lock)) != seen:
            seen, waited = found, 0.0
        if waited > ABANDONED_S:
            _remove(lock, found)
        time.sleep(POLL_S)
        waited += POLL_S  # not wall-clock time: a stalled file system must not count as an abandoned lock
    began = time.monotonic()
    try:
        yield
    finally:
        if time.monotonic() - began < ABANDONED_S or _read(lock) == token:
            lock.unlink(missing_ok=True)


class OwnerFile:
    """The owner's file in a folder. Only one process can create it."""

    def __init__(self, path: Path):
        self.path, self.folder = path, str(path.parent)

    def create(self, content: str) -> bool:
        """Creates it; False if it exists."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return _create(self.path, content)

    def read(self) -> str | None:
        """Its content, None if it does not exist."""
        return _read(self.path) or ("" if self.path.exists() else None)

    def rewrite(self, content: str) -> None:
        """Replaces the content by one of the same length."""
        with self.path.open("r+", encoding="utf-8") as file:
            file.write(content)

    def remove(self, content: str) -> None:
        """Removes it if it still has this content."""
        _remove(self.path, content)


class OwnerObject:
    """The owner's object in an object store, where pyarrow can't create one exclusively. Methods as of `OwnerFile`.

    A process that finds none writes its own, waits `SETTLE_S` and reads it back: the last of several writers wins.
    If a request takes longer than that, two processes may hold the lock, until the next heartbeat of one of them finds
    the other's object and ends its process. Reads must show the last write, as those of Amazon, Google and Azure do.
    """

    def __init__(self, system: FileSystem, path: str, folder: str):
        self.system, self.path, self.folder = system, path, hide_password(folder)

    def create(self, content: str) -> bool:
        if self.read() is not None:
            return False
        self.rewrite(content)
        time.sleep(SETTLE_S)
        return self.read() == content

    def read(self) -> str | None:
        with storage_errors(self.folder, "read"):
            try:
                with self.system.open_input_stream(self.path, compression=None) as file:
                    return file.read().decode("utf-8", "replace")
            except FileNotFoundError:
                return None

    def rewrite(self, content: str) -> None:
        atomic_write(self.system, self.path, content.encode())

    def remove(self, content: str) -> None:
        if self.read() == content:
            with storage_errors(self.folder, "written"):
                self.system.delete_file(self.path)


@contextmanager
def run_lock(folder: str, command: str) -> Iterator[None]:
    """Keeps every other `sora prep` or `sora train`, on any node, out of a folder, which may be a URI.

    Raises UserError if another process owns the folder; the message names it. A killed process loses its lock: at once
    on the same machine, after `STALE_S` on another.
    """
    system, path = resolve(folder)
    if isinstance(system, LocalFileSystem):
        file = OwnerFile(Path(path) / OWNER_FILE)
    else:
        file = OwnerObject(system, f"{path}/{OWNER_FILE}", folder)
    me = {
        "command": command,
        "process": os.getpid(),
        "host": socket.gethostname(),
        "machine": _machine(),
        "started": _started(os.getpid()),
        "token": uuid.uuid4().hex,
    }
    try:
        _acquire(file, me)
    except OSError as error:
        why = broken_link(Path(path)) or error.strerror or error
        raise UserError(
            f"{file.path} can't be written: {why}. Free space there or make it writable", code="not_writable"
        ) from None
    ended = threading.Event()
    heartbeat = threading.Thread(target=_heartbeat, args=(file, me, ended), name="run lock", daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        ended.set()
        heartbeat.join()
        with contextlib.suppress(OSError, UserError):  # the next owner removes what stays
            found = file.read() or ""
            if _parse(found).get("token") == me["token"]:
                file.remove(found)


def _acquire(file: OwnerFile | OwnerObject, me: dict) -> None:
    """Creates the owner's file once no living process has it."""
    seen, waited = "", 0.0
    while not file.create(_line(me, 0)):
        found = file.read()
        if found is None:
            continue  # the owner has just released it
        owner = _parse(found)
        other = (
            f"another `{owner.get('command', 'sora')}` is running in {file.folder} "
            f"(process {owner.get('process', '?')} on {owner.get('host', 'an unknown host')})"
        )
        here = owner.get("machine") == me["machine"]
        alive = here and owner["started"] == _started(owner["process"])
        if alive or (waited and found and found != seen):
            raise UserError(f"{other}. Wait until it ends, stop it, or {INSTEAD[me['command']]}", code="locked")
        if here or waited >= STALE_S:
            file.remove(found)
            continue
        if waited == (0 if owner else 1):  # an empty file is just being written
            log.info(f"{other}, or was killed. Waiting {STALE_S:.0f} s for its heartbeat")
        seen, waited = found, waited + 1
        time.sleep(1)


def _heartbeat(file: OwnerFile | OwnerObject, me: dict, ended: threading.Event) -> None:
    """Rewrites the owner's file periodically. Ends this process if another process has taken the folder over."""
    count = 0
    while not ended.wait(HEARTBEAT_S):
        count += 1
        with contextlib.suppress(OSError, UserError):  # a full or stalled disk; the next heartbeat may succeed
            content = file.read()
            found = _parse(content or "")
            if found and found.get("token") != me["token"]:
                other = f"process {found.get('process')} on {found.get('host')}"
                with contextlib.suppress(OSError):
                    why = f"{other} took over {file.folder} after {STALE_S:.0f} s without a heartbeat from this process"
                    log.warning(f"{why}. This process ends")
                os._exit(1)  # at once: anything else it writes would go into the other process's folder
            if content is None:
                file.create(_line(me, count))
            else:
                file.rewrite(_line(me, count))


def _line(me: dict, count: int) -> str:
    """The owner file's content. Its length is constant, so it can be rewritten in place."""
    return json.dumps({**me, "beat": f"{count:012d}"})


def _create(path: Path, content: str) -> bool:
    """Creates the file with `content`; False if it exists."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _parse(text: str) -> dict:
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _remove(path: Path, content: str) -> None:
    """Removes the file if it still has this content. A file that another process created meanwhile is put back."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if _read(aside) != content:
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)


def _machine() -> str:
    """Identifies the PID namespace of this boot: equal only for processes that see each other's PIDs."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{uuid.getnode():x} {socket.gethostname()}"


def _started(process: int) -> str:
    """When a process of this machine started, in ticks since boot; empty if it is not running."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        pass
    if Path("/proc/self").exists():
        return ""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, 0)
        return "alive"
    return ""
