"""The quickstart's oracle: reads colour, shape and direction from pixels alone.

It shares no code with the drawing. The background is the colour along the frame's border, and the object is what
differs from it. The object's shape is the template of equal area and centroid that overlaps it best. Its colour is the
hue inside it. Its direction is the path of its centroid. Anything unclear is None, which counts as wrong: no object,
two objects, none of the named colours, no motion, or diagonal motion.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from sora_train.quickstart.shapes import COLOURS, DIRECTIONS, SHAPES, Scene

CONTRAST = 70.0  # least difference of an object from the background, in the channel that differs most (0 to 255)
AREA = (0.01, 0.4)  # smallest and largest share of the frame that an object covers
CLEAR_FRAMES = 0.75  # least share of the frames that show one clear object
OBJECT_OVERLAP = 0.6  # least overlap of an object with its best template; below it is a smear
SHAPE_OVERLAP, SHAPE_MARGIN = 0.85, 0.02  # least mean overlap of the best template, and its lead over the second
HUE_MARGIN = 20.0  # degrees; the quickstart's hues are 50 apart; of closer ones the nearest to the median counts
COLOUR_SHARE = 0.7  # least share of the object's inner pixels that agree on a colour
TRAVEL = 0.15  # least distance over the whole clip, in frame sides
STRAIGHT = 0.35  # largest sideways motion, as a share of the distance forward
STEPS = 0.75  # least share of the steps that go forward


@dataclass(frozen=True)
class Verdict:
    """What a clip shows; None if unclear."""

    colour: str | None
    shape: str | None
    direction: str | None


@dataclass(frozen=True)
class Object:
    """The object in one frame: its pixels and their centre (x, y)."""

    frame: int
    mask: np.ndarray
    centre: tuple[float, float]
    overlaps: tuple[float, ...]  # with each of SHAPES


def classify(video: np.ndarray, colours: Mapping[str, tuple[int, int, int]] = COLOURS) -> Verdict:
    """Reads a clip of uint8 frames `F H W 3`, which shows one of these colours."""
    found = [seen for i, seen in enumerate(find_objects(video)) if seen is not None]
    if len(found) < max(2, CLEAR_FRAMES * len(video)):
        return Verdict(None, None, None)
    return Verdict(colour_of(video, found, colours), shape_of(found), direction_of(found, video.shape[1:3]))


def find_objects(video: np.ndarray) -> list[Object | None]:
    """The one clear object of every frame, or None."""
    border = np.concatenate([video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]], axis=1).reshape(-1, 3)
    ground = np.median(border, axis=0)
    return [find_object(i, np.abs(frame - ground).max(-1)) for i, frame in enumerate(video.astype(np.float64))]


def find_object(index: int, distance: np.ndarray) -> Object | None:
    """The one clear object of a frame, from each pixel's distance to the background."""
    distance = ndimage.gaussian_filter(distance, 0.6)  # suppresses single noisy pixels
    contrast = np.quantile(distance, 0.97)
    if contrast < CONTRAST:
        return None
    labels = np.zeros(distance.shape, np.int32)
    ndimage.label(distance > contrast / 2, output=labels)
    areas = np.bincount(labels.ravel())[1:]
    mask = np.asarray(ndimage.binary_fill_holes(labels == 1 + areas.argmax()))
    area = int(mask.sum())
    if not AREA[0] <= area / mask.size <= AREA[1] or areas.max() < 0.8 * areas.sum() or areas.max() < 0.9 * area:
        return None  # too small, too large, one of several, or a ring
    y, x = (float(mean) for mean in np.argwhere(mask).mean(0))
    overlaps = tuple(overlap(mask, template(shape, mask.shape, (x, y), area)) for shape in SHAPES)
    return Object(index, mask, (x, y), overlaps) if max(overlaps) >= OBJECT_OVERLAP else None


