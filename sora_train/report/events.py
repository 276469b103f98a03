"""A run's events in words: problems first, and all of them."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sora_train.errors import one_line
from sora_train.report.read import is_number

TITLES = {
    "failed": "training failed",
    "damaged": "a checkpoint was damaged",
    "not_compiled": "blocks run without torch.compile",
    "no_kernels": "runs without some of sora_train's kernels",
    "group_split": "workers that share clips are on two nodes",
    "rollback": "went back to a checkpoint",
    "skipped": "a step was skipped",
    "worker_lost": "a worker was lost",
    "driver_lost": "the command was lost",
    "validation_failed": "a validation failed",
    "validation_dropped": "a validation was skipped",
    "tracking_failed": "wandb failed",
    "interrupted": "interrupted",
    "stopped": "asked to stop",
    "preempted": "nodes about to be taken away",
    "changed": "settings changed",
    "new_data": "clips were added or removed",
}
GRAVE = {"failed", "damaged", "rollback", "worker_lost", "driver_lost"}
NORMAL = {"start", "resume", "checkpoint", "validation_done", "left_out", "attention", "norms", "compiling", "profiled",
          "end"}  # fmt: skip
STATES = {"end": "finished", "failed": "failed", "stopped": "stopped, can resume", "interrupted": "interrupted",
          "start": "running", "resume": "running"}  # fmt: skip
MAX_OF_A_KIND, MAX_PROBLEMS, MAX_ROWS = 3, 60, 3000


@dataclass(frozen=True)
class Row:
    """An event in words. `more` is the number of earlier events of its kind that are not shown."""

    time: str
    step: str
    what: str
    rest: str
    grave: bool
    more: int = 0


def problems(events: Sequence[dict]) -> list[Row]:
    """The newest few of every kind that is not normal, newest first."""
    counts = Counter(kind_of(event) for event in events)
    shown: Counter[str] = Counter()
    rows: list[Row] = []
    for event in reversed(events):
        kind = kind_of(event)
        if kind and kind not in NORMAL and shown[kind] < MAX_OF_A_KIND:
            shown[kind] += 1
            rows.append(row_of(event, counts[kind] - MAX_OF_A_KIND if shown[kind] == MAX_OF_A_KIND else 0))
    return rows[:MAX_PROBLEMS]


def all_rows(events: Sequence[dict]) -> list[Row]:
    """The newest `MAX_ROWS` events, newest first."""
    return [row_of(event) for event in reversed(events[-MAX_ROWS:])]


def state_of(events: Sequence[dict], complete: bool = True) -> str:
    """The state of a run after its last start or end; `complete` is false if some events could not be read."""
    states = [STATES[kind] for event in events if (kind := kind_of(event)) in STATES]
    return states[-1] if states else "not started" if complete else "state unknown"


def kind_of(event: dict) -> str:
    """The event's name; empty if it has none."""
    kind = event.get("event")
    return one_line(kind[:80]) if isinstance(kind, str) else ""


def row_of(event: dict, more: int = 0) -> Row:
    """An event in words, of limited length."""
    time, step, kind = event.get("time", ""), event.get("step", ""), kind_of(event)
    if is_number(time) and 0 < time < 1e11:
        time = datetime.datetime.fromtimestamp(time, datetime.UTC).isoformat()
    rest = {key: value for key, value in event.items() if key not in ("time", "step", "event")}
    words = str(rest["reason"]) if list(rest) == ["reason"] else ", ".join(f"{key}: {rest[key]}" for key in rest)
    step = f"{step:,}" if isinstance(step, int) and abs(step) < 1e15 else str(step)[:40]
    time = one_line(str(time)[:19].replace("T", " "))
    what = TITLES.get(kind, kind.replace("_", " "))
    return Row(time, one_line(step), what, one_line(words[:2000]), kind in GRAVE, max(0, more))
