"""Progress of `sora prep`: a bar on a terminal, plain lines in a job's log, the same counts as Ray metrics."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from itertools import chain
from statistics import fmean

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from sora_train.log import log
from sora_train.storage import in_bytes

WINDOW_S, MIN_WINDOW_S = 60.0, 10.0
"""Rates are measured over the last WINDOW_S, once there is output for MIN_WINDOW_S."""
BUSY_WINDOW_S = 20.0
"""The busiest stage is known once there is output for so long: the first clips were decoded while others started."""
QUIET_S = 30.0
"""After so long without output the line says so."""
LIMITING = 0.8
"""A stage limits the others if its workers work for this share of the time."""


class Progress:
    """Counts sources and their clips; as a context manager it prints them every `every_s` seconds."""

    def __init__(self, total: int, every_s: float = 5.0, run: str = "", clock: Callable[[], float] = time.monotonic):
        """`run` is the tag of the Ray metrics, which need a process that is connected to Ray."""
        self.total, self.every_s, self.clock = total, every_s, clock
        self.sources = self.clips = self.written = self.bad = self.filtered = 0
        self.started = clock()
        self.bytes = 0
        self.history: deque[tuple[float, int, int, int, dict[tuple[str, str], float]]] = deque()
        """Time, sources, clips and bytes after each table of the last WINDOW_S, and of one before, and the seconds of
        work on the table by stage and worker."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._metrics = None
        if run:
            from sora_train.ray_cluster.metrics import RayMetrics

            self._metrics = RayMetrics(run)
        self._bar = tqdm(total=total, desc="prep", unit=" sources", mininterval=0.5) if sys.stdout.isatty() else None

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def add(
        self, sources: int, written: int, bad: int, filtered: int, reasons: Counter[str] | None = None,
        facts: pa.Table | None = None, sink_s: float = 0.0,
    ) -> None:  # fmt: skip
        """Counts finished sources and clips. `reasons` are of all clips without a row so far.

        `facts` are the block's FACTS, and `sink_s` how long the sink took for it.
        """
        work = defaultdict[tuple[str, str], float](float, {("sink", ""): sink_s})
        if facts is not None:
            self.bytes += pc.sum(facts["bytes"]).as_py() or 0
            listed: list[list[dict]] = facts["work"].drop_null().to_pylist()  # pyright: ignore[reportAssignmentType]
            for each in chain.from_iterable(listed):
                work[each["stage"], each["worker"]] += each["seconds"]
        self.sources += sources
        self.clips += written + bad + filtered
        self.written += written
        self.bad += bad
        self.filtered += filtered
        now = self.clock()
        self.history.append((now, self.sources, self.clips, self.bytes, work))
        while len(self.history) > 1 and self.history[1][0] < now - WINDOW_S:
            self.history.popleft()
        if self._metrics is not None:
            for outcome, count in (("written", written), ("quarantined", bad), ("filtered", filtered)):
                self._metrics.count("sora_prep_clips", outcome, count)
            by_reason = {("sora_prep_left_out", reason): count for reason, count in (reasons or {}).items()}
            self._metrics.set_tagged(by_reason)
            self._metrics.set({"sora_prep_share_done": self.sources / max(1, self.total)})
        if self._bar is not None:
            self._bar.update(sources)
            self._bar.set_postfix_str(f"{self.clips} clips, {self.bad} bad, {self.filtered} filtered", refresh=False)

    def line(self) -> str:
        """`prep: 512 of 1500 sources (34 %), 530 clips, 45.1 clips/s, 3 bad, 0 filtered, 22 s left`.

        Then, once known, what `limit` returns, or how long no clip has come.
        """
        if not self.history:
            since = self.clock() - self.started
            return f"prep: starting Ray and loading the VAE and the text encoder, {since:.0f} s so far"
        text = f"prep: {self.sources} of {self.total} sources ({100 * self.sources // max(1, self.total)} %)"
        counts = f"{self.bad} bad, {self.filtered} filtered"
        if self.sources == self.total:
            return f"{text}, {self.clips} clips, {counts}; the last shards are being written"
        rates = self.rates()
        clips_per_s = f", {rates[1]:.3g} clips/s" if rates else ""
        left = f", {(self.total - self.sources) / rates[0]:.0f} s left" if rates and rates[0] else ""
        idle = self.clock() - self.history[-1][0]
        more = f"; no clip for {idle:.0f} s" if idle > QUIET_S else self.limit()
        return f"{text}, {self.clips} clips{clips_per_s}, {counts}{left}{more}"

    def limit(self) -> str:
        """`; 50 MB/s; the VAE limits the speed, 97 % busy`; empty if not known."""
        history, busy = list(self.history), self.busy()
        if not any(busy.values()) or history[-1][0] - history[0][0] < BUSY_WINDOW_S:
            return ""
        rate = (history[-1][3] - history[0][3]) / (self.clock() - history[0][0])
        stage, share = max(busy.items(), key=lambda item: item[1])
        what = f"the {stage} limits the speed" if share >= LIMITING else f"the {stage} is the busiest stage"
        return f"; {in_bytes(rate)}/s; {what}, {100 * share:.0f} % busy"

    def busy(self) -> dict[str, float]:
        """The share of the recent time that each stage worked, the mean over its workers."""
        history, work = list(self.history), defaultdict[str, dict[str, float]](dict)
        for *_, seconds in history[1:]:
            for (stage, worker), value in seconds.items():
                work[stage][worker] = work[stage].get(worker, 0.0) + value
        elapsed = history[-1][0] - history[0][0] if history else 0.0
        return {stage: min(1.0, fmean(each.values()) / elapsed) for stage, each in work.items()} if elapsed else {}

    def rates(self) -> tuple[float, float] | None:
        """Recent sources and clips per second, without start-up; None until there is enough output to tell."""
        history = list(self.history)  # another thread appends
        if not history or history[-1][0] - history[0][0] < MIN_WINDOW_S:
            return None
        seconds = self.clock() - history[0][0]
        return (history[-1][1] - history[0][1]) / seconds, (history[-1][2] - history[0][2]) / seconds

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            if self._metrics is not None and (rates := self.rates()):
                self._metrics.set({"sora_prep_clips_per_s": rates[1]})
            if self._bar is None:
                log.info(self.line())
            else:
                self._bar.refresh()
