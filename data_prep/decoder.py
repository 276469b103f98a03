"""Decoding in a process of its own: a crash in native code, or a hang, costs one clip and a restart.

`Decoder` is the parent's side. The child is `python -m data_prep.decoder FD`: it imports neither Ray nor torch, and
ends when its parent does.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection

from data_prep.buckets import Bucket
from data_prep.clips import Clip, read_clip
from data_prep.reasons import ClipError


class Decoder:
    """Reads clips through a child process, which is started at the first clip and again after it died."""

    def __init__(self, bucket: Bucket, timeout_s: float):
        self.bucket = bucket
        self.timeout_s = timeout_s
        self._child: subprocess.Popen | None = None
        self._line: Connection | None = None

    def read(self, path: str) -> Clip:
        """The clip at the start of a local file. Raises ClipError, also where the child dies or takes too long."""
        try:
            line = self._connected()
            line.send((path, self.bucket))
            if not line.poll(self.timeout_s):
                self.close()
                raise ClipError("timeout", f"decoding was given up after {self.timeout_s:g} s (data.timeout_s)")
            answer = line.recv()
        except (EOFError, OSError):
            raise ClipError("decoder_crashed", f"the decoder's process {self._end()} on it") from None
        if isinstance(answer, ClipError):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the child."""
        if self._child:
            self._child.kill()
            self._end()

    def _connected(self) -> Connection:
        if self._line is None:
            ours, theirs = socket.socketpair()
            with theirs:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "data_prep.decoder", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                    stdin=subprocess.DEVNULL,
                )
            self._line = Connection(ours.detach())
            if not self._line.poll(60) or self._line.recv() != "ready":
                self.close()
                raise RuntimeError("the decoder's process doesn't start; its own message stands above")
        return self._line

    def _end(self) -> str:
        """Waits for the dead child and says how it ended."""
        assert self._child is not None
        assert self._line is not None
        self._line.close()
        code = self._child.wait()
        self._child = self._line = None
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"


def serve(line: Connection) -> None:
    """The child's loop: a path and a bucket come in, a Clip or a ClipError goes out, until the parent hangs up."""
    line.send("ready")
    while True:
        try:
            path, bucket = line.recv()
        except EOFError:
            return
        try:
            answer: Clip | ClipError = read_clip(path, bucket)
        except ClipError as error:
            answer = error
        except Exception as error:  # whatever a decoder makes of a bad file costs that clip, never the job
            answer = ClipError("corrupt", f"{type(error).__name__}: {error}")
        line.send(answer)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
