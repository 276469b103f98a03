"""Which curves a report shows, their titles and their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sora_train.errors import one_line
from sora_train.report.charts import RAMP, RUNS, SMOOTH_FROM, Line, draw, short
from sora_train.report.read import RunRecord, is_number

PARTS = {
    "quarters": {
        "loss_q1": "first quarter, nearest the data",
        "loss_q2": "second",
        "loss_q3": "third",
        "loss_q4": "last, nearest noise",
    },
    "tenths": {f"holdout_loss_{i}": f"{i}/10 to {i + 1}/10" for i in range(10)},
}
"""Charts of several metrics, one for each part of the diffusion time."""
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
        "fvd": ("Distance from real videos (FVD)", "lower is better; comparable only for the same number of clips"),
        "similarity": ("Similarity of video and prompt", "cosine of CLIP embeddings; higher is better"),
    },
    "Speed and memory": {
        "samples_per_s": ("Clips per second", "of all workers"),
        "tokens_per_s": ("Tokens per second", "of all workers"),
        "step_s": ("Seconds per step", ""),
        "data_wait_share": ("Time spent waiting for data", "share of the total"),
        "mfu": ("Model FLOPs utilisation (MFU)", "share of the devices' peak"),
        "memory_gb": ("Memory", "peak of one worker in GB"),
        "checkpoint_s": ("Seconds to write a checkpoint", "in the background of training"),
        "checkpoint_stall_s": ("Seconds that a checkpoint blocks training", ""),
        "validation_s": ("Seconds of a validation", "samples and metrics, in the background of training"),
    },
}
NOT_SMOOTHED = {"lr", "holdout_loss", *GROUPS["Quality of the samples"]}
MAX_OTHERS = 24
EVENTS = {
    "resumed": ("resumed", ("resume",)),
    "rolled-back": ("rolled back", ("rollback",)),
    "skipped": ("steps skipped", ("skipped",)),
    "changed": ("settings or clips changed", ("changed", "new_data")),
}
"""Marks in the curves by CSS variable: text in the legend, and the events that they stand for."""


@dataclass(frozen=True)
class Chart:
    """A chart of the page. `legend` has labels and colours."""

    title: str
    note: str
    value: str
    legend: list[tuple[str, str]]
    drawing: Markup


def chart_groups(runs: Sequence[RunRecord]) -> list[tuple[str, list[Chart]]]:
    """The charts by group: of one run, or with one line for each of several runs."""
    known = {key for keys in GROUPS.values() for key in keys} | {"fvd_clips", *PARTS["quarters"], *PARTS["tenths"]}
    others = sorted({key for run in runs for key in run.curves} - known)[:MAX_OTHERS]
    groups = GROUPS | {"Other metrics": {key: (one_line(key[:200])[:60] or "(no name)", "") for key in others}}
    charts = [(name, [make_chart(runs, key, *words) for key, words in keys.items()]) for name, keys in groups.items()]
    found = [(name, [chart for chart in each if chart]) for name, each in charts]
    return [(name, each) for name, each in found if each]


def make_chart(runs: Sequence[RunRecord], key: str, title: str, note: str) -> Chart | None:
    """The chart of a metric, or of `PARTS` for one run; None if no run has it."""
    alone, percent = len(runs) == 1, key in SHARES
    if key in PARTS:
        parts, curves = PARTS[key] if alone else {}, runs[0].curves
        lines = [Line(curves[name], label, RAMP[9 * i // (len(parts) - 1)])
                 for i, (name, label) in enumerate(parts.items()) if name in curves]  # fmt: skip
    else:
        lines = [Line(run.curves[key], run.name, RUNS[i % len(RUNS)], i >= len(RUNS))
                 for i, run in enumerate(runs) if key in run.curves]  # fmt: skip
    if not lines:
        return None
    value, legend, marks = "", [(line.label + (" (dashed)" if line.dashed else ""), line.colour) for line in lines], {}
    if alone and key not in PARTS:
        last, legend = lines[0].points[-1, 1], []
        value = f"{100 * last:.3g} %" if percent else f"{last:.4g}" if last < 1e4 else short(last)
        marks = marks_of(runs[0]) if key in GROUPS["Learning"] else {}
    if key == "loss":
        legend += [(f"{EVENTS[kind][0]}, {len(steps)}×", f"var(--{kind})") for kind, steps in marks.items() if steps]
        if max(len(line.points) for line in lines) >= SMOOTH_FROM:
            note = "mean over a twentieth of the run" + ("; faint: as logged" if alone else "")
    drawing = draw(lines, marks, key not in NOT_SMOOTHED, percent, last_step(runs))
    return Chart(title, note, value, legend, Markup(drawing))


def last_step(runs: Sequence[RunRecord]) -> float:
    """The last step of any curve."""
    return max((float(points[-1, 0]) for run in runs for points in run.curves.values()), default=0.0)


def marks_of(run: RunRecord) -> dict[str, list[float]]:
    """The steps of the run's events, by the names in `EVENTS`."""
    last = last_step([run])
    at = [(event.get("event"), step) for event in run.events if is_number(step := event.get("step"))]
    return {name: [float(step) for kind, step in at if kind in kinds and 0 <= step <= last]
            for name, (_, kinds) in EVENTS.items()}  # fmt: skip
