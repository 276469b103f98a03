"""`sora bench train`: a step of `sora train` beside a bare torch loop, what each part adds, workers, and start-up."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from sora_train.bench.core import Row, Table, interleave, one_line, say, spread
from sora_train.bench.options import Common, parse
from sora_train.bench.output import finish
from sora_train.bench.overhead import RUNGS, Climber, Rung
from sora_train.bench.process import Process
from sora_train.bench.recipes import recipe_in, train
from sora_train.errors import RecipeError, UserError
from sora_train.recipe import Recipe

ABOUT = (
    "Times training steps of a recipe whose shards are ready. First one worker: a bare torch loop with the same model, "
    "batch, optimizer and threads beside the same with DeepSpeed, averaged weights, reading, and the whole loop, each "
    "in a process that takes its turn; and `sora train` itself, with Ray. Then `sora train` with 1, 2, 4 … workers. "
    "And the seconds from the command to the first step. Any key of the recipe is a flag too.\n\n"
    "For instance: sora bench train jobs/quickstart.yaml --workers 1 2 --data.output runs/quickstart/shards"
)
RAY = "sora train, with Ray"


@dataclass(frozen=True)
class Options(Common):
    """How much of it."""

    steps: int = 40
    """Steps of each `sora train`, the first quarter of which does not count; turns of the others are a tenth."""
    rounds: int = 2
    """Times that `sora train` is started for one worker; the rungs take ten turns in between."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of workers, `1 2 4`; each takes cluster.cpus_per_worker cores."""


def bench(options: Options, recipe: Recipe, words: Sequence[str]) -> list[Table]:
    """Three tables. Raises UserError where the recipe can't be trained."""
    if options.steps < 8 or not options.rounds or 0 in options.workers:
        raise RecipeError("--steps takes 8 or more, --rounds and --workers 1 or more")
    from sora_train.data.shards import ShardSet

    ShardSet(recipe.data.output, recipe.data.holdout_fraction, "train")
    with tempfile.TemporaryDirectory() as folder:
        parts, starts = of_parts(options, recipe, words, folder)
        return [parts, of_workers(options, words, folder, starts), of_start(starts)]


