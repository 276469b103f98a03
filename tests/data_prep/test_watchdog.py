"""The watchdog detects a pipeline without output. Real restarts: tests/drills/cluster.py."""

import threading
import time
from collections.abc import Iterator

import pytest

from data_prep.watchdog import PipelineStalled, with_watchdog


def nothing() -> None:
    """Ends what ends by itself."""


def test_items_come_in_order_and_an_error_after_them():
    def items() -> Iterator[int]:
        yield from range(100)
        raise ValueError("the 101st")

    found: list[int] = []
    with pytest.raises(ValueError, match="the 101st"):
        found.extend(with_watchdog(items(), nothing))
    assert found == list(range(100))
    assert list(with_watchdog(iter(range(100)), nothing)) == list(range(100))


def test_no_output_is_a_stall():
    released = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        released.wait(30)

    tables = with_watchdog(items(), released.set, stall_timeout_s=0.2)
    assert next(tables) == 1
    with pytest.raises(PipelineStalled, match="gave no output for 0 s"):
        next(tables)
    assert released.is_set()


def test_a_slow_pipeline_has_a_longer_timeout():
    def items() -> Iterator[int]:
        for number, seconds in enumerate((0.6, 0.2, 1.0)):  # patience ends after 0.3, then after 10 times 0.2
            time.sleep(seconds)
            yield number

    assert list(with_watchdog(items(), nothing, stall_timeout_s=0.3, startup_timeout_s=30)) == [0, 1, 2]


def test_no_thread_is_left_between_items_or_after_them():
    def items() -> Iterator[int]:
        while True:
            yield 0

    before = threading.active_count()
    tables = with_watchdog(items(), nothing)
    for _ in range(3):
        next(tables)
    tables.close()
    assert threading.active_count() == before
