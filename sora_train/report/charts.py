"""Curves as inline SVG by matplotlib. Colours are variables of the page, so that one drawing serves light and dark.

Titles and legends are the page's own text: they wrap on a phone, where a drawing would shrink them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

INK = "ink"
RAMP = ("#2f81d6", "#6a78d6", "#9a6cc6", "#c2649f", "#d66a6f", "#d97a3f")
"""From the data's end of diffusion time to that of noise; all of a lightness that shows on white and on black."""
RUNS = ("#2f81d6", "#d9822b", "#2f9e6e", "#c2559d", "#8a70d6", "#b8902a", "#3aa5b8", "#d05f5f")
MOST_POINTS = 600  # more could not be told apart, and would only make the page heavy
SMOOTH_FROM = 40  # points; fewer are shown as they are
WIDE, NARROW = (11.5, 3.1), (4.3, 2.15)  # inches, of which a page shows each about 85 pixels wide
MOST_MARKS = 400


@dataclass(frozen=True)
class Line:
    """A curve: points `n 2` of steps and values, a name for the legend, a CSS colour."""

    points: np.ndarray
    label: str = ""
    colour: str = RAMP[0]
    dashed: bool = False


@dataclass(frozen=True)
class Marks:
    """Steps at which something happened to the run: each kind has a mark of its own."""

    resumed: Sequence[int | float] = field(default=())
    rolled_back: Sequence[int | float] = field(default=())
    skipped: Sequence[int | float] = field(default=())
    changed: Sequence[int | float] = field(default=())


def draw(
    lines: Sequence[Line],
    name: str,
    marks: Marks = Marks(),
    wide: bool = False,
    smoothed: bool = True,
    percent: bool = False,
    until: int | float = 0,
    profile: bool = False,
) -> str:
    """An SVG element of values over steps. A page must not hold two of one `name`: ids inside are made from it.

    Long curves are smoothed; a single one stands before what it was smoothed from, of which a spike must not flatten
    the rest. Short ones are dots on a line. Several positive ones that lie far apart are drawn on a logarithmic scale.
    Steps go on to `until` at least, so that charts beside each other can be compared. A `profile` is over ten bins of
    diffusion time instead.
    """
    from matplotlib import rc_context  # here: importing it takes a second
    from matplotlib.figure import Figure  # no pyplot: no global state, no display
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    colours = Colours()
    ink = colours.of(INK)
    with rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": name,
            "font.size": 9,
            "text.parse_math": False,
            "axes.edgecolor": ink,
            "xtick.labelcolor": colours.of("faint"),
            "ytick.labelcolor": colours.of("faint"),
            "axes.linewidth": 0.5,
            "path.simplify": False,  # lines are thinned already
        }
    ):
        width, height = WIDE if wide else NARROW
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0.56 / width, 0.28 / height, 1 - 0.66 / width, 1 - 0.4 / height))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", color=ink, alpha=0.13, linewidth=0.6)
        axes.tick_params(length=0, labelsize=9, pad=4)
        shown = []
        for line in lines:
            stroke = {"color": colours.of(line.colour), "linestyle": (0, (4, 2)) if line.dashed else "-"}
            if smoothed and len(line.points) >= SMOOTH_FROM:
                steps, mean, low, high = thin(line.points)
                values = smooth(mean)
                shown.append(values)
                if len(lines) == 1:
                    shown.append(np.quantile(line.points[:, 1], [0.005, 0.995]))
                    if len(steps) < len(line.points):
                        axes.fill_between(steps, low, high, color=stroke["color"], alpha=0.22, linewidth=0)
                    else:
                        axes.plot(steps, mean, **stroke, alpha=0.38, linewidth=0.8)
            else:
                steps, values, *_ = thin(line.points)
                shown.append(values)
            dots = "o" if len(steps) < 26 and (len(lines) < 4 or len(steps) == 1) else None
            axes.plot(steps, values, **stroke, linewidth=1.6, marker=dots, markersize=3.2, solid_joinstyle="round")
        limits(axes, np.concatenate(shown), len(lines) > 2)
        axes.xaxis.set_major_locator(MaxNLocator(6 if wide else 4, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        written = FuncFormatter(lambda y, _: f"{100 * y:.3g}%" if percent else short(y))
        axes.yaxis.set_major_formatter(written)
        if axes.get_yscale() == "log":
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5 if wide else 4))
        if profile:
            axes.set_xticks([0, 4.5, 9], ["data", "diffusion time", "noise"])
        else:
            ends = max(until, *(line.points[-1, 0] for line in lines), 1)
            axes.set_xlim(min(0, *(line.points[0, 0] for line in lines)) - 0.015 * ends, 1.015 * ends)
        mark(axes, marks, colours)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return colours.back(for_page(buffer.getvalue(), name))


