"""What a run left behind, read so that a run that has only started, or was cut off in mid-write, still has a report."""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np
import yaml

from sora_train.errors import UserError, one_line
from sora_train.report.files import read_lines, read_object, read_text
from sora_train.report.samples import Samples, read_samples

NO_CURVE = {"step", "time", "epoch", "samples_seen", "validation", "holdout_clips", "fvd_clips"}
MOST_KEYS = 200  # of metrics; beyond that a file is garbage
EXPORT = ("sora_export.json", "model_index.json", "model.safetensors")  # what only the folder of an export has


@dataclass(frozen=True)
class RunRecord:
    """Everything that a report shows of a run. `curves` are steps and values, `n 2`, in order of steps; `flaws`
    are the files that can't be read as they ought to be, with what is wrong."""

    folder: Path
    name: str
    recipe: str
    settings: dict
    curves: dict[str, np.ndarray]
    events: list[dict]
    samples: list[Samples]
    obedience: dict | None
    environment: dict
    flaws: dict[Path, str]

    def setting(self, section: str, key: str) -> object:
        """A value of the recipe, or None: a recipe that can't be read is still shown as text."""
        inside = self.settings.get(section)
        return inside.get(key) if isinstance(inside, dict) else None


def read_run(folder: str | Path) -> RunRecord:
    """Reads a run's folder. Raises UserError where there is none, and for an export; anything but the recipe may
    be missing, and all may be damaged."""
    folder = Path(folder).expanduser()
    if any((folder / name).is_file() for name in EXPORT):
        raise UserError(f"{folder} is an export, which has no history to report on; name the run that it was made of")
    if not (folder / "recipe.yaml").is_file():
        what = "is no run: it has no recipe.yaml" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}; name the folder that `sora train` made (train.output/name)")
    flaws: dict[Path, str] = {}
    recipe = read_text(folder / "recipe.yaml", flaws) or ""
    if not (settings := read_settings(recipe)):
        flaws.setdefault(folder / "recipe.yaml", "no recipe in YAML")
    return RunRecord(
        folder=folder,
        name=one_line(str(settings.get("name") or ""))[:200] or folder.absolute().name,
        recipe=recipe,
        settings=settings,
        curves=read_curves(folder / "metrics.jsonl", flaws),
        events=list(read_lines(folder / "events.jsonl", flaws)),
        samples=read_samples(folder / "samples", flaws),
        obedience=read_object(folder / "obedience.json", flaws),
        environment=read_object(folder / "environment.json", flaws) or {},
        flaws=flaws,
    )


def read_settings(recipe: str) -> dict:
    """The recipe's values; none where it can't be read."""
    try:
        settings = yaml.safe_load(re.sub(r"[^\x09\x0a\x0d\x20-\x7e\x85\xa0-\ufffd\U00010000-\U0010ffff]", "", recipe))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def read_curves(path: Path, flaws: dict[Path, str]) -> dict[str, np.ndarray]:
    """Steps and finite values `n 2` of every metric, in order of steps; of a step that came twice, the later line.

    Kept in arrays from the first line on: a long run has a hundred thousand lines.
    """
    found: dict[str, array[float]] = {}
    for entry in read_lines(path, flaws):
        step = entry.get("step")
        if not is_number(step):
            continue
        for key, value in entry.items():
            if is_number(value) and key not in NO_CURVE and (key in found or len(found) < MOST_KEYS):
                found.setdefault(key, array("d")).extend((step, value))
    return {key: in_order(np.array(values).reshape(-1, 2)) for key, values in found.items()}


def in_order(points: np.ndarray) -> np.ndarray:
    """Points `n 2` sorted by step, the last one of each step."""
    points = points[np.argsort(points[:, 0], kind="stable")]
    return points[np.append(points[1:, 0] != points[:-1, 0], True)]


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value of JSON is a number that can be drawn: finite, and no bool (which is Python's int)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30
