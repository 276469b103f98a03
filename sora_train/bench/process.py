"""A contender in a process of its own: its memory is its own, and what breaks breaks alone.

The process waits, which costs nothing, until it is asked; so contenders can take turns step by step.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from sora_train.bench.core import one_line


class Process:
    """What `make(given)` gives, in another process, as its parent sees it. Both travel by pickle, to a child only."""

    def __init__(self, make: Callable[[Any], object], given: object) -> None:
        spawn = mp.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(make, given, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method: str) -> Any:
        """What a method gives there. Raises RuntimeError with what went wrong, also where the process died."""
        try:
            self.pipe.send(method)
            worked, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            raise RuntimeError(f"its process died with exit status {self.process.exitcode}") from None
        if not worked:
            raise RuntimeError(answer)
        return answer

    def end(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self.pipe.close()
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()


def serve(make: Callable[[Any], object], given: object, pipe: Connection) -> None:
    """The process: makes the object when it is first asked, and does so until the other end is closed."""
    made: list[object] = []
    with contextlib.suppress(EOFError, OSError):
        while True:
            method = pipe.recv()
            try:
                made = made or [make(given)]
                answer = True, getattr(made[0], method)()
            except Exception as error:
                answer = False, one_line(error)
            pipe.send(answer)
