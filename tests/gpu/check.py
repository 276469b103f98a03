"""`make check-gpu`: what only a GPU shows, on one GPU, in at most six minutes.

    python -m tests.gpu.check [--only NAME …] [--out FILE.md] [--device cpu]

Each part is a process of its own. Parts that measure speed run alone, the others a few at a time. The page is written
again after each part, so a check that is cut off leaves the results so far. The exit status is 1 if a part failed, 2
without a GPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from itertools import groupby
from pathlib import Path

from sora_train.provenance import git_commit, package_versions, usable_cores

ROOT = Path(__file__).parents[2]
LIMIT_S = 360.0
"""For all parts together, without the optional ones."""
LIMITS_S = {
    "table": 185, "train": 80, "numerics": 60, "compile": 90, "zero": 75, "fp8": 45, "resume": 45, "road": 90,
    "plan": 45, "memory": 45, "codec": 30, "tests": 60, "attention": 75, "prep": 60, "sampling": 60, "real": 1500,
}  # fmt: skip
"""The parts, the most valuable first, and the seconds that each may take: the keys of `parts.PARTS`."""
ALONE = {"table", "attention", "train", "prep", "sampling", "real"}
"""Parts that measure speed."""
OPTIONAL = {"real"}
"""Parts that only run if `--only` names them."""
AT_ONCE = 4


@dataclass(frozen=True)
class Row:
    """One part: `figures` are what it found, or what is wrong; `tables` are Markdown that it printed before."""

    part: str
    holds: bool
    figures: str
    seconds: float
    tables: str = ""


def main() -> int:
    default = [name for name in LIMITS_S if name not in OPTIONAL]
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=LIMITS_S, default=default, metavar="NAME",
                        help=f"{', '.join(default)}; and, not by default: {', '.join(sorted(OPTIONAL))}")  # fmt: skip
    parser.add_argument("--out", type=Path, help="page to write; default: docs/benchmarks/gpu_NAME_DATE.md")
    parser.add_argument("--device", default="cuda", help="cpu tries the parts themselves, at a smaller size")
    asked = parser.parse_args()
    import torch

    if asked.device == "cuda" and not torch.cuda.is_available():
        print("make check-gpu needs a CUDA GPU and this machine has none", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name() if asked.device == "cuda" else "no GPU"
    out = asked.out or (new_page(device) if asked.device == "cuda" else None)
    began, rows = time.monotonic(), dict[str, Row]()
    for row in results([name for name in LIMITS_S if name in asked.only], asked.device):
        rows[row.part] = row
        print(f"{row.part}: {'holds' if row.holds else 'FAILED'} ({row.seconds:.0f} s) {row.figures}", flush=True)
        if out:
            out.write_text(page([rows[name] for name in LIMITS_S if name in rows], device), encoding="utf-8")
    done = [rows[name] for name in LIMITS_S if name in rows]
    tables = "".join(f"\n{row.tables}\n" for row in done if row.tables)
    held = sum(row.holds for row in done)
    print(f"{tables}\n{tabulate(done)}\n\n{held} of {len(done)} hold, {time.monotonic() - began:.0f} s", flush=True)
    if out:
        print(f"written to {out}")
    return int(held < len(done))


def results(names: list[str], device: str) -> Iterator[Row]:
    """The parts' rows as they are ready, in groups: each of ALONE, and the others in between together."""
    began = time.monotonic()

    def limit_s(name: str) -> float:
        left = LIMIT_S - (time.monotonic() - began)
        if device == "cpu":
            return 4 * LIMITS_S[name]
        return LIMITS_S[name] if name in OPTIONAL else min(LIMITS_S[name], left)

    for number, group in groupby(enumerate(names), lambda each: each[0] if each[1] in ALONE else -1):
        with ThreadPoolExecutor(1 if number >= 0 or device == "cpu" else AT_ONCE) as pool:
            tasks = [pool.submit(lambda name=name: check(name, device, limit_s(name))) for _, name in group]
            yield from (task.result() for task in as_completed(tasks))


def check(name: str, device: str, limit_s: float) -> Row:
    """Runs one part in a process of its own, which is killed after `limit_s`. Its last line has the figures."""
    began = time.monotonic()
    if limit_s < 1:
        return Row(name, False, f"not begun: the check's {LIMIT_S:.0f} s are over", 0.0)
    with tempfile.TemporaryDirectory(prefix=f"check-{name}-") as folder:
        environment = dict(os.environ)
        if device == "cpu":
            # glibc is to keep nothing of what was freed before memory is made short.
            environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**18)}
        command = [sys.executable, "-m", "tests.gpu.check_one", name, device, f"{folder}/part"]
        with open(f"{folder}/out", "w+") as out, open(f"{folder}/err", "w+") as err:
            try:
                status = subprocess.run(command, env=environment, cwd=ROOT, stdout=out, stderr=err, timeout=limit_s)
                failed = "" if status.returncode == 0 else "it said nothing"
            except subprocess.TimeoutExpired:
                failed = f"not done within {limit_s:.0f} s"
        said, errors = (Path(f"{folder}/{file}").read_text(errors="replace") for file in ("out", "err"))
    lines = [line for line in said.splitlines() if line.strip()]
    tables = "\n".join(f"\n{line}\n" if line[0] == "#" else line for line in lines if line[0] in "|#")
    if failed:
        print(errors[-3000:], file=sys.stderr, flush=True)
        last = [line for line in errors.splitlines() if line.strip()][-1:]
        figures = failed if failed.startswith("not") else (last or [failed])[0]
    else:
        figures = (lines or ["it said nothing"])[-1]
    return Row(name, not failed, figures, time.monotonic() - began, tables)


def tabulate(rows: list[Row]) -> str:
    lines = ["| part | result | figures | seconds | limit |", "|---|---|---|---|---|"]
    for row in rows:
        figures, result = row.figures.replace("|", "\\|"), "holds" if row.holds else "FAILED"
        lines.append(f"| {row.part} | {result} | {figures} | {row.seconds:.0f} | {LIMITS_S[row.part]} |")
    return "\n".join(lines)


def new_page(device: str) -> Path:
    """The page for docs/benchmarks, named after the device and the day; an older one is not replaced."""
    name = re.sub(r"\W+", "_", device.removeprefix("NVIDIA ")).lower()
    stem = ROOT / "docs/benchmarks" / f"gpu_{name}_{date.today()}"
    names = [f"{stem}.md", *(f"{stem}_{i}.md" for i in range(2, 100))]
    return Path(next(name for name in names if not Path(name).exists()))


def page(rows: list[Row], device: str) -> str:
    """The page for docs/benchmarks."""
    packages = package_versions(("torch", "triton", "deepspeed", "ray", "diffusers", "transformers", "torchao"))
    versions = ", ".join(f"{name} {number}" for name, number in packages.items())
    command = shlex.join(["python", "-m", "tests.gpu.check", *sys.argv[1:]])
    tables = "".join(f"\n## {row.part}\n\n{row.figures}\n\n{row.tables}\n" for row in rows if row.tables)
    return f"""\
# The GPU check on {device}, {date.today()}

Command: `{command}` (`make check-gpu`). Commit: {git_commit() or "unknown"}.
Hardware: {device}, {usable_cores()} cores. Python {platform.python_version()}, {versions}.

{tabulate(rows)}
{tables}"""


if __name__ == "__main__":
    raise SystemExit(main())
