"""The formulas of the forecast against a simulation and against published figures."""

import heapq
from itertools import product

import numpy as np
import pytest

from sora_train.plan.forecast import Forecast, best_steps, mean_time_between_failures

HOUR, DAY = 3600.0, 86400.0


def simulated_goodput(case: Forecast, interval: float, count: int = 150_000) -> tuple[float, float]:
    """Goodput and the share of time in restarts of a run, from so many events one after another.

    The state is that of a real run: seconds of steps done, those of the newest complete checkpoint, and those of the
    one that is being written. Failures strike in any state.
    """
    random, now, done, saved, restarting = np.random.default_rng(0), 0.0, 0.0, 0.0, 0.0
    writing: float | None = None
    waiting = False
    events: list[tuple[float, int, str, int]] = []
    order = attempt = 0

    def plan(after: float, what: str) -> None:
        nonlocal order
        order += 1
        heapq.heappush(events, (now + after, order, what, attempt))

    plan(random.exponential(case.mtbf), "failure")
    plan(interval, "due")
    began = 0.0
    for _ in range(count):
        now, _, what, of = heapq.heappop(events)
        if what == "failure":
            attempt += 1
            restarting += now - began if began else 0.0
            began, done, writing, waiting = now, saved, None, False
            plan(random.exponential(case.mtbf), "failure")
            plan(case.restart, "restarted")
        elif of != attempt:  # planned by workers that are lost
            continue
        elif what == "restarted":
            restarting += now - began
            began = 0.0
            plan(interval, "due")
        elif what == "due":
            done += interval
            waiting = writing is not None
            if not waiting:
                plan(case.stall, "copied")
        elif what == "copied":
            writing = done
            plan(case.write, "written")
            plan(interval, "due")
        elif what == "written":
            assert writing is not None
            saved, writing = writing, None
            if waiting:
                waiting = False
                plan(case.stall, "copied")
    return saved / now, restarting / now


GRID = [
    (Forecast(mtbf, stall, write, restart), share)
    for (mtbf, stall, write, restart), share in product(
        [
            (30 * HOUR, 2.0, 11.0, 115.0),
            (8 * HOUR, 20.0, 300.0, 600.0),
            (2 * HOUR, 60.0, 30.0, 900.0),
            (0.5 * HOUR, 30.0, 200.0, 300.0),
        ],
        (0.2, 1.0, 4.0),
    )
]
"""Costs, and the interval as a share of the recommended one; in two cases it is shorter than writing takes."""


@pytest.mark.parametrize(("case", "share"), GRID)
def test_formula_and_simulation_agree_within_a_percent(case: Forecast, share: float):
    interval = share * case.best_interval()
    found, restarts = simulated_goodput(case, interval)
    assert found == pytest.approx(case.goodput(interval), rel=0.01)
    assert restarts == pytest.approx(case.lost(interval).restarts, abs=0.005)


def test_the_grid_has_intervals_shorter_than_a_write():
    assert sum(share * case.best_interval() < case.write for case, share in GRID) >= 2


@pytest.mark.parametrize(("mtbf", "minutes"), [(24 * HOUR, 117), (6 * HOUR, 57), (0.25 * HOUR, 9.1)])
def test_intervals_are_those_of_daly_s_paper(mtbf: float, minutes: float):
    """His figures 3 to 5: a dump of 5 minutes, restarts of 10."""
    assert Forecast(mtbf, 300.0, 0.0, 600.0).best_interval() / 60 == pytest.approx(minutes, rel=0.01)


@pytest.mark.parametrize("stall", [0.1, 10.0, 600.0])
@pytest.mark.parametrize("write", [0.0, 120.0, 2 * HOUR])
def test_no_other_interval_has_a_higher_goodput(stall: float, write: float):
    case = Forecast(10 * HOUR, stall, write, 300.0)
    best = case.goodput(case.best_interval())
    assert best >= max(case.goodput(float(second)) for second in np.geomspace(1, 20 * HOUR, 500)) - 1e-4


def test_the_parts_of_the_time_sum_to_one():
    case = Forecast(8 * HOUR, 20.0, 300.0, 600.0)
    for interval in (100.0, 1000.0, 10_000.0):
        lost = case.lost(interval)
        parts = (lost.checkpoints, lost.repeated, lost.restarts)
        assert min(parts) > 0
        assert sum(parts) + case.goodput(interval) == pytest.approx(1)


def test_failure_rates_are_those_that_were_published():
    """RSC-1's rate gives 1.8 h at 16,384 GPUs and 0.23 h at 131,072, as its authors project."""
    assert mean_time_between_failures(16_384) / HOUR == pytest.approx(1.8, rel=0.01)
    assert mean_time_between_failures(131_072) / HOUR == pytest.approx(0.23, rel=0.03)
    assert mean_time_between_failures(1) == mean_time_between_failures(8) == 2 * mean_time_between_failures(9)


def test_steps_are_round_or_divide_the_steps_between_validations():
    case = Forecast(DAY, 2.0, 10.0, 100.0)
    assert best_steps(case, 0.3) == pytest.approx(case.best_interval() / 0.3, rel=0.05)
    assert 10_000 % best_steps(case, 0.3, 10_000) == 0
    assert best_steps(case, 1e6) == 1


def test_a_run_that_hardly_lives_as_long_as_a_restart_has_no_goodput():
    assert Forecast(1.0, 1.0, 1.0, 1e6).goodput(10.0) == 0
    assert Forecast(60.0, 300.0, 1.0, 1.0).best_interval() == 60
