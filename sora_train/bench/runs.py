"""The recipe among a bench's words, and `sora train` started as a user would start it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sora_train.errors import RecipeError, UserError
from sora_train.flags import parse_flags
from sora_train.recipe import Recipe, load_recipe
from sora_train.train.metrics import JsonLines


def recipe_in(words: Sequence[str], bench: str) -> Recipe:
    """The recipe that the words name, with their flags applied. RecipeError if they don't name one recipe."""
    overrides, files = parse_flags(words, Recipe)
    if len(files) != 1:
        raise RecipeError(f"takes one RECIPE, got {' '.join(files) or 'none'}: sora bench {bench} jobs/quickstart.yaml")
    return load_recipe(files[0], overrides)


def train(words: Sequence[str], name: str, folder: str, flags: dict[str, object]) -> tuple[list[dict[str, Any]], float]:
    """Runs `sora train WORDS` in a folder, with more flags. UserError if it fails.

    Returns the lines of metrics.jsonl, one of each step, and the seconds from the start to the first step.
    """
    flags = {"name": name, "train.output": folder, "tracking.wandb": "off", "train.log_every": 1, **flags}
    if not any(word.startswith("--cluster.address") for word in words):
        flags["cluster.address"] = "local"  # not a cluster of someone else on this machine
    given = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    command, log = [sys.executable, "-m", "sora_train.cli", "train", *words, *given], Path(folder) / f"{name}.log"
    metrics, began = JsonLines(Path(folder) / name / "metrics.jsonl"), time.monotonic()
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        while process.poll() is None and not metrics.read():
            time.sleep(0.02)
        first = time.monotonic() - began
    if process.returncode:
        said = " ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
        raise UserError(f"sora train ended with exit status {process.returncode}: {said[-500:]}")
    return metrics.read(), first
