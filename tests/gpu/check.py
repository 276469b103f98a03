"""`make check-gpu`: what only a GPU shows, on one GPU, in at most six minutes.

    python -m tests.gpu.check [--only NAME …] [--out FILE.md] [--device cpu]

Each part is a process of its own. Prints one table; the exit status is 1 where a part failed, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

NAMES = ("zero", "compile", "resume", "codec", "memory", "plan", "road")  # the keys of parts.PARTS; test_parts says so
LIMIT_S = 360.0


@dataclass(frozen=True)
class Row:
    """One part: `figures` are what it found, or what is wrong."""

    part: str
    holds: bool
    figures: str
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, help="write the table, with commit, versions and hardware, into this file")
    parser.add_argument("--device", default="cuda", help="cpu tries the parts themselves, at a smaller size")
    asked = parser.parse_args()
    import torch

    if asked.device == "cuda" and not torch.cuda.is_available():
        print("make check-gpu needs a CUDA GPU and this machine has none", file=sys.stderr)
        return 2
    began, rows = time.monotonic(), []
    for name in asked.only:
        rows.append(check(name, asked.device, LIMIT_S - (time.monotonic() - began)))
        print(f"{name}: {'holds' if rows[-1].holds else 'FAILED'} ({rows[-1].seconds:.0f} s)", flush=True)
    table = tabulate(rows)
    print(
        f"\n{table}\n\n{sum(row.holds for row in rows)} of {len(rows)} hold, {time.monotonic() - began:.0f} s",
        flush=True,
    )
    if asked.out:
        name = torch.cuda.get_device_name() if asked.device == "cuda" else "no GPU"
        asked.out.write_text(page(table, name), encoding="utf-8")
    return int(not all(row.holds for row in rows))


def check(name: str, device: str, limit_s: float) -> Row:
    """Runs one part in a process of its own, which is killed after `limit_s`."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"check-{name}-") as folder:
        environment = dict(os.environ)
        if device == "cpu":
            # glibc is to keep nothing of what was freed before memory is made short.
            environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**18)}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "tests.gpu.check_one", name, device, folder],
                env=environment,
                cwd=Path(__file__).parents[2],
                capture_output=True,
                text=True,
                timeout=max(1.0, limit_s),
            )
        except subprocess.TimeoutExpired:
            return Row(name, False, f"not done within the {LIMIT_S:.0f} s of the whole check", time.monotonic() - began)
    lines = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr, flush=True)
    return Row(name, done.returncode == 0, (lines or ["it said nothing"])[-1], time.monotonic() - began)


def tabulate(rows: list[Row]) -> str:
    lines = ["| part | result | figures | seconds |", "|---|---|---|---|"]
    for row in rows:
        figures = row.figures.replace("|", "\\|")
        lines.append(f"| {row.part} | {'holds' if row.holds else 'FAILED'} | {figures} | {row.seconds:.0f} |")
    return "\n".join(lines)


def page(table: str, device: str) -> str:
    """The page for docs/benchmarks."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "ray", "diffusers"))
    return f"""\
# The GPU check on {device}, {date.today()}

Command: `{shlex.join(["python", "-m", "tests.gpu.check", *sys.argv[1:]])}` (`make check-gpu`). Commit: {commit}.
Hardware: {device}, {os.cpu_count()} cores. Python {platform.python_version()}, {versions}.

{table}
"""


if __name__ == "__main__":
    raise SystemExit(main())
