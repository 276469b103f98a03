"""Curves as inline SVG. Text and axes take the page's colour, so that one drawing serves light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import numpy as np

INK, ACCENT = "#010203", "#2f81f7"  # INK stands for the page's own text colour, put in its place at the end
MOST_POINTS = 1200  # more could not be told apart, and would only make the page heavy


def line_chart(
    points: Sequence[tuple[float, float]], title: str, marks: Sequence[int | float] = (), large: bool = False
) -> str:
    """An SVG element: values over steps, and marks as upright lines. A large one is smoothed, over the raw line.

    The page must not hold two charts of the same title: ids inside are made from it.
    """
    import matplotlib  # here, since it takes a second
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    steps, values = thin(np.array(points, dtype=float))
    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": title,
            "font.size": 9,
            "text.parse_math": False,  # a metric's name may hold a dollar sign
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.linewidth": 0.6,
        }
    ):
        figure = Figure(figsize=(9.6, 3.2) if large else (4.7, 2.3), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.margins(x=0.01)
        for mark in marks:
            axes.axvline(mark, color="#e08a1e", linewidth=0.9, linestyle=(0, (3, 3)))
        if large and len(values) >= 40:
            axes.plot(steps, values, color=ACCENT, alpha=0.3, linewidth=0.8)
            axes.plot(steps, smooth(values), color=ACCENT, linewidth=1.6)
            # one spike must not flatten everything else
            low, high = np.quantile(values, [0, 0.995])
            axes.set_ylim(low - 0.05 * (high - low + 1e-12), high + 0.05 * (high - low + 1e-12))
        else:
            dots = "o" if len(values) < 15 else None
            axes.plot(steps, values, color=ACCENT, linewidth=1.4, marker=dots, markersize=3)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return for_page(buffer.getvalue(), title)


def thin(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of points `n 2`; where there are too many, means over equal runs of neighbours."""
    size = -(-len(points) // MOST_POINTS)
    parts = [points[start : start + size].mean(0) for start in range(0, len(points), size)]
    steps, values = np.array(parts).T
    return steps, values


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the curve, shorter at its ends so that they are not dragged."""
    reach = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    side = np.minimum(reach, np.minimum(places, places[::-1]))
    return (sums[places + side + 1] - sums[places - side]) / (2 * side + 1)


def for_page(svg: str, title: str) -> str:
    """A whole SVG file as an element of a page: no prologue, no fixed size, ids of its own, the page's ink."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    prefix = "c" + re.sub(r"[^a-z0-9]", "", title.lower())
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\1#{prefix}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    return re.sub(r' (?:width|height)="[^"]*pt"', "", svg, count=2).strip()
