"""The quickstart's data: captioned clips of one coloured shape that moves.

The clips are real H.264 files with a `captions.csv`, so the quickstart uses the same pipeline as any other videos.

A third of the colour x shape x direction combinations is held out of training. Training sees every pair of attributes,
but not these triples. So a model that draws a held-out caption has combined words that it never saw together.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from sora_train.video import write_mp4

COLOURS = {
    "red": (230, 50, 50),
    "green": (60, 200, 80),
    "blue": (60, 100, 240),
    "yellow": (240, 210, 60),
    "magenta": (220, 70, 210),
    "white": (235, 235, 235),
}
NEW_COLOURS = {"orange": (238, 116, 45)}
"""Learned afterwards, by `quickstart/lora.py`. The embedded VAE saw `COLOURS` alone; of other hues it keeps only this
one, between red and yellow: cyan becomes purple, and purple magenta."""
ALL_COLOURS = COLOURS | NEW_COLOURS
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y down
GROUND = (18, 18, 24)
SIZE, FRAMES, FPS = 64, 8, 8


@dataclass(frozen=True)
class Scene:
    """What a clip shows."""

    colour: str
    shape: str
    direction: str

    @property
    def caption(self) -> str:
        article = "an" if self.colour in NEW_COLOURS else "a"
        return f"{article} {self.colour} {self.shape} moving {self.direction}"

    @property
    def motion(self) -> str:
        """The caption of a clip whose first frame is given: its colour and shape are seen."""
        return f"moving {self.direction}"

    @property
    def held_out(self) -> bool:
        """Whether this combination is held out of training.

        One shape of each (colour, direction) pair is held out: a Latin square over the three attributes.
        """
        indices = (list(ALL_COLOURS).index(self.colour), list(DIRECTIONS).index(self.direction))
        return SHAPES.index(self.shape) == sum(indices) % len(SHAPES)


def all_scenes(colours: Iterable[str] = COLOURS) -> list[Scene]:
    """The combinations of these colours, always in the same order: 72 of the quickstart's six."""
    return [Scene(*names) for names in product(colours, SHAPES, DIRECTIONS)]


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """How much of each pixel the shape covers, 0 to 1.

    Computed from the signed distance at pixel offsets x, y from the shape's centre. All three shapes fill the same
    bounding box, 2 x radius on a side. The triangle points up.
    """
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - radius
    elif shape == "triangle":  # sides run from (0, -r) to (+-r, r): normal (2, -1) / sqrt 5
        distance = np.maximum((2 * np.abs(x) - y - radius) / np.sqrt(5), y - radius)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0, 1)


def draw(
    scene: Scene, rng: np.random.Generator, frames: int = FRAMES, size: int = SIZE, from_middle: bool = False
) -> np.ndarray:
    """One clip, uint8 `F H W 3`.

    The shape's path, size and speed are drawn from `rng`. Its path has its middle near that of the frame, or begins
    there (`from_middle`), so that the first frame does not tell the direction.
    """
    step = np.array(DIRECTIONS[scene.direction], dtype=float)
    radius = rng.uniform(0.17, 0.2) * size
    travel = (rng.uniform(0.2, 0.23) if from_middle else rng.uniform(0.36, 0.42)) * size
    middle = (size - 1) / 2 + rng.uniform(-0.05, 0.05, size=2) * size
    y, x = np.mgrid[0:size, 0:size]
    ground, colour = np.array(GROUND, dtype=float), np.array(ALL_COLOURS[scene.colour], dtype=float)
    clip = np.empty((frames, size, size, 3), dtype=np.uint8)
    for i, along in enumerate(np.linspace(0, 1, frames) if from_middle else np.linspace(-0.5, 0.5, frames)):
        centre = middle + step * along * travel
        alpha = coverage(scene.shape, x - centre[0], y - centre[1], radius)[..., None]
        clip[i] = np.rint(ground + alpha * (colour - ground))
    return clip


def make_clips(
    folder: str | Path,
    count: int,
    seed: int = 0,
    progress: Callable[[int], object] = lambda done: None,
    image: bool = False,
    scenes: Sequence[Scene] = (),
) -> Path:
    """Writes `count` mp4 files of seen combinations, evenly spread, or of these scenes in turns.

    With `image` they are to be continued from their first frame: it does not tell the direction, and the caption tells
    nothing else. Returns the path of their `captions.csv`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = scenes or [scene for scene in all_scenes() if not scene.held_out]
    rows = []
    for i in range(count):
        scene = scenes[i % len(scenes)]
        name = f"clip_{i:05d}.mp4"
        write_mp4(folder / name, draw(scene, np.random.default_rng((seed, i)), from_middle=image), fps=FPS, crf=10)
        rows.append((name, scene.motion if image else scene.caption))
        progress(len(rows))
    captions = folder / "captions.csv"
    with captions.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("video_file_name", "prompt"))
        writer.writerows(rows)
    return captions
