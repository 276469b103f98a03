"""Locks on folders that several nodes share, made of files that only one process can create.

`flock` is local to a node, or does nothing, on some cluster file systems (Lustre without `-o flock`, some NFS).
Exclusive creation (`O_EXCL`) works on all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sora_train.errors import UserError
from sora_train.storage import broken_link

OWNER = ".owner"
"""The file that names the process which works in a folder."""
BEAT_S, STALE_S = 5.0, 30.0
"""An owner rewrites its file every `BEAT_S`. One of another machine that does not for `STALE_S` is dead."""
ABANDONED_S, POLL_S = 10.0, 0.02
"""A lock for one line is held for milliseconds; one that stays for `ABANDONED_S` belongs to a killed process."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Excludes other threads, processes and nodes from a file for a short block. Raises OSError where it can't."""
    lock, token = path.with_name(f".{path.name}.lock"), uuid.uuid4().hex
    seen, waited = "", 0.0
    while not _create(lock, token):
        if (found := _read(lock)) != seen:
            seen, waited = found, 0.0
        if waited > ABANDONED_S:
            _remove(lock, found)
        time.sleep(POLL_S)
        waited += POLL_S  # not the clock's time: a file system that stalls is not a lock that stays
    began = time.monotonic()
    try:
        yield
    finally:
        if time.monotonic() - began < ABANDONED_S or _read(lock) == token:
            lock.unlink(missing_ok=True)


@contextmanager
def owned(folder: Path, command: str, otherwise: str) -> Iterator[None]:
    """Keeps other processes of any node off a folder for the length of a block.

    Raises UserError where one is at work there: names it, and says what to do `otherwise` than wait. The owner's file
    of a process that was killed is removed, at once on the same machine, after `STALE_S` on another.
    """
    path = folder / OWNER
    me = {
        "command": command,
        "process": os.getpid(),
        "host": socket.gethostname(),
        "machine": _machine(),
        "started": _started(os.getpid()),
        "token": uuid.uuid4().hex,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(path, me, otherwise)
    except OSError as error:
        why = broken_link(folder) or error.strerror or error
        raise UserError(f"{path} can't be written ({why}): make room there or make it writable") from None
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, me, ended), name="owner", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if _parse(_read(path)).get("token") == me["token"]:
            path.unlink(missing_ok=True)


def _take(path: Path, me: dict, otherwise: str) -> None:
    """Creates the owner's file, once no living process has it."""
    seen, waited = "", 0.0
    while not _create(path, _line(me, 0)):
        found = _read(path)
        if not found and not path.exists():
            continue  # its owner has just left
        owner = _parse(found)
        what = (
            f"`{owner.get('command', 'sora')}` is at work in {path.parent} (process {owner.get('process', '?')} on "
            f"{owner.get('host', 'an unknown host')})"
        )
        here = owner.get("machine") == me["machine"]
        alive = here and owner["started"] == _started(owner["process"])
        if alive or (waited and found and found != seen):
            raise UserError(f"another {what}. Wait for its end, end it, or {otherwise}")
        if here or waited >= STALE_S:
            _remove(path, found)
            continue
        if not waited:
            print(f"another {what}, or was killed: waiting {STALE_S:.0f} s for a sign of life", flush=True)
        seen, waited = found, waited + 1
        time.sleep(1)


def _beat(path: Path, me: dict, ended: threading.Event) -> None:
    """Rewrites the owner's file again and again. Ends this process where another has taken the folder over."""
    beat = 0
    while not ended.wait(BEAT_S):
        beat += 1
        with contextlib.suppress(OSError):  # a full or stalled disk; the next beat may get through
            found = _parse(_read(path))
            if found and found.get("token") != me["token"]:
                other = f"process {found.get('process')} on {found.get('host')}"
                with contextlib.suppress(OSError):
                    why = f"{other} took {path.parent} over: this process was silent for {STALE_S:.0f} s, and ends"
                    print(why, file=sys.stderr, flush=True)
                os._exit(1)  # at once: whatever else it wrote would be into the other's folder
            if not _create(path, _line(me, beat)):
                with path.open("r+", encoding="utf-8") as file:
                    file.write(_line(me, beat))


def _line(me: dict, beat: int) -> str:
    """Always as long, so that it is rewritten in place."""
    return json.dumps({**me, "beat": f"{beat:012d}"})


def _create(path: Path, content: str) -> bool:
    """Whether the file was created by this very call."""
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
    """Removes the file if it still has this content. Another that appeared meanwhile is put back."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if _read(aside) != content:
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)


def _machine() -> str:
    """The same for processes that see each other's numbers, and for no others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{uuid.getnode():x} {socket.gethostname()}"


def _started(process: int) -> str:
    """When a process of this machine started, in ticks since boot; an empty string where none lives."""
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
