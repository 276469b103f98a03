"""What Ray Data waits for without end where a node, or its network, failed: found here, so that prep begins anew."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S, TIMES, START_S = 120.0, 10, 1800.0
"""Without anything for so long, and for so many times the longest wait before, nothing comes any more. The first may
take the last of these: networks are loaded before it."""


class Standstill(Exception):  # noqa: N818
    """The pipeline gives nothing any more and must be restarted. `moved` says whether it gave anything before."""

    moved = False


class DeviceLost(Standstill):
    """A GPU no longer works in the process that used it. Only a new process can use it again."""


def watched(items: Iterable[T], patience_s: float = PATIENCE_S, start_s: float = START_S) -> Iterator[T]:
    """The items, taken in a thread of its own. Raises Standstill where none came for too long; what the thread is stuck
    in must then be ended by others.
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
    limit, longest = start_s, 0.0
    try:
        while True:
            began = time.monotonic()
            try:
                kind, what = ready.get(timeout=limit)
            except queue.Empty:
                raise Standstill(f"nothing came for {limit:.0f} s") from None
            if kind == "end":
                return
            if isinstance(what, BaseException):
                raise what
            if limit != start_s:  # the first wait is for more than its item
                longest = max(longest, time.monotonic() - began)
            limit = max(patience_s, TIMES * longest)
            yield what  # type: ignore[misc]
    finally:
        given_up.set()
