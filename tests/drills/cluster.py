"""The cluster drill, `make drill-cluster`: random faults over prep and training as jobs on three machines.

    python -m tests.drills.cluster [--minutes 30] [--seed 7] [--only prep|train] [--out FILE.md] [--logs FOLDER]

The machines are network namespaces with addresses and disks of their own (tests/cluster/nodes.py). First an unbroken
prep and an unbroken training; then random faults with random pauses, the first third of the time over preps, the rest
over trainings. A job that ends is submitted again by the same command, as cluster/README.md says. When the time is up,
what is under way is got through, and everything is held against the unbroken runs. Prints one table; the exit status
is 1 where anything does not hold. The same seed gives the same faults in the same order.
"""

import argparse
import itertools
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from sora_train.quickstart.shapes import make_clips
from tests.cluster.nodes import SHARED
from tests.cluster.world import INTO, ROOT, lacking
from tests.drills.cluster_faults import FAULTS, Later, PlannedFault, schedule
from tests.drills.cluster_stage import SUCCEEDED, Cluster, Workload, job_result
from tests.drills.cluster_verdict import Row, compare, tabulate
from tests.drills.train import processor

CLIPS, STEPS = 1080, 300
HANG_S = 300.0
ATTEMPTS = 40
PREP = "--prep.vae_workers 2 --prep.decode_workers 2 --prep.shard_mb 1"
TRAIN = (
    f"--train.output {SHARED}/runs --train.steps {STEPS} --train.log_every 1 --train.log_samples true "
    "--train.checkpoint_every 10 --train.keep_checkpoints 3 --train.batch_size 36 --train.micro_batch_size 12 "
    "--train.warmup_steps 5 --train.zero_stage 1 --model.width 32 --model.depth 2 --model.heads 2 "
    "--validation.every 100 --validation.steps 2 --validation.holdout_clips 4 "
    "--cluster.workers 3 --cluster.max_failures 20"
)


class Drill:
    """One drill: its machines, clock and table."""

    def __init__(self, folder: Path, logs: Path, seed: int) -> None:
        self.began, self.logs = time.monotonic(), logs
        self.machines = Cluster(folder)
        self.plans = schedule(seed)
        self.plan: PlannedFault | None = None
        self.rows: list[Row] = []
        self.faults_began = self.began
        self.wrong: list[str] = []
        self.seconds: dict[str, float] = {}

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self.began:5.0f} s] {line}", flush=True)

    def work(self, verb: str, name: str) -> Workload:
        shards = SHARED / (name if verb == "prep" else "prep-unbroken")
        words = f"jobs/quickstart.yaml --data.captions {SHARED}/clips/captions.csv --data.output {shards} "
        words += PREP if verb == "prep" else f"--name {name} {TRAIN}"
        environment = {"SORA_STEP_DELAY_S": "0.2"} if verb == "train" else {}
        return Workload(verb, name, words.split(), self.machines, self.logs, environment)

    def get_through(self, work: Workload, until: float) -> bool:
        """Submits a workload until it succeeds, with faults until `until`. Returns whether it succeeded."""
        began = time.monotonic()
        work.submit()
        row: Row | None = None
        later: list[Later] = []
        due: float | None = None
        looked_at = 0.0
        while True:
            time.sleep(0.3)
            work.update_progress()
            for one in [one for one in later if one[0] <= time.monotonic()]:
                later.remove(one)
                one[1]()
            now = time.monotonic()
            if work.ended():
                why = job_result(work.log)
                if why == SUCCEEDED:
                    for _, act in later:
                        act()
                    self.seconds[work.name] = now - began
                    self.say(f"{work.name} succeeded, submitted {len(work.jobs)} times, {now - began:.0f} s")
                    self.note(work, row)
                    return True
                row = row or self.begin(work, "none", "—", "")
                row.happened.append(f"job ended ({why}), submitted again")
                self.say(row.happened[-1])
                if len(work.jobs) >= ATTEMPTS:
                    return self.give_up(work, f"did not succeed in {ATTEMPTS} submissions")
                work.submit()
            if now - max(work.progressed_at, work.submitted_at) > HANG_S:
                work.dump_stacks()
                return self.give_up(
                    work, f"hangs after {row.fault if row else 'nothing'}: no progress in {HANG_S:.0f} s"
                )
            if not later and now - looked_at > 10:
                looked_at = now
                for node in self.machines.rejoin():
                    row = row or self.begin(work, "none", node.name, "")
                    row.happened.append(f"the raylet of {node.name} had ended, `ray start` again")
                    self.say(row.happened[-1])
            if later or (row and not row.recovered(work)) or not work.is_working() or now > until:
                continue
            if due is None:
                if row:
                    row.stalled_s = work.gap
                self.plan = self.plan or next(self.plans)
                due = now + self.plan.pause_s
            elif now >= due:
                self.note(work, row)
                row, later = self.inflict(work)
                due = None

    def inflict(self, work: Workload) -> tuple[Row, list[Later]]:
        """Applies the next planned fault."""
        assert self.plan is not None
        plan, self.plan = self.plan, None
        work.gap = 0.0
        row = self.begin(work, plan.kind, "—", "")
        harm = FAULTS[plan.kind](work, self.machines, plan)
        row.node, row.met, row.ends_job = harm.node, harm.met, harm.ends_job
        now = time.monotonic()
        row.repaired_s = now + max((seconds for seconds, _ in harm.later), default=0.0)
        self.say(f"{plan.kind}, {harm.node}, {harm.met or 'met nothing'}; {work.name} stands at {work.progress[1]}")
        return row, [(now + seconds, act) for seconds, act in harm.later]

    def begin(self, work: Workload, fault: str, node: str, met: str) -> Row:
        row = Row(
            time.monotonic() - self.faults_began, work.name, fault, node, met, time.monotonic(), work.progress,
            len(work.jobs), len(work.events()), time.time_ns(),
        )  # fmt: skip
        self.rows.append(row)
        return row

    def note(self, work: Workload, row: Row | None) -> None:
        """Adds what happened since a fault to its row."""
        if row:
            row.stalled_s = row.stalled_s or work.gap
            row.add_events(work.events()[row.events_before :])
            row.attempts = len([at for at in work.worker_starts() if at > row.began_ns])
            self.say(f"    {row.describe()}; longest standstill {row.stalled_s:.0f} s")

    def give_up(self, work: Workload, why: str) -> bool:
        self.wrong.append(f"{work.name} {why}")
        self.say(self.wrong[-1])
        if self.rows and self.rows[-1].phase == work.name:
            self.rows[-1].happened.append(f"FAILED: {why}")
        return False

    def play(self, minutes: float, only: str | None) -> list[Workload]:
        """Undisturbed runs, then faults for `minutes`. Returns the workloads that succeeded, undisturbed ones first."""
        make_clips(self.machines.folder / "shared/clips", CLIPS)
        for _ in range(2):
            self.machines.add()
        self.say("three nodes")
        verbs = ("prep",) if only == "prep" else ("prep", "train")  # trainings are on the shards of the unbroken prep
        unbroken = [self.work(verb, f"{verb}-unbroken") for verb in verbs]
        done = [work for work in unbroken if self.get_through(work, until=0)]
        if len(done) < len(unbroken):
            return done
        self.faults_began = time.monotonic()
        for verb, end in (("prep", minutes * 20), ("train", minutes * 60)):
            end = minutes * 60 if only else end
            if only not in (None, verb):
                continue
            for number in itertools.count(1):
                if self.wrong or (number > 1 and time.monotonic() > self.faults_began + end):
                    break
                work = self.work(verb, f"{verb}-{number}")
                if self.get_through(work, self.faults_began + end):
                    done.append(work)
        return done


