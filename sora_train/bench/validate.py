"""`sora bench validate`: seconds of a step with and without a validation running next to training.

Trains one run of a recipe whose shards exist, with a validation every so many steps, and compares the steps during
which a validation ran with the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from pydantic import PositiveInt

from sora_train.bench.core import BenchOptions, Row, Table, log, spread
from sora_train.bench.runs import train
from sora_train.errors import RecipeError, UserError
from sora_train.recipe import Recipe

WARM_UP_STEPS = 20


class Options(BenchOptions):
    """The flags."""

    steps: PositiveInt = 400
    """Steps of the run; at least twice --every."""
    every: PositiveInt = 100
    """Steps between two validations."""
    sampler_steps: PositiveInt = 100
    """Sampler steps: how long a validation takes."""


def bench(options: Options, recipe: Recipe) -> list[Table]:
    """One row for each kind of steps."""
    if options.steps < 2 * options.every:
        raise RecipeError(f"--steps {options.steps} is less than twice --every {options.every}. Use more steps")
    if not recipe.validation.prompts:
        raise UserError(
            "validation.prompts is empty. Add prompts, such as --validation.prompts 'a red circle'", code="evaluation"
        )
    log(f"training {options.steps} steps")
    metrics, _ = train(recipe, {
        "train.steps": options.steps, "train.checkpoint_every": options.every,
        "validation.every": options.every, "validation.steps": options.sampler_steps,
    })  # fmt: skip
    return [table_of(split_steps(metrics, options.every))]


def split_steps(metrics: Iterable[dict[str, Any]], every: int) -> dict[bool, list[float]]:
    """Seconds of the steps during which a validation ran (True) and of the others, from a run's metrics.

    A validation starts with its checkpoint, every `every` steps, and ends with its own line.
    """
    found: dict[bool, list[float]] = {False: [], True: []}
    running: set[int] = set()
    for line in metrics:
        if line.get("validation"):
            running.discard(line["step"])
            continue
        if line["step"] > WARM_UP_STEPS:
            found[bool(running)].append(line["step_s"])
        if line["step"] % every == 0:
            running.add(line["step"])
    return found


def table_of(found: dict[bool, list[float]]) -> Table:
    """Both kinds of steps, and the ratio of their rates."""
    names = {False: "no validation", True: "a validation"}
    rows: list[Row] = [
        {"steps with": names[kind], "steps": len(values), "step_s": spread(values), "rate, of without": None}
        for kind, values in found.items()
        if values
    ]
    if all(found.values()):
        rows[1]["rate, of without"] = statistics.fmean(found[False]) / statistics.fmean(found[True])
    failed = [f"no step with {names[kind]}. Use more --steps" for kind, values in found.items() if not values]
    return Table("validate", rows, ["one run; the rate compares means"], failed)
