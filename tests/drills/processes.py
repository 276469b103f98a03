"""Drills that kill workers, nodes and drivers, or resume at another world size."""

import os
import random
import re
import signal
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from tests.drills.commands import end, family, lines, title, training_workers, wait_for, wait_for_step
from tests.drills.history import events, losses
from tests.drills.stage import ONE_THREAD, SEED, STEPS, Row, Stage, check_newest, compare_runs, say, verdict


def worker_killed(stage: Stage) -> Row:
    """`kill -9` of a random worker at ten random steps of one run."""
    draw = random.Random(SEED)
    moments = sorted(draw.sample(range(1, STEPS - 2), 10))
    command = stage.train("worker-killed", delay_s=0.1)
    for number, step in enumerate(moments):
        wait_for(command, f"start {number}", lambda: len(worlds(command.run)) > number)  # noqa: B023  called at once
        wait_for_step(command, step)
        victim = draw.choice(training_workers(command))
        victim.kill()
        say(f"kill -9 of {victim.pid} at step {max(losses(command.run))} (drawn: {step})")
    code = end(command)
    lost = len(events(command.run, "worker_lost"))
    wrong = [] if lost == len(moments) else [f"{lost} workers noted as lost"]
    return compare_runs(stage, "kill -9 of a worker", command.run, [code], want=[0], times=len(moments), wrong=wrong)


def node_lost(stage: Stage) -> Row:
    """One of three nodes is lost for good; later a new one joins."""
    with three_nodes(delay_s=0.5) as (cluster, nodes):
        elastic = ("--cluster.address", cluster.address, "--cluster.workers", "1", "3")
        command = stage.train("node-lost", *elastic)
        wait_for_step(command, 13)
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        say(f"a node removed at step {max(losses(command.run))}")
        wait_for(command, "resume on fewer", lambda: worlds(command.run)[-1] < 3)
        wait_for_step(command, max(events(command.run, "resume")[-1]["step"] + 9, 25))
        cluster.add_node(num_cpus=1)
        say(f"a node added at step {max(losses(command.run))}")
        code = end(command)
    sizes = worlds(command.run)
    wrong = [] if sizes == [3, 2, 3] else [f"workers were {sizes}, not 3, 2, 3"]
    ours, theirs = (statistics.mean(list(losses(run).values())[-20:]) for run in (command.run, stage.unbroken))
    mean = abs(ours - theirs) / theirs
    wrong += [f"the mean of the last 20 losses differs by {mean:.1e}"] if mean > 1e-4 else []
    remark = f"{', '.join(map(str, sizes))} workers; mean of the last 20 losses differs by {mean:.0e}"
    return compare_runs(
        stage,
        "one of three nodes removed, one added later",
        command.run,
        [code],
        want=[0],
        tolerance=1e-4,
        wrong=wrong,
        remark=remark,
    )


@contextmanager
def three_nodes(delay_s: float) -> Iterator[tuple[Cluster, list]]:
    """A cluster of a head and two nodes on this machine, one CPU each. Workers inherit the nodes' environment."""
    given = {**ONE_THREAD, "SORA_STEP_DELAY_S": str(delay_s)}
    before = {key: os.environ.get(key) for key in given}
    os.environ.update(given)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield cluster, [cluster.add_node(num_cpus=1) for _ in range(2)]
    finally:
        cluster.shutdown()
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def worlds(run: Path) -> list[int]:
    """The world sizes of a run in order."""
    begun = [event["reason"] for event in lines(run / "events.jsonl") if event["event"] in ("start", "resume")]
    return [int(found[1]) for reason in begun if (found := re.search(r"(\d+) workers?", reason))]


def driver_terminated(stage: Stage) -> Row:
    """SIGTERM to the driver; the same command resumes at the step where it stopped."""
    command = stage.train("driver-terminated", delay_s=0.1)
    wait_for_step(command, 20)
    command.process.send_signal(signal.SIGTERM)
    code, at = end(command), max(losses(command.run))
    say(f"SIGTERM: left at step {at} with exit {code}")
    wrong = check_newest(command.run, at)  # so that no step is done again
    wrong += [] if events(command.run, "stopped") else ["no event `stopped`"]
    wrong += ["a traceback is shown"] if "Traceback" in command.output() else []
    again = end(stage.train("driver-terminated"))
    resumed = [event["step"] for event in events(command.run, "resume")]
    wrong += [] if resumed == [at] else [f"resumed from {resumed}, not {at}"]
    return compare_runs(stage, "SIGTERM to the driver", command.run, [code, again], want=[75, 0], wrong=wrong)


def driver_killed(stage: Stage) -> Row:
    """`kill -9` of the driver; the same command resumes at once, and no process of the first one is left."""
    command = stage.train("driver-killed", delay_s=0.3)
    wait_for_step(command, 20)
    orphans, workers = family(command), training_workers(command)
    command.process.kill()
    code, second = end(command), stage.train("driver-killed")
    _, training = psutil.wait_procs(workers, timeout=5)  # sooner than the second has workers
    wrong = ["its workers train on 5 s later"] if training else []
    again = end(second)
    _, alive = psutil.wait_procs(orphans, timeout=10)
    left = [process.name() for process in alive if "agent" not in title(process).lower()]  # these take a minute
    wrong += [f"when the second command has ended there are still {left}"] if left else []
    return compare_runs(stage, "kill -9 of the driver", command.run, [code, again], want=[-9, 0], wrong=wrong)


def resized(stage: Stage) -> Row:
    """A half run resumes at other world sizes and ZeRO stages."""
    rows = []
    for workers, zero_stage in ((1, 3), (3, 2), (2, 0)):
        name = f"resized-{workers}-{zero_stage}"
        run = stage.half(name)
        code = end(stage.train(name, "--cluster.workers", str(workers), "--train.zero_stage", str(zero_stage)))
        row = compare_runs(stage, name, run, [code], want=[0], tolerance=1e-6)
        say(f"{workers} workers, ZeRO {zero_stage}: {row.difference}, {row.verdict}")
        rows.append(row)
    wrong = [f"{row.fault}: {row.verdict}" for row in rows if not row.holds]
    return Row(
        "resumed at another size (2 workers, ZeRO 1 → 1, ZeRO 3; 3, ZeRO 2; 2, ZeRO 0)", len(rows),
        ", ".join(row.exits for row in rows), sum(int(row.again) for row in rows),
        sum(int(row.lost) for row in rows), sum(int(row.repeated) for row in rows),
        ", ".join(row.difference for row in rows), *verdict(wrong),
    )  # fmt: skip
