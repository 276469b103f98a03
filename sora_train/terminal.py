"""Standard streams that never end a command's work.

A reader that goes away (`| head`), a closed terminal, a full disk behind `> log` and a locale without UTF-8 would raise
at the next `print`, in whatever thread it is.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys

from sora_train.errors import UserError


class LenientOutput(io.FileIO):
    """Writes to a file descriptor; drops what can't be written. `lost` is the first error of a write."""

    def __init__(self, descriptor: int, lost: OSError | None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.lost = lost

    def write(self, data) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            self.lost, written = self.lost or error, None
        return len(data) if written is None else written


def protect_streams() -> None:
    """Makes stdout and stderr lenient, and handles SIGHUP (a closed terminal) like SIGTERM, unless under `nohup`."""
    closed: list[OSError | None] = [None] * 3
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError as error:  # closed, as by `>&-`: the next opened file would receive what is printed
            closed[descriptor] = OSError(error.errno, "it is closed")
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = _stream(sys.stdout, 1, closed[1]), _stream(sys.stderr, 2, closed[2])
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))


def _stream(before: object, descriptor: int, lost: OSError | None) -> io.TextIOWrapper:
    encoding = getattr(before, "encoding", None) or "utf-8"
    raw = LenientOutput(descriptor, lost)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=raw.isatty() or descriptor == 2
    )


def print_result(text: str) -> None:
    """Prints a command's result. UserError if stdout can't be written, unless its reader is gone."""
    try:
        print(text, flush=True)
        lost = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", None)
    except OSError as error:
        lost = error
    if lost is not None and lost.errno not in (errno.EPIPE, errno.EIO):
        remedy = "Free the disk, or send" if lost.errno == errno.ENOSPC else "Send"
        raise UserError(f"stdout can't be written: {lost.strerror}. {remedy} the output elsewhere", code="not_writable")