def template(shape: str, size: tuple[int, ...], centre: tuple[float, float], area: int) -> np.ndarray:
    """The mask of a shape with this centroid (x, y) and this area in pixels."""
    y, x = np.mgrid[: size[0], : size[1]]
    x, y = x - centre[0], y - centre[1]
    if shape == "circle":
        return x**2 + y**2 <= area / np.pi
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= np.sqrt(area) / 2
    side = np.sqrt(2 * area)  # a triangle as high as its base is wide; its centroid is a third above the base
    return (y <= side / 3) & (np.abs(x) <= (y + 2 * side / 3) / 2)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks."""
    return float((a & b).sum() / max(1, (a | b).sum()))


def shape_of(found: Sequence[Object]) -> str | None:
    """The template that overlaps best, on average and in most frames, or None."""
    overlaps = np.array([seen.overlaps for seen in found])
    means = overlaps.mean(0)
    best = int(means.argmax())
    lead = means[best] - np.delete(means, best).max()
    most = (overlaps.argmax(1) == best).mean() > 0.5
    return SHAPES[best] if means[best] >= SHAPE_OVERLAP and lead >= SHAPE_MARGIN and most else None


def colour_of(video: np.ndarray, found: Sequence[Object], colours: Mapping[str, tuple[int, int, int]]) -> str | None:
    """The named colour of most pixels inside the object, over all frames, or None.

    If most pixels are within the margin of two, it is the one nearest to their median hue.
    """
    inner = [video[seen.frame][ndimage.binary_erosion(seen.mask, iterations=2)] for seen in found]
    pixels = np.concatenate(inner)
    if not len(pixels):
        return None
    close = {name: closeness(pixels, named) for name, named in colours.items()}
    agreed = {name: away for name, (count, away) in close.items() if count >= COLOUR_SHARE * len(pixels)}
    return min(agreed, key=lambda name: agreed[name]) if agreed else None


def closeness(pixels: np.ndarray, named: tuple[int, int, int]) -> tuple[int, float]:
    """How many uint8 pixels `n 3` have a named colour, and the median distance of their hues from it, in degrees.

    White means bright with low saturation; it has no hue.
    """
    rgb = pixels.astype(np.float64) / 255
    value, low = rgb.max(1), rgb.min(1)
    saturation = (value - low) / np.maximum(value, 1e-6)
    if colorsys.rgb_to_hsv(*(channel / 255 for channel in named))[1] < 0.1:
        return int(((saturation < 0.25) & (value > 0.6)).sum()), 0.0
    angles = np.deg2rad([0, 120, 240])
    hue, named_hue = (
        np.rad2deg(np.arctan2(each @ np.sin(angles), each @ np.cos(angles))) for each in (rgb, np.array(named))
    )
    away = np.abs((hue - named_hue + 180) % 360 - 180)
    return int(((away < HUE_MARGIN) & (saturation > 0.4) & (value > 0.4)).sum()), float(np.median(away))


def direction_of(found: Sequence[Object], size: tuple[int, ...]) -> str | None:
    """Direction of the centroid's path, or None if it is unclear.

    The path must follow one axis, be long enough and straight, and go forward in most steps without jumps.
    """
    path = np.array([seen.centre for seen in found]) / (size[1], size[0])
    way = path[-1] - path[0]
    axis = int(np.abs(way).argmax())
    forward = np.diff(path[:, axis]) * np.sign(way[axis])
    sideways = np.ptp(path[:, 1 - axis])
    if abs(way[axis]) < TRAVEL or sideways > STRAIGHT * abs(way[axis]):
        return None
    if (forward > 0).mean() < STEPS or (len(forward) > 3 and forward.max() > 0.6 * abs(way[axis])):
        return None
    step = [0, 0]
    step[axis] = int(np.sign(way[axis]))
    return next(name for name, unit in DIRECTIONS.items() if list(unit) == step)


def right(verdict: Verdict, scene: Scene) -> dict[str, bool]:
    """Whether colour, direction, shape, and all three match the scene's caption."""
    parts = {name: getattr(verdict, name) == getattr(scene, name) for name in ("colour", "direction", "shape")}
    return {**parts, "all": all(parts.values())}


def accuracy(
    videos: Sequence[np.ndarray],
    scenes: Sequence[Scene],
    colours: Mapping[str, tuple[int, int, int]] = COLOURS,
) -> float:
    """The oracle's own test: the share of real clips that it reads correctly."""
    return shares([right(classify(video, colours), scene) for video, scene in zip(videos, scenes, strict=True)])["all"]


def prompt_accuracy(verdicts: Sequence[Verdict], scenes: Sequence[Scene]) -> dict:
    """Share of clips that show their captions, and number of clips.

    Given for all captions, for seen and for held-out ones.
    """
    judged = [(scene, right(verdict, scene)) for verdict, scene in zip(verdicts, scenes, strict=True)]
    seen = shares([parts for scene, parts in judged if not scene.held_out])
    held_out = shares([parts for scene, parts in judged if scene.held_out])
    return {**shares([parts for _, parts in judged]), "seen": seen, "held_out": held_out}


def shares(parts: Sequence[dict[str, bool]]) -> dict:
    """Mean of each part, rounded to four digits, and the number of clips.

    The mean over no clips is 0.
    """
    names = ("colour", "direction", "shape", "all")
    means = {name: round(sum(part[name] for part in parts) / max(1, len(parts)), 4) for name in names}
    return {**means, "clips": len(parts)}
