"""`sora bench train`: a step of `sora train` compared with a bare torch loop, by part and by number of workers."""

from __future__ import annotations

import statistics
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from itertools import pairwise

import torch

from sora_train.bench.core import Flags, Row, Table, finish, interleave, log, spread
from sora_train.bench.overhead import PARTS, PartialLoop
from sora_train.bench.runs import recipe_in, start_training
from sora_train.errors import RecipeError, UserError, error_line
from sora_train.recipe import Recipe

ABOUT = """Times training steps of a recipe whose shards exist. With one worker: a bare torch loop, then the same with
DeepSpeed, averaged weights and reading, in turns; then `sora train`, which adds the guard,
metrics, logs and Ray. Then `sora train` with other numbers of workers. And the time from the command to the first step.
Any key of the recipe is a flag too. Example: sora bench train jobs/quickstart.yaml --workers 1 2"""
WHOLE = "sora train, with Ray"


def bench(options: Namespace, recipe: Recipe, words: Sequence[str]) -> list[Table]:
    """Three tables. UserError if the recipe can't be trained."""
    from sora_train.data.shards import ShardSet

    ShardSet(recipe.data.output, recipe.data.holdout_fraction, "train")
    with tempfile.TemporaryDirectory() as folder:
        times, failed = time_parts(options, recipe)
        runs: list[Row] = []
        for workers in [1] * options.rounds + sorted({*options.workers} - {1}):
            log(f"sora train with {workers} workers")
            try:
                runs.append(time_run(options, words, workers, f"run-{len(runs)}-{len(failed)}", folder))
            except UserError as error:
                failed.append(f"{workers} workers: {error_line(error)}")
    if whole := [step for run in runs if run["workers"] == 1 for step in run["step_s"]]:
        times[WHOLE] = whole
    return [parts_table(recipe, times, failed), workers_table(runs), start_table(runs)]


def time_parts(options: Namespace, recipe: Recipe) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds per step of the loops of `PARTS`, taken in turns, and what failed."""
    torch.set_num_threads(recipe.cluster.cpus_per_worker)
    loops = {part: PartialLoop(recipe, part, max(options.steps // 10, 1)) for part in PARTS}
    times, errors = interleave({part: loop.turn for part, loop in loops.items()}, 10 * options.rounds, warm_up=2)
    return times, [f"{part}: {error}" for part, error in errors.items()]


def time_run(options: Namespace, words: Sequence[str], workers: int, name: str, folder: str) -> Row:
    """One `sora train`: its start, and the metrics of its steps without the first quarter. UserError if it fails."""
    flags = {
        "cluster.workers": workers, "train.steps": options.steps, "train.checkpoint_every": options.steps,
        "validation.every": 0,
    }  # fmt: skip
    run = start_training(words, name, folder, flags)
    ready, first = run.wait_for("events.jsonl"), run.wait_for("metrics.jsonl")
    measured = run.finish()[options.steps // 4 :]
    keys = ("step_s", "samples_per_s", "data_wait_share", "mfu")
    values = {key: [line[key] for line in measured if line[key] is not None] for key in keys}
    return {"workers": workers, "ready": ready, "first": first, **values}


def parts_table(recipe: Recipe, times: dict[str, list[float]], failed: list[str]) -> Table:
    """The step time with each part, compared with the bare loop and with the part before."""
    bare = times.get(PARTS[0])
    previous = {b: a for a, b in pairwise(times)}
    rows: list[Row] = []
    for name, values in times.items():
        median = statistics.median(values)
        added = median - statistics.median(times[previous[name]]) if name in previous else None
        rows.append(
            {
                "step": name,
                "step_s": spread(values),
                "clips_per_s": recipe.train.batch_size / median,
                "of bare": median / statistics.median(bare) if bare else None,
                "of bare, at best": min(values) / min(bare) if bare else None,
                "adds_ms": None if added is None else 1000 * added,
            }
        )
    train = recipe.train
    note = (
        f"one worker of {recipe.cluster.cpus_per_worker} threads, batch {train.batch_size} in micro-batches of "
        f"{train.micro_batch_size}, ZeRO {train.zero_stage}, {train.precision}; each line adds one part; adds: "
        "difference of medians; at best: minimum over minimum, which other programs on the machine affect least"
    )
    return Table("train: parts of a step", rows, [note], failed)


def workers_table(runs: list[Row]) -> Table:
    """Rates of `sora train` by number of workers."""
    rows: list[Row] = []
    for workers in sorted({run["workers"] for run in runs}):
        together = {key: [value for run in runs if run["workers"] == workers for value in run[key]]
                    for key in ("step_s", "samples_per_s", "data_wait_share", "mfu")}  # fmt: skip
        rate = statistics.median(together["samples_per_s"])
        one = rows[0]["clips_per_s"] if rows and rows[0]["workers"] == 1 else rate if workers == 1 else None
        rows.append(
            {
                "workers": workers,
                "step_s": spread(together["step_s"]),
                "clips_per_s": rate,
                "of so many times 1 worker": rate / (one * workers) if one else None,
                "data_wait": statistics.fmean(together["data_wait_share"]),
                "mfu": statistics.median(together["mfu"]) if together["mfu"] else None,
            }
        )
    return Table("train: workers", rows, ["the same batch for any number of workers; data_wait: share of the time"])


def start_table(runs: list[Row]) -> Table:
    """Seconds from the command to the first step of one worker."""
    alone = [run for run in runs if run["workers"] == 1]
    parts = {
        "imports, checks, Ray and its workers": [run["ready"] for run in alone],
        "model, DeepSpeed, first step": [run["first"] - run["ready"] for run in alone],
        "command to first step": [run["first"] for run in alone],
    }
    rows: list[Row] = [{"part": part, "seconds": spread(values)} for part, values in parts.items() if values]
    return Table("train: start", rows, ["one worker, shards ready, no running cluster"])


def main(words: Sequence[str], prog: str = "sora bench train") -> int:
    """The command; returns the exit status."""
    flags = Flags(f"{prog} RECIPE", ABOUT)
    flags.flag("steps", 40, "steps of each `sora train`, the first quarter of which does not count; at least 8")
    flags.flag("rounds", 2, "times that `sora train` is started with one worker")
    flags.flag("workers", [1, 2], "numbers of workers; each takes cluster.cpus_per_worker cores")
    options, rest = flags.parse_with_rest(words)
    recipe = recipe_in(rest, "train")
    if options.steps < 8:
        raise RecipeError(f"--steps {options.steps} is too few. Use 8 or more")
    return finish(bench(options, recipe, rest), ["train", *words], options.out)
