"""The videos of a page: embedded as base64 up to a total size, linked beyond it."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from markupsafe import Markup
from PIL import Image

from sora_train.report.read import Clip, RunRecord, Samples

MAX_EMBEDDED = 200_000_000  # bytes of videos in one page, which a browser still opens in seconds
MAX_SHEET = 5_000_000  # bytes of a contact sheet; larger ones stay in their folders
MAX_CLIPS = 200  # of a folder that is not a validation's

LARGEST_GIVEN = 150_000  # bytes of a given frame's PNG; larger ones are shown as a JPEG of GIVEN_SIDE pixels
GIVEN_SIDE = 480

Key = tuple[str, int | None, str, int]
"""Prompt, seed, name of the given frames, and a counter of clips that are the same in these."""


class MediaIndex:
    """Numbers the clips of a page. Those added first are embedded, so the newest should be."""

    def __init__(self, page: Path) -> None:
        self.folder = page.absolute().parent
        self.left = MAX_EMBEDDED
        self.clips: list[tuple[Clip, bool]] = []

    def add(self, clip: Clip) -> int:
        embedded = clip.size <= self.left
        self.left -= clip.size if embedded else 0
        self.clips.append((clip, embedded))
        return len(self.clips) - 1

    @property
    def linked(self) -> int:
        return sum(not embedded for _, embedded in self.clips)

    def __iter__(self) -> Iterator[tuple[int, str, Markup]]:
        """Number, relative link and base64 of each clip, one of the two empty; both if the file is gone."""
        for number, (clip, embedded) in enumerate(self.clips):
            if not embedded:
                yield number, quote(Path(os.path.relpath(clip.path.absolute(), self.folder)).as_posix()), Markup("")
                continue
            try:
                content = clip.path.read_bytes()
            except OSError:
                content = b""
            yield number, "", Markup(base64.b64encode(content).decode())


@dataclass
class Cell:
    """What one run shows for one prompt: the number of a video and its step, by position of the slider."""

    run: int
    numbers: list[int | None]
    steps: list[int | None]


class Row(NamedTuple):
    """A prompt, a cell for every run that has it, and the `data:` address of the given first frame, if any."""

    prompt: str
    cells: list[Cell]
    given: str = ""


@dataclass(frozen=True)
class Grid:
    """Prompts x steps: a row for each prompt, and the slider's positions."""

    steps: list[int]
    rows: list[Row]
    videos: int


def make_grid(runs: Sequence[RunRecord], media: MediaIndex) -> Grid:
    """The validations of all runs. Prompts that most runs have come first, then those of the newest validation.

    Each of several runs shows its newest video at or before the slider's step, since they may validate at other steps.
    """
    numbers: dict[Key, dict[tuple[int, int], int]] = {}
    given: dict[Key, Path | None] = {}
    found = [(one.step, i, one) for i, run in enumerate(runs) for one in run.samples if one.step is not None]
    for step, i, samples in sorted(found, key=lambda entry: (-entry[0], entry[1])):
        for key, clip in keyed(samples):
            numbers.setdefault(key, {})[i, step] = media.add(clip)
            given.setdefault(key, clip.given)
    steps = sorted({step for videos in numbers.values() for _, step in videos})
    seeds = {prompt: len({seed for at, seed, *_ in numbers if at == prompt}) for prompt, *_ in numbers}
    rows = []
    for key, videos in numbers.items():
        prompt, seed, *_ = key
        cells = []
        for i in range(len(runs)):
            shown = [step if (i, step) in videos else None for step in steps]
            shown = fill(shown) if len(runs) > 1 else shown
            if any(step is not None for step in shown):
                cells.append(Cell(i, [None if step is None else videos[i, step] for step in shown], shown))
        title = prompt + (f" (seed {seed})" if seeds[prompt] > 1 else "")
        rows.append(Row(title, cells, given_address(given[key])))
    rows.sort(key=lambda row: -len(row.cells))
    return Grid(steps, rows, sum(map(len, numbers.values())))


def keyed(samples: Samples) -> Iterator[tuple[Key, Clip]]:
    """A folder's clips by what identifies them from step to step."""
    seen: Counter[tuple[str, int | None, str]] = Counter()
    for clip in samples.clips:
        same = (clip.prompt, clip.seed, clip.given.name if clip.given else "")
        yield (*same, seen[same]), clip
        seen[same] += 1


def fill(steps: list[int | None]) -> list[int | None]:
    """The last value at every position: [None, 2, None] becomes [None, 2, 2]."""
    filled: list[int | None] = []
    for step in steps:
        filled.append(step if step is not None or not filled else filled[-1])
    return filled


def sheet_address(sheet: Path | None) -> str:
    """A contact sheet as a `data:` address; empty if there is none, or if it is too large or can't be read."""
    try:
        content = sheet.read_bytes() if sheet and sheet.stat().st_size <= MAX_SHEET else b""
    except OSError:
        content = b""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}" if content else ""


def given_address(picture: Path | None) -> str:
    """Given frames as a `data:` address; empty if there are none, or if they can't be read."""
    if picture is None:
        return ""
    try:
        if picture.stat().st_size <= LARGEST_GIVEN:
            return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
        with Image.open(picture, formats=["PNG"]) as image:
            image.thumbnail((4 * GIVEN_SIDE, GIVEN_SIDE))
            image.convert("RGB").save(content := io.BytesIO(), "JPEG", quality=90)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
