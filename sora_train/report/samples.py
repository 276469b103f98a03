"""A run's folders of samples: which video shows which prompt, and what of it is missing or damaged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sora_train.errors import one_line
from sora_train.report.files import is_file, is_whole_mp4, is_whole_png, read_object


@dataclass(frozen=True)
class Clip:
    """One sample's file, the prompt it was made for, and what its noise was drawn from. `told` is false where no
    listing says so, and the prompt is the file's name."""

    path: Path
    size: int
    prompt: str
    seed: int | None
    told: bool = True


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


def read_samples(folder: Path, flaws: dict[Path, str]) -> list[Samples]:
    """The sample folders that hold something: by step, then the others by name."""
    found = []
    for place in folder.iterdir() if folder.is_dir() else ():
        samples = read_folder(place, flaws) if place.is_dir() else None
        if samples is not None and (samples.clips or samples.sheet):
            found.append(samples)
    return told_by_others(sorted(found, key=lambda one: (one.step is None, one.step or 0, one.name)))


def read_folder(place: Path, flaws: dict[Path, str]) -> Samples | None:
    """One folder of samples, or None while a validation still writes into it."""
    if (read_object(place / "result.json", flaws) or {}).get("status") in ("asked", "running"):
        return None
    told = read_listing(place / "samples.json", flaws)
    clips = []
    for path in sorted({*place.glob("*.mp4"), *(place / name for name in told)}):
        if not is_file(path):
            if path.name in told:
                flaws[path] = "a link" if path.is_symlink() else "missing"
            continue
        if not is_whole_mp4(path):
            flaws[path] = "cut short or no mp4"
        if size := path.stat().st_size:
            entry = told.get(path.name, {})
            prompt = one_line(str(entry.get("prompt", re.sub(r"^\d+-", "", path.stem)))[:2000])
            seed = entry.get("seed")
            seed = seed if type(seed) is int and 0 <= seed < 2**64 else None
            clips.append(Clip(path, size, prompt, seed, path.name in told))
    if clips and not (place / "samples.json").exists():
        flaws[place / "samples.json"] = "missing"
    match = re.fullmatch(r"step_(\d{1,15})", place.name)
    sheet = place / "sheet.png"
    if is_file(sheet) and not is_whole_png(sheet):
        flaws[sheet] = "cut short or no PNG"
    return Samples(place.name, int(match[1]) if match else None, sheet if is_file(sheet) else None, clips)


def read_listing(path: Path, flaws: dict[Path, str]) -> dict[str, dict]:
    """The entries of a `samples.json` by file name; of others than mp4 none, since the page shows no others."""
    about = read_object(path, flaws)
    listing = None if about is None else about.get("samples")
    entries = listing if isinstance(listing, list) else []
    told = {entry["file"]: entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("file"), str)}
    if about is not None and (not isinstance(listing, list) or len(told) < len(listing)):
        flaws[path] = "no list of samples"
    return {name: entry for name, entry in told.items() if re.fullmatch(r"[^/\x00]{1,200}\.mp4", name)}


def told_by_others(found: Sequence[Samples]) -> list[Samples]:
    """The folders, where a validation's clip that no listing tells of gets the prompt and seed that all other
    validations tell of the same file name: else one prompt would be two."""
    known: dict[str, set[tuple[str, int | None]]] = {}
    for samples in found:
        for clip in samples.clips if samples.step is not None else ():
            if clip.told:
                known.setdefault(clip.path.name, set()).add((clip.prompt, clip.seed))

    def of(clip: Clip) -> Clip:
        said = known.get(clip.path.name, ())
        if clip.told or len(said) != 1:
            return clip
        ((prompt, seed),) = said
        return replace(clip, prompt=prompt, seed=seed)

    return [
        replace(samples, clips=[of(clip) for clip in samples.clips]) if samples.step is not None else samples
        for samples in found
    ]
