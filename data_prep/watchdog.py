"""Watchdog: detects a pipeline that gives no output, since Ray Data may wait forever for a lost node."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")

STARTUP_TIMEOUT_S = 1800.0
"""For the first item: the VAE and the text encoder are loaded before it."""
STALL_TIMEOUT_S, LONGEST_WAIT_FACTOR = 120.0, 10
"""For a later item: this many seconds, or this many times the longest wait so far, if that is more."""


class PipelineStalled(Exception):  # noqa: N818
    """The pipeline gives no output and must be restarted. `made_progress`: it wrote a clip before that."""

    made_progress = False


class DeviceLost(PipelineStalled):
    """A GPU no longer works in the process that used it. Only a new process can use it again."""


def with_watchdog(
    items: Iterable[T], stall_timeout_s: float = STALL_TIMEOUT_S, startup_timeout_s: float = STARTUP_TIMEOUT_S
) -> Iterator[T]:
    """Yields the items. Raises PipelineStalled if the next one takes too long.

    Each is read by a daemon thread, and the caller must end what that is stuck in.
    """
    iterator, end = iter(items), object()
    limit, longest = startup_timeout_s, 0.0
    while True:
        began = time.monotonic()
        future: Future = Future()
        threading.Thread(target=_read_next, args=(iterator, end, future), name="prep-pipeline", daemon=True).start()
        wait([future], timeout=limit)
        if not future.done():
            raise PipelineStalled(f"the pipeline gave no output for {limit:.0f} s")
        if (item := future.result()) is end:
            return
        if limit != startup_timeout_s:  # the first wait includes loading
            longest = max(longest, time.monotonic() - began)
        limit = max(stall_timeout_s, LONGEST_WAIT_FACTOR * longest)
        yield item


def _read_next(iterator: Iterator, end: object, future: Future) -> None:
    try:
        future.set_result(next(iterator, end))
    except BaseException as error:
        future.set_exception(error)