def inside(asked: argparse.Namespace) -> int:
    """The drill, inside its namespaces."""
    drill = Drill(asked.inside, asked.logs, asked.seed)
    done = drill.play(asked.minutes, asked.only)
    drill.say("held against the unbroken runs")
    said, holds = compare(done, drill.rows, drill.wrong)
    times = ", ".join(f"{name} {drill.seconds[name]:.0f} s" for name in drill.seconds)
    table = f"{tabulate(drill.rows)}\n\n" + "\n".join(said) + f"\n\nFrom submission to success: {times}."
    print(f"\n{table}\n\n{'holds' if holds else 'FAILED'}", flush=True)
    if asked.out:
        asked.out.write_text(page(table, asked), encoding="utf-8")
    return int(not holds)


def page(table: str, asked: argparse.Namespace) -> str:
    """The page for docs/benchmarks."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "deepspeed"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    only = f" --only {asked.only}" if asked.only else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"""\
# The cluster drill on {os.cpu_count()} CPU cores, {date.today()}

Command: `python -m tests.drills.cluster --minutes {asked.minutes:g} --seed {asked.seed}{only}` (`make drill-cluster`).
Commit: {commit}.
Hardware: {os.cpu_count()} cores of {processor()}, {memory:.0f} GB, no GPU, {platform.system()} {platform.machine()};
Python {platform.python_version()}, {versions}. Float32, gloo; three raylets of 2 CPUs each in network
namespaces, with a token.

Preps of {CLIPS} clips; trainings of {STEPS} steps of 36 of them on 3 workers, ZeRO 1, a checkpoint every 10 steps, a
validation every 100, jobs by `ray job submit`. Time: minutes and seconds since the first fault could come. Met: what
of the job the fault hit. Standstill: the longest time without a step (a prep tells only every 5 s) from the fault until
the run went on; a job that ended was submitted again by the same command. What happened to a training is what its
`events.jsonl` says, and each new start of its workers must have a reason there; a prep keeps no such file.

{table}
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.drills.cluster", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30, help="minutes of faults")
    parser.add_argument("--seed", type=int, default=7, help="of the faults and pauses")
    parser.add_argument("--only", choices=("prep", "train"), help="faults over one of the two alone")
    parser.add_argument("--out", type=Path, help="write the table, with command, commit and hardware, into this file")
    parser.add_argument("--logs", type=Path, help="a folder for what the jobs say")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        return inside(asked)
    if why := lacking():
        print(f"the drill needs a world of its own: {why}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what follows cleans up
    logs = (asked.logs or Path(tempfile.mkdtemp(prefix="drill-cluster-logs-"))).resolve()
    logs.mkdir(parents=True, exist_ok=True)
    print(f"what the jobs say is in {logs}", flush=True)
    root = Path(tempfile.mkdtemp(prefix="drill-"))
    words = ["--minutes", str(asked.minutes), "--seed", str(asked.seed), "--logs", str(logs), "--inside", str(root)]
    words += ["--only", asked.only] if asked.only else []
    words += ["--out", str(asked.out.resolve())] if asked.out else []
    command = shlex.join([sys.executable, "-m", "tests.drills.cluster", *words])
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") or "niceness" in key}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    try:
        # The shell stays, as number 1, since somebody must see to orphans that end.
        return subprocess.call(
            [*INTO, "sh", "-c", f"{command}; exit $?"], cwd=ROOT, env={**clean, "PATH": path, "PYTHONPATH": str(ROOT)}
        )
    finally:
        time.sleep(1)  # what ends with the world may still write
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
