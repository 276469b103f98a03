"""`sora train` started as a user would start it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sora_train.errors import UserError
from sora_train.recipe import Recipe, save_recipe
from sora_train.settings import build
from sora_train.train.metrics import JsonLines


def train(recipe: Recipe, changes: dict[str, object]) -> tuple[list[dict[str, Any]], float]:
    """Runs `sora train` with a recipe and changes to it, in a temporary folder. UserError if it fails.

    Returns the lines of metrics.jsonl, one of each step, and the seconds from the start to the first step.
    """
    with tempfile.TemporaryDirectory() as folder:
        changes = {"name": "run", "train.output": folder, "tracking.wandb": "off", "train.log_every": 1, **changes}
        if recipe.cluster.address == "auto":
            changes["cluster.address"] = "local"  # not a cluster of someone else on this machine
        file, log = Path(folder) / "recipe.yaml", Path(folder) / "log"
        save_recipe(build(Recipe, recipe.model_dump(mode="json"), changes, "sora bench"), file)
        metrics, began = JsonLines(Path(folder) / "run" / "metrics.jsonl"), time.monotonic()
        command = [sys.executable, "-m", "sora_train.cli", "train", str(file)]
        with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
            while process.poll() is None and not metrics.read():
                time.sleep(0.02)
            first = time.monotonic() - began
        if process.returncode:
            said = " ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
            raise UserError(f"sora train ended with exit status {process.returncode}: {said[-500:]}", code="workers")
        return metrics.read(), first
