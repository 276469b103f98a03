"""`sora bench validate`: steps per second of a run with and without a validation running next to it."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from sora_train.bench.core import Flags, Row, Table, finish, log, spread
from sora_train.bench.runs import lines, recipe_in, start_training
from sora_train.errors import RecipeError, UserError

ABOUT = """Trains one run of a recipe whose shards exist, with a validation every so many steps, and counts steps in
spans of some seconds: spans in which a validation's process was running, and spans in which none was. Any key of the
recipe is a flag too. Example: sora bench validate jobs/quickstart.yaml --cluster.workers 1"""
WARM_UP_STEPS = 20


def count_steps(process: subprocess.Popen, run: Path, steps: int, span_s: float = 2.0) -> dict[bool, list[float]]:
    """Steps per second of spans with a validation (True) and without, until the run has made so many steps."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    while process.poll() is None and last_step(run) < WARM_UP_STEPS:
        time.sleep(0.1)
    validating, before, began = is_validating(process.pid), last_step(run), time.monotonic()
    while process.poll() is None and before < steps:
        time.sleep(span_s)
        still, now, ended = is_validating(process.pid), last_step(run), time.monotonic()
        if validating == still and now < steps:
            rates[still].append((now - before) / (ended - began))
        validating, before, began = still, now, ended
    return rates


def last_step(run: Path) -> int:
    """The last training step in metrics.jsonl; validations write there too, of earlier steps."""
    return max((line["step"] for line in lines(run / "metrics.jsonl") if "step_s" in line), default=0)


def is_validating(pid: int) -> bool:
    """Whether a process has a descendant that validates a checkpoint."""
    try:
        descendants = psutil.Process(pid).children(recursive=True)
    except psutil.Error:  # it has ended
        return False
    for process in descendants:
        try:
            if "sora_train.launch.validation validate" in " ".join(process.cmdline()):
                return True
        except psutil.Error:  # it has ended meanwhile
            continue
    return False


def table_of(rates: dict[bool, list[float]], span_s: float) -> Table:
    """The rates of both kinds of spans, and their ratio."""
    names = {False: "no validation", True: "a validation"}
    rows: list[Row] = [
        {"spans with": names[kind], "steps_per_s": spread(values), "of without": None}
        for kind, values in sorted(rates.items())
        if values
    ]
    if all(rates.values()):
        rows[1]["of without"] = statistics.median(rates[True]) / statistics.median(rates[False])
    failed = [
        f"no span of {span_s:g} s with {names[kind]}. Use more --steps" for kind, values in rates.items() if not values
    ]
    return Table("validate", rows, [f"spans of {span_s:g} s in one run"], failed)


def main(words: Sequence[str], prog: str = "sora bench validate") -> int:
    """The command; returns the exit status."""
    flags = Flags(f"{prog} RECIPE", ABOUT)
    flags.flag("steps", 400, "steps of the run; at least twice --every")
    flags.flag("every", 100, "steps between two validations")
    flags.flag("sampler_steps", 100, "sampler steps: how long a validation takes")
    flags.flag("span_s", 2.0, "seconds of a span in which steps are counted")
    options, rest = flags.parse_with_rest(words)
    recipe = recipe_in(rest, "validate")
    if options.steps < 2 * options.every:
        raise RecipeError(f"--steps {options.steps} is less than twice --every {options.every}. Use more steps")
    if not recipe.validation.prompts:
        raise UserError("validation.prompts is empty. Add prompts, such as --validation.prompts 'a red circle'")
    with tempfile.TemporaryDirectory() as folder:
        log(f"training {options.steps} steps")
        run = start_training(rest, "validated", folder, {
            "train.steps": options.steps, "train.checkpoint_every": options.every,
            "validation.every": options.every, "validation.steps": options.sampler_steps,
        })  # fmt: skip
        rates = count_steps(run.process, run.folder, options.steps, options.span_s)
        run.finish()
    return finish([table_of(rates, options.span_s)], ["validate", *words], options.out)
