"""The project's log messages: one logger, one plain format.

Information goes to stdout and warnings to stderr, as they are, so that a job's log reads like a terminal.
`--verbose` adds time and module, `--quiet` leaves warnings only. What a command computes is not logged but printed
(`terminal.print_result`).
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

log = logging.getLogger("sora_train")


def set_verbosity(verbose: bool = False, quiet: bool = False) -> None:
    """Shows debug messages with time and module (`verbose`), or warnings only (`quiet`)."""
    log.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    for handler in log.handlers:
        handler.setFormatter(_Plain(verbose))


def progress(text: str) -> None:
    """Progress of a command whose stdout is its result: to stderr."""
    if log.isEnabledFor(logging.INFO):
        print(text, file=sys.stderr, flush=True)


def every_few_seconds(show: Callable[P, object]) -> Callable[P, None]:
    """`show` for progress: a call less than 5 s after the last one that was shown is ignored."""
    last = time.monotonic()

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        nonlocal last
        if time.monotonic() - last >= 5:
            last = time.monotonic()
            show(*args, **kwargs)

    return call


class _Plain(logging.Formatter):
    """The message alone. A warning says that it is one."""

    def __init__(self, verbose: bool = False) -> None:
        super().__init__("%(asctime)s %(module)s: %(message)s" if verbose else "%(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return ("warning: " if record.levelno == logging.WARNING else "") + super().format(record)


class _Streams(logging.Handler):
    """Writes to the present stdout or stderr. A stream that is gone must not end the work."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        with contextlib.suppress(OSError, ValueError):
            print(self.format(record), file=stream, flush=True)


if not log.handlers:
    log.addHandler(_Streams())
    log.propagate = False
    set_verbosity()
