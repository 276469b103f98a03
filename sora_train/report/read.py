"""What a run left behind, read so that a run that has only started, or was cut off in mid-write, still has a report."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np
import yaml

from sora_train.errors import UserError
from sora_train.video import one_line

NO_CURVE = {"step", "time", "epoch", "samples_seen", "validation", "holdout_clips", "fvd_clips"}
MOST_KEYS = 200  # of metrics; beyond that a file is garbage


@dataclass(frozen=True)
class Clip:
    """One sample's file, the prompt it was made for, and what its noise was drawn from."""

    path: Path
    size: int
    prompt: str
    seed: int | None


@dataclass(frozen=True)
class Samples:
    """A folder of samples: `step_00000500` by validation, `final` by the quickstart, `prompts` by `sora sample`."""

    name: str
    step: int | None
    sheet: Path | None
    clips: list[Clip]

    @property
    def title(self) -> str:
        return self.name if self.step is None else f"step {self.step:,}"


@dataclass(frozen=True)
class RunRecord:
    """Everything that a report shows of a run. `curves` are steps and values, `n 2`, in order of steps."""

    folder: Path
    name: str
    recipe: str
    settings: dict
    curves: dict[str, np.ndarray]
    events: list[dict]
    samples: list[Samples]
    obedience: dict | None
    environment: dict

    def setting(self, section: str, key: str) -> object:
        """A value of the recipe, or None: a recipe that can't be read is still shown as text."""
        inside = self.settings.get(section)
        return inside.get(key) if isinstance(inside, dict) else None


def read_run(folder: str | Path) -> RunRecord:
    """Reads a run's folder. Raises UserError where there is none; anything but the recipe may be missing."""
    folder = Path(folder).expanduser()
    if not (folder / "recipe.yaml").is_file():
        what = "is no run: it has no recipe.yaml" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}; name the folder that `sora train` made (train.output/name)")
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    settings = read_settings(recipe)
    return RunRecord(
        folder=folder,
        name=one_line(str(settings.get("name") or ""))[:200] or folder.absolute().name,
        recipe=recipe,
        settings=settings,
        curves=read_curves(folder / "metrics.jsonl"),
        events=list(read_lines(folder / "events.jsonl")),
        samples=read_samples(folder / "samples"),
        obedience=read_object(folder / "obedience.json"),
        environment=read_object(folder / "environment.json") or {},
    )


def read_settings(recipe: str) -> dict:
    """The recipe's values; none where it can't be read."""
    try:
        settings = yaml.safe_load(re.sub(r"[^\x09\x0a\x0d\x20-\x7e\x85\xa0-\ufffd\U00010000-\U0010ffff]", "", recipe))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def read_curves(path: Path) -> dict[str, np.ndarray]:
    """Steps and finite values `n 2` of every metric, in order of steps; of a step that came twice, the later line.

    Kept in arrays from the first line on: a long run has a hundred thousand lines.
    """
    found: dict[str, array[float]] = {}
    for entry in read_lines(path):
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


def read_lines(path: Path) -> Iterator[dict]:
    """The objects of a JSON-lines file; a line that is no object, such as a last one cut short, is left out."""
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if (entry := _object(line)) is not None:
                    yield entry


def read_object(path: Path) -> dict | None:
    """A file's JSON object, or None where there is none."""
    return _object(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None


def read_samples(folder: Path) -> list[Samples]:
    """The sample folders that hold something: by step, then the others by name."""
    found = []
    for place in folder.iterdir() if folder.is_dir() else ():
        samples = read_folder(place) if place.is_dir() else None
        if samples is not None and (samples.clips or samples.sheet):
            found.append(samples)
    return sorted(found, key=lambda one: (one.step is None, one.step or 0, one.name))


def read_folder(place: Path) -> Samples | None:
    """One folder of samples, or None while a validation still writes into it."""
    if (read_object(place / "result.json") or {}).get("status") in ("asked", "running"):
        return None
    listing = (read_object(place / "samples.json") or {}).get("samples")
    entries = [entry for entry in (listing if isinstance(listing, list) else ()) if isinstance(entry, dict)]
    told = {entry["file"]: entry for entry in entries if isinstance(entry.get("file"), str)}
    clips = []
    for path in sorted(place.glob("*.mp4")):
        if is_file(path) and (size := path.stat().st_size):
            entry = told.get(path.name, {})
            prompt = one_line(str(entry.get("prompt", re.sub(r"^\d+-", "", path.stem)))[:2000])
            seed = entry.get("seed")
            clips.append(Clip(path, size, prompt, seed if type(seed) is int and 0 <= seed < 2**64 else None))
    match = re.fullmatch(r"step_(\d{1,15})", place.name)
    sheet = place / "sheet.png"
    return Samples(place.name, int(match[1]) if match else None, sheet if is_file(sheet) else None, clips)


def is_file(path: Path) -> bool:
    """A file of the run's own: a link could lead anywhere, and what it leads to would be put into the page."""
    return path.is_file() and not path.is_symlink()


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value of JSON is a number that can be drawn: finite, and no bool (which is Python's int)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30


def _object(text: str) -> dict | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
