"""The training drill, `make drill-train`: real `sora train` commands under faults.

    python -m tests.drills.train [--only NAME …] [--out FILE.md]

Each drill does harm to a run and holds what comes of it against a run that nobody touched: the loss of every step, and
what every rank says it was trained on. Prints one table; the exit status is 1 where anything does not hold. All that it
makes lies in a temporary folder, and all that it starts is ended.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from tests.drills import files, processes, validations
from tests.drills.commands import end, end_all, start
from tests.drills.stage import BATCH, CLIPS, EVERY, STEPS, Row, Stage, verdict


def quickstart(stage: Stage) -> Row:
    """`sora demo` in an empty folder reaches its quality: colour and direction 0.95, shape 0.75, halves within 0.1."""
    place = stage.root / "quickstart"
    place.mkdir()
    command = start(["demo"], place / "runs/quickstart", stage.logs, {}, cwd=place)
    code = end(command, timeout_s=3600)
    found = json.loads((command.run / "obedience.json").read_text())
    seen, held_out = found["seen"], found["held_out"]
    bars = {"colour": 0.95, "direction": 0.95, "shape": 0.75}
    wrong = [f"{name} is below {bar}" for name, bar in bars.items() if min(seen[name], held_out[name]) < bar]
    wrong += [f"{name} differs by more than 0.1" for name in bars if abs(seen[name] - held_out[name]) > 0.1]
    remark = "; ".join(f"{name} {seen[name]:.2f} seen, {held_out[name]:.2f} held out" for name in (*bars, "all"))
    text, holds = verdict(wrong + ([] if code == 0 else [f"exit {code}"]), remark)
    return Row("none: the quickstart", exits=str(code), again=0, verdict=text, holds=holds)


DRILLS = {
    "worker-killed": processes.worker_killed,
    "node-lost": processes.node_lost,
    "driver-terminated": processes.driver_terminated,
    "driver-killed": processes.driver_killed,
    "poisoned-clip": files.poisoned_clip,
    "poisoned-stretch": files.poisoned_stretch,
    "shard-truncated": files.shard_truncated,
    "shard-flipped": files.shard_flipped,
    "checkpoint-truncated": files.checkpoint_truncated,
    "checkpoint-flipped": files.checkpoint_flipped,
    "disk-full": files.disk_full,
    "folder-unwritable": files.folder_unwritable,
    "resized": processes.resized,
    **validations.DRILLS,
    "quickstart": quickstart,
}
HEADS = (
    "fault",
    "how often",
    "exit",
    "steps done again",
    "samples lost",
    "samples repeated",
    "largest loss difference",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.drills.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=DRILLS, default=list(DRILLS), metavar="NAME", help=", ".join(DRILLS)
    )
    parser.add_argument("--out", type=Path, help="write the table, with command, commit and hardware, into this file")
    asked = parser.parse_args()
    began, rows = time.monotonic(), []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what follows cleans up
    root = Path(tempfile.mkdtemp(prefix="drill-"))
    os.environ["RAY_TMPDIR"] = str(root)  # a Ray of our own, and what `end_all` knows its processes by
    try:
        stage = Stage(root)
        if asked.only != ["quickstart"]:
            print(f"{CLIPS} clips to shards, and the unbroken run of {STEPS} steps", flush=True)
            stage.unbroken  # noqa: B018  made here
            end_all(root)
        for name in asked.only:
            rows.append(drill(name, stage, began))
            end_all(root)
        table, minutes = tabulate(rows), (time.monotonic() - began) / 60
        print(f"\n{table}\n\n{sum(row.holds for row in rows)} of {len(rows)} hold, {minutes:.0f} min", flush=True)
        if asked.out:
            about = next(root.rglob("environment.json"))  # any run's
            asked.out.write_text(page(table, minutes, json.loads(about.read_text())), encoding="utf-8")
    finally:
        end_all(root)
        shutil.rmtree(root, ignore_errors=True)
    return int(not all(row.holds for row in rows))


def drill(name: str, stage: Stage, began: float) -> Row:
    """One drill; an exception becomes its row."""
    print(f"[{time.monotonic() - began:5.0f} s] {name}", flush=True)
    try:
        row = DRILLS[name](stage)
    except Exception as error:  # one drill that falls must not hide what the others show
        print(f"    {type(error).__name__}: {error}", flush=True)
        row = Row(name, verdict=f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"[:200], holds=False)
    if not row.holds and (logs := sorted(stage.logs.iterdir(), key=lambda log: log.stat().st_mtime)):
        print(f"    {logs[-1].name} ends:\n{logs[-1].read_text(errors='replace')[-2000:]}", flush=True)
    print(f"[{time.monotonic() - began:5.0f} s] {name}: {row.verdict}", flush=True)
    return row


def tabulate(rows: list[Row]) -> str:
    head = f"| {' | '.join(HEADS)} | verdict |\n|{'---|' * (len(HEADS) + 1)}"
    cells = [(r.fault, r.times, r.exits, r.again, r.lost, r.repeated, r.difference, r.verdict) for r in rows]
    return "\n".join([head, *(f"| {' | '.join(map(str, row))} |" for row in cells)])


def page(table: str, minutes: float, about: dict) -> str:
    """The page for docs/benchmarks. `about` is a run's environment.json."""
    versions = ", ".join(f"{name} {about['packages'][name]}" for name in ("torch", "ray", "deepspeed"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"""\
# The training drill on {about["cores"]} CPU cores, {date.today()}

Command: `{shlex.join(["python", "-m", "tests.drills.train", *sys.argv[1:]])}` (`make drill-train`), {minutes:.0f} min.
Commit: {about["commit"]} (`+`: changed since).
Hardware: {about["cores"]} cores of {processor()}, {memory:.0f} GB, no GPU, {about["machine"]};
Python {about["python"]}, {versions}. Float32, gloo.

Runs of {STEPS} steps of {BATCH} of {CLIPS} clips, so {STEPS * BATCH // CLIPS} epochs; a checkpoint every {EVERY} steps;
ZeRO 1 on two workers where nothing else is said. Steps done again: what no checkpoint held yet. Lost and repeated count
the clips of the run's final history by epoch, from what every rank wrote down: each must come once, but for those that
`events.jsonl` names. Loss differences are relative, the largest of all steps, to the run that nobody touched.

{table}
"""


def processor() -> str:
    """The CPU's name."""
    about = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in about.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
