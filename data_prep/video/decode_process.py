"""Decodes in a child process: a crash or a hang in native code costs one clip and a restart.

`Decoder` is the parent's side. The child is `python -P -m data_prep.video.decode_process FD`: it imports neither Ray
nor torch, and ends with its parent. Frames come back in anonymous shared memory, so nothing is left behind when either
is killed. Everything else that the child sends is JSON, checked by type: its input is untrusted, and nothing that it
sends can run code in the parent.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from data_prep.buckets import buckets_of
from data_prep.reasons import FILTERED, QUARANTINED, ClipError
from data_prep.video.clips import Clip, ClipPlan, ClipSpan, Source
from sora_train.data.config import DataConfig, SelectionConfig

START_S = 120.0  # until a child has imported its libraries on a busy machine
ALIVE_S = 1.0  # between a child's reports of progress
MOST_BYTES = 64 << 20  # in an answer: the clip plan of a very long video
READY, ALIVE = b'"ready"', b'"alive"'
CLIP_PLAN, FACTS, REFUSAL = TypeAdapter(ClipPlan), TypeAdapter(dict[str, str]), TypeAdapter(tuple[str, str])


@dataclass(frozen=True)
class DecodeRequest:
    """A request to the child: for a file's clip plan, or with a span, for that clip."""

    path: str
    span: ClipSpan | None = None
    seed: str = ""
    headers_only: bool = False


class Decoder:
    """Reads clips through a child process, which is started on first use and after it has died."""

    def __init__(self, data: DataConfig, selection: SelectionConfig):
        self.data, self.selection = data, selection
        self._size = max(bucket.clip_bytes for bucket in buckets_of(data))
        self._memory = os.memfd_create("sora-clip")
        os.ftruncate(self._memory, self._size)
        self._shared = mmap.mmap(self._memory, self._size)
        self.process: subprocess.Popen | None = None
        """The child, while it runs."""
        self._line: Connection | None = None

    def plan_clips(self, path: str, headers_only: bool = False) -> ClipPlan:
        """The clips of a local file. Raises ClipError, also if the child dies or makes no progress."""
        return self._answer(DecodeRequest(path, headers_only=headers_only), CLIP_PLAN)

    def read(self, path: str, span: ClipSpan, seed: str) -> Clip:
        """One clip of a local file, which stays open for the next. Raises ClipError as `plan_clips` does."""
        facts = self._answer(DecodeRequest(path, span, seed), FACTS)
        bucket = span.bucket
        shape = bucket.frames, bucket.height, bucket.width, 3
        return Clip(np.frombuffer(self._shared, np.uint8, bucket.clip_bytes).reshape(shape).copy(), **facts)

    def close(self) -> None:
        """Ends the child."""
        if self.process:
            self.process.kill()
            self._end()

    def _answer(self, request: DecodeRequest, kind: TypeAdapter) -> Any:
        line = self.connect()
        answer = ALIVE
        try:
            line.send(request)
            while answer == ALIVE:
                if not line.poll(self.data.timeout_s):
                    self.close()
                    raise ClipError(
                        "timeout", f"decoding made no progress for {self.data.timeout_s:g} s (data.timeout_s)"
                    )
                answer = line.recv_bytes(MOST_BYTES)
            return parse_answer(answer, kind)
        except (EOFError, OSError):
            raise ClipError("decoder_crashed", f"the decoder's process {self._end()} on it") from None
        except ValueError:
            self.close()
            raise ClipError("decoder_crashed", "the decoder's process sent an invalid answer") from None

    def connect(self) -> Connection:
        """Starts the child if it doesn't run, and returns the connection to it."""
        if self._line is not None:
            return self._line
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "data_prep.video.decode_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno(), self._memory],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                stdin=subprocess.DEVNULL,
            )
        self._line = Connection(ours.detach())
        try:
            self._line.send((self.data, self.selection, self._memory, self._size))
            if self._line.poll(START_S) and self._line.recv_bytes(len(READY)) == READY:
                return self._line
        except (EOFError, OSError):
            pass
        self.close()
        raise RuntimeError("the decoder's process doesn't start; its error message is above")

    def _end(self) -> str:
        """Waits for the dead child and returns how it ended."""
        assert self.process is not None
        assert self._line is not None
        self._line.close()
        code = self.process.wait()
        self.process = self._line = None
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"

    def __del__(self) -> None:
        """The memory is freed with its last mapping; the child ends when the connection is closed."""
        if hasattr(self, "_memory"):
            os.close(self._memory)


def parse_answer(answer: bytes, kind: TypeAdapter) -> Any:
    """The child's answer as `kind`. Raises ClipError if the child refused, ValueError if the answer is invalid."""
    said = json.loads(answer)
    if isinstance(said, dict) and "refused" in said:
        reason, message = REFUSAL.validate_python(said["refused"])
        if reason not in QUARANTINED and reason not in FILTERED:
            raise ValueError(reason)
        raise ClipError(reason, message)
    return kind.validate_python(said)


class DecodeServer:
    """The child's side: answers requests, and keeps the last file open."""

    def __init__(self, line: Connection, data: DataConfig, selection: SelectionConfig, shared: mmap.mmap):
        self.line, self.data, self.selection, self.shared = line, data, selection, shared
        self.source: Source | None = None
        self.identity: tuple | None = None
        self.spoke = 0.0

    def answer(self, request: DecodeRequest) -> bytes:
        """A ClipPlan; the facts of a Clip whose frames are in the shared memory; or why there is none."""
        try:
            said = self.found(request)
        except ClipError as error:
            said = {"refused": (error.reason, error.message)}
        except Exception as error:  # any error on a bad file costs that clip, never the job
            said = {"refused": ("corrupt", f"{type(error).__name__}: {error}")}
        return json.dumps(said).encode()

    def found(self, request: DecodeRequest) -> dict[str, Any]:
        """A ClipPlan, or the facts of a Clip. Raises ClipError."""
        try:
            status = os.stat(request.path)
        except OSError as error:
            raise ClipError("missing_file", f"can't be opened: {error.strerror}") from None
        identity = request.path, status.st_ino, status.st_size, status.st_mtime_ns
        if self.source is None or identity != self.identity:
            self.source = None  # before the next one is opened: two files open are twice the memory
            self.source = Source(request.path, self.data, self.selection, self.alive)
            self.identity = identity
        if request.span is None:
            return asdict(self.source.plan_clips(request.headers_only))
        clip = self.source.read(request.span, request.seed)
        np.frombuffer(self.shared, np.uint8, clip.frames.size)[:] = clip.frames.ravel()
        return {name: value for name, value in vars(clip).items() if name != "frames"}

    def alive(self) -> None:
        """Reports progress at most every ALIVE_S."""
        if time.monotonic() - self.spoke > ALIVE_S:
            self.spoke = time.monotonic()
            self.line.send_bytes(ALIVE)


def serve(line: Connection) -> None:
    """The child's loop: answers requests until the parent closes the connection."""
    data, selection, memory, size = line.recv()
    server = DecodeServer(line, data, selection, mmap.mmap(memory, size))
    threading.Thread(target=exit_with_parent, args=(line.fileno(),), daemon=True).start()
    gc.freeze()  # makes the gc.collect() of readers.py fast
    line.send_bytes(READY)
    while True:
        try:
            line.send_bytes(server.answer(line.recv()))
        except (EOFError, OSError):
            return


def exit_with_parent(line: int) -> None:
    """Ends the process, even while decoding, once the other end of its connection is closed."""
    watch = select.poll()
    watch.register(line, select.POLLRDHUP)
    watch.poll()
    os._exit(0)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
