"""What Ray Data waits for without end where a node was lost that held blocks: found here, so that prep begins anew."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 120.0
"""Seconds without anything after the loss of a node: Ray needs some to start actors elsewhere and do work again."""


class Standstill(Exception):  # noqa: N818  no mistake of anybody's
    """Nothing comes any more, and nodes were lost. The message names them."""


def watched(items: Iterable[T], lost: Callable[[], list[str]], patience_s: float = PATIENCE_S) -> Iterator[T]:
    """The items, taken in a thread of its own. Raises Standstill where none came for `patience_s` and `lost()`, which
    names the nodes that went, is not empty; what the thread is stuck in must then be ended by others.
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
    came_at = time.monotonic()
    try:
        while True:
            try:
                kind, what = ready.get(timeout=min(1.0, patience_s))
            except queue.Empty:
                if time.monotonic() - came_at > patience_s and (nodes := lost()):
                    raise Standstill(", ".join(nodes)) from None
                continue
            if kind == "end":
                return
            if isinstance(what, BaseException):
                raise what
            yield what  # type: ignore[misc]
            came_at = time.monotonic()
    finally:
        given_up.set()