def of_parts(options: Options, recipe: Recipe, words: Sequence[str], folder: str) -> tuple[Table, list[Row]]:
    """The ladder with `sora train` on top; and what its starts were like."""
    each = max(options.steps // 10, 1)
    given = recipe.model_dump(mode="json")
    climbers = {
        name: Process(Climber, Rung(name, given, each, tempfile.mkdtemp(dir=folder))) for name in RUNGS
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in RUNGS}
    failed: list[str] = []
    starts: list[Row] = []
    try:
        for turn in range(options.rounds):
            say(f"turn {turn + 1}: a step in parts")
            acts = {name: partial(climbers[name].ask, "turn") for name in found}
            took, broken = interleave(acts, rounds=10, warm_up=2 if turn == 0 else 1)
            failed += [f"{name}: {why}" for name, why in broken.items()]
            found = {name: found[name] + values for name, values in took.items()}
            say(f"turn {turn + 1}: sora train with 1 worker")
            starts += started(options, words, 1, f"w1-{turn}", folder, failed)
    finally:
        for climber in climbers.values():
            climber.end()
    if whole := [step for start in starts for step in start["steps"]]:
        found[RAY] = whole
    return parts_table(recipe, found, failed), starts


def parts_table(recipe: Recipe, found: dict[str, list[float]], failed: list[str]) -> Table:
    """What a step takes with each part, beside the bare one, and what the part adds."""
    bare = statistics.median(found[RUNGS[0]]) if found.get(RUNGS[0]) else None
    before: dict[str, str] = {b: a for a, b in pairwise(found)}
    rows: list[Row] = []
    for name, values in found.items():
        here = statistics.median(values)
        adds = here - statistics.median(found[before[name]]) if name in before else None
        rows.append(
            {
                "step": name,
                "step_s": spread(values),
                "clips_per_s": recipe.train.batch_size / here,
                "of bare": here / bare if bare else None,
                "of bare, at best": min(values) / min(found[RUNGS[0]]) if bare else None,
                "adds_ms": None if adds is None else 1000 * adds,
            }
        )
    notes = [
        f"one worker of {recipe.cluster.cpus_per_worker} threads, batch {recipe.train.batch_size} in micro-batches of "
        f"{recipe.train.micro_batch_size}, ZeRO {recipe.train.zero_stage}, {recipe.train.precision}; each line is the "
        "one before and one thing more; adds: medians' difference; at best: least over least, which "
        "other programs and a machine whose speed wanders move least",
    ]
    return Table("train: parts of a step", rows, notes, failed)


def started(
    options: Options, words: Sequence[str], workers: int, name: str, folder: str, failed: list[str]
) -> list[Row]:  # fmt: skip
    """One `sora train`: its steps' seconds, its waits for data, and when it came how far; or none, where it failed."""
    flags: dict[str, Any] = {
        "cluster.workers": workers, "train.steps": options.steps, "train.checkpoint_every": options.steps,
        "validation.every": 0,
    }  # fmt: skip
    try:
        training = train(words, name, folder, flags)
        measured = training.end()[options.steps // 4 :]
    except UserError as error:
        failed.append(f"{workers} workers: {one_line(error)}")
        return []
    return [
        {
            "workers": workers,
            "steps": [line["step_s"] for line in measured],
            "clips_per_s": [line["samples_per_s"] for line in measured],
            "waits": [line["data_wait_share"] for line in measured],
            "mfu": [line["mfu"] for line in measured if line["mfu"] is not None],
            **training.marks,
        }
    ]


def of_workers(options: Options, words: Sequence[str], folder: str, starts: list[Row]) -> Table:
    """`sora train` with more and more workers."""
    failed: list[str] = []
    for workers in sorted({*options.workers} - {1}):
        say(f"sora train with {workers} workers")
        starts += started(options, words, workers, f"w{workers}", folder, failed)
    rows: list[Row] = []
    one: float | None = None
    for workers in sorted({start["workers"] for start in starts}):
        mine = [start for start in starts if start["workers"] == workers]

        def all_of(key: str) -> list[float]:
            return [value for start in mine for value in start[key]]  # noqa: B023

        rate = statistics.median(all_of("clips_per_s"))
        one = rate if workers == 1 else one
        rows.append(
            {
                "workers": workers,
                "step_s": spread(all_of("steps")),
                "clips_per_s": rate,
                "of so many times 1 worker": rate / (one * workers) if one else None,
                "data_wait": statistics.fmean(all_of("waits")),
                "mfu": statistics.median(all_of("mfu")) if all_of("mfu") else None,
            }
        )
    notes = ["the same batch for any number of workers; data_wait: share of the time"]
    return Table("train: workers", rows, notes, failed)


def of_start(starts: list[Row]) -> Table:
    """Seconds from the command to the first step, in parts."""
    names = ("checked", "begun", "first step")
    titles = ("imports and checks", "Ray and its workers", "model, DeepSpeed, first step")
    marks = [start for start in starts if set(names) <= start.keys() and start["workers"] == 1]
    rows: list[Row] = []
    if marks:
        befores = (None, "checked", "begun")
        for title, name, before in zip(titles, names, befores, strict=True):
            rows.append({"part": title, "seconds": spread([m[name] - (m[before] if before else 0) for m in marks])})
        rows.append({"part": "command to first step", "seconds": spread([m["first step"] for m in marks])})
    return Table("train: start", rows, ["one worker, shards ready, no cluster running; as seen from outside"])


def main(words: Sequence[str], prog: str = "sora bench train") -> int:
    """The command; returns the exit status."""
    options, rest = parse(Options, words, f"{prog} RECIPE", ABOUT)
    return finish(bench(options, recipe_in(rest, "train"), rest), options, ["train", *words])
