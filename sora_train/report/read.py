"""Reads a run's folder, complete or not: recipe, metrics, events, samples. Damaged files are noted, not raised."""

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

from sora_train.errors import UserError, one_line

NOT_CURVES = {"step", "time", "epoch", "samples_seen", "validation", "holdout_clips", "fvd_clips"}
MAX_METRICS = 200  # a file with more is garbage
EXPORT = ("sora_export.json", "model_index.json", "model.safetensors")  # only in the folder of an export
NOT_XML = r"[^\x09\x0a\x0d\x20-\x7e\x85\xa0-\ufffd\U00010000-\U0010ffff]"
Flaws = dict[Path, str]
"""What is wrong with a file, by path."""


@dataclass(frozen=True)
class Clip:
    """A sample's video; its prompt is the file's name if samples.json does not list it.

    `given` is the PNG of the frames that it begins with, if any.
    """

    path: Path
    size: int
    prompt: str
    seed: int | None
    given: Path | None = None


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
    """What a report shows of a run. `curves` are arrays `n 2` of steps and values, in order of steps."""

    folder: Path
    name: str
    recipe: str
    settings: dict
    curves: dict[str, np.ndarray]
    events: list[dict]
    samples: list[Samples]
    obedience: dict | None
    environment: dict
    flaws: Flaws

    def setting(self, section: str, key: str) -> object:
        """A value of the recipe; None if it is not there or the recipe can't be parsed."""
        inside = self.settings.get(section)
        return inside.get(key) if isinstance(inside, dict) else None


def read_run(folder: str | Path) -> RunRecord:
    """Reads a run's folder, of which only the recipe is required. UserError for other folders, and for an export."""
    folder = Path(folder).expanduser()
    if any((folder / name).is_file() for name in EXPORT):
        why = "is an export, which has no history to report on. Name the run that it was made of"
        raise UserError(f"{folder} {why}", code="run")
    if not (folder / "recipe.yaml").is_file():
        what = "is not a run: it has no recipe.yaml" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}. Name the folder that `sora train` made (train.output/name)", code="run")
    flaws: Flaws = {}
    recipe = read_text(folder / "recipe.yaml", flaws) or ""
    if not (settings := parse_recipe(recipe)):
        flaws.setdefault(folder / "recipe.yaml", "not a recipe in YAML")
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


def parse_recipe(recipe: str) -> dict:
    """The recipe's values; empty if it can't be parsed."""
    try:
        settings = yaml.safe_load(re.sub(NOT_XML, "", recipe))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def read_curves(path: Path, flaws: Flaws) -> dict[str, np.ndarray]:
    """Steps and finite values `n 2` of every metric, sorted by step. If a step is repeated, its last line counts."""
    found: dict[str, array[float]] = {}  # compact: a long run has a hundred thousand lines
    for entry in read_lines(path, flaws):
        step = entry.get("step")
        if not is_number(step):
            continue
        for key, value in entry.items():
            if is_number(value) and key not in NOT_CURVES and (key in found or len(found) < MAX_METRICS):
                found.setdefault(key, array("d")).extend((step, value))
    return {key: sort_steps(np.array(values).reshape(-1, 2)) for key, values in found.items()}


def sort_steps(points: np.ndarray) -> np.ndarray:
    """Points `n 2` sorted by step, the last one of each step."""
    points = points[np.argsort(points[:, 0], kind="stable")]
    return points[np.append(points[1:, 0] != points[:-1, 0], True)]


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is a number that can be drawn: finite and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30


def read_samples(folder: Path, flaws: Flaws) -> list[Samples]:
    """The sample folders that are not empty: validations by step, then the others by name."""
    places = [place for place in folder.iterdir() if place.is_dir()] if folder.is_dir() else []
    found = [samples for place in places if (samples := read_sample_folder(place, flaws)) is not None]
    return sorted(found, key=lambda one: (one.step is None, one.step or 0, one.name))


