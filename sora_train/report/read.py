"""What a run left behind, read so that a run that has only started, or was cut off in mid-write, still has a report."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from sora_train.errors import UserError


@dataclass(frozen=True)
class Clip:
    """One sample's file and the prompt it was made for."""

    path: Path
    prompt: str


@dataclass(frozen=True)
class Samples:
    """A folder of samples: `step_00000500` by validation, `final` by the quickstart, `prompts` by `sora sample`."""

    name: str
    step: int | None
    sheet: Path | None
    clips: list[Clip]


@dataclass(frozen=True)
class RunRecord:
    """Everything a report shows."""

    folder: Path
    recipe: str
    metrics: list[dict]
    events: list[dict]
    samples: list[Samples]
    obedience: dict | None
    environment: dict | None


def read_run(folder: str | Path) -> RunRecord:
    """Reads a run's folder. Raises UserError where there is none; anything but the recipe may be missing."""
    folder = Path(folder).expanduser()
    if not (folder / "recipe.yaml").is_file():
        what = "is no run: it has no recipe.yaml" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}; name the folder that `sora train` made (train.output/name)")
    return RunRecord(
        folder=folder,
        recipe=(folder / "recipe.yaml").read_text(encoding="utf-8", errors="replace"),
        metrics=read_lines(folder / "metrics.jsonl"),
        events=read_lines(folder / "events.jsonl"),
        samples=read_samples(folder / "samples"),
        obedience=read_object(folder / "obedience.json"),
        environment=read_object(folder / "environment.json"),
    )


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file; a line that is no object, such as a last one cut short, is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [entry for entry in map(_object, lines) if entry is not None]


def read_object(path: Path) -> dict | None:
    """A file's JSON object, or None where there is none."""
    return _object(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None


def read_samples(folder: Path) -> list[Samples]:
    """The sample folders that hold something: by step, then the others by name."""
    found = []
    for place in folder.iterdir() if folder.is_dir() else ():
        if not place.is_dir():
            continue
        prompts = {}
        for entry in (read_object(place / "samples.json") or {}).get("samples", []):
            if isinstance(entry, dict):
                prompts[entry.get("file")] = str(entry.get("prompt", ""))
        clips = [Clip(path, prompts.get(path.name, path.stem)) for path in sorted(place.glob("*.mp4"))]
        sheet = place / "sheet.png"
        if clips or sheet.is_file():
            match = re.fullmatch(r"step_(\d+)", place.name)
            step = int(match.group(1)) if match else None
            found.append(Samples(place.name, step, sheet if sheet.is_file() else None, clips))
    return sorted(found, key=lambda one: (one.step is None, one.step or 0, one.name))


def series(metrics: list[dict], key: str) -> list[tuple[float, float]]:
    """A metric's finite values by step, in order of steps; of a step that was logged twice, the later line."""
    points = {}
    for entry in metrics:
        step, value = entry.get("step"), entry.get(key)
        if is_number(step) and is_number(value):
            points[float(step)] = float(value)
    return sorted(points.items())


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value of JSON is a finite number (JSON's true and false are Python's int)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _object(text: str) -> dict | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
