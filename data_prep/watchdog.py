"""Watchdog: detects a pipeline that gives no output, since Ray Data may wait forever for a lost node."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

STARTUP_TIMEOUT_S = 1800.0
"""Longest wait for the first item: the VAE and the text encoder are loaded before it."""
STALL_TIMEOUT_S, LONGEST_WAIT_FACTOR = 120.0, 10
"""Longest wait for a later item: STALL_TIMEOUT_S, or the longest wait so far times the factor, if that is more."""
WRITE_TIMEOUT_S = 300.0
"""Longest wait until one of the writers finishes a shard, and for the facts of a block."""
ENDING_TIMEOUT_S = 60.0
"""Longest wait for the reading thread after `end` was called, and for writers after the pipeline failed."""


class PipelineStalled(Exception):  # noqa: N818
    """The pipeline gives no output and must be restarted. `made_progress`: it wrote a clip before that."""

    made_progress = False


class DeviceLost(PipelineStalled):
    """A GPU no longer works in the process that used it. Only a new process can use it again."""


def with_watchdog(
    items: Iterable[T],
    end: Callable[[], object],
    stall_timeout_s: float = STALL_TIMEOUT_S,
    startup_timeout_s: float = STARTUP_TIMEOUT_S,
) -> Generator[T, None, None]:
    """Yields the items, which one thread reads. Raises PipelineStalled if the next one takes too long.

    Close this generator before `ray.shutdown`, after which a thread that still uses Ray would crash the process. It
    then calls `end`, which must end what the items come from, and waits for the thread.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)
    given_up = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not given_up.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((kind, value), timeout=0.2)
                return

    def read() -> None:
        try:
            for item in items:
                put("item", item)
                if given_up.is_set():
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=read, name="prep-pipeline", daemon=True)
    thread.start()
    limit, longest = startup_timeout_s, 0.0
    try:
        while True:
            began = time.monotonic()
            try:
                kind, value = ready.get(timeout=limit)
            except queue.Empty:
                raise PipelineStalled(f"the pipeline gave no output for {limit:.0f} s") from None
            if kind == "end":
                return
            if kind == "error":
                raise value
            if limit != startup_timeout_s:  # the first wait includes loading
                longest = max(longest, time.monotonic() - began)
            limit = max(stall_timeout_s, LONGEST_WAIT_FACTOR * longest)
            yield value
    finally:
        given_up.set()
        end()
        thread.join(ENDING_TIMEOUT_S)