def read_sample_folder(place: Path, flaws: Flaws) -> Samples | None:
    """One folder of samples; None if it is empty or a validation is still writing it."""
    if (read_object(place / "result.json", flaws) or {}).get("status") in ("asked", "running"):
        return None
    listed = read_listing(place / "samples.json", flaws)
    clips = []
    for path in sorted({*place.glob("*.mp4"), *(place / name for name in listed)}):
        if not is_own_file(path):
            if path.name in listed:
                flaws[path] = "a link" if path.is_symlink() else "missing"
            continue
        if not (size := path.stat().st_size):
            flaws[path] = "empty"
        else:
            entry = listed.get(path.name, {})
            prompt = one_line(str(entry.get("prompt", re.sub(r"^\d+-", "", path.stem)))[:2000])
            seed = entry.get("seed")
            seed = seed if type(seed) is int and 0 <= seed < 2**64 else None
            clips.append(Clip(path, size, prompt, seed, read_given(place, entry, flaws)))
    if clips and not (place / "samples.json").exists():
        flaws[place / "samples.json"] = "missing"
    match = re.fullmatch(r"step_(\d{1,15})", place.name)
    sheet = whole_png(place / "sheet.png", flaws)
    return Samples(place.name, int(match[1]) if match else None, sheet, clips) if clips or sheet else None


def read_given(place: Path, entry: dict, flaws: Flaws) -> Path | None:
    """The PNG of the frames that a sample begins with, which its entry of samples.json names; None without."""
    given = entry.get("given")
    name = given.get("file") if isinstance(given, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"given-[0-9a-f]{1,64}\.png", name):
        return None
    if not (place / name).exists():
        flaws[place / name] = "missing"
    return whole_png(place / name, flaws)


def whole_png(path: Path, flaws: Flaws) -> Path | None:
    """The path of a complete PNG; None if there is none."""
    if not is_own_file(path):
        return None
    if path.read_bytes().endswith(b"IEND\xaeB`\x82"):
        return path
    flaws[path] = "truncated or not a PNG"
    return None


def read_listing(path: Path, flaws: Flaws) -> dict[str, dict]:
    """The entries of a samples.json by the name of their mp4 file."""
    about = read_object(path, flaws)
    listing = None if about is None else about.get("samples")
    entries = [entry for entry in listing if isinstance(entry, dict)] if isinstance(listing, list) else []
    found = {entry["file"]: entry for entry in entries if isinstance(entry.get("file"), str)}
    if about is not None and (not isinstance(listing, list) or len(found) < len(listing)):
        flaws[path] = "not a list of samples"
    return {name: entry for name, entry in found.items() if re.fullmatch(r"[^/\x00]{1,200}\.mp4", name)}


def read_lines(path: Path, flaws: Flaws) -> Iterator[dict]:
    """The objects of a JSON-lines file. Other lines, such as a truncated one, are skipped and counted."""
    text = read_text(path, flaws)
    lines = (text or "").removesuffix("\n").split("\n")
    bad = 0
    for line in lines:
        entry = parse_object(line)
        if entry is not None:
            yield entry
        else:
            bad += bool(line.strip())
    if bad:
        flaws[path] = f"{bad:,} of {len(lines):,} lines"


def read_object(path: Path, flaws: Flaws) -> dict | None:
    """The JSON object of a file; None if there is none."""
    text = read_text(path, flaws)
    found = None if text is None else parse_object(text)
    if text is not None and found is None:
        flaws[path] = "truncated or not a JSON object"
    return found


def parse_object(text: str) -> dict | None:
    """The JSON object of a text; None if it is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_text(path: Path, flaws: Flaws) -> str | None:
    """The text of a file; None if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    except OSError as error:
        flaws[path] = error.strerror or str(error)
        return None


def is_own_file(path: Path) -> bool:
    """Whether a path is a file and not a link, which could put any file into the page."""
    return path.is_file() and not path.is_symlink()
