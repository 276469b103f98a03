"""Which curves a report shows, in whose words, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from sora_train.errors import one_line
from sora_train.report.charts import RUNS, SMOOTH_FROM, Line, Marks, draw, ramp, short, spread
from sora_train.report.read import RunRecord, is_number

QUARTERS = {
    "loss_q1": "first quarter, nearest the data",
    "loss_q2": "second",
    "loss_q3": "third",
    "loss_q4": "last, nearest noise",
}
TENTHS = [f"holdout_loss_{i}" for i in range(10)]
SHARES = {"data_wait_share", "mfu"}
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Learning": {
        "loss": ("Training loss", ""),
        "quarters": ("Training loss by diffusion time", "quarters of the time between data and noise"),
        "holdout_loss": ("Held-out loss", "on clips that are never trained on"),
        "tenths": ("Held-out loss by diffusion time", "tenths of the time between data and noise"),
        "grad_norm": ("Gradient norm", "before clipping"),
        "lr": ("Learning rate", ""),
    },
    "Quality of the samples": {
        "fvd": ("Distance from real videos (FVD)", "lower is better; only of the same number of clips comparable"),
        "similarity": ("Likeness of video and prompt", "cosine of CLIP's embeddings; higher is better"),
    },
    "Speed and memory": {
        "samples_per_s": ("Clips per second", "of all workers together"),
        "tokens_per_s": ("Tokens per second", "of all workers together"),
        "step_s": ("Seconds per step", ""),
        "data_wait_share": ("Time spent waiting for data", "share of the whole"),
        "mfu": ("Use of the devices (MFU)", "share of what they could compute"),
        "memory_gb": ("Memory", "GB at the most, of one worker"),
        "checkpoint_s": ("Seconds of a checkpoint", "until it was on disk; training goes on meanwhile"),
        "checkpoint_stall_s": ("Seconds that a checkpoint held training up", ""),
        "validation_s": ("Seconds of a validation", "samples and figures; training goes on meanwhile"),
    },
}
UNDRAWN = {"fvd_clips", *QUARTERS, *TENTHS}
MOST_OTHERS = 24


@dataclass(frozen=True)
class Chart:
    """A chart as the page shows it: a wide one has a second drawing for narrow windows."""

    title: str
    note: str
    value: str
    legend: list[tuple[str, str]]
    drawing: Markup
    wide: Markup | None = None


def chart_groups(runs: Sequence[RunRecord]) -> list[tuple[str, list[Chart]]]:
    """Groups of charts: of one run its quarters and tenths in one chart each, of several a line for every run."""
    groups = [(name, [chart for key, words in keys.items() if (chart := one_chart(runs, key, words))])
              for name, keys in GROUPS.items()]  # fmt: skip
    known = {key for keys in GROUPS.values() for key in keys} | UNDRAWN
    others = sorted({key for run in runs for key in run.curves} - known)[:MOST_OTHERS]
    groups.append(("Other figures", [chart for key in others if (chart := one_chart(runs, key, (title_of(key), "")))]))
    return [(name, charts) for name, charts in groups if charts]


def one_chart(runs: Sequence[RunRecord], key: str, words: tuple[str, str]) -> Chart | None:
    """The chart of a metric, or None where no run has it."""
    if key == "quarters":
        return by_time(runs, list(QUARTERS), list(QUARTERS.values()), key, words)
    if key == "tenths":
        return by_time(runs, TENTHS, [f"{i}/10 to {i + 1}/10" for i in range(10)], key, words)
    lines = [Line(run.curves[key], *tag) for run, tag in zip(runs, tags(runs), strict=True) if key in run.curves]
    if not lines:
        return None
    percent = key in SHARES
    last = lines[0].points[-1, 1]
    value = "" if len(runs) > 1 else f"{100 * last:.3g} %" if percent else f"{last:.4g}" if last < 1e4 else short(last)
    marks = marks_of(runs[0]) if len(runs) == 1 else Marks()
    how = {
        "smoothed": key not in ("lr", "holdout_loss", *GROUPS["Quality of the samples"]),
        "percent": percent,
        "until": last_step(runs),
    }
    wide = Markup(draw(lines, f"wide {key}", marks, wide=True, **how)) if key == "loss" else None
    drawing = Markup(draw(lines, key, marks if key in GROUPS["Learning"] else Marks(), **how))
    legend = legend_of(lines) if len(runs) > 1 else mark_legend(marks) if key == "loss" else []
    title, note = words
    if key == "loss" and max(len(line.points) for line in lines) >= SMOOTH_FROM:
        note = "the mean of a twentieth of the run around each step" + (
            "" if len(runs) > 1 else "; faint, as it was logged"
        )
    return Chart(title, note, value, legend, drawing, wide)


def by_time(
    runs: Sequence[RunRecord], keys: list[str], labels: list[str], name: str, words: tuple[str, str]
) -> Chart | None:
    """Of one run a line for each part of the diffusion time; of several each one's newest values over the parts."""
    if len(runs) == 1:
        curves = runs[0].curves
        there = zip(keys, labels, ramp(len(keys)), strict=True)
        lines = [Line(curves[key], label, colour) for key, label, colour in there if key in curves]
        return Chart(*words, "", legend_of(lines), Markup(draw(lines, name, until=last_step(runs)))) if lines else None
    if name == "quarters":
        return None
    lines = []
    for run, tag in zip(runs, tags(runs), strict=True):
        newest = [run.curves[key][-1, 1] if key in run.curves else np.nan for key in keys]
        if np.isfinite(newest).all():
            lines.append(Line(np.stack([np.arange(len(keys)), newest], 1), *tag))
    note = "at each run's newest validation"
    return Chart(words[0], note, "", legend_of(lines), Markup(draw(lines, name, profile=True))) if lines else None


