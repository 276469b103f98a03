"""Signals that ask a run to end: it makes a checkpoint first. Schedulers send SIGTERM before they take a machine."""

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
from sora_train.launch.run_folder import resume_hint
from sora_train.log import log
from sora_train.train.run_dir import STOP_FILE

RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What Ray sets in the environment of a job's driver, and nowhere else (ray 2.60, job_supervisor.py)."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
STOP_WAIT_VARIABLE, MIN_STOP_WAIT_S = "RAY_JOB_STOP_WAIT_TIME_S", 60


def warn_if_stop_wait_short() -> None:
    """Says so where `ray job stop` would kill this driver before its run has made a checkpoint. Ray takes the seconds
    from the environment of the node, or of the job, that the driver runs in.
    """
    seconds = os.environ.get(STOP_WAIT_VARIABLE, "3")
    if RAY_JOB_VARIABLE in os.environ and seconds.isdecimal() and int(seconds) < MIN_STOP_WAIT_S:
        log.info(
            f"`ray job stop` gives this run {seconds} s, perhaps too few for a checkpoint: start the head node with "
            f"{STOP_WAIT_VARIABLE}=300, or make a file `{STOP_FILE}` in the run's folder instead"
        )


def detach_wandb() -> None:
    """Has wandb's own process live where `ray job stop` does not find it: that sends SIGTERM to all that a driver has
    started, and wandb would end before the last checkpoint's line is written. It goes by itself when it is idle.
    Where it can't be started so, wandb starts one as always.
    """
    if RAY_JOB_VARIABLE in os.environ and "WANDB_SERVICE" not in os.environ:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        command = [sys.executable, "-P", "-m", "wandb", "beta", "core", "start", "--idle-timeout", "60s"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            os.environ["WANDB_SERVICE"] = done.stdout.strip()


class SignalHandler:
    """What SIGTERM, SIGHUP (a closed terminal) and SIGINT (Ctrl-C) do to the driver within a `with` block.

    While workers train, the first only asks them to make a checkpoint and leave, which ends `fit`. A second one ends
    the block at once, as does one that comes while no worker trains: nothing would be lost. Then the block ends with
    Stopped, or after Ctrl-C with KeyboardInterrupt. A signal that this process ignores (`nohup`) stays ignored. Only a
    main thread hears signals.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.count, self.name = run, 0, ""
        self.can_wait: Callable[[], bool] = lambda: False
        self.owns = False
        """Whether the run's folder is this command's own: in another's, `leave` would end the other's run."""
        self.hears = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> SignalHandler:
        if self.hears:
            # Whoever handles a signal, its number comes out of this pipe.
            self.pipe = os.pipe()
            for end in self.pipe:
                os.set_blocking(end, False)
            self.fd_before = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
            handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            self.before = {number: found for number, found in handlers.items() if found is not signal.SIG_IGN}
            self._listen()
        return self

    def reinstall(self) -> None:
        """To be called when Ray has started: it sets a handler of its own, and Python drops what a handler raises amid
        a fork, of which there are many then.
        """
        if self.hears:
            self._listen()
            with contextlib.suppress(BlockingIOError):
                for number in os.read(self.pipe[0], 4096):
                    self._count(number)
        self.check()

    def check(self) -> None:
        """Ends the block if there was a signal."""
        if self.count:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        for number in self.before:
            signal.signal(number, self._hear)

    def _count(self, number: int) -> None:
        if number in self.before:
            self.count += 1
            self.name = self.name or ("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    def _hear(self, number: int, _: object) -> None:
        self._count(number)
        if self.owns:
            with contextlib.suppress(OSError):  # there may be no folder yet
                (
                    self.run / STOP_FILE
                ).touch()  # also where it raises, which may get lost: workers that start look for it
        if self.count > 1 or not self.can_wait():
            raise KeyboardInterrupt  # the one exception that Ray's calls let through
        log.info(f"{self.name}: saving a checkpoint, then stopping. A second {self.name} stops at once")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.hears:
            for number, handler in self.before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self.fd_before)
            for end in self.pipe:
                os.close(end)
        if kind is KeyboardInterrupt and self.name in ("", "Ctrl-C"):
            return
        # SystemExit is what Ray's own handler makes of it while Ray starts.
        if kind is SystemExit or (self.count and kind is KeyboardInterrupt):
            asked = self.name or "SIGTERM"
            raise Stopped(f"stopped after {asked}, before training workers ran. {resume_hint(self.run)}") from None
