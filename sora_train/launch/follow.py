"""What the driver does while workers train: prints their lines, and hands everything on to wandb and to Ray's metrics.

It reads the run's folder, so it needs no word from Ray, shows the same after a worker was replaced, and gets the
results of validations, which add their line to `metrics.jsonl`, also of those that end after the training.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sora_train.launch.node_stats import NodeStats
from sora_train.launch.ray_metrics import RayMetrics
from sora_train.train.metrics import Events, JsonLines, duration, log_line, parse, validation_line
from sora_train.train.tracking import Tracker

POLL_S = 0.5
QUIET_S = 9.0  # after so long without a line there is one that says what is waited for


class Follower:
    """A thread that follows `metrics.jsonl` and `events.jsonl` of a run, from now until the end of its block.

    What nobody waits for begins once training does: wandb, and `begun`, which the caller may set. Until then the
    workers need the cores, and the first step comes seconds sooner.
    """

    def __init__(self, run: Path, steps: int, tracking: dict[str, Any], config: dict[str, Any]) -> None:
        self.run, self.steps, self.tracking, self.config = run, steps, tracking, config
        self.metrics, self.events = Tail(run / "metrics.jsonl"), Tail(run / "events.jsonl")
        self.doing, self.said_at, self.began = "starting workers", time.monotonic(), time.monotonic()
        self.training = False  # whether workers are there that would hear of a wish
        self.begun: Callable[[], object] = lambda: None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="follow", daemon=True)

    def __enter__(self) -> Follower:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _follow(self) -> None:
        events, tracker = Events(self.run), None
        shown, nodes = RayMetrics(self.run.name), NodeStats()
        while True:
            ending = self.ended.is_set()  # asked first, so that the last round sees the last lines
            records, fresh = self.metrics.new(), self.events.new()
            self._show(records, fresh, shown)
            quiet = time.monotonic() - self.said_at > QUIET_S
            if tracker is None and (records or ending or (self.training and quiet)):
                tracker = self._tracker(events)
                # Also those of before: what a kill kept from wandb.
                records, fresh = JsonLines(self.metrics.path).read(), events.lines.read()
                if self.training and not ending:
                    self.begun()
            if tracker is not None and tracker.writer is not None:
                tracker.log(records, nodes.look() if records else {})
                if fresh:
                    tracker.alert(events.lines.read())
            if quiet:
                self._say(f"… {self.doing}, {duration(time.monotonic() - self.began)} since the start")
            if ending:
                break
            self.ended.wait(POLL_S)
        if tracker is not None:
            tracker.finish()

    def _show(self, records: list[dict[str, Any]], fresh: list[dict[str, Any]], shown: RayMetrics) -> None:
        """New lines, to people and to Ray's metrics."""
        for record in records:
            shown.line(record)
            if record.get("validation"):
                self._say(validation_line(record))
                continue
            self.doing = "training" if record["step"] < self.steps else "waiting for checkpoints and validations to end"
            self._say(log_line(record, self.steps))
        for event in fresh:
            shown.count("sora_events", str(event["event"])[:80])
            self._say(f"{event['event'].replace('_', ' ')} at step {event['step']}: {event['reason']}")
            if event["event"] in ("start", "resume"):
                self.doing, self.training = "training", True
            if event["event"] == "worker_lost":
                self.doing, self.training = "replacing workers", False
                shown.forget()
        shown.again()

    def _tracker(self, events: Events) -> Tracker:
        return Tracker(
            self.run, **self.tracking, config=self.config, failed=lambda why: events.write("tracking_failed", 0, why)
        )

    def _say(self, line: str) -> None:
        print(line, flush=True)
        self.said_at = time.monotonic()


class Tail:
    """New lines of a file that grows, and that a resume may cut back; lines that were there before are left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset, self.last = 0, b""
        self.seen: set[int] = set()
        self.new()

    def new(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset - len(self.last))
            if file.read(len(self.last)) != self.last:  # cut back, and perhaps grown again since
                self.offset, self.last = 0, b""
                file.seek(0)
            lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # still being written
        fresh = [line for line in lines if hash(line) not in self.seen]
        self.seen.update(map(hash, lines))
        self.offset += sum(map(len, lines))
        self.last = lines[-1] if lines else self.last
        return [record for line in fresh if (record := parse(line)) is not None]
