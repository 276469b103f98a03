"""The cluster drill's machines, the Ray cluster on them, and the submitted jobs.

Runs in its own PID, network and mount namespaces (tests/cluster/world.py).
"""

import json
import re
import shlex
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.cluster.nodes import SHARED, Node, boot, prepare
from tests.cluster.world import ROOT
from tests.drills.commands import lines

SETTINGS = "export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265"
SMALL = "--num-cpus 2 --object-store-memory 250000000"
WORK = ("RayTrainWorker", "MapWorker", "write_blocks", "sora_train.launch.validation")
"""Words in the titles of processes that work for a job."""
ENDINGS = ("worker_lost", "preempted", "stopped", "interrupted", "failed", "end")
"""Events after which no worker trains."""
SUCCEEDED = "succeeded"


class Cluster:
    """The nodes. The first has Ray's head and the drivers; the others come and go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        prepare(folder)
        self.count = 0
        self.first = self._boot()
        self.others: list[Node] = []
        self.checkout = self.first.home / "sora_train"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(self.checkout)], check=True)
        self.first.run("umask 077; ray get-auth-token --generate > /dev/null", SHARED)
        self.first.run(f"RAY_AUTH_MODE=token RAY_JOB_STOP_WAIT_TIME_S=300 ray start --head {SMALL}", SHARED)

    def _boot(self) -> Node:
        self.count += 1
        return boot(self.count, self.folder)

    def add(self) -> Node:
        """Adds a machine to the cluster."""
        node = self._boot()
        node.run(
            f"mkdir -m 700 -p ~/.ray && install -m 600 {self.first.home}/.ray/auth_token ~/.ray/auth_token", SHARED
        )
        self.join(node)
        self.others.append(node)
        return node

    def join(self, node: Node) -> None:
        patience = "RAY_raylet_start_wait_time_s=180"  # on a loaded machine Ray's own 30 s are too few
        node.run(f"RAY_AUTH_MODE=token {patience} ray start --address {self.first.name}:6379 {SMALL}", SHARED)

    def rejoin(self) -> list[Node]:
        """Restarts Ray on nodes whose raylet has ended, as it does once the cluster has given a node up."""
        gone = [node for node in self.others if not any(is_raylet(title) for _, title in node.processes())]
        for node in gone:
            self.join(node)
        return gone

    def work_on(self, node: Node) -> list[tuple[psutil.Process, str]]:
        """Processes of a node that work for a job, with their titles."""
        return [(process, title) for process, title in node.processes() if any(word in title for word in WORK)]


@dataclass
class Workload:
    """A prep or training: the same command, submitted until it succeeds."""

    verb: str
    name: str
    words: list[str]
    machines: Cluster
    logs: Path
    environment: dict[str, str]
    jobs: list[subprocess.Popen] = field(default_factory=list)
    progress: tuple[int, int] = (0, 0)
    """Grows with progress: (0, last step) of a training, (number of the job, its sources done) of a prep."""
    progressed_at: float = 0.0
    submitted_at: float = 0.0
    gap: float = 0.0
    """The longest time without progress since `gap` was set to zero."""

    @property
    def run(self) -> Path:
        """The run's folder of a training."""
        return self.machines.folder / "shared/runs" / self.name

    @property
    def job_id(self) -> str:
        return f"{self.name}-{len(self.jobs)}"

    @property
    def log(self) -> Path:
        """The log of the last submitted job."""
        return self.logs / f"{self.job_id}.log"

    def submit(self) -> None:
        """Runs `ray job submit` on the first node, which ends with the job."""
        self.jobs.append(None)  # type: ignore[arg-type]  the name counts it
        environment = shlex.quote(json.dumps({"env_vars": self.environment}))
        line = (
            f"{SETTINGS}; PYTHONUNBUFFERED=1 ray job submit --submission-id {self.job_id} --working-dir . "
            f"--runtime-env-json {environment} -- sora {self.verb} {shlex.join(self.words)}"
        )
        self.jobs[-1] = self.machines.first.start(line, self.machines.checkout, self.log)
        self.submitted_at = time.monotonic()
        self.progressed_at = self.progressed_at or self.submitted_at

    def ended(self) -> bool:
        return bool(self.jobs) and self.jobs[-1].poll() is not None

    def update_progress(self) -> None:
        """Reads how far the job is."""
        now, before = time.monotonic(), self.progress
        if self.verb == "train":
            steps = [line["step"] for line in lines(self.run / "metrics.jsonl") if "validation" not in line]
            self.progress = max(before, (0, max(steps, default=0)))
        else:
            found = re.findall(r"prep: (\d+) of \d+ sources", self.log.read_text(errors="replace"))
            done = int(found[-1]) if found else 0
            if done:
                self.progress = max(before, (len(self.jobs), done))
        self.gap = max(self.gap, now - self.progressed_at)
        if self.progress != before:
            self.progressed_at = now

    def is_working(self) -> bool:
        """Whether the last submitted job is at work, so a fault hits it there."""
        if self.verb == "prep":
            return self.progress[0] == len(self.jobs)
        begun = [event["event"] for event in self.events() if event["event"] in ("start", "resume", *ENDINGS)]
        return begun[-1:] in (["start"], ["resume"]) and time.monotonic() - self.progressed_at < 10

    def events(self) -> list[dict]:
        return lines(self.run / "events.jsonl") if self.verb == "train" else []

    def driver(self) -> psutil.Process | None:
        """The process of `sora`."""
        for process, title in self.machines.first.processes():
            if re.match(rf"\S*python\S* \S*/sora {self.verb} ", title):
                return process
        return None

    def worker_starts(self) -> list[int]:
        """Times (ns since 1970) of all starts of the workers that did a step, from the ranks' records."""
        if self.verb == "prep":
            return []
        return sorted({line["attempt"] for file in (self.run / "trained").glob("*.jsonl") for line in lines(file)})

    def dump_stacks(self) -> None:
        """Writes the stacks of all processes of the job into the logs."""
        with (self.logs / f"{self.job_id}.stacks").open("w") as file:
            nodes = (self.machines.first, *self.machines.others)
            found = [(node, *one) for node in nodes for one in self.machines.work_on(node)]
            driver = self.driver()
            found += [(self.machines.first, driver, "driver")] if driver else []
            for node, process, title in found:
                file.write(f"\n==== {node.name} {title[:200]}\n")
                file.flush()
                subprocess.run(["py-spy", "dump", "--pid", str(process.pid)], stdout=file, stderr=file, timeout=60)


def is_raylet(title: str) -> bool:
    return title.split(" ")[0].endswith("raylet/raylet")


def job_result(log: Path) -> str:
    """How a job ended, from the output of `ray job submit`: `SUCCEEDED`, or the reason."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    said = re.sub(r"^\S+ \S+\s+[A-Z]+ \w+\.py:\d+ -- ", "", plain, flags=re.MULTILINE).strip().splitlines()
    if any("succeeded" in line and "Job '" in line for line in said[-4:]):
        return SUCCEEDED
    told = [line for line in said if line.startswith("sora ") or "Status message" in line or "was stopped" in line]
    return (told or said or ["nothing was said"])[-1].split("Status message: ")[-1].split(", last available")[0][:160]
