"""Curves as inline SVG. Colours are CSS variables of the page, so one drawing serves light and dark.

Titles and legends are text of the page, which wraps on a phone where text in a drawing would shrink.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RAMP = ("#2f81d6", "#507cd6", "#6f77d4", "#8a70cb", "#a36abd", "#b966a8", "#c9668f", "#d46974", "#d7715a", "#d97a3f")
"""From the data end of diffusion time to the noise end; visible on white and on black."""
RUNS = ("#2f81d6", "#d9822b", "#2f9e6e", "#c2559d", "#8a70d6", "#b8902a", "#3aa5b8", "#d05f5f")
MAX_POINTS = 600  # more can't be told apart and only make the page heavy
MAX_MARKS = 400
SMOOTH_FROM = 40  # points; shorter curves are drawn as they are
WIDTH, HEIGHT = 310, 155
LEFT, RIGHT, TOP, BOTTOM = 40, 7, 9, 20  # margins


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
    smoothed: bool = True,
    percent: bool = False,
    until: int | float = 0,
) -> str:
    """An SVG element of values over steps.

    Long curves are smoothed; a single one is also shown as it was. `marks` are steps by the names of CSS variables. The
    step axis reaches at least `until`, so charts next to each other can be compared.
    """
    curves = [thin(line.points) for line in lines]
    smooths = [smooth(values) if smoothed and len(line.points) >= SMOOTH_FROM else values
               for line, (_, values) in zip(lines, curves, strict=True)]  # fmt: skip
    visible = np.concatenate(smooths)
    if len(lines) == 1:  # without the extremes of the raw curve, so one spike doesn't flatten the rest
        visible = np.append(visible, np.quantile(lines[0].points[:, 1], [0.005, 0.995]))
    low, high = value_range(visible)
    first = min(0.0, *(float(line.points[0, 0]) for line in lines))
    last = float(max(until, *(line.points[-1, 0] for line in lines), 1))
    bottom = HEIGHT - BOTTOM

    def x(step: np.ndarray | float) -> np.ndarray:
        return np.asarray(LEFT + 5 + (WIDTH - LEFT - RIGHT - 10) * (step - first) / (last - first))

    def y(value: np.ndarray | float) -> np.ndarray:
        return np.asarray(bottom - (bottom - TOP) * (value - low) / (high - low))

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for value in ticks(low, high, 4):
        at, text = float(y(value)), f"{100 * value:.3g}%" if percent else short(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.2f}H{WIDTH - RIGHT}"/>'
                     f'<text x="{LEFT - 4}" y="{at + 3:.2f}" text-anchor="end">{text}</text>')  # fmt: skip
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
    parts += [f'<text x="{float(x(step)):.2f}" y="{bottom + 13}" text-anchor="middle">{short(step)}</text>'
              for step in ticks(first, last, 4) if step == int(step)]  # fmt: skip
    parts.append(f'<svg x="0" y="0" width="{WIDTH}" height="{bottom}">')  # clips the curves
    for line, (steps, raw), values in zip(lines, curves, smooths, strict=True):
        if len(lines) == 1 and values is not raw:
            parts.append(f'<polyline class="raw" points="{points(x(steps), y(raw))}" stroke="{line.colour}"/>')
        dashes = ' stroke-dasharray="6 3"' if line.dashed else ""
        parts.append(f'<polyline points="{points(x(steps), y(values))}" stroke="{line.colour}"{dashes}/>')
        if len(steps) < 26:
            parts += [f'<circle cx="{a:.2f}" cy="{b:.2f}" r="1.7" fill="{line.colour}"/>'
                      for a, b in zip(x(steps), y(values), strict=True)]  # fmt: skip
    for kind, all_steps in (marks or {}).items():
        steps = sorted({float(step) for step in all_steps})
        top = bottom - 6 if kind == "skipped" else TOP  # there may be many
        parts += [f'<path class="mark" d="M{float(x(step)):.2f} {top}V{bottom}" stroke="var(--{kind})"/>'
                  for step in steps[:: -(-len(steps) // MAX_MARKS) or 1]]  # fmt: skip
    return "".join([*parts, "</svg></svg>"])


def points(x: np.ndarray, y: np.ndarray) -> str:
    """Coordinates for SVG."""
    return " ".join(f"{a:.2f},{b:.2f}" for a, b in zip(x, y, strict=True))


def value_range(values: np.ndarray) -> tuple[float, float]:
    """Lower and upper end of the axis."""
    low, high = float(values.min()), float(values.max())
    constant = high - low < 1e-3 * abs(high) or high == low  # else its rounding would look like a curve
    margin = (0.05 * abs(high) or 1.0) if constant else 0.06 * (high - low)
    return low - margin if low - margin >= 0 or low < 0 else 0.0, high + margin


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most about so many round numbers in a range."""
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= (high - low) / most)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def thin(points: np.ndarray) -> np.ndarray:
    """Steps and values, `2 n`, of points `n 2`: means of at most `MAX_POINTS` equal bins."""
    starts = np.arange(0, len(points), -(-len(points) // MAX_POINTS))
    return np.add.reduceat(points, starts).T / np.diff(np.append(starts, len(points)))


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the curve, shorter at its ends to stay centred."""
    reach, places = max(1, len(values) // 40), np.arange(len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    side = np.minimum(reach, np.minimum(places, places[::-1]))
    return (sums[places + side + 1] - sums[places - side]) / (2 * side + 1)


def short(value: float) -> str:
    """A number in few characters: 1200 is 1.2k."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}".replace("e-0", "e-")
