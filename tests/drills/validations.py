"""Drills with validations that fail, hang, are killed or are slow: training must neither end nor wait."""

import statistics
from collections.abc import Callable
from pathlib import Path

import psutil

from sora_train.bench.validate import split_steps
from sora_train.train.metrics import JsonLines
from tests.drills.commands import Command, end, family, start, title, wait_for, wait_for_step
from tests.drills.history import events, losses
from tests.drills.stage import EVERY, ONE_THREAD, STEPS, Row, Stage, compare_runs, say, verdict

FIRST = 2 * EVERY
PROMPT = "a red circle moving left"
ASKED = ("--validation.every", str(FIRST), "--validation.prompts", PROMPT, "--validation.steps", "2")


def raises(stage: Stage) -> Row:
    """The EMA weights of its checkpoint are damaged before it loads them."""
    command = stage.train("validation-raises", *ASKED, delay_s=0.2, validation_s=5)
    wait_for(command, "a validation", lambda: bool(children(command)))
    weights = command.run / f"checkpoints/step_{FIRST:08d}/ema.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2 :] = b""
    weights.write_bytes(damaged)
    return outcome(stage, "a validation raises: its weights are damaged", command, "is cut short")


def hangs(stage: Stage) -> Row:
    """Every validation takes ten minutes, with a timeout of three seconds."""
    command = stage.train("validation-hangs", *ASKED, "--validation.timeout_s", "3", delay_s=0.2, validation_s=600)
    return outcome(stage, "every validation hangs past its timeout", command, "ended after validation.timeout_s 3")


def killed(stage: Stage) -> Row:
    """`kill -9` of both attempts."""
    command = stage.train("validation-killed", *ASKED, delay_s=0.2, validation_s=5)
    for attempt in range(2):
        wait_for(command, f"attempt {attempt}", lambda: len(events(command.run, "validation_failed")) == attempt)  # noqa: B023
        wait_for(command, f"attempt {attempt}", lambda: bool(children(command)))
        for child in children(command):
            child.kill()
        say(f"kill -9 of attempt {attempt + 1}")
    return outcome(stage, "kill -9 of a validation, both attempts", command, "signal 9")


def supervisor_killed(stage: Stage) -> Row:
    """`kill -9` of the Ray task that supervises a validation: Ray restarts it."""
    command = stage.train("supervisor-killed", *ASKED, delay_s=0.2, validation_s=5)
    wait_for(command, "a validation", lambda: bool(children(command)))
    supervisor = children(command)[0].parent()
    assert supervisor is not None
    say(f"kill -9 of {title(supervisor)}")
    supervisor.kill()
    return outcome(stage, "kill -9 of what watches over a validation", command, "died; retrying", done=(FIRST,))


def slow(stage: Stage) -> Row:
    """Each validation takes a minute; all steps of the run finish meanwhile."""
    command = stage.train("validation-slow", *ASKED, delay_s=0.1, validation_s=60)
    wait_for(command, "a validation", lambda: bool(children(command)))
    at = max(losses(command.run))
    wait_for_step(command, STEPS)
    wrong = (
        ["the validation of step 12 ended before the training did"] if events(command.run, "validation_done") else []
    )
    say(f"steps {at} to {STEPS} were done while one validation ran")
    row = outcome(stage, "a validation slowed to 60 s", command, "", done=(FIRST, STEPS), wrong=wrong)
    return row


def outcome(
    stage: Stage, fault: str, command: Command, reason: str, done: tuple[int, ...] = (), wrong: list[str] | None = None
) -> Row:  # fmt: skip
    """The row of a run whose training must have finished undisturbed, with an event for the fault."""
    code, wrong = end(command, timeout_s=600), list(wrong or [])
    noted = [event["reason"] for event in events(command.run, "validation_failed")]
    if reason and not any(reason in text for text in noted):
        wrong.append(f"events.jsonl does not say {reason!r}, but {noted}")
    finished = [event["step"] for event in events(command.run, "validation_done")]
    if not set(done) <= set(finished):
        wrong.append(f"validations of steps {finished} were done, not {done}")
    wrong += [] if events(command.run, "end") else ["training did not end normally"]
    remark = f"{len(noted)} noted, {len(finished)} validations done"
    return compare_runs(stage, fault, command.run, [code], want=[0], wrong=wrong, remark=remark)


def throughput(stage: Stage) -> Row:
    """Steps per second with and without a validation that samples on another core, within one run."""
    recipe = Path(__file__).parents[2] / "jobs/quickstart.yaml"
    flags = {"data.output": str(stage.shards), "data.holdout_fraction": "0", "data.frames": "4", "name": "throughput",
             "train.output": str(stage.runs), "train.steps": "400", "train.log_every": "1",
             "train.checkpoint_every": "100", "validation.every": "100", "validation.steps": "200",
             "cluster.workers": "1", "cluster.address": "local", "tracking.wandb": "off"}  # fmt: skip
    words = ["train", str(recipe), *(word for key, value in flags.items() for word in (f"--{key}", value))]
    command = start(words, stage.runs / "throughput", stage.logs, ONE_THREAD)
    code = end(command, timeout_s=600)
    found = split_steps(JsonLines(command.run / "metrics.jsonl").read(), every=100)
    with_it, without = (1 / statistics.fmean(found[busy]) if found[busy] else float("nan") for busy in (True, False))
    remark = (
        f"{with_it / without:.2f} of the steps a second without one ({with_it:.2f} against {without:.2f}, means of "
        f"{len(found[True])} and {len(found[False])} steps; one worker, two cores)"
    )
    return Row("none: throughput while a validation samples", exits=str(code), again=0,
               verdict=verdict([] if code == 0 else [f"exit {code}"], remark)[0], holds=code == 0)  # fmt: skip


def children(command: Command) -> list[psutil.Process]:
    """The present validation processes."""
    return [process for process in family(command) if "sora_train.launch.validation validate" in title(process)]


DRILLS: dict[str, Callable[[Stage], Row]] = {
    "validation-raises": raises,
    "validation-hangs": hangs,
    "validation-killed": killed,
    "supervisor-killed": supervisor_killed,
    "validation-slow": slow,
    "validation-throughput": throughput,
}
