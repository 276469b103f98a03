"""Results of the cluster drill: compares with undisturbed runs, and faults with events."""

import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.shards import read_shards
from tests.drills.cluster_stage import Workload
from tests.drills.history import account, difference, losses

HEADS = ("time", "job", "fault", "node", "met", "what happened", "standstill")
ORDINARY = ("checkpoint", "validation_done", "validation_dropped", "not_measured", "end")
TROUBLE = ("worker_lost", "driver_lost", "preempted", "stopped", "interrupted", "failed")
"""Events one of which must explain each restart of the workers."""


@dataclass
class Row:
    """A row of the table: a fault and its consequences."""

    at_s: float
    phase: str
    fault: str
    node: str
    met: str
    repaired_s: float
    """When the fault is repaired, by the monotonic clock."""
    standing: tuple[int, int]
    jobs: int
    events_before: int
    began_ns: int
    ends_job: bool = False
    stalled_s: float = 0.0
    attempts: int = 0
    """Later starts of the workers that did a step."""
    happened: list[str] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)

    def recovered(self, work: Workload) -> bool:
        """Whether the workload has progressed beyond the fault, after it was repaired."""
        beyond = work.progress > (self.standing[0], self.standing[1] + (work.verb == "train"))
        return beyond and work.progressed_at > self.repaired_s and len(work.jobs) > self.jobs - (not self.ends_job)

    def add_events(self, events: list[dict]) -> None:
        self.events = [event for event in events if event["event"] not in ORDINARY]

    def is_recorded(self) -> bool:
        """Whether `events.jsonl` explains the restarts of the workers."""
        kinds = Counter(event["event"] for event in self.events)
        begun = kinds["start"] + kinds["resume"]
        reasons = sum(kinds[kind] for kind in TROUBLE)
        return begun >= self.attempts and (reasons >= 1 or not self.attempts)

    def describe(self) -> str:
        counts = Counter(event["event"] for event in self.events)
        shown = [f"{kind}{f' × {number}' if number > 1 else ''}" for kind, number in counts.items()]
        if not self.met and self.fault != "none":
            shown.append("hit nothing of the job")
        return "; ".join([*self.happened, *shown]) or "went on"


def tabulate(rows: list[Row]) -> str:
    head = f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}"
    cells = [
        (f"{row.at_s // 60:.0f}:{row.at_s % 60:02.0f}", row.phase, row.fault, row.node, row.met or "—",
         row.describe().replace("|", "/"), f"{row.stalled_s:.0f} s")
        for row in rows
    ]  # fmt: skip
    return "\n".join([head, *(f"| {' | '.join(row)} |" for row in cells)])


def compare(done: list[Workload], rows: list[Row], wrong: list[str]) -> tuple[list[str], bool]:
    """A line per requirement, and whether all hold. `done` starts with the undisturbed prep and training."""
    said, holds = [], not wrong and bool(rows)
    for work in done:
        unbroken = done[0] if work.verb == "prep" else done[1]
        found, fine = (prep_holds if work.verb == "prep" else training_holds)(work, unbroken)
        said.append(f"- {work.name}, submitted {len(work.jobs)} times: {found}")
        holds = holds and fine
    trained, unseen = [row for row in rows if row.attempts], [row for row in rows if not row.is_recorded()]
    restarts = sum(row.attempts for row in trained)
    kinds = Counter(row.fault for row in rows)
    said.append(f"- {len(rows)} faults: {', '.join(f'{kind} {number}' for kind, number in kinds.items())}")
    said.append(f"- workers were restarted {restarts} times, after {len(trained)} faults")
    said += [f"- FAILED: {row.fault} of {row.phase} is not in events.jsonl: {row.describe()}" for row in unseen]
    said += [f"- FAILED: {one}" for one in wrong]
    return said, holds and not unseen


def prep_holds(work: Workload, unbroken: Workload) -> tuple[str, bool]:
    """The shards have the same rows, byte for byte, as those of the undisturbed prep, and none twice."""
    ours, theirs = (rows_of(shared(one) / one.name) for one in (work, unbroken))
    ids, wanted = [name for name, _ in ours], {name for name, _ in theirs}
    lost, twice, foreign = len(wanted - set(ids)), len(ids) - len(set(ids)), len(set(ids) - wanted)
    other = sum(dict(theirs).get(name) != row for name, row in ours)
    fine = not (lost or twice or foreign or other)
    text = f"{len(ids)} ids, {lost} lost, {twice} twice, {foreign} others; {other} rows differ from the unbroken prep's"
    return ("holds: " if fine else "FAILED: ") + text, fine


def shared(work: Workload) -> Path:
    return work.machines.folder / "shared"


def rows_of(folder: Path) -> list[tuple[str, tuple]]:
    """Id and content of every row of the shards."""
    return [
        (row["sample_id"], (row["latents"], *row["text"], *row["captions"]))
        for _, table in read_shards(str(folder))
        for row in table.to_pylist()
    ]


def training_holds(work: Workload, unbroken: Workload) -> tuple[str, bool]:
    """Each epoch has every clip exactly once, and losses equal the undisturbed training's."""
    found = account(work.run, shared(work) / "prep-unbroken")
    ours, theirs = (statistics.mean(list(losses(one.run).values())[-20:]) for one in (work, unbroken))
    mean, off = abs(ours - theirs) / theirs, difference(work.run, unbroken.run)
    fine = not (found.lost or found.repeated or found.unseen or found.named) and mean <= 1e-4
    text = (
        f"{found.lost} samples lost, {found.repeated} repeated, {found.again} steps done again; mean of the last 20 "
        f"losses differs by {mean:.0e}, a step's by at most {off:.0e}"
    )
    return ("holds: " if fine else "FAILED: ") + text, fine