class Colours:
    """matplotlib takes only colours that it knows: each of the page's gets a stand-in, and is put back at the end."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def of(self, name: str) -> str:
        if name not in self.names:
            self.names.append(name)
        return f"#01fe{self.names.index(name):02x}"

    def back(self, svg: str) -> str:
        def put(found: re.Match[str]) -> str:
            name = self.names[int(found[1], 16)]
            return name if name.startswith("#") else f"var(--{name})"

        return re.sub(r"#01fe([0-9a-f]{2})", put, svg)


def mark(axes, marks: Marks, colours: Colours) -> None:
    """Upright lines where a run went on, went back or was changed, and ticks where steps were skipped."""
    high = axes.get_xaxis_transform()  # x in steps, y from 0 to 1
    for steps, colour, shape, dashes in (
        (marks.resumed, "resumed", "v", (0, (3, 3))),
        (marks.rolled_back, "rolled-back", "X", (0, (1, 2))),
        (marks.changed, "changed", "D", (0, (5, 2))),
    ):
        for step in spread(steps):
            axes.axvline(step, color=colours.of(colour), linewidth=0.9, linestyle=dashes, zorder=1)
        there = spread(steps)
        kept = {"color": colours.of(colour), "transform": high, "clip_on": False}
        axes.plot(there, [1.0] * len(there), shape, markersize=4.5, markeredgewidth=0, **kept)
    there = spread(marks.skipped)
    axes.plot(there, [0.02] * len(there), "|", color=colours.of("skipped"), transform=high, markersize=6, clip_on=False)


def limits(axes, values: np.ndarray, several: bool) -> None:
    """Room for all that is shown; a logarithmic scale where several lines need it."""
    low, high = float(values.min()), float(values.max())
    if several and low > 0 and high / low > 5:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.1, high * 1.1)
        return
    alike = high - low < 1e-3 * abs(high) or high == low  # else the rounding of a constant would look like a curve
    room = (0.05 * abs(high) or 1.0) if alike else 0.06 * (high - low)
    axes.set_ylim(low - room if low - room >= 0 or low < 0 else 0.0, high + room)


def thin(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean values, smallest and largest values of points `n 2`, over equal runs of neighbours where there are
    too many."""
    if len(points) <= MOST_POINTS:
        steps, values = points.T
        return steps, values, values, values
    starts = np.arange(0, len(points), -(-len(points) // MOST_POINTS))
    steps, values = np.add.reduceat(points, starts).T / np.diff(np.append(starts, len(points)))
    extremes = (np.minimum.reduceat(points[:, 1], starts), np.maximum.reduceat(points[:, 1], starts))
    return steps, values, *extremes


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the curve, shorter at its ends so that they are not dragged."""
    reach = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    side = np.minimum(reach, np.minimum(places, places[::-1]))
    return (sums[places + side + 1] - sums[places - side]) / (2 * side + 1)


def spread(steps: Sequence[int | float]) -> list[float]:
    """The steps, each once; where there are too many to tell apart, some of them."""
    there = sorted({float(step) for step in steps})
    return there[:: -(-len(there) // MOST_MARKS) or 1]


def ramp(count: int) -> list[str]:
    """So many colours, evenly along `RAMP`."""
    corners = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in RAMP])
    at = np.linspace(0, len(RAMP) - 1, count)
    mixed = np.stack([np.interp(at, np.arange(len(RAMP)), corners[:, c]) for c in range(3)], 1)
    return ["#" + "".join(f"{round(float(part)):02x}" for part in colour) for colour in mixed]


def short(value: float) -> str:
    """A number in few letters: 1200 is 1.2k."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}".replace("e-0", "e-")


def for_page(svg: str, name: str) -> str:
    """A whole SVG file as an element of a page: no prologue, no fixed size, ids of its own, hundredths of a point."""
    svg = svg[svg.index("<svg") :]
    prefix = "c" + re.sub(r"[^a-z0-9]", "", name.lower())
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\1#{prefix}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"font-(?:size|family): [^;]*; ", "", svg)  # the page's own
    return re.sub(r' (?:width|height)="[^"]*pt"', "", svg, count=2).strip()
