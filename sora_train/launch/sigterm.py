"""SIGTERM, which schedulers send before they take a machine away: the run makes a checkpoint and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from sora_train.errors import Stopped
from sora_train.launch.folder import goes_on
from sora_train.train.home import LEAVE

IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What Ray sets in the environment of a job's driver, and nowhere else (ray 2.60, job_supervisor.py)."""
STOP_WAIT, LEAST_S = "RAY_JOB_STOP_WAIT_TIME_S", 60


def warn_of_short_stops() -> None:
    """Says so where `ray job stop` would kill this driver before its run has made a checkpoint. Ray takes the seconds
    from the environment of the node, or of the job, that the driver runs in.
    """
    seconds = os.environ.get(STOP_WAIT, "3")
    if IN_A_JOB in os.environ and seconds.isdecimal() and int(seconds) < LEAST_S:
        print(
            f"`ray job stop` gives this run {seconds} s, perhaps too few for a checkpoint: start the head node with "
            f"{STOP_WAIT}=300, or make a file `{LEAVE}` in the run's folder instead",
            flush=True,
        )


def shelter_wandb() -> None:
    """Has wandb's own process live where `ray job stop` does not find it: that sends SIGTERM to all that a driver has
    started, and wandb would end before the last checkpoint's line is written. It goes by itself when it is idle.
    Where it can't be started so, wandb starts one as always.
    """
    if IN_A_JOB in os.environ and "WANDB_SERVICE" not in os.environ:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        command = [sys.executable, "-m", "wandb", "beta", "core", "start", "--idle-timeout", "60s"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            os.environ["WANDB_SERVICE"] = done.stdout.strip()


class Sigterm:
    """What SIGTERM does to the driver within a `with` block: raises Stopped at its end.

    While workers train it only asks them to make a checkpoint and leave, which ends `fit`. The block ends at once on a
    second SIGTERM, and where no worker trains: nothing would be lost. Only a main thread hears signals.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.count = run, 0
        self.can_wait: Callable[[], bool] = lambda: False
        self.hears = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Sigterm:
        if self.hears:
            # Whoever handles a signal, its number comes out of this pipe.
            self.pipe = os.pipe()
            for end in self.pipe:
                os.set_blocking(end, False)
            self.fd_before = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
            self.before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def listen_again(self) -> None:
        """To be called when Ray has started: it sets a handler of its own, and Python drops what a handler raises amid
        a fork, of which there are many then.
        """
        if self.hears:
            signal.signal(signal.SIGTERM, self._hear)
            with contextlib.suppress(BlockingIOError):
                self.count += os.read(self.pipe[0], 4096).count(signal.SIGTERM)
        self.check()

    def check(self) -> None:
        """Ends the block if there was a SIGTERM."""
        if self.count:
            raise KeyboardInterrupt

    def _hear(self, *_: object) -> None:
        self.count += 1
        with contextlib.suppress(OSError):  # there may be no folder yet
            (self.run / LEAVE).touch()  # also where it raises, which may get lost: workers that start look for it
        if self.count > 1 or not self.can_wait():
            raise KeyboardInterrupt  # the one exception that Ray's calls let through
        print("SIGTERM: makes a checkpoint, then ends; a second SIGTERM ends at once", flush=True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.hears:
            signal.signal(signal.SIGTERM, self.before)
            signal.set_wakeup_fd(self.fd_before)
            for end in self.pipe:
                os.close(end)
        # SystemExit is what Ray's own handler makes of it while Ray starts.
        if kind is SystemExit or (self.count and kind is KeyboardInterrupt):
            raise Stopped(f"SIGTERM before workers could leave: {goes_on(self.run)}") from None
