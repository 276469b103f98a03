"""How far the work is: a bar on a terminal, plain lines in a job's log, the same counters as Ray metrics."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter

from tqdm import tqdm


class Progress:
    """Counts sources and their clips; a context manager that says so every `every_s` seconds, also while none come."""

    def __init__(self, total: int, every_s: float = 5.0, run: str = ""):
        """`run` is the name that Ray's metrics have it under, where this process is connected to Ray."""
        self.total, self.every_s = total, every_s
        self.sources = self.clips = self.bad = self.filtered = 0
        self.started = time.monotonic()
        self.first: tuple[float, int, int] | None = None  # when the first came out, and how many: start-up left out
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._metrics = None
        if run:
            from sora_train.launch.ray_metrics import RayMetrics

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
        self.bad += bad
        self.filtered += filtered
        if self.first is None and self.clips:
            self.first = time.monotonic(), self.sources, self.clips
        if self._metrics is not None:
            for outcome, count in (("written", written), ("quarantined", bad), ("filtered", filtered)):
                self._metrics.count("sora_prep_clips", outcome, count)
            self._metrics.show_by({("sora_prep_left_out", reason): count for reason, count in (reasons or {}).items()})
            self._metrics.show({"sora_prep_share_done": self.sources / max(1, self.total)})
        if self._bar is not None:
            self._bar.update(sources)
            self._bar.set_postfix_str(f"{self.clips} clips, {self.bad} bad, {self.filtered} filtered", refresh=False)

    def line(self) -> str:
        """`prep: 512 of 1500 sources (34 %), 530 clips, 45.1 clips/s, 3 bad, 0 filtered, 22 s left`."""
        now = time.monotonic()
        text = f"prep: {self.sources} of {self.total} sources ({100 * self.sources // max(1, self.total)} %)"
        if self.first is None:
            return f"{text}, the first are under way since {now - self.started:.0f} s"
        seconds, sources, clips = self._since(now)
        left = f", {(self.total - self.sources) * seconds / sources:.0f} s left" if sources else ""
        counts = f"{self.clips} clips, {clips / seconds:.3g} clips/s, {self.bad} bad, {self.filtered} filtered"
        return f"{text}, {counts}{left}"

    def _since(self, now: float) -> tuple[float, int, int]:
        """Seconds, and the sources and clips finished in them: since the first came out, if there are more."""
        if self.first is None or self.sources <= self.first[1]:
            return now - self.started, self.sources, self.clips
        return now - self.first[0], self.sources - self.first[1], self.clips - self.first[2]

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            if self._metrics is not None and self.first is not None:
                seconds, _, clips = self._since(time.monotonic())
                self._metrics.show({"sora_prep_clips_per_s": clips / seconds})
            if self._bar is None:
                print(self.line(), flush=True)
            else:
                self._bar.refresh()
