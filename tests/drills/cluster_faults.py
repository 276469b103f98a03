"""Faults of the cluster drill. Each has a first half, at once, and for most a second one some seconds later."""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

from tests.cluster.nodes import SHARED, Node
from tests.drills.cluster_stage import SETTINGS, Machines, Work, is_raylet

Later = tuple[float, Callable[[], None]]
"""Seconds from now, and what to do then."""


@dataclass(frozen=True)
class Planned:
    """A fault of the schedule. `where` and `which`, from 0 to 1, choose node and process among those there then."""

    kind: str
    pause_s: float
    where: float
    which: float


@dataclass(frozen=True)
class Harm:
    """What was done: to which node, what of the job it met (nothing: an empty string), and what is still to do."""

    node: str
    met: str
    later: tuple[Later, ...] = ()
    ends_job: bool = False


def schedule(seed: int) -> Iterator[Planned]:
    """Every kind once in random order, then every kind again, without end: the same for the same seed."""
    draw = random.Random(seed)
    for _ in count():
        for kind in draw.sample(list(FAULTS), len(FAULTS)):
            yield Planned(kind, draw.uniform(2, 10), draw.random(), draw.random())


def worker_killed(work: Work, machines: Machines, plan: Planned) -> Harm:
    found = [
        (process, title, node)
        for node in (machines.first, *machines.others)
        for process, title in machines.work_on(node)
        if ("RayTrainWorker" if work.verb == "train" else "MapWorker") in title
    ]
    if not found:
        return Harm("—", "")
    process, title, node = pick(sorted(found, key=lambda one: one[0].pid), plan.which)
    process.kill()
    stage = re.search(r"MapBatches\((\w+)\)", title)
    return Harm(node.name, f"actor {stage[1]}" if stage else "training worker")


def raylet_killed(work: Work, machines: Machines, plan: Planned) -> Harm:
    node, met = victim(machines, plan)
    for process, title in node.processes():
        if is_raylet(title):
            process.kill()
    return Harm(node.name, met, ((12, lambda: machines.join(node)),))


def cut_off(work: Work, machines: Machines, plan: Planned) -> Harm:
    node, met = victim(machines, plan)
    node.link("down")
    return Harm(node.name, met, ((20, lambda: node.link("up")),))


def cut_off_for_good(work: Work, machines: Machines, plan: Planned) -> Harm:
    node, met = victim(machines, plan)
    node.link("down")
    machines.others.remove(node)
    return Harm(node.name, met, ((40, lambda: machines.add() and None),))


def driver_killed(work: Work, machines: Machines, plan: Planned) -> Harm:
    driver = work.driver()
    if driver is None:
        return Harm("—", "")
    driver.kill()
    return Harm(machines.first.name, f"sora {work.verb}", ends_job=True)


def disk_filled(work: Work, machines: Machines, plan: Planned) -> Harm:
    node, met = victim(machines, plan)
    node.fill_disk()
    return Harm(node.name, met, ((30, node.free_disk),))


def job_stopped(work: Work, machines: Machines, plan: Planned) -> Harm:
    """SIGTERM to the driver and all that it started, by `ray job stop`."""
    machines.first.start(f"{SETTINGS}; ray job stop {work.job_id}", SHARED, work.log.with_suffix(".stop.log"))
    return Harm(machines.first.name, f"sora {work.verb}", ends_job=True)


FAULTS: dict[str, Callable[[Work, Machines, Planned], Harm]] = {
    "kill -9 of a worker": worker_killed,
    "kill -9 of a raylet": raylet_killed,
    "cut off for 20 s": cut_off,
    "cut off for good": cut_off_for_good,
    "kill -9 of the driver": driver_killed,
    "disk filled for 30 s": disk_filled,
    "SIGTERM": job_stopped,
}


def victim(machines: Machines, plan: Planned) -> tuple[Node, str]:
    """A node other than the first, one that works if there is any, and what of the job is on it."""
    busy = [node for node in machines.others if machines.work_on(node)]
    node = pick(busy or machines.others, plan.where)
    titles = [title for _, title in machines.work_on(node)]
    names = {"RayTrainWorker": "training worker", "MapWorker": "actor", "launch.validation": "validation"}
    counts = {name: sum(word in title for title in titles) for word, name in names.items()}
    return node, ", ".join(f"{number} {name}{'s' if number > 1 else ''}" for name, number in counts.items() if number)


def pick(among: list, where: float):
    """The one at a place from 0 to 1."""
    return among[int(where * len(among))]
