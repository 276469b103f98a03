"""What happened to a run: the events that somebody should see first, and all of them."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sora_train.errors import one_line
from sora_train.report.read import is_number

TROUBLE = {
    "failed": "training failed",
    "damaged": "a checkpoint was damaged",
    "rollback": "went back to a checkpoint",
    "skipped": "a step was skipped",
    "worker_lost": "a worker was lost",
    "driver_lost": "the command was lost",
    "validation_failed": "a validation failed",
    "validation_dropped": "a validation was left out",
    "tracking_failed": "wandb failed",
    "interrupted": "interrupted",
    "stopped": "asked to stop",
    "preempted": "nodes about to be taken away",
    "changed": "settings changed",
    "new_data": "clips came or went",
}
GRAVE = {"failed", "damaged", "rollback", "worker_lost", "driver_lost"}
CALM = {"start", "resume", "checkpoint", "validation_done", "left_out", "compiling", "end"}
STATES = {"end": "finished", "failed": "failed", "stopped": "stopped, can resume", "interrupted": "interrupted"}
MOST_OF_A_KIND, MOST_ROWS = 3, 3000


@dataclass(frozen=True)
class Row:
    """An event in words; `more` counts those of its kind that are not shown beside it."""

    time: str
    step: str
    what: str
    rest: str
    grave: bool
    more: int = 0


def trouble(events: Sequence[dict]) -> list[Row]:
    """The newest few of every kind that is not the ordinary course of things, newest first."""
    counts: Counter[str] = Counter()
    chosen: list[dict] = []
    for event in reversed(events):
        kind = kind_of(event)
        if kind and kind not in CALM:
            counts[kind] += 1
            if counts[kind] <= MOST_OF_A_KIND:
                chosen.append(event)
    last = {kind_of(event): event for event in chosen}  # of each kind the one that is shown last says how many more
    return [
        row(event, counts[kind_of(event)] - MOST_OF_A_KIND if last[kind_of(event)] is event else 0)
        for event in chosen[:60]
    ]


def all_rows(events: Sequence[dict]) -> list[Row]:
    """Every event, newest first, the newest few thousand of very many."""
    return [row(event) for event in reversed(events[-MOST_ROWS:])]


def state_of(events: Sequence[dict], whole: bool = True) -> str:
    """How a run stands after its last start or end: running, or cut off without a word. Not `whole` are events of
    which some could not be read: that there is no start then says nothing."""
    for event in reversed(events):
        kind = kind_of(event)
        if kind in STATES:
            return STATES[kind]
        if kind in ("start", "resume"):
            return "running"
    return "not started" if whole else "state unknown"


def kind_of(event: dict) -> str:
    kind = event.get("event")
    return one_line(kind[:80]) if isinstance(kind, str) else ""


def row(event: dict, more: int = 0) -> Row:
    """An event in words, cut where it is very long."""
    time = event.get("time", "")
    if is_number(time) and 0 < time < 1e11:
        time = datetime.datetime.fromtimestamp(time, datetime.UTC).isoformat()
    time = str(time)[:19].replace("T", " ")
    step = event.get("step", "")
    rest = {key: value for key, value in event.items() if key not in ("time", "step", "event")}
    words = str(rest["reason"]) if list(rest) == ["reason"] else ", ".join(f"{key}: {rest[key]}" for key in rest)
    kind = kind_of(event)
    what = TROUBLE.get(kind, kind.replace("_", " "))
    place = f"{step:,}" if isinstance(step, int) and abs(step) < 1e15 else str(step)[:40]
    return Row(one_line(time), one_line(place), what, one_line(words[:2000]), kind in GRAVE, max(0, more))
