"""What the forecast takes from earlier runs and from benches, and how its lines read."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sora_train.plan.forecast import Forecast
from sora_train.plan.forecast_table import format_forecast
from sora_train.plan.measured import ASSUMED_RATES, COMPILE_S, REPORT_S, START_S, Figure, costs_of, rank0_share
from sora_train.plan.states import checkpoint_bytes
from sora_train.recipe import Recipe, save_recipe
from sora_train.settings import build

STEP = Figure(0.5, "planned")


def recipe_in(folder: Path, **changes: object) -> Recipe:
    settings = {"name": "own", "train.output": str(folder), "model.preset": "S", "cluster.workers": 4}
    settings |= {"train.batch_size": 64, "train.steps": 10_000}
    return build(Recipe, {}, settings | {key.replace("__", "."): value for key, value in changes.items()}, "test")


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_run(recipe: Recipe, resume_s: float = 90.0) -> Path:
    """A run with steps of 2 s and checkpoints that stall it for 3 s and are complete after 10, which lost a worker."""
    run, began = Path(recipe.train.output) / recipe.name, datetime(2026, 11, 27, tzinfo=UTC)
    run.mkdir()
    save_recipe(recipe, run / "recipe.yaml")
    events = [(0, "start", 0), (210, "checkpoint", 100), (260, "worker_lost", 120), (300, "resume", 100)]
    events += [(260 + resume_s + 100 * 2 + 10, "checkpoint", 200), (900, "end", 400)]
    write_lines(run / "events.jsonl", [
        {"time": (began + timedelta(seconds=at)).isoformat(timespec="seconds"), "event": what, "step": step}
        for at, what, step in events
    ])  # fmt: skip
    metrics: list[dict] = [{"step": 20 * k, "step_s": 2.0} for k in range(1, 21)]
    metrics[5] |= {"step_s": 9.0, "checkpoint_stall_s": 3.0, "checkpoint_s": 10.0}
    write_lines(run / "metrics.jsonl", metrics)
    return run


def write_bench(folder: Path, gb: float, stall: float, whole: float, resume: float) -> None:
    times = {"stall_s": stall, "whole_s": whole, "resume_s": resume}
    row = {"gb": gb, **{name: {"median": value} for name, value in times.items()}}
    hardware = {"gpus": ["NVIDIA H100"], "cpu": "some"}
    write_lines(folder / "bench.jsonl", [{"what": "checkpoint", "rows": [row], "hardware": hardware}])


def test_an_earlier_run_gives_all_seconds(tmp_path: Path):
    run = write_run(recipe_in(tmp_path, name="earlier"))
    costs = costs_of(recipe_in(tmp_path), STEP)
    assert costs.step == Figure(2.0, f"measured in {run}")
    assert (costs.stall.seconds, costs.write.seconds, costs.resume.seconds) == (3.0, 7.0, 90.0)


def test_the_run_s_own_records_come_before_those_of_others(tmp_path: Path):
    write_run(recipe_in(tmp_path), resume_s=50.0)
    write_run(recipe_in(tmp_path, name="newer"), resume_s=70.0)
    assert costs_of(recipe_in(tmp_path), STEP).resume.seconds == 50.0


@pytest.mark.parametrize("other", [{"cluster__workers": 8}, {"model__preset": "B"}, {"train__batch_size": 32}])
def test_runs_of_other_work_do_not_count(tmp_path: Path, other: dict):
    write_run(recipe_in(tmp_path, name="other", **other))
    assert costs_of(recipe_in(tmp_path), STEP).step == STEP


def test_records_that_are_cut_short_or_garbage_are_passed_over(tmp_path: Path):
    run = write_run(recipe_in(tmp_path))
    (run / "events.jsonl").write_text('{"event": "worker_lost", "step": 1}\n{"event": "checkpoint", "step": 7, "time"')
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "step_s": "slow"}\n{"step": 2, "step_s": NaN}\n{"step": 3, "step_s": 0}\nno'
    )
    (tmp_path / "bench.jsonl").write_text('[]\n{"what": "checkpoint", "rows": []}\n{"what"')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "recipe.yaml").write_text("{")
    costs = costs_of(recipe_in(tmp_path), STEP)
    assert costs.step == STEP
    assert costs.resume.seconds > START_S + COMPILE_S


def test_a_bench_gives_the_rates_of_any_model(tmp_path: Path):
    """Of 10 GB: copied at 5 GB/s, written at 2, its four fifths read at 4."""
    recipe = recipe_in(tmp_path)
    size = checkpoint_bytes(recipe.model)
    assumed = costs_of(recipe, STEP)
    assert assumed.write.seconds == pytest.approx(size / ASSUMED_RATES["write"])
    assert "assumed" in assumed.write.origin
    write_bench(tmp_path, gb=10.0, stall=2.0, whole=7.0, resume=2.0)
    costs = costs_of(recipe, STEP)
    assert costs.stall.seconds == pytest.approx(rank0_share(4) * size / 5e9 + 4 * REPORT_S)
    assert costs.write.seconds == pytest.approx(size / 2e9)
    assert costs.resume.seconds == pytest.approx(START_S + COMPILE_S + 0.8 * size / 4e9)
    assert "`sora bench checkpoint` on NVIDIA H100" in costs.write.origin


def test_a_checkpoint_interval_that_is_far_off_is_a_warning_that_helps(tmp_path: Path):
    def warned(every: int, **changes: object) -> list[str]:
        recipe = recipe_in(tmp_path, train__checkpoint_every=every, **changes)
        return [line for line in format_forecast(recipe, STEP, 4.0) if "warning: train.checkpoint_every" in line]

    (rare,) = warned(10_000)
    (often,) = warned(1, cluster__workers=1)
    best = int(rare.rpartition(" ")[2])
    assert 1 < best < 10_000
    assert not warned(best)
    assert "Set train.checkpoint_every to " in often
    assert not warned(10_000, train__steps=400)
    prompts = {"validation__every": 3000, "validation__prompts": ["a cat"]}
    assert 3000 % int(warned(10_000, **prompts)[0].rpartition(" ")[2]) == 0


def test_more_failures_than_restarts_are_a_warning(tmp_path: Path):
    """10,000 steps of 0.5 s take 1.4 h: at least 14 failures at one each 0.1 h, and one at one each 4 h."""
    recipe = recipe_in(tmp_path)
    assert any("Set cluster.max_failures to" in line for line in format_forecast(recipe, STEP, 0.1))
    assert not any("cluster.max_failures" in line for line in format_forecast(recipe, STEP, 4.0))


@pytest.mark.parametrize("hours", [1e-9, 1e-3, 1e-2])
def test_where_restarts_take_all_the_time_no_key_is_suggested(tmp_path: Path, hours: float):
    said = [line for line in format_forecast(recipe_in(tmp_path), STEP, hours) if line.startswith("warning")]
    assert len(said) == 1
    assert "almost no progress" in said[0]
    assert " Set " not in said[0]


def test_the_lines_show_the_formula_s_goodput(tmp_path: Path):
    recipe = recipe_in(tmp_path, train__checkpoint_every=100)
    costs = costs_of(recipe, STEP)
    case = Forecast(3600.0, costs.stall.seconds, costs.write.seconds, 20.0 + costs.resume.seconds)
    (line,) = [line for line in format_forecast(recipe, STEP, 1.0) if line.startswith("the recipe's")]
    assert f"{100 * case.goodput(50.0):.1f} %" in line
