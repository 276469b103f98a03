"""The videos of a page: in it as base64 as far as they are not too many, beside it for the rest."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from sora_train.report.read import RunRecord
from sora_train.report.samples import Clip, Samples

INLINE_ALL = 200_000_000  # bytes of videos in one page: a browser still opens it in seconds
SHEET_BYTES = 250_000  # larger sheets are compressed anew
MOST_CLIPS = 200  # of a folder that is no validation's

Key = tuple[str, int | None, int]
"""Prompt, seed, and which one of the same prompt and seed it is."""


class Shelf:
    """Numbers the clips that a page shows; those put first are in the page, the newest ought to be."""

    def __init__(self, page: Path) -> None:
        self.folder = page.absolute().parent
        self.left = INLINE_ALL
        self.clips: list[tuple[Clip, bool]] = []

    def put(self, clip: Clip) -> int:
        inside = clip.size <= self.left
        self.left -= clip.size if inside else 0
        self.clips.append((clip, inside))
        return len(self.clips) - 1

    @property
    def linked(self) -> int:
        return sum(not inside for _, inside in self.clips)

    def __iter__(self) -> Iterator[tuple[int, str, Markup]]:
        """Number, relative address, base64 of each clip: one of the two is empty. Read as the page is written.

        A clip that has gone since has neither.
        """
        for number, (clip, inside) in enumerate(self.clips):
            if not inside:
                yield number, quote(Path(os.path.relpath(clip.path.absolute(), self.folder)).as_posix()), Markup("")
                continue
            try:
                content = clip.path.read_bytes()
            except OSError:
                content = b""
            yield number, "", Markup(base64.b64encode(content).decode())


@dataclass
class Cell:
    """What one run shows for one prompt: by position of the slider the number of a video, and the step it is of."""

    run: int
    numbers: list[int | None]
    steps: list[int | None]


@dataclass(frozen=True)
class Grid:
    """Prompts × steps: `rows` are prompts with a cell for every run that has videos of it, `steps` are where the slider
    stops.
    """

    steps: list[int]
    rows: list[tuple[str, list[Cell]]]
    videos: int = field(default=0)


def make_grid(runs: Sequence[RunRecord], shelf: Shelf) -> Grid:
    """The validations of all runs. Prompts are in the order of the newest; one that has gone from it comes after.

    Several runs may have validated at different steps: each shows the newest that it has at the slider's step. Prompts
    that more runs have come first.
    """
    numbers: dict[Key, dict[tuple[int, int], int]] = {}
    shown = [(one.step, i, one) for i, run in enumerate(runs) for one in run.samples if one.step is not None]
    for step, i, samples in sorted(shown, key=lambda entry: (-entry[0], entry[1])):
        for key, clip in keyed(samples):
            numbers.setdefault(key, {})[i, step] = shelf.put(clip)
    steps = sorted({step for videos in numbers.values() for _, step in videos})
    seeds = {prompt: len({seed for at, seed, _ in numbers if at == prompt}) for prompt, _, _ in numbers}
    rows = []
    for (prompt, seed, _), videos in numbers.items():
        cells = []
        for i in range(len(runs)):
            there = [step if (i, step) in videos else None for step in steps]
            there = fill(there) if len(runs) > 1 else there
            if len(runs) == 1 or any(step is not None for step in there):  # a run with other prompts has no empty tile
                cells.append(Cell(i, [None if step is None else videos[i, step] for step in there], there))
        rows.append((prompt + (f" (seed {seed})" if seeds[prompt] > 1 else ""), cells))
    rows.sort(key=lambda row: -len(row[1]))
    return Grid(steps, rows, sum(map(len, numbers.values())))


def keyed(samples: Samples) -> Iterator[tuple[Key, Clip]]:
    """A folder's clips by what tells them apart from step to step."""
    seen: Counter[tuple[str, int | None]] = Counter()
    for clip in samples.clips:
        same = (clip.prompt, clip.seed)
        yield (*same, seen[same]), clip
        seen[same] += 1


def fill(steps: list[int | None]) -> list[int | None]:
    """The last step that is there, at every position: [None, 2, None] becomes [None, 2, 2]."""
    last, filled = None, []
    for step in steps:
        last = last if step is None else step
        filled.append(last)
    return filled


def sheet_address(sheet: Path | None) -> str:
    """A contact sheet as a `data:` address, a large one compressed; empty where it can't be read."""
    if sheet is None:
        return ""
    from PIL import Image

    try:
        content = sheet.read_bytes()
        kind = "png"
        if len(content) > SHEET_BYTES:
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                image.thumbnail((1700, 2400))
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "WEBP", quality=80)
            content, kind = buffer.getvalue(), "webp"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises at a damaged picture
        return ""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}" if content else ""
