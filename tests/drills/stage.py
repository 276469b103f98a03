"""Shared by the drills: recipe, shards, the undisturbed run, and comparison with it."""

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from sora_train.quickstart.shapes import make_clips
from sora_train.train.checkpoint import complete_checkpoints
from tests.drills.commands import Command, end, lines, start
from tests.drills.history import Account, account, difference

STEPS, CLIPS, BATCH, EVERY, SEED = 60, 48, 4, 6, 0
HALF = 24
"""The checkpoint from which half runs resume."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    fault: str
    times: int = 1
    exits: str = "—"
    again: int | str = "—"
    lost: int | str = "—"
    repeated: int | str = "—"
    difference: str = "—"
    verdict: str = "holds"
    holds: bool = True


class Stage:
    """A folder with the recipe, the shards and the undisturbed run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs, self.logs = root / "runs", root / "logs"
        self.runs.mkdir(exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        self.recipe = root / "recipe.yaml"
        settings = {
            "data": {"captions": str(root / "clips" / "captions.csv"), "output": str(root / "shards"),
                     "frames": 4, "fps": 8, "height": 64, "width": 64},
            "codec": {"vae": "builtin", "text": "builtin", "precision": "fp32", "text_precision": "fp32"},
            "model": {"width": 32, "depth": 2, "heads": 2, "sample_size": 8, "text_width": 64},
            "train": {"output": str(self.runs), "steps": STEPS, "batch_size": BATCH, "micro_batch_size": 2,
                      "learning_rate": 3e-4, "warmup_steps": 5, "schedule": "cosine", "ema_decay": 0.99, "seed": SEED,
                      "precision": "fp32", "zero_stage": 1, "log_every": 1, "log_samples": True,
                      "checkpoint_every": EVERY, "keep_checkpoints": 100},
            "validation": {"every": 0},
            "cluster": {"address": "local", "workers": 2, "gpu": "no", "max_failures": 20, "elastic_poll_s": 5},
        }  # fmt: skip
        self.recipe.write_text(yaml.safe_dump(settings))

    def train(
        self, name: str, *flags: str, delay_s: float = 0.0, validation_s: float = 0.0, output: Path | None = None
    ) -> Command:
        """Starts `sora train` of a run, its steps and validations delayed; the same name and flags again are the same
        command.
        """
        output = output or self.runs
        words = ["train", str(self.recipe), "--name", name, "--train.output", str(output), *flags]
        delays = {"SORA_STEP_DELAY_S": str(delay_s), "SORA_VALIDATION_DELAY_S": str(validation_s)}
        return start(words, output / name, self.logs, {**ONE_THREAD, **delays})

    @cached_property
    def shards(self) -> Path:
        make_clips(self.root / "clips", CLIPS)
        prep = start(["prep", str(self.recipe)], self.root / "prep", self.logs, ONE_THREAD)
        assert end(prep) == 0, prep.output()
        return self.root / "shards"

    @cached_property
    def unbroken(self) -> Path:
        """The undisturbed run."""
        assert self.shards.is_dir()
        command = self.train("unbroken")
        assert end(command) == 0, command.output()
        found = account(command.run, self.shards)
        assert found == Account(0, 0, 0, 0, 0), found
        return command.run

    def half(self, name: str, output: Path | None = None) -> Path:
        """A copy of the unbroken run as it was at step `HALF`."""
        run = (output or self.runs) / name
        shutil.copytree(self.unbroken, run)
        for step, path in complete_checkpoints(run / "checkpoints"):
            if step > HALF:
                shutil.rmtree(path)
        for path in (run / "metrics.jsonl", run / "events.jsonl", *(run / "trained").iterdir()):
            kept = [line for line in lines(path) if line["step"] <= HALF and line.get("event") != "end"]
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        return run


def say(line: str) -> None:
    print(f"    {line}", flush=True)


def compare_runs(
    stage: Stage, fault: str, run: Path, exits: list[int], *, want: list[int], times: int = 1, tolerance: float = 0.0,
    until: int | None = None, wrong: list[str] | None = None, remark: str = "",
) -> Row:  # fmt: skip
    """The row of a finished run, compared with the undisturbed one up to step `until`."""
    wrong, codes = list(wrong or []), ", ".join(map(str, exits))
    if exits != want:
        wrong.append(f"exit {exits}, not {want}")
        return Row(fault, times, codes, verdict=verdict(wrong)[0], holds=False)
    found, off = account(run, stage.shards), difference(run, stage.unbroken, until)
    if found.lost or found.repeated:
        wrong.append("samples are not exact")
    if found.unseen:
        wrong.append(f"state.json counts {found.unseen} clips more than the ranks wrote down")
    if off > tolerance:
        wrong.append(f"losses differ by {off:.1e}, more than {tolerance:g}")
    if until is None and found.named:
        wrong.append(f"{found.named} clips left out")
    shown = "0, bit for bit" if off == 0 else f"{off:.1e}"
    if until is not None:
        shown += f", to step {until}"
    return Row(fault, times, codes, found.again, found.lost, found.repeated, shown, *verdict(wrong, remark))


def verdict(wrong: list[str], remark: str = "") -> tuple[str, bool]:
    """The verdict as text, and whether all is well."""
    return (f"FAILED: {'; '.join(wrong)}" if wrong else f"holds{remark and ': '}{remark}"), not wrong


def check_refusal(command: Command, code: int, *needles: str) -> list[str]:
    """What is wrong with a command's failure: it needs one message with these words, and no traceback."""
    output = command.output()
    said = [line for line in output.splitlines() if line.startswith("sora ")]
    say(f"exit {code}: {said[0] if said else output[-300:]}")
    wrong = [] if code == 1 else [f"exit {code}, not 1"]
    wrong += [f"{len(said)} messages"] if len(said) != 1 else []
    wrong += ["a traceback is shown"] if "Traceback" in output else []
    return wrong + [f"the message does not say {needle!r}" for needle in needles if needle not in output]


def check_newest(run: Path, step: int) -> list[str]:
    found = [at for at, _ in complete_checkpoints(run / "checkpoints")]
    return [] if found[-1:] == [step] else [f"whole checkpoints are {found}, not up to {step}"]
