"""Where a run lives: the folder that the loop writes into, and what the world around it asks of the loop.

A plain process needs no more than the folder. Ray comes in by two callables (`launch/worker.py`).
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sora_train.train import checkpoint
from sora_train.train.metrics import STOP_FILE, Events, JsonLines

LOOK_S = 0.5  # between two looks for it: a network file system answers slowly
STEP_DELAY_S = float(os.environ.get("SORA_STEP_DELAY_S", "0"))  # for drills: steps slow enough to do something in them

Report = Callable[[int, dict[str, float], Path, Callable[[], None]], None]
"""Takes (step, metrics, folder, wait) on every rank while this rank's part is being written into `folder`; `wait`
returns when it is, and raises what went wrong."""


class Home:
    """A run's folder. Every rank has its own `Home` of the same folder."""

    def __init__(self, run: Path, report: Report | None = None, notice: Callable[[int], bool] | None = None) -> None:
        """`notice` is asked on every rank at every step whether a checkpoint is wanted at once."""
        self.run, self.report, self.notice = run, report, notice
        self.metrics, self.events = JsonLines(run / "metrics.jsonl"), Events(run)
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None
        self.noting: list[Future[None]] = []
        self.timings: dict[str, float] = {}  # of the last checkpoint, for the next line of the log
        self.looked_at, self.stop_requested = 0.0, False

    def log(self, record: dict[str, Any]) -> None:
        """A metrics record, with the seconds of a checkpoint where one was written since the last. For rank 0."""
        timings, self.timings = self.timings, {}
        self.metrics.write(record | timings)

    def note(self, event: str, step: int, reason: str) -> None:
        """An event. For rank 0."""
        self.events.write(event, step, reason)

    def note_later(self, event: str, step: int, reasons: Callable[[], str | list[str]]) -> None:
        """Events whose reasons take long to find, such as names in remote shards. They are written in the background,
        before any checkpoint that is made later. For rank 0.
        """

        def write() -> None:
            found = reasons()
            for reason in [found] if isinstance(found, str) else found:
                self.events.write(event, step, reason)

        self.noting.append(self.writer.submit(write))

    def trained(self, rank: int, step: int, batch: int, sample_ids: list[str]) -> None:
        """What this rank learned from at a step; nothing at one that was skipped. A step that comes again, after a
        resume or a rollback, is written again: a rank's last line for it in the last attempt holds, which is named by
        the time at which it began. On every rank.
        """
        folder = self.run / "trained"
        folder.mkdir(exist_ok=True)
        line = {"attempt": self.attempt, "step": step, "batch": batch, "sample_ids": sample_ids}
        JsonLines(folder / f"rank_{rank:05d}.jsonl").write(line)

    @cached_property
    def attempt(self) -> int:
        """Nanoseconds since 1970 at which this attempt began, the same on every rank. Collective the first time."""
        began = [time.time_ns()]
        dist.broadcast_object_list(began, src=0)
        return began[0]

    def cut_back(self, step: int) -> None:
        """Takes back the records of later steps, and that these were validated: they are done again. For rank 0."""
        self.metrics.cut_back(step)
        for result in self.run.glob("samples/step_*/result.json"):
            if result.parent.name > checkpoint.name_of(step):
                result.unlink(missing_ok=True)

    def wish(self, step: int) -> tuple[bool, bool]:
        """Whether somebody wants a checkpoint now, and whether the run shall end with it. On every rank, each step."""
        if STEP_DELAY_S:
            time.sleep(STEP_DELAY_S)
        notice = self.notice is not None and self.notice(step)
        if time.monotonic() - self.looked_at > LOOK_S:
            self.looked_at, self.stop_requested = time.monotonic(), (self.run / STOP_FILE).exists()
        return notice, self.stop_requested

    def keep(self, make: Callable[[], checkpoint.Snapshot]) -> None:
        """Has a snapshot made, and written in the background. Waits first until the one before is written: a slow disk
        slows training down, and memory never holds two. The copy itself is from and to pageable memory.

        On every rank. Raises UserError where the one before could not be written.
        """
        began = time.monotonic()
        self.settle()
        snapshot = make()
        stall_s, state = time.monotonic() - began, snapshot.state
        folder = self.run / "checkpoints" / checkpoint.name_of(state.step)

        def write() -> None:
            snapshot.write(folder)
            self.timings = {"checkpoint_s": time.monotonic() - began, "checkpoint_stall_s": stall_s}

        writing = self.writing = self.writer.submit(write)
        if self.report is not None:
            metrics = {} if state.loss is None else {"loss": state.loss}
            self.report(state.step, metrics, folder, lambda: writing.result())

    def settle(self) -> None:
        """Waits for the events and the checkpoint that are being written; raises UserError if one could not be."""
        writing, self.writing = [*self.noting, *([self.writing] if self.writing else [])], None
        self.noting.clear()
        for each in writing:
            each.result()

    def newest(self, step: int) -> Path | None:
        """The newest whole checkpoint of this step or an earlier one, the same on every rank. Collective."""
        self.settle()
        dist.barrier()
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            earlier = [path for at, path in checkpoint.whole(self.run / "checkpoints") if at <= step]
            found = earlier[-1:] or [None]
        dist.broadcast_object_list(found, src=0)
        return found[0]
