"""The recipe among a bench's words, and `sora train` started as a user would start it."""

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
from sora_train.flags import parse_flags
from sora_train.recipe import Recipe, load_recipe


def recipe_in(words: Sequence[str], bench: str) -> Recipe:
    """The recipe that the words name, with their flags applied. RecipeError if they don't name one recipe."""
    overrides, files = parse_flags(words, Recipe)
    if len(files) != 1:
        raise RecipeError(f"takes one RECIPE, got {' '.join(files) or 'none'}: sora bench {bench} jobs/quickstart.yaml")
    return load_recipe(files[0], overrides)


@dataclass(frozen=True)
class Run:
    """A `sora train` process, its run folder and its log."""

    process: subprocess.Popen
    folder: Path
    log: Path
    began: float
    """When it was started, on the monotonic clock."""

    def wait_for(self, name: str) -> float:
        """Waits until a JSON-lines file of the run has a line or the process ends; seconds since the start."""
        while self.process.poll() is None and not lines(self.folder / name):
            time.sleep(0.02)
        return time.monotonic() - self.began

    def finish(self, timeout_s: float = 1800) -> list[dict[str, Any]]:
        """Waits for the end and returns the lines of metrics.jsonl. UserError if the run failed or took too long."""
        if code := wait(self.process, timeout_s):
            said = " ".join(self.log.read_text(errors="replace").strip().splitlines()[-3:])
            raise UserError(f"sora train ended with exit status {code}: {said[-500:]}")
        return lines(self.folder / "metrics.jsonl")


def wait(process: subprocess.Popen, timeout_s: float) -> int:
    """The exit status of a `sora` process. Interrupts it first if it takes too long, so that it can stop Ray."""
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout_s)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(60) or 1
        return 1
    finally:
        if process.poll() is None:
            process.kill()


def start_training(words: Sequence[str], name: str, folder: str | Path, flags: dict[str, object]) -> Run:
    """Starts `sora train WORDS` as a run of this name in a folder, with more flags and without wandb."""
    flags = {"name": name, "train.output": str(folder), "tracking.wandb": "off", "train.log_every": 1, **flags}
    if not any(word.startswith("--cluster.address") for word in words):
        flags["cluster.address"] = "local"  # not a cluster of someone else on this machine
    given = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    log = Path(folder) / f"{name}.log"
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "sora_train.cli", "train", *words, *given],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    return Run(process, Path(folder) / name, log, began)


def lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; empty if it does not exist."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
