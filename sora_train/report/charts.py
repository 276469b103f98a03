"""Curves as inline SVG. Colours are CSS variables of the page, so one drawing serves light and dark.

Titles and legends are text of the page, which wraps on a phone where text in a drawing would shrink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RAMP = ("#2f81d6", "#6a78d6", "#9a6cc6", "#c2649f", "#d66a6f", "#d97a3f")
"""From the data end of diffusion time to the noise end; visible on white and on black."""
RUNS = ("#2f81d6", "#d9822b", "#2f9e6e", "#c2559d", "#8a70d6", "#b8902a", "#3aa5b8", "#d05f5f")
MAX_POINTS = 600  # more can't be told apart and only make the page heavy
MAX_MARKS = 400
SMOOTH_FROM = 40  # points; shorter curves are drawn as they are
WIDE, NARROW = (828, 223), (310, 155)
LEFT, RIGHT, TOP, BOTTOM = 40, 7, 9, 20  # margins
MARKERS = {"resumed": "▼", "rolled-back": "✖", "skipped": "❘", "changed": "◆"}
"""Events in a curve: their names, which are CSS variables too, and their signs."""


@dataclass(frozen=True)
class Line:
    """A curve: points `n 2` of steps and values, a name for the legend, a CSS colour."""

    points: np.ndarray
    label: str = ""
    colour: str = RAMP[0]
    dashed: bool = False


def draw(
    lines: Sequence[Line],
    marks: Mapping[str, Sequence[int | float]] | None = None,
    wide: bool = False,
    smoothed: bool = True,
    percent: bool = False,
    until: int | float = 0,
    profile: bool = False,
) -> str:
    """An SVG element of values over steps, or over ten bins of diffusion time (`profile`).

    Long curves are smoothed; a single one is also shown as it was. `marks` are steps by the names in `MARKERS`. The
    step axis reaches at least `until`, so charts next to each other can be compared.
    """
    width, height = WIDE if wide else NARROW
    curves = [thin(line.points) for line in lines]
    smooths = [smooth(one[1]) if smoothed and len(line.points) >= SMOOTH_FROM else one[1]
               for line, one in zip(lines, curves, strict=True)]  # fmt: skip
    visible = np.concatenate(smooths)
    if len(lines) == 1:  # without the extremes of the raw curve, so one spike doesn't flatten the rest
        visible = np.append(visible, np.quantile(lines[0].points[:, 1], [0.005, 0.995]))
    low, high, logarithmic = value_range(visible, len(lines) > 2)
    first = min(0.0, *(float(line.points[0, 0]) for line in lines))
    last = 9.0 if profile else float(max(until, *(line.points[-1, 0] for line in lines), 1))
    log = np.log if logarithmic else lambda value: value

    def x(step: np.ndarray | float) -> np.ndarray:
        return np.asarray(LEFT + 5 + (width - LEFT - RIGHT - 10) * (step - first) / (last - first))

    def y(value: np.ndarray | float) -> np.ndarray:
        return np.asarray(height - BOTTOM - (height - TOP - BOTTOM) * (log(value) - log(low)) / (log(high) - log(low)))

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img">',
        *axes(width, x, y, (first, last), (low, high), logarithmic, percent, profile),
        f'<svg x="0" y="0" width="{width}" height="{height - BOTTOM}">',  # clips the curves
    ]
    for line, (steps, raw, lowest, highest), values in zip(lines, curves, smooths, strict=True):
        if len(lines) == 1 and values is not raw:
            parts.append(background(x(steps), y(raw), y(lowest), y(highest), line.colour))
        dashes = ' stroke-dasharray="6 3"' if line.dashed else ""
        parts.append(f'<polyline points="{points(x(steps), y(values))}" stroke="{line.colour}"{dashes}/>')
        if len(steps) < 26 and (len(lines) < 4 or len(steps) == 1):
            parts += [f'<circle cx="{a:.2f}" cy="{b:.2f}" r="1.7" fill="{line.colour}"/>'
                      for a, b in zip(x(steps), y(values), strict=True)]  # fmt: skip
    return "".join([*parts, *mark_lines(marks or {}, x, height), "</svg></svg>"])


def axes(
    width: int, x: Callable[[float], np.ndarray], y: Callable[[float], np.ndarray], steps: tuple[float, float],
    values: tuple[float, float], logarithmic: bool, percent: bool, profile: bool,
) -> list[str]:  # fmt: skip
    """Grid lines and numbers."""
    found: list[str] = []
    bottom = float(y(values[0]))
    for value in ticks(*values, 5 if width > 400 else 4, logarithmic):
        at, text = float(y(value)), f"{100 * value:.3g}%" if percent else short(value)
        found.append(f'<path class="grid" d="M{LEFT} {at:.2f}H{width - RIGHT}"/>'
                     f'<text x="{LEFT - 4}" y="{at + 3:.2f}" text-anchor="end">{text}</text>')  # fmt: skip
    names = [(0.0, "data"), (4.5, "diffusion time"), (9.0, "noise")] if profile else [
        (step, short(step)) for step in ticks(*steps, 6 if width > 400 else 4, False) if step == int(step)]  # fmt: skip
    found.append(f'<path class="axis" d="M{LEFT} {bottom:.2f}H{width - RIGHT}"/>')
    found += [f'<text x="{float(x(step)):.2f}" y="{bottom + 13:.2f}" text-anchor="middle">{text}</text>'
              for step, text in names]  # fmt: skip
    return found


def background(x: np.ndarray, raw: np.ndarray, lowest: np.ndarray, highest: np.ndarray, colour: str) -> str:
    """A curve before smoothing: itself, or the range of its values if it was thinned."""
    if lowest is raw or np.array_equal(lowest, highest):
        return f'<polyline class="raw" points="{points(x, raw)}" stroke="{colour}"/>'
    outline = points(np.append(x, x[::-1]), np.append(lowest, highest[::-1]))
    return f'<polygon points="{outline}" fill="{colour}" fill-opacity=".22"/>'


def mark_lines(marks: Mapping[str, Sequence[int | float]], x: Callable[[float], np.ndarray], height: int) -> list[str]:
    """A vertical line and a sign for each event; for skipped steps only a tick at the bottom."""
    found: list[str] = []
    for kind, all_steps in marks.items():
        steps = sorted({float(step) for step in all_steps})
        for step in steps[:: -(-len(steps) // MAX_MARKS) or 1]:
            at, top = float(x(step)), height - BOTTOM - 6 if kind == "skipped" else TOP - 2
            sign = "" if kind == "skipped" else f'<text x="{at:.2f}" y="7" text-anchor="middle">{MARKERS[kind]}</text>'
            line = f'<path d="M{at:.2f} {top}V{height - BOTTOM}" stroke="var(--{kind})"/>{sign}'
            found.append(f'<g class="mark {kind}">{line}</g>')
    return found


def points(x: np.ndarray, y: np.ndarray) -> str:
    """Coordinates for SVG."""
    return " ".join(f"{a:.2f},{b:.2f}" for a, b in zip(x, y, strict=True))


def value_range(values: np.ndarray, several: bool) -> tuple[float, float, bool]:
    """Lower and upper end of the axis, and whether it is logarithmic: for several positive curves far apart."""
    low, high = float(values.min()), float(values.max())
    if several and low > 0 and high / low > 5:
        return low / 1.1, high * 1.1, True
    constant = high - low < 1e-3 * abs(high) or high == low  # else its rounding would look like a curve
    margin = (0.05 * abs(high) or 1.0) if constant else 0.06 * (high - low)
    return low - margin if low - margin >= 0 or low < 0 else 0.0, high + margin, False


def ticks(low: float, high: float, most: int, logarithmic: bool) -> list[float]:
    """At most about so many round numbers in a range."""
    if logarithmic:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [tick for k in powers for m in (1, 2, 5) if low <= (tick := m * 10.0**k) <= high]
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= (high - low) / most)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def thin(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, means, minima and maxima of points `n 2`, in at most `MAX_POINTS` equal bins."""
    if len(points) <= MAX_POINTS:
        steps, values = points.T
        return steps, values, values, values
    starts = np.arange(0, len(points), -(-len(points) // MAX_POINTS))
    steps, values = np.add.reduceat(points, starts).T / np.diff(np.append(starts, len(points)))
    return steps, values, np.minimum.reduceat(points[:, 1], starts), np.maximum.reduceat(points[:, 1], starts)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the curve, shorter at its ends to stay centred."""
    reach, places = max(1, len(values) // 40), np.arange(len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    side = np.minimum(reach, np.minimum(places, places[::-1]))
    return (sums[places + side + 1] - sums[places - side]) / (2 * side + 1)


def ramp(count: int) -> list[str]:
    """So many colours, evenly along `RAMP`."""
    corners = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in RAMP])
    at = np.linspace(0, len(RAMP) - 1, count)
    mixed = np.stack([np.interp(at, np.arange(len(RAMP)), corners[:, c]) for c in range(3)], 1)
    return ["#" + "".join(f"{round(float(part)):02x}" for part in colour) for colour in mixed]


def short(value: float) -> str:
    """A number in few characters: 1200 is 1.2k."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}".replace("e-0", "e-")
