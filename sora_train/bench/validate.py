"""`sora bench validate`: seconds of a step with and without a validation running next to training."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from sora_train.bench.core import Flags, Row, Table, finish, log, spread
from sora_train.bench.runs import recipe_in, train
from sora_train.errors import RecipeError, UserError

ABOUT = """Trains one run of a recipe whose shards exist, with a validation every so many steps, and compares the steps
during which a validation ran with the others. Any key of the recipe is a flag too. Example: sora bench validate
jobs/quickstart.yaml --cluster.workers 1"""
WARM_UP_STEPS = 20


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


def main(words: Sequence[str], prog: str = "sora bench validate") -> int:
    """The command; returns the exit status."""
    flags = Flags(f"{prog} RECIPE", ABOUT)
    flags.flag("steps", 400, "steps of the run; at least twice --every")
    flags.flag("every", 100, "steps between two validations")
    flags.flag("sampler_steps", 100, "sampler steps: how long a validation takes")
    options, rest = flags.parse_with_rest(words)
    recipe = recipe_in(rest, "validate")
    if options.steps < 2 * options.every:
        raise RecipeError(f"--steps {options.steps} is less than twice --every {options.every}. Use more steps")
    if not recipe.validation.prompts:
        raise UserError("validation.prompts is empty. Add prompts, such as --validation.prompts 'a red circle'")
    with tempfile.TemporaryDirectory() as folder:
        log(f"training {options.steps} steps")
        metrics, _ = train(rest, "validated", folder, {
            "train.steps": options.steps, "train.checkpoint_every": options.every,
            "validation.every": options.every, "validation.steps": options.sampler_steps,
        })  # fmt: skip
    return finish([table_of(split_steps(metrics, options.every))], ["validate", *words], options.out)
