"""Stop signals: SIGTERM, SIGHUP and Ctrl-C make a run save a checkpoint and end."""

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
from sora_train.train.metrics import STOP_FILE

RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""An environment variable that Ray sets for a job's driver only (ray 2.60, job_supervisor.py)."""
STOP_WAIT_VARIABLE, MIN_STOP_WAIT_S = "RAY_JOB_STOP_WAIT_TIME_S", 60
"""How long `ray job stop` waits before it kills a driver; read on the head node."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def warn_if_stop_wait_short() -> None:
    """Warns if `ray job stop` would kill this driver before its run can save a checkpoint."""
    seconds = os.environ.get(STOP_WAIT_VARIABLE, "3")
    if RAY_JOB_VARIABLE in os.environ and seconds.isdecimal() and int(seconds) < MIN_STOP_WAIT_S:
        log.info(
            f"`ray job stop` kills this run after {seconds} s, perhaps before it has saved a checkpoint. Start the "
            f"head node with {STOP_WAIT_VARIABLE}=300, or stop the run by creating the file `{STOP_FILE}` in its folder"
        )


def detach_wandb() -> None:
    """Starts wandb's service process outside a Ray job.

    `ray job stop` sends SIGTERM to all processes of the driver, and wandb would end before it has the last checkpoint's
    record. The service ends by itself when idle. If it can't be started, wandb starts its own as usual.
    """
    if RAY_JOB_VARIABLE in os.environ and "WANDB_SERVICE" not in os.environ:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        command = [sys.executable, "-P", "-m", "wandb", "beta", "core", "start", "--idle-timeout", "60s"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            os.environ["WANDB_SERVICE"] = done.stdout.strip()


class SignalHandler:
    """Handles stop signals in the driver for the length of a `with` block.

    While workers train, the first signal requests a stop: they save a checkpoint and `fit` returns. A second signal, or
    one while no worker trains, ends the block at once, with Stopped, or with KeyboardInterrupt after Ctrl-C. A signal
    that this process ignores (`nohup`) stays ignored. Only the main thread receives signals.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.count, self.name = run, 0, ""
        self.can_wait: Callable[[], bool] = lambda: False
        """Whether workers would notice a stop request."""
        self.owns_run = False
        """Whether this command holds the run's lock. If not, a stop file would end somebody else's run."""
        self.is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> SignalHandler:
        if self.is_main:
            # Every signal's number comes out of this pipe, whoever handles the signal.
            self.pipe = os.pipe()
            for end in self.pipe:
                os.set_blocking(end, False)
            self.old_wakeup_fd = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
            handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            self.old_handlers = {number: found for number, found in handlers.items() if found is not signal.SIG_IGN}
            self._install()
        return self

    def reinstall(self) -> None:
        """Call once Ray has started: Ray sets its own handler, and an exception raised during a fork is lost."""
        if self.is_main:
            self._install()
            with contextlib.suppress(BlockingIOError):
                for number in os.read(self.pipe[0], 4096):
                    self._count(number)
        self.check()

    def check(self) -> None:
        """Ends the block if there was a signal."""
        if self.count:
            raise KeyboardInterrupt

    def _install(self) -> None:
        for number in self.old_handlers:
            signal.signal(number, self._handle)

    def _count(self, number: int) -> None:
        if number in self.old_handlers:
            self.count += 1
            self.name = self.name or ("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    def _handle(self, number: int, _: object) -> None:
        self._count(number)
        if self.owns_run:  # also before raising: the exception may get lost, and restarting workers look for the file
            with contextlib.suppress(OSError):  # there may be no folder yet
                (self.run / STOP_FILE).touch()
        if self.count > 1 or not self.can_wait():
            raise KeyboardInterrupt  # the only exception that Ray's calls let through
        log.info(f"{self.name}: saving a checkpoint, then stopping. A second {self.name} stops at once")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.is_main:
            for number, handler in self.old_handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self.old_wakeup_fd)
            for end in self.pipe:
                os.close(end)
        if kind is KeyboardInterrupt and self.name in ("", "Ctrl-C"):
            return
        # Ray's own handler raises SystemExit while Ray starts.
        if kind is SystemExit or (self.count and kind is KeyboardInterrupt):
            asked = self.name or "SIGTERM"
            raise Stopped(f"stopped after {asked}, before training workers ran. {resume_hint(self.run)}") from None
