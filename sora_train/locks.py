"""Locks on shared folders, by files that only one process can create.

`flock` is local to a node, or does nothing, on some cluster file systems (Lustre without `-o flock`, some NFS).
Exclusive creation (`O_EXCL`) works on all of them.
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

from pyarrow.fs import LocalFileSystem

from sora_train.errors import UserError
from sora_train.log import log
from sora_train.storage import broken_link, resolve

OWNER_FILE = ".owner"
"""Name of the file in a locked folder that describes the owner process."""
HEARTBEAT_S, STALE_S = 5.0, 30.0
"""An owner rewrites its file every `HEARTBEAT_S`. An owner on another machine is dead after `STALE_S` without one."""
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


@contextmanager
def run_lock(folder: str, command: str) -> Iterator[None]:
    """Keeps every other `sora prep` or `sora train`, on any node, out of a folder.

    Raises UserError if another process owns the folder; the message names it. A killed process loses its lock: at once
    on the same machine, after `STALE_S` on another. A remote folder (`s3://…`) can't be locked, and is not.
    """
    system, local = resolve(folder)
    if not isinstance(system, LocalFileSystem):
        yield
        return
    path = Path(local) / OWNER_FILE
    me = {
        "command": command,
        "process": os.getpid(),
        "host": socket.gethostname(),
        "machine": _machine(),
        "started": _started(os.getpid()),
        "token": uuid.uuid4().hex,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(path, me)
    except OSError as error:
        why = broken_link(path.parent) or error.strerror or error
        raise UserError(
            f"{path} can't be written: {why}. Free space there or make it writable", code="not_writable"
        ) from None
    ended = threading.Event()
    heartbeat = threading.Thread(target=_heartbeat, args=(path, me, ended), name="run lock", daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        ended.set()
        heartbeat.join()
        if _parse(_read(path)).get("token") == me["token"]:
            path.unlink(missing_ok=True)


def _acquire(path: Path, me: dict) -> None:
    """Creates the owner file once no living process has it."""
    seen, waited = "", 0.0
    while not _create(path, _line(me, 0)):
        found = _read(path)
        if not found and not path.exists():
            continue  # the owner has just released it
        owner = _parse(found)
        other = (
            f"another `{owner.get('command', 'sora')}` is running in {path.parent} "
            f"(process {owner.get('process', '?')} on {owner.get('host', 'an unknown host')})"
        )
        here = owner.get("machine") == me["machine"]
        alive = here and owner["started"] == _started(owner["process"])
        if alive or (waited and found and found != seen):
            raise UserError(f"{other}. Wait until it ends, stop it, or {INSTEAD[me['command']]}", code="locked")
        if here or waited >= STALE_S:
            _remove(path, found)
            continue
        if not waited:
            log.info(f"{other}, or was killed. Waiting {STALE_S:.0f} s for its heartbeat")
        seen, waited = found, waited + 1
        time.sleep(1)


def _heartbeat(path: Path, me: dict, ended: threading.Event) -> None:
    """Rewrites the owner file periodically. Ends this process if another process has taken the folder over."""
    count = 0
    while not ended.wait(HEARTBEAT_S):
        count += 1
        with contextlib.suppress(OSError):  # a full or stalled disk; the next heartbeat may succeed
            found = _parse(_read(path))
            if found and found.get("token") != me["token"]:
                other = f"process {found.get('process')} on {found.get('host')}"
                with contextlib.suppress(OSError):
                    why = f"{other} took over {path.parent} after {STALE_S:.0f} s without a heartbeat from this process"
                    log.warning(f"{why}. This process ends")
                os._exit(1)  # at once: anything else it writes would go into the other process's folder
            if not _create(path, _line(me, count)):
                with path.open("r+", encoding="utf-8") as file:
                    file.write(_line(me, count))


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
