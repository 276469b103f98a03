"""What the driver does while workers train: prints their lines, and hands everything on to wandb and to Ray's metrics.

It reads the run's folder, so it needs no word from Ray, shows the same after a worker was replaced, and gets the
results of validations, which add their line to `metrics.jsonl`, also of those that end after the training.
"""

from __future__ import annotations

import contextlib
import threading
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sora_train.launch.node_stats import NodeStats
from sora_train.log import log
from sora_train.ray_cluster.connection import WAIT_S
from sora_train.ray_cluster.metrics import RayMetrics
from sora_train.train.metrics import Events, JsonLines, duration, log_line, parse, validation_line
from sora_train.train.tracking import Tracker

POLL_S = 0.5
MAX_ERRORS = 20
T = TypeVar("T")
QUIET_S = 9.0  # after so long without a line there is one that says what is waited for


class Monitor:
    """A thread that follows `metrics.jsonl` and `events.jsonl` of a run, from now until the end of its block.

    wandb and the optional `on_first_step` callback start only after training has begun, so they don't compete with the
    workers for CPU cores during start-up. wandb has its own thread, because it may wait for its server. No error ends
    either thread early: a full disk, a damaged line or a closed stdout is reported once.
    """

    def __init__(self, run: Path, steps: int, tracking: dict[str, Any], config: dict[str, Any]) -> None:
        self.run, self.steps, self.tracking, self.config = run, steps, tracking, config
        self.metrics, self.events = Tail(run / "metrics.jsonl"), Tail(run / "events.jsonl")
        self.activity, self.printed_at, self.started_at = "starting workers", time.monotonic(), time.monotonic()
        self.training = False  # whether workers are there that would hear of a wish
        self.on_first_step: Callable[[], object] = lambda: None
        self.wait_reason: Callable[[], str] = lambda: ""
        """Why no workers start, if Ray says so; the caller may set it."""
        self.seen_errors: set[str] = set()
        self.ray_metrics, self.nodes = RayMetrics(run.name), NodeStats()
        self.tracker: Tracker | None = None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="follow", daemon=True)
        self.background = ThreadPoolExecutor(1, thread_name_prefix="tracking")

    def __enter__(self) -> Monitor:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.background.shutdown()

    def _follow(self) -> None:
        tracked = ending = False
        while not ending:
            ending = self.ended.is_set()  # asked first, so that the last round sees the last lines
            records = self._catch_errors(self.metrics.new_records) or []
            fresh = self._catch_errors(self.events.new_records) or []
            self._show(records, fresh)
            quiet = time.monotonic() - self.printed_at > QUIET_S
            if not tracked and (records or ending or (self.training and quiet)):
                tracked = True
                self._in_background(self._begin_tracking)
                if self.training and not ending:
                    self._catch_errors(self.on_first_step)
            elif tracked and (records or fresh):
                self._in_background(partial(self._track, records, bool(fresh)))
            if quiet:
                waited = time.monotonic() - self.started_at
                self._print(f"… {self.activity}, {duration(waited)} since the start")
                if not self.training and waited > WAIT_S and (why := self._catch_errors(self.wait_reason)):
                    self._print(why)
            self.ended.wait(POLL_S)
        if tracked:
            self._in_background(lambda: self.tracker and self.tracker.finish())

    def _begin_tracking(self) -> None:
        """Also tells wandb of the lines of before: a kill may have kept them from it."""
        events = Events(self.run)
        self.tracker = Tracker(
            self.run, **self.tracking, config=self.config, failed=lambda why: events.write("tracking_failed", 0, why)
        )
        self._track(JsonLines(self.metrics.path).read(), True)

    def _track(self, records: list[dict[str, Any]], alert: bool) -> None:
        if self.tracker is not None and self.tracker.writer is not None:
            self.tracker.log(records, self.nodes.read() if records else {})
            if alert:
                self.tracker.alert(JsonLines(self.events.path).read())

    def _show(self, records: list[dict[str, Any]], fresh: list[dict[str, Any]]) -> None:
        """New lines, to people and to Ray's metrics."""
        for record in records:
            self._catch_errors(partial(self._show_record, record))
        for event in fresh:
            self._catch_errors(partial(self._show_event, event))
        self._catch_errors(self.ray_metrics.refresh)

    def _show_record(self, record: dict[str, Any]) -> None:
        self.ray_metrics.set_from_record(record)
        if record.get("validation"):
            self._print(validation_line(record))
            return
        self.activity = "training" if record["step"] < self.steps else "waiting for checkpoints and validations to end"
        self._print(log_line(record, self.steps))

    def _show_event(self, event: dict[str, Any]) -> None:
        kind = str(event["event"])
        if kind in ("start", "resume"):
            self.activity, self.training = "training", True
        if kind == "worker_lost":
            self.activity, self.training = "replacing workers", False
            self.ray_metrics.clear()
        self.ray_metrics.count("sora_events", kind[:80])
        self._print(f"{kind.replace('_', ' ')} at step {event['step']}: {event['reason']}")

    def _print(self, line: str) -> None:
        self.printed_at = time.monotonic()
        with contextlib.suppress(OSError, ValueError):  # stdout is gone, or can't encode the line
            log.info(line)

    def _in_background(self, act: Callable[[], object]) -> None:
        self.background.submit(self._catch_errors, act)

    def _catch_errors(self, act: Callable[[], T]) -> T | None:
        """What `act` returns, or None where it fails, which is said once."""
        try:
            return act()
        except Exception as error:  # nothing that is only shown may end a training, or what else is shown of it
            why = f"{type(error).__name__}: {error}"
            if why not in self.seen_errors and len(self.seen_errors) < MAX_ERRORS:
                self.seen_errors.add(why)
                with contextlib.suppress(OSError, ValueError):
                    log.warning(f"a line of {self.run} can't be shown or tracked ({why}); training goes on")
            return None


class Tail:
    """New lines of a file that grows, and that a resume may cut back; lines that were there before are left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset, self.last = 0, b""
        self.lines = array("q")
        """A hash of each line of the file, by which lines are known again after it was cut back."""
        self.new_records()

    def new_records(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(max(0, self.offset - len(self.last)))
            cut_back = file.read(len(self.last)) != self.last  # and perhaps grown again since
            if cut_back:
                self.offset = 0
                file.seek(0)
            lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # still being written
        hashes = array("q", map(hash, lines))
        seen = 0
        if cut_back:  # what stayed are lines of before in their order; lines that were added follow
            before, self.lines = iter(self.lines), array("q")
            seen = next((i for i, line in enumerate(hashes) if line not in before), len(lines))
        self.lines.extend(hashes)
        self.offset += sum(map(len, lines))
        self.last = lines[-1] if lines else b"" if cut_back else self.last
        return [record for line in lines[seen:] if (record := parse(line)) is not None]
