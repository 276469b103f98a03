"""What is done where Ray Data waits for ever: prep itself begins anew, in tests/drills/cluster.py."""

import threading
import time
from collections.abc import Iterator

import pytest

from data_prep.standstill import Standstill, watched


def test_all_comes_in_order_and_an_error_comes_where_it_was_raised():
    def items() -> Iterator[int]:
        yield from range(100)
        raise ValueError("the 101st")

    found: list[int] = []
    with pytest.raises(ValueError, match="the 101st"):
        found.extend(watched(items(), list))
    assert list(watched(iter(range(100)), list)) == list(range(100))


def test_nothing_more_after_a_lost_node_is_a_standstill_that_names_it():
    released = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        released.wait(30)

    tables = watched(items(), lambda: ["node3"], patience_s=0.2)
    assert next(tables) == 1
    with pytest.raises(Standstill, match="node3"):
        next(tables)
    released.set()


def test_what_is_slow_is_waited_for_as_long_as_no_node_is_lost():
    def items() -> Iterator[int]:
        time.sleep(0.5)
        yield 1

    assert list(watched(items(), list, patience_s=0.1)) == [1]


def test_whoever_stops_listening_leaves_no_thread_behind():
    def items() -> Iterator[int]:
        while True:
            yield 0

    before = threading.active_count()
    tables = watched(items(), list)
    next(tables)
    assert threading.active_count() == before + 1
    tables.close()
    for _ in range(100):
        if threading.active_count() == before:
            return
        time.sleep(0.05)
    raise AssertionError("the thread goes on")
