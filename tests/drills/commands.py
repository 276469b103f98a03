"""Starts `sora` commands as processes, watches and kills them."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Command:
    """A `sora` process, running or ended. `run` is the folder of its run."""

    process: subprocess.Popen
    run: Path
    log: Path

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def start(words: list[str], run: Path, logs: Path, environment: dict[str, str], cwd: Path | None = None) -> Command:
    """Starts `sora WORDS`, with its output in a numbered file in `logs`."""
    number = len(list(logs.glob(f"{run.name}.*.log")))
    log = logs / f"{run.name}.{number}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "sora_train.cli", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_ADDRESS": "", "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
            cwd=cwd,
        )
    return Command(process, run, log)


def end(command: Command, timeout_s: float = TIMEOUT_S) -> int:
    """Waits for a command to end; returns its exit status."""
    try:
        return command.process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"still running after {timeout_s:.0f} s:\n{command.output()[-2000:]}") from None


def wait_for(command: Command, what: str, is_so: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    """Waits until `is_so()` while the command runs."""
    until = time.monotonic() + timeout_s
    while not is_so():
        if command.process.poll() is not None:
            raise AssertionError(f"ended before {what}:\n{command.output()[-2000:]}")
        if time.monotonic() > until:
            raise AssertionError(f"no {what} within {timeout_s:.0f} s:\n{command.output()[-2000:]}")
        time.sleep(0.02)


def wait_for_step(command: Command, step: int) -> None:
    """Waits until `metrics.jsonl` has a step."""
    metrics = command.run / "metrics.jsonl"
    wait_for(command, f"step {step}", lambda: any(line["step"] >= step for line in lines(metrics)))


def lines(path: Path) -> list[dict]:
    """The complete lines of a JSON lines file; none if it does not exist."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def family(command: Command) -> list[psutil.Process]:
    """All processes that a command has started."""
    return psutil.Process(command.process.pid).children(recursive=True)


def training_workers(command: Command) -> list[psutil.Process]:
    return sorted((p for p in family(command) if "RayTrainWorker" in title(p)), key=lambda process: process.pid)


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return ""


def end_all(root: Path) -> None:
    """Kills every process whose `RAY_TMPDIR` is this folder."""
    found = [process for process in psutil.process_iter() if is_of(process, root) and process.pid != os.getpid()]
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(found, timeout=10)


def is_of(process: psutil.Process, root: Path) -> bool:
    try:
        return process.environ().get("RAY_TMPDIR") == str(root)
    except psutil.Error:  # it ended meanwhile, or is somebody else's
        return False
