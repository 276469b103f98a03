"""Faults of the cluster drill. Most are repaired some seconds later."""

import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

from tests.cluster.nodes import SHARED, Node
from tests.drills.cluster_stage import SETTINGS, Cluster, Workload, is_raylet

Later = tuple[float, Callable[[], None]]
"""Seconds from now, and the action to take then."""


@dataclass(frozen=True)
class PlannedFault:
    """A scheduled fault. `where` and `which`, from 0 to 1, choose the node and process among those that exist then."""

    kind: str
    pause_s: float
    where: float
    which: float


@dataclass(frozen=True)
class FaultEffect:
    """The node of a fault, what it hit of the job ("" if nothing), and later actions."""

    node: str
    met: str
    later: tuple[Later, ...] = ()
    ends_job: bool = False


def schedule(seed: int) -> Iterator[PlannedFault]:
    """Endless: all kinds in random order, again and again. Deterministic by seed."""
    draw = random.Random(seed)
    for _ in count():
        for kind in draw.sample(list(FAULTS), len(FAULTS)):
            yield PlannedFault(kind, draw.uniform(2, 10), draw.random(), draw.random())


def worker_killed(work: Workload, machines: Cluster, plan: PlannedFault) -> FaultEffect:
    found = [
        (process, title, node)
        for node in (machines.first, *machines.others)
        for process, title in machines.work_on(node)
        if ("RayTrainWorker" if work.verb == "train" else "MapWorker") in title
    ]
    if not found:
        return FaultEffect("—", "")
    process, title, node = pick(sorted(found, key=lambda one: one[0].pid), plan.which)
    process.kill()
    stage = re.search(r"MapBatches\((\w+)\)", title)
    return FaultEffect(node.name, f"actor {stage[1]}" if stage else "training worker")


def writer_killed(work: Workload, machines: Cluster, plan: PlannedFault) -> FaultEffect:
    """A writer of shards, if one is caught within 5 s; else a worker."""
    until = time.monotonic() + 5
    while work.verb == "prep" and time.monotonic() < until:
        for node in (machines.first, *machines.others):
            for process, title in machines.work_on(node):
                if "write_blocks" in title:
                    process.kill()
                    return FaultEffect(node.name, "writer")
    return worker_killed(work, machines, plan)


def raylet_killed(work: Workload, machines: Cluster, plan: PlannedFault) -> FaultEffect:
    node, met = choose_node(machines, plan)
    for process, title in node.processes():
        if is_raylet(title):
            process.kill()
    return FaultEffect(node.name, met, ((12, lambda: machines.join(node)),))


def cut_off(work: Workload, machines: Cluster, plan: PlannedFault) -> FaultEffect:
    node, met = choose_node(machines, plan)
    node.link("down")
    return FaultEffect(node.name, met, ((20, lambda: node.link("up")),))


def cut_off_for_good(work: Workload, machines: Cluster, plan: PlannedFault) -> FaultEffect:
    node, met = choose_node(machines, plan)
    node.link("down")
    machines.others.remove(node)
    return FaultEffect(node.name, met, ((40, lambda: machines.add() and None),))


def driver_killed(work: Workload, machines: Cluster, plan: PlannedFault) -> FaultEffect:
    driver = work.driver()
    if driver is None:
        return FaultEffect("—", "")
    driver.kill()
    return FaultEffect(machines.first.name, f"sora {work.verb}", ends_job=True)


def disk_filled(work: Workload, machines: Cluster, plan: PlannedFault) -> FaultEffect:
    node, met = choose_node(machines, plan)
    node.fill_disk()
    return FaultEffect(node.name, met, ((30, node.free_disk),))


def job_stopped(work: Workload, machines: Cluster, plan: PlannedFault) -> FaultEffect:
    """SIGTERM to the driver and its children, by `ray job stop`."""
    machines.first.start(f"{SETTINGS}; ray job stop {work.job_id}", SHARED, work.log.with_suffix(".stop.log"))
    return FaultEffect(machines.first.name, f"sora {work.verb}", ends_job=True)


FAULTS: dict[str, Callable[[Workload, Cluster, PlannedFault], FaultEffect]] = {
    "kill -9 of a worker": worker_killed,
    "kill -9 of a writer": writer_killed,
    "kill -9 of a raylet": raylet_killed,
    "cut off for 20 s": cut_off,
    "cut off for good": cut_off_for_good,
    "kill -9 of the driver": driver_killed,
    "disk filled for 30 s": disk_filled,
    "SIGTERM": job_stopped,
}


def choose_node(machines: Cluster, plan: PlannedFault) -> tuple[Node, str]:
    """A node other than the first, preferably a busy one, and what the job runs on it."""
    busy = [node for node in machines.others if machines.work_on(node)]
    node = pick(busy or machines.others, plan.where)
    titles = [title for _, title in machines.work_on(node)]
    names = {"RayTrainWorker": "training worker", "MapWorker": "actor", "launch.validation": "validation"}
    counts = {name: sum(word in title for title in titles) for word, name in names.items()}
    return node, ", ".join(f"{number} {name}{'s' if number > 1 else ''}" for name, number in counts.items() if number)


def pick(among: list, where: float):
    """The element at a relative position from 0 to 1."""
    return among[int(where * len(among))]