def last_step(runs: Sequence[RunRecord]) -> float:
    """The last step that any run has a figure of."""
    return max((float(points[-1, 0]) for run in runs for points in run.curves.values()), default=0.0)


def tags(runs: Sequence[RunRecord]) -> list[tuple[str, str, bool]]:
    """Name, colour, and whether it is dashed, of each run's line; a run alone needs no name."""
    if len(runs) == 1:
        return [("", RUNS[0], False)]
    return [(run.name, RUNS[i % len(RUNS)], i >= len(RUNS)) for i, run in enumerate(runs)]


def legend_of(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """(label, colour) of each line."""
    return [(line.label + (" (dashed)" if line.dashed else ""), line.colour) for line in lines]


def marks_of(run: RunRecord) -> Marks:
    """Where a run went on, went back, skipped steps, and got other settings or other clips, after its events."""

    def steps(*kinds: str) -> list[float]:
        found = (event.get("step") for event in run.events if event.get("event") in kinds)
        return [float(step) for step in found if is_number(step) and 0 <= step <= last_step([run])]

    return Marks(steps("resume"), steps("rollback"), steps("skipped"), steps("changed", "new_data"))


def mark_legend(marks: Marks) -> list[tuple[str, str]]:
    """What the marks mean and how many there are, of those kinds that there are."""
    kinds = (
        ("resumed", "▼", marks.resumed),
        ("rolled-back", "✖", marks.rolled_back),
        ("skipped", "❘", marks.skipped),
        ("changed", "◆", marks.changed),
    )
    words = {
        "resumed": "resumed",
        "rolled-back": "rolled back",
        "skipped": "steps skipped",
        "changed": "settings or clips changed",
    }
    return [(f"{sign} {words[kind]}, {len(steps)}×", f"var(--{kind})") for kind, sign, steps in kinds if spread(steps)]


def title_of(key: str) -> str:
    """The title of a metric that this module doesn't know."""
    return one_line(key[:200])[:60] or "(no name)"
