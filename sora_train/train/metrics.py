"""A run's records: `metrics.jsonl`, `events.jsonl`, and the lines of the log that people read."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
    """A file of one JSON object per line, which driver, workers and validations on several nodes append to.

    Each line is on disk before `write` returns (fsync). Writers use a lock file, since appending is not atomic on NFS.
    A file that is not `shared` has a single writer and no lock. Floats keep every digit. Raises UserError if writing
    fails, for example on a full disk.
    """

    def __init__(self, path: Path, shared: bool = True) -> None:
        self.path, self.shared = path, shared

    def write(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record) + "\n").encode()
        lock = file_lock(self.path) if self.shared else nullcontext()
        with self._write_errors(), lock, self.path.open("a+b") as file:
            if end := os.fstat(file.fileno()).st_size:
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line  # after the half line of a killed writer
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All complete records; a line that a crash cut short is ignored."""
        if not self.path.exists():
            return []
        return [record for line in self.path.read_bytes().splitlines() if (record := parse(line)) is not None]

    def last_step(self) -> int:
        """The last step of a record; 0 without records."""
        return max((record["step"] for record in self.read()), default=0)

    def truncate(self, step: int) -> None:
        """Removes records of steps after `step`, and lines that are no records, such as one that a crash cut short."""
        if not self.path.exists():
            return
        with self._write_errors(), file_lock(self.path):
            before = self.path.read_bytes()
            lines = before.splitlines(keepends=True)
            after = b"".join(line for line in lines if (record := parse(line)) is not None and record["step"] <= step)
            if after != before:
                with atomic_file(self.path) as draft:
                    draft.write_bytes(after)

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path} can't be written: {error.strerror or error}. Make room there or make it writable. "
                "Then run the same command again: it resumes from the last complete checkpoint",
                code="not_writable",
            ) from error


class Events:
    """`events.jsonl`: starts, resumes, lost workers, rollbacks, validations, ends, each with its reason."""

    def __init__(self, run: Path) -> None:
        self.lines = JsonLines(run / "events.jsonl")

    def write(self, event: str, step: int, reason: str) -> None:
        self.lines.write(
            {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, "step": step, "reason": reason}
        )


QUARTERS = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")
"""Keys of the mean loss by quarter of the diffusion time, from 0 (data) to 1000 (noise)."""


class Tally:
    """Sums over all ranks since the last metrics record; times are of this rank."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.waited = 0.0
        self.steps = self.clips = self.positions = self.flops = 0
        self.losses, self.counts = [0.0] * 4, [0.0] * 4
        self.by_bucket = defaultdict[str, list[float]](lambda: [0.0, 0.0])  # loss sum and clips

    def wait(self, make: Callable[[], T]) -> T:
        """Calls `make` and counts the time as waiting for data."""
        began = time.perf_counter()
        made = make()
        self.waited += time.perf_counter() - began
        return made

    def add(
        self, bucket: str, clips: int, positions: int, flops: int, losses: list[float], counts: list[float]
    ) -> None:
        """Adds a step: its bucket, clips, tokens, FLOPs, and loss sums and counts by quarter of diffusion time."""
        self.by_bucket[bucket][0] += sum(losses)
        self.by_bucket[bucket][1] += clips
        self.steps += 1
        self.clips += clips
        self.positions += positions
        self.flops += flops
        self.losses = [a + b for a, b in zip(self.losses, losses, strict=True)]
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def record(self, peak_flops: float | None, by_bucket: bool = False) -> dict[str, float | None]:
        """Means and rates, with `by_bucket` also the mean loss of each bucket that came.

        A quarter without clips is None, as is `mfu` without `peak_flops` (of all devices). Recomputed activations are
        not counted.
        """
        seconds = max(self.seconds, 1e-9)
        quarters = zip(QUARTERS, self.losses, self.counts, strict=True)
        return {
            **{name: loss / count if count else None for name, loss, count in quarters},
            **{f"loss_{name}": loss / clips for name, (loss, clips) in self.by_bucket.items() if by_bucket},
            "step_s": seconds / max(self.steps, 1),
            "samples_per_s": self.clips / seconds,
            "tokens_per_s": self.positions / seconds,
            "data_wait_share": self.waited / seconds,
            "mfu": self.flops / seconds / peak_flops if peak_flops else None,
        }


def parse(line: bytes) -> dict[str, Any] | None:
    """A line's record with its step, or None for a line that holds none, such as one that was cut short."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def log_line(record: dict[str, Any], steps: int) -> str:
    """A metrics record as an aligned line of the log."""
    width = len(str(steps))
    left = (steps - record["step"]) * record["step_s"]
    return (
        f"step {record['step']:{width}d}/{steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
        f"grad {record['grad_norm']:7.3f}  {record['step_s']:6.2f} s/step  {record['samples_per_s']:7.1f} clips/s  "
        f"data wait {record['data_wait_share']:4.0%}  {duration(left)} left"
    )


def validation_line(record: dict[str, Any]) -> str:
    """A validation's metrics as a line of the log, without its bins of diffusion time."""
    shown = {"holdout_loss": "held-out loss", "fvd": "FVD", "similarity": "similarity"}
    figures = [f"{title} {record[key]:.4g}" for key, title in shown.items() if record.get(key) is not None]
    return f"validation of step {record['step']}  {'  '.join(figures) or 'samples are there'}"


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 07 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"
