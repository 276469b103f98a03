"""What benches of a recipe share: the recipe in a command's words, and `sora` started as people start it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_train.errors import RecipeError, UserError
from sora_train.recipe import Recipe, load_recipe
from sora_train.settings import parse_flags

LOOK_S = 0.02


def recipe_in(words: Sequence[str], what: str) -> Recipe:
    """The recipe that words name, with its flags laid over it. RecipeError where they are none."""
    overrides, files = parse_flags(words, Recipe)
    if len(files) != 1:
        raise RecipeError(f"takes one RECIPE, got {' '.join(files) or 'none'}: sora bench {what} jobs/quickstart.yaml")
    return load_recipe(files[0], overrides)


@dataclass
class Training:
    """A `sora train` that was started, and when it came how far, in seconds since the command."""

    process: subprocess.Popen
    run: Path
    log: Path
    began: float
    marks: dict[str, float]

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def look(self) -> None:
        """Notes what has happened since."""
        now = time.monotonic() - self.began
        for name, there in (
            ("checked", lambda: "starting Ray" in self.output()),
            ("begun", lambda: bool(lines(self.run / "events.jsonl"))),
            ("first step", lambda: bool(lines(self.run / "metrics.jsonl"))),
        ):
            if name not in self.marks and there():
                self.marks[name] = now

    def end(self, timeout_s: float = 1800) -> list[dict[str, Any]]:
        """Waits for it; the lines of its metrics. UserError where it failed or did not end in time."""
        until = time.monotonic() + timeout_s
        try:
            while self.process.poll() is None and time.monotonic() < until:
                if "first step" not in self.marks:
                    self.look()
                time.sleep(LOOK_S if "first step" not in self.marks else 0.25)
        finally:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(60)
                self.process.kill()
        if self.process.returncode:
            said = " ".join(self.output().strip().splitlines()[-3:])
            raise UserError(f"sora train ended with exit status {self.process.returncode}: {said[-500:]}")
        return lines(self.run / "metrics.jsonl")


def train(words: Sequence[str], name: str, folder: str | Path, flags: dict[str, object]) -> Training:
    """Starts `sora train WORDS` as a run of this name in a folder, with more flags; nothing goes to wandb."""
    run = Path(folder) / name
    flags = {"name": name, "train.output": str(folder), "tracking.wandb": "off", "train.log_every": 1, **flags}
    if not any(word.startswith(("--cluster.address", "--cluster.address=")) for word in words):
        flags["cluster.address"] = "local"  # not somebody else's that happens to run here
    given = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    log = Path(folder) / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "sora_train.cli", "train", *words, *given],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    return Training(process, run, log, time.monotonic(), {})


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; none where there is no file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
