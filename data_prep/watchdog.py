"""What Ray Data waits for without end where a node, or its network, failed: found here, so that prep begins anew."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

STALL_TIMEOUT_S, LONGEST_WAIT_FACTOR, STARTUP_TIMEOUT_S = 120.0, 10, 1800.0
"""Without anything for so long, and for so many times the longest wait before, nothing comes any more. The first may
take the last of these: networks are loaded before it."""


class PipelineStalled(Exception):  # noqa: N818
    """The pipeline gives no output and must be restarted. `made_progress`: it wrote a clip before that."""

    made_progress = False


class DeviceLost(PipelineStalled):
    """A GPU no longer works in the process that used it. Only a new process can use it again."""


def with_watchdog(
    items: Iterable[T], stall_timeout_s: float = STALL_TIMEOUT_S, startup_timeout_s: float = STARTUP_TIMEOUT_S
) -> Iterator[T]:
    """Yields the items, which a thread reads. Raises PipelineStalled if none came for too long.

    The caller must then end what the thread is stuck in.
    """
    ready: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(maxsize=1)
    given_up = threading.Event()

    def put(kind: str, what: T | BaseException | None) -> None:
        while not given_up.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((kind, what), timeout=0.2)
                return

    def take() -> None:
        try:
            for item in items:
                put("item", item)
                if given_up.is_set():
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    threading.Thread(target=take, name="chain", daemon=True).start()
    limit, longest = startup_timeout_s, 0.0
    try:
        while True:
            began = time.monotonic()
            try:
                kind, what = ready.get(timeout=limit)
            except queue.Empty:
                raise PipelineStalled(f"nothing came for {limit:.0f} s") from None
            if kind == "end":
                return
            if isinstance(what, BaseException):
                raise what
            if limit != startup_timeout_s:  # the first wait is for more than its item
                longest = max(longest, time.monotonic() - began)
            limit = max(stall_timeout_s, LONGEST_WAIT_FACTOR * longest)
            yield what  # type: ignore[misc]
    finally:
        given_up.set()
