"""The driver's monitor thread: prints a run's progress and sends it to wandb and to Ray's metrics.

It reads the files in the run's folder. So it works the same after a worker was replaced, and also gets the results of
validations, which append to `metrics.jsonl`, even after training has ended.
"""

from __future__ import annotations

import threading
import time
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
QUIET_S = 9.0
"""After so long without output, a line says what the run is waiting for."""


class Monitor:
    """A thread that follows `metrics.jsonl` and `events.jsonl` of a run for the length of a `with` block.

    wandb starts only after training has begun, so it does not compete with the workers for CPU cores during start-up.
    It has its own thread, because it may wait for its server. No error ends either thread early: a full disk, a damaged
    line or a closed stdout is reported once.
    """

    def __init__(self, run: Path, steps: int, tracking: dict[str, Any], config: dict[str, Any]) -> None:
        self.run, self.steps, self.tracking, self.config = run, steps, tracking, config
        self.metrics, self.events = Tail(run / "metrics.jsonl"), Tail(run / "events.jsonl")
        self.activity, self.started_at = "starting workers", time.monotonic()
        self.printed_at = self.started_at
        self.training = False
        """Whether workers train, so that they would notice a stop request."""
        self.wait_reason: Callable[[], str] = lambda: ""
        """Returns why no workers start, if known; set by the caller."""
        self.seen_errors: set[str] = set()
        self.ray_metrics, self.nodes = RayMetrics(run.name), NodeStats()
        self.tracker: Tracker | None = None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="monitor", daemon=True)
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
            ending = self.ended.is_set()  # read first, so the last round sees the last lines
            records = self._catch_errors(self.metrics.new_records) or []
            events = self._catch_errors(self.events.new_records) or []
            for record in records:
                self._catch_errors(partial(self._show_record, record))
            for event in events:
                self._catch_errors(partial(self._show_event, event))
            self._catch_errors(self.ray_metrics.refresh)
            quiet = time.monotonic() - self.printed_at > QUIET_S
            if not tracked and (records or ending or (self.training and quiet)):
                tracked = True
                self._in_background(self._start_tracking)
            elif tracked and (records or events):
                self._in_background(partial(self._track, records, bool(events)))
            if quiet:
                self._explain_wait()
            self.ended.wait(POLL_S)
        if tracked:
            self._in_background(lambda: self.tracker and self.tracker.finish())

    def _start_tracking(self) -> None:
        """Starts wandb and sends it all earlier lines, some of which a kill may have kept from it."""
        events, metrics = Events(self.run), JsonLines(self.metrics.path)

        def failed(why: str) -> None:
            events.write("tracking_failed", metrics.last_step(), why)

        self.tracker = Tracker(self.run, **self.tracking, config=self.config, failed=failed)
        self._track(metrics.read(), True)

    def _track(self, records: list[dict[str, Any]], alert: bool) -> None:
        if self.tracker is not None and self.tracker.writer is not None:
            self.tracker.log(records, self.nodes.read() if records else {})
            if alert:
                self.tracker.alert(JsonLines(self.events.path).read())

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

    def _explain_wait(self) -> None:
        waited = time.monotonic() - self.started_at
        self._print(f"… {self.activity}, {duration(waited)} since the start")
        if not self.training and waited > WAIT_S and (why := self._catch_errors(self.wait_reason)):
            self._print(why)

    def _print(self, line: str) -> None:
        self.printed_at = time.monotonic()
        log.info(line)

    def _in_background(self, act: Callable[[], object]) -> None:
        self.background.submit(self._catch_errors, act)

    def _catch_errors(self, act: Callable[[], T]) -> T | None:
        """Calls `act`. Returns its result, or None if it raises; each error is reported once."""
        try:
            return act()
        except Exception as error:  # an error in the monitor must not end the run
            why = f"{type(error).__name__}: {error}"
            if why not in self.seen_errors and len(self.seen_errors) < MAX_ERRORS:
                self.seen_errors.add(why)
                log.warning(f"a line of {self.run} can't be shown or tracked ({why}); training continues")
            return None


class Tail:
    """New lines of a file that grows, and that a resume may truncate. Lines older than this object are skipped."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.last = path, 0, b""
        self.seen = set[int]()
        """Hashes of all lines, which recognise old lines after the file was truncated."""
        self.new_records()

    def new_records(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(max(0, self.offset - len(self.last)))
            if truncated := file.read(len(self.last)) != self.last:  # and perhaps grown since
                self.offset, self.last = 0, b""
                file.seek(0)
            lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # being written
        self.offset += sum(map(len, lines))
        self.last = lines[-1] if lines else self.last
        new = [line for line in lines if not truncated or hash(line) not in self.seen]
        self.seen.update(map(hash, lines))
        return [record for line in new if (record := parse(line)) is not None]
