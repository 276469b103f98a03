"""`sora bench validate`: steps a second of a run while a validation samples beside it, and while none does."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from sora_train.bench.core import Row, Table, say, spread
from sora_train.bench.options import Common, parse
from sora_train.bench.output import finish
from sora_train.bench.recipes import Training, lines, recipe_in, train
from sora_train.errors import RecipeError, UserError

ABOUT = (
    "Trains one run of a recipe whose shards are ready, with a validation every so many steps, and counts steps in "
    "spans of two seconds: with a validation's process there for all of a span, and without. Any key of the recipe is "
    "a flag too.\n\nFor instance: sora bench validate jobs/quickstart.yaml --cluster.workers 1"
)


@dataclass(frozen=True)
class Options(Common):
    """How much of it."""

    steps: int = 400
    """Steps of the run."""
    every: int = 100
    """Steps between two validations."""
    sampler_steps: int = 100
    """Steps of the sampler: how long a validation takes."""
    span_s: float = 2.0
    """Seconds of a span in which steps are counted."""
    settle_steps: int = 20
    """Steps before the first span."""


def bench(options: Options, words: Sequence[str]) -> list[Table]:
    """A table of two rows. Raises UserError where the run fails."""
    if not options.every or options.steps < 2 * options.every or not options.span_s > 0:
        raise RecipeError("--steps must be two times --every at least, and --span_s more than 0")
    with tempfile.TemporaryDirectory() as folder:
        flags: dict[str, object] = {
            "train.steps": options.steps, "train.checkpoint_every": options.every,
            "validation.every": options.every, "validation.steps": options.sampler_steps,
        }  # fmt: skip
        say(f"training {options.steps} steps")
        training = train(words, "validated", folder, flags)
        rates = count(training, options)
        training.end()
    return [table_of(rates, options.span_s)]


def count(training: Training, options: Options) -> dict[bool, list[float]]:
    """Steps a second of spans with a validation (True) and without."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    while training.process.poll() is None and steps_done(training)[1] < options.settle_steps:
        time.sleep(0.1)
    busy, before = validates(training.process.pid), steps_done(training)
    while training.process.poll() is None and before[1] < options.steps:
        time.sleep(options.span_s)
        now, still = steps_done(training), validates(training.process.pid)
        if busy == still and now[1] < options.steps:  # all the time, as far as two looks tell
            rates[still].append((now[1] - before[1]) / (now[0] - before[0]))
        busy, before = still, now
    return rates


def steps_done(training: Training) -> tuple[float, int]:
    """The clock, and the last step that was logged."""
    done = lines(training.run / "metrics.jsonl")  # validations write their figures there too, of earlier steps
    return time.monotonic(), max((line["step"] for line in done if "step_s" in line), default=0)


def validates(pid: int) -> bool:
    """Whether a process that validates a checkpoint is among those that this one started."""
    try:
        started = psutil.Process(pid).children(recursive=True)
    except psutil.Error:  # it has ended itself
        return False
    for process in started:
        try:
            if "sora_train.launch.validation validate" in " ".join(process.cmdline()):
                return True
        except psutil.Error:  # it ended meanwhile
            continue
    return False


def table_of(rates: dict[bool, list[float]], span_s: float) -> Table:
    """Medians of both kinds of spans, and their ratio."""
    names = {False: "no validation", True: "a validation beside it"}
    rows: list[Row] = [
        {"spans with": names[busy], "steps_per_s": spread(values), "of without": None}
        for busy, values in sorted(rates.items())
        if values
    ]
    if all(rates.values()):
        rows[1]["of without"] = statistics.median(rates[True]) / statistics.median(rates[False])
    failed = [
        f"no span of {span_s:g} s with {names[busy]}: raise --steps" for busy, values in rates.items() if not values
    ]
    return Table("validate", rows, [f"spans of {span_s:g} s in one run"], failed)


def main(words: Sequence[str], prog: str = "sora bench validate") -> int:
    """The command; returns the exit status."""
    options, rest = parse(Options, words, f"{prog} RECIPE", ABOUT)
    recipe = recipe_in(rest, "validate")
    if not recipe.validation.prompts:
        raise UserError("the recipe has no validation.prompts; give some, such as --validation.prompts 'a red circle'")
    return finish(bench(options, rest), options, ["validate", *words])
