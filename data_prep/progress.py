"""How far the work is: a bar on a terminal, plain lines in a job's log, the same counters as Ray metrics."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable

from tqdm import tqdm

from sora_train.log import log

WINDOW_S = 60.0  # over which rates are measured
MIN_WINDOW_S = 10.0  # before that a rate says nothing


class Progress:
    """Counts sources and their clips; a context manager that says so every `every_s` seconds, also while none come."""

    def __init__(self, total: int, every_s: float = 5.0, run: str = "", clock: Callable[[], float] = time.monotonic):
        """`run` is the name that Ray's metrics have it under, where this process is connected to Ray."""
        self.total, self.every_s, self.clock = total, every_s, clock
        self.sources = self.clips = self.written = self.bad = self.filtered = 0
        self.started = clock()
        self.seen: deque[tuple[float, int, int]] = deque()
        """When tables came, and the sources and clips after each: those of the last WINDOW_S, and one before."""
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

    def add(self, sources: int, written: int, bad: int, filtered: int, reasons: Counter[str] | None = None) -> None:
        """Counts sources that are finished, and clips that came out at the end. `reasons` are of all that was left out
        so far, also before the first source was opened.
        """
        self.sources += sources
        self.clips += written + bad + filtered
        self.written += written
        self.bad += bad
        self.filtered += filtered
        now = self.clock()
        self.seen.append((now, self.sources, self.clips))
        while len(self.seen) > 1 and self.seen[1][0] < now - WINDOW_S:
            self.seen.popleft()
        if self._metrics is not None:
            for outcome, count in (("written", written), ("quarantined", bad), ("filtered", filtered)):
                self._metrics.count("sora_prep_clips", outcome, count)
            self._metrics.set_tagged(
                {("sora_prep_left_out", reason): count for reason, count in (reasons or {}).items()}
            )
            self._metrics.set({"sora_prep_share_done": self.sources / max(1, self.total)})
        if self._bar is not None:
            self._bar.update(sources)
            self._bar.set_postfix_str(f"{self.clips} clips, {self.bad} bad, {self.filtered} filtered", refresh=False)

    def line(self) -> str:
        """`prep: 512 of 1500 sources (34 %), 530 clips, 45.1 clips/s, 3 bad, 0 filtered, 22 s left`."""
        if not self.seen:
            since = self.clock() - self.started
            return f"prep: starting Ray and loading the VAE and the text encoder, {since:.0f} s so far"
        text = f"prep: {self.sources} of {self.total} sources ({100 * self.sources // max(1, self.total)} %)"
        rates = self.rates()
        clips_per_s = f", {rates[1]:.3g} clips/s" if rates else ""
        left = f", {(self.total - self.sources) / rates[0]:.0f} s left" if rates and rates[0] else ""
        return f"{text}, {self.clips} clips{clips_per_s}, {self.bad} bad, {self.filtered} filtered{left}"

    def rates(self) -> tuple[float, float] | None:
        """Sources and clips a second, of late; None while too little came to tell, start-up left out."""
        seen = list(self.seen)  # another thread appends
        if not seen or seen[-1][0] - seen[0][0] < MIN_WINDOW_S:
            return None
        seconds = self.clock() - seen[0][0]
        return (seen[-1][1] - seen[0][1]) / seconds, (seen[-1][2] - seen[0][2]) / seconds

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            if self._metrics is not None and (rates := self.rates()):
                self._metrics.set({"sora_prep_clips_per_s": rates[1]})
            if self._bar is None:
                log.info(self.line())
            else:
                self._bar.refresh()
