"""The run directory: what the loop writes there, and the stop and checkpoint requests that it polls.

A plain process needs only the folder. Ray is attached by two callables (`launch/worker.py`).
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

TRYING_FILE = "trying_kernels"
"""In a run's folder while a start tries kernels on its GPUs."""
POLL_STOP_FILE_S = 0.5  # a network file system answers slowly
STEP_DELAY_S = float(os.environ.get("SORA_STEP_DELAY_S", "0"))  # for drills, which act during slow steps

Report = Callable[[int, dict[str, float], Path, Callable[[], None]], None]
"""Called on every rank as (step, metrics, folder, wait) while this rank's part is being written into `folder`; `wait`
returns when it is written and raises what went wrong."""


class RunDir:
    """A run's folder. Every rank has its own `RunDir` of the same folder."""

    def __init__(
        self, run: Path, report: Report | None = None, preemption_requested: Callable[[int], bool] | None = None
    ) -> None:
        """`preemption_requested(step)` is called on every rank at every step: whether to save a checkpoint now."""
        self.run, self.report, self.preemption_requested = run, report, preemption_requested
        self.metrics, self.events = JsonLines(run / "metrics.jsonl"), Events(run)
        self.samples: JsonLines | None = None
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None  # the last checkpoint
        self.writing_events: list[Future[None]] = []
        self.timings: dict[str, float] = {}  # of the last checkpoint, for the next metrics record
        self.polled_at, self.stop_requested = 0.0, False

    def log_metrics(self, record: dict[str, Any]) -> None:
        """Writes a metrics record, with the seconds of the checkpoint written since the last, if any. For rank 0."""
        timings, self.timings = self.timings, {}
        self.metrics.write(record | timings)

    def log_event_later(self, event: str, step: int, reasons: Callable[[], list[str]]) -> None:
        """Writes events in the background, before any later checkpoint. For rank 0.

        For reasons that take long to find, such as names in remote shards.
        """

        def write() -> None:
            for reason in reasons():
                self.events.write(event, step, reason)

        self.writing_events.append(self.writer.submit(write))

    def log_samples(self, rank: int, step: int, batch: int, sample_ids: list[str]) -> None:
        """Writes which clips this rank trained on at a step; none for a skipped one. On every rank.

        A step that is repeated, after a resume or a rollback, is written again. Its last line in the last attempt
        counts; an attempt is named by the time of its start.
        """
        if self.samples is None:
            (self.run / "trained").mkdir(exist_ok=True)
            self.samples = JsonLines(self.run / "trained" / f"rank_{rank:05d}.jsonl", shared=False)
        self.samples.write({"attempt": self.attempt, "step": step, "batch": batch, "sample_ids": sample_ids})

    @cached_property
    def attempt(self) -> int:
        """Start of this attempt in nanoseconds since 1970, the same on every rank. Collective on first use."""
        began = [time.time_ns()]
        dist.broadcast_object_list(began, src=0)
        return began[0]

    def truncate(self, step: int) -> None:
        """Removes the records of later steps, and their validations' results: they will be repeated. For rank 0."""
        self.metrics.truncate(step)
        for result in self.run.glob("samples/step_*/result.json"):
            if result.parent.name > checkpoint.name_of(step):
                result.unlink(missing_ok=True)

    def poll_requests(self, step: int) -> tuple[bool, bool]:
        """Whether a checkpoint is requested now, and whether the run is to stop after it. On every rank, each step.

        The loop combines the ranks' answers, so only rank 0 looks for the stop file.
        """
        if STEP_DELAY_S:
            time.sleep(STEP_DELAY_S)
        save = self.preemption_requested is not None and self.preemption_requested(step)
        if dist.get_rank() == 0 and time.monotonic() - self.polled_at > POLL_STOP_FILE_S:
            self.polled_at, self.stop_requested = time.monotonic(), (self.run / STOP_FILE).exists()
        return save, self.stop_requested

    def save_async(self, make: Callable[[], checkpoint.Snapshot]) -> None:
        """Makes a snapshot and writes it in the background. On every rank.

        Waits first until the previous checkpoint is written: a slow disk slows training down, but memory never holds
        two snapshots. Raises UserError if the previous one could not be written.
        """
        began = time.monotonic()
        self.wait()
        snapshot = make()
        state, timings = snapshot.state, dict[str, float]()
        folder = self.run / "checkpoints" / checkpoint.name_of(state.step)

        def write() -> None:
            snapshot.write(folder)
            timings["checkpoint_s"] = time.monotonic() - began
            self.timings = timings

        writing = self.writing = self.writer.submit(write)
        if self.report is not None:
            metrics = {} if state.loss is None else {"loss": state.loss}
            self.report(state.step, metrics, folder, lambda: writing.result())
        timings["checkpoint_stall_s"] = time.monotonic() - began  # Ray's barrier takes 1 ms for each rank

    def wait(self) -> None:
        """Waits for background writes. Raises UserError if one failed."""
        writing, self.writing = [*self.writing_events, *([self.writing] if self.writing else [])], None
        self.writing_events.clear()
        for each in writing:
            each.result()

    def newest_checkpoint(self, step: int) -> Path | None:
        """The newest complete checkpoint at or before a step, the same on every rank. Collective."""
        self.wait()
        dist.barrier()
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            earlier = [path for at, path in checkpoint.complete_checkpoints(self.run / "checkpoints") if at <= step]
            found = earlier[-1:] or [None]
        dist.broadcast_object_list(found, src=0)
        return found[0]
