"""Plain progress lines that fit a job's log: one at least every few seconds, also while nothing comes out."""

from __future__ import annotations

import threading
import time


class Progress:
    """Counts clips and says so; a context manager whose thread prints a line every `every_s` seconds."""

    def __init__(self, total: int, every_s: float = 5.0):
        self.total, self.every_s = total, every_s
        self.done = self.bad = self.filtered = 0
        self.started = time.monotonic()
        self.first: tuple[float, int] | None = None  # when the first clips came out, and how many: start-up left out
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def add(self, written: int, bad: int, filtered: int) -> None:
        """Counts clips that came out at the end."""
        self.done += written + bad + filtered
        self.bad += bad
        self.filtered += filtered
        if self.first is None:
            self.first = time.monotonic(), self.done

    def line(self) -> str:
        """`prep: 512 of 1500 clips (34 %), 45.1 clips/s, 3 bad, 0 filtered, 22 s left`."""
        now = time.monotonic()
        text = f"prep: {self.done} of {self.total} clips ({100 * self.done // max(1, self.total)} %)"
        if self.first is None:
            return f"{text}, the first are under way since {now - self.started:.0f} s"
        since, before = self.first
        rate = (self.done - before) / (now - since) if self.done > before else self.done / (now - self.started)
        left = (self.total - self.done) / rate if rate else 0.0
        return f"{text}, {rate:.1f} clips/s, {self.bad} bad, {self.filtered} filtered, {left:.0f} s left"

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            print(self.line(), flush=True)
