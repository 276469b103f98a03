"""What a run writes down: `metrics.jsonl`, the record of truth, `events.jsonl`, and the line that a person reads."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class JsonLines:
    """A file of one JSON object a line; each is on disk before `write` returns. Floats are written in full."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        # One write of a whole line in append mode: driver, worker and validation may write the same file.
        with self.path.open("ab") as file:
            file.write((json.dumps(record) + "\n").encode())

    def read(self) -> list[dict[str, Any]]:
        """Every whole line; one that a crash cut short is left out."""
        if not self.path.exists():
            return []
        return [record for line in self.path.read_bytes().splitlines() if (record := parse(line)) is not None]

    def cut_back(self, step: int) -> None:
        """Ends the file before the first line that is of a later step than `step`, or that a crash cut short."""
        if not self.path.exists():
            return
        keep = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            record = parse(line)
            if record is None or record["step"] > step:
                break
            keep += len(line)
        os.truncate(self.path, keep)


class Events:
    """`events.jsonl`: starts, resumes, lost workers, checkpoints, validations, ends, each with its reason."""

    def __init__(self, run: Path) -> None:
        self.lines = JsonLines(run / "events.jsonl")

    def write(self, event: str, step: int, reason: str) -> None:
        self.lines.write(
            {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, "step": step, "reason": reason}
        )


def parse(line: bytes) -> dict[str, Any] | None:
    """A line's object, or None where it holds none, such as one cut short."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def log_line(record: dict[str, Any], steps: int) -> str:
    """One aligned line of a metrics record, for people."""
    width = len(str(steps))
    left = (steps - record["step"]) * record["step_s"]
    return (
        f"step {record['step']:{width}d}/{steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
        f"grad {record['grad_norm']:7.3f}  {record['step_s']:6.2f} s/step  {record['samples_per_s']:7.1f} clips/s  "
        f"data wait {record['data_wait_share']:4.0%}  {duration(left)} left"
    )


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 07 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"
