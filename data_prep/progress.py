"""How far the work is: a bar on a terminal, plain lines in a job's log, the same counters as Ray metrics."""

from __future__ import annotations

import sys
import threading
import time

from tqdm import tqdm


class Progress:
    """Counts sources and their clips; a context manager that says so every `every_s` seconds, also while none come."""

    def __init__(self, total: int, every_s: float = 5.0, metrics: bool = False):
        self.total, self.every_s = total, every_s
        self.sources = self.clips = self.bad = self.filtered = 0
        self.started = time.monotonic()
        self.first: tuple[float, int, int] | None = None  # when the first came out, and how many: start-up left out
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._metrics = RayMetrics() if metrics else None
        self._bar = tqdm(total=total, desc="prep", unit=" sources", mininterval=0.5) if sys.stdout.isatty() else None

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def add(self, sources: int, written: int, bad: int, filtered: int) -> None:
        """Counts sources that are finished, and clips that came out at the end."""
        self.sources += sources
        self.clips += written + bad + filtered
        self.bad += bad
        self.filtered += filtered
        if self.first is None and self.clips:
            self.first = time.monotonic(), self.sources, self.clips
        if self._metrics is not None:
            self._metrics.add(written, bad, filtered, self.sources / max(1, self.total))
        if self._bar is not None:
            self._bar.update(sources)
            self._bar.set_postfix_str(f"{self.clips} clips, {self.bad} bad, {self.filtered} filtered", refresh=False)

    def line(self) -> str:
        """`prep: 512 of 1500 sources (34 %), 530 clips, 45.1 clips/s, 3 bad, 0 filtered, 22 s left`."""
        now = time.monotonic()
        text = f"prep: {self.sources} of {self.total} sources ({100 * self.sources // max(1, self.total)} %)"
        if self.first is None:
            return f"{text}, the first are under way since {now - self.started:.0f} s"
        since, sources, clips = self.first
        if self.sources > sources:
            seconds, sources, clips = now - since, self.sources - sources, self.clips - clips
        else:
            seconds, sources, clips = now - self.started, self.sources, self.clips
        left = f", {(self.total - self.sources) * seconds / sources:.0f} s left" if sources else ""
        counts = f"{self.clips} clips, {clips / seconds:.3g} clips/s, {self.bad} bad, {self.filtered} filtered"
        return f"{text}, {counts}{left}"

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            if self._bar is None:
                print(self.line(), flush=True)
            else:
                self._bar.refresh()


class RayMetrics:
    """The counters where Ray's dashboard and Prometheus see them; only while this process is connected to Ray."""

    def __init__(self):
        from ray.util.metrics import Counter, Gauge

        self.clips = Counter(
            "sora_prep_clips", "Clips that came out, by outcome: written, quarantined, filtered.", ("outcome",)
        )
        self.share = Gauge("sora_prep_share_done", "Share of the sources that are finished.")

    def add(self, written: int, bad: int, filtered: int, share: float) -> None:
        """Counts clips by how they ended."""
        for outcome, count in (("written", written), ("quarantined", bad), ("filtered", filtered)):
            if count:
                self.clips.inc(count, {"outcome": outcome})
        self.share.set(share)
