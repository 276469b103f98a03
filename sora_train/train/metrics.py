"""What a run writes down: `metrics.jsonl`, the record of truth, `events.jsonl`, and the line that a person reads."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from sora_train.errors import UserError
from sora_train.locks import file_lock
from sora_train.storage import atomic_file

T = TypeVar("T")
STOP_FILE = "leave"
"""A file of this name in a run's folder asks the run to make a checkpoint and end."""


class JsonLines:
    """A file of one JSON object a line, to which driver, workers and validations of several nodes may append.

    Each line is on the disk before `write` returns (fsync). Writers exclude each other by a lock file, since appending
    is not atomic on NFS. Floats are written in full. Writing raises UserError where it fails, such as on a full disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record) + "\n").encode()
        with self._named(), file_lock(self.path), self.path.open("a+b") as file:
            if end := os.fstat(file.fileno()).st_size:
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line  # a killed writer left half a line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """Every whole line; one that a crash cut short is left out."""
        if not self.path.exists():
            return []
        return [record for line in self.path.read_bytes().splitlines() if (record := parse(line)) is not None]

    def cut_back(self, step: int) -> None:
        """Takes out lines of later steps than `step`, and what is no record, such as a line that a crash cut short."""
        if not self.path.exists():
            return
        with self._named(), file_lock(self.path):
            before = self.path.read_bytes()
            lines = before.splitlines(keepends=True)
            after = b"".join(line for line in lines if (record := parse(line)) is not None and record["step"] <= step)
            if before.startswith(after):
                os.truncate(self.path, len(after))
                return
            with atomic_file(self.path) as draft:
                draft.write_bytes(after)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path} can't be written: {error.strerror or error}. Make room there or make it "
                "writable; then the same command goes on from the last whole checkpoint"
            ) from error


class Events:
    """`events.jsonl`: starts, resumes, lost workers, checkpoints, validations, ends, each with its reason."""

    def __init__(self, run: Path) -> None:
        self.lines = JsonLines(run / "events.jsonl")

    def write(self, event: str, step: int, reason: str) -> None:
        self.lines.write(
            {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, "step": step, "reason": reason}
        )


QUARTERS = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")
"""Mean loss at diffusion times from 0 to 250, the data's end, to 500, to 750, to 1000, which is noise."""


class Tally:
    """What happened since the last line of the log. Sums over all ranks, but for the clock, which is this rank's."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.waited = 0.0
        self.steps = self.clips = self.positions = self.flops = 0
        self.losses, self.counts = [0.0] * 4, [0.0] * 4

    def wait(self, make: Callable[[], T]) -> T:
        """Calls `make`, and counts the time as waiting for data."""
        began = time.perf_counter()
        made = make()
        self.waited += time.perf_counter() - began
        return made

    def add(self, clips: int, positions: int, flops: int, losses: list[float], counts: list[float]) -> None:
        """A step: its clips, their tokens and forward FLOPs, and loss sums and counts by quarter of diffusion time."""
        self.steps += 1
        self.clips += clips
        self.positions += positions
        self.flops += flops
        self.losses = [a + b for a, b in zip(self.losses, losses, strict=True)]
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def record(self, peak_flops: float | None) -> dict[str, float | None]:
        """Means and rates. A quarter that no clip fell into is None, as is `mfu` where `peak_flops` (of all devices
        together, per second) is not known. A step costs three forward passes; what is computed twice counts once.
        """
        seconds = max(self.seconds, 1e-9)
        quarters = zip(QUARTERS, self.losses, self.counts, strict=True)
        return {
            **{name: loss / count if count else None for name, loss, count in quarters},
            "step_s": seconds / max(self.steps, 1),
            "samples_per_s": self.clips / seconds,
            "tokens_per_s": self.positions / seconds,
            "data_wait_share": self.waited / seconds,
            "mfu": 3 * self.flops / seconds / peak_flops if peak_flops else None,
        }


def parse(line: bytes) -> dict[str, Any] | None:
    """A line's record, which says its step, or None where it holds none, such as one cut short."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def log_line(record: dict[str, Any], steps: int) -> str:
    """One aligned line of a metrics record, for people."""
    width = len(str(steps))
    left = (steps - record["step"]) * record["step_s"]
    return (
        f"step {record['step']:{width}d}/{steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
        f"grad {record['grad_norm']:7.3f}  {record['step_s']:6.2f} s/step  {record['samples_per_s']:7.1f} clips/s  "
        f"data wait {record['data_wait_share']:4.0%}  {duration(left)} left"
    )


def validation_line(record: dict[str, Any]) -> str:
    """One line of what a validation measured; its bins of diffusion time are left to the report."""
    shown = {"holdout_loss": "held-out loss", "fvd": "FVD", "similarity": "similarity"}
    figures = [f"{title} {record[key]:.4g}" for key, title in shown.items() if record.get(key) is not None]
    return f"validation of step {record['step']}  {'  '.join(figures) or 'samples are there'}"


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 07 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"
