"""Trains on a cluster of three nodes of this machine, some of which come and go. A program, not a test: Ray's state is
one per process, and nodes must come and go from its main thread.

    python elastic.py RECIPE.yaml              in this process alone, without Ray
    python elastic.py RECIPE.yaml lose:6 …     with Ray; at step 6 a node is killed
    python elastic.py RECIPE.yaml gain:9 …     at step 9 one comes
    python elastic.py RECIPE.yaml warn:6 …     at step 6 Ray announces the end of a node
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ray
import torch
from ray.cluster_utils import Cluster

from sora_train.data.shards import ShardSet
from sora_train.launch.trainer import launch_training
from sora_train.recipe import Recipe, load_recipe
from sora_train.train.loop import train
from sora_train.train.run_dir import RunDir

WARNING_S = 15


def alone(recipe: Recipe, run: Path) -> int:
    run.mkdir(parents=True)
    shards = ShardSet(recipe.data.output, recipe.data.holdout_fraction, "train")
    train(recipe.train, recipe.model, recipe.diffusion, shards, device=torch.device("cpu"), run_dir=RunDir(run))
    return 0


def on_nodes(recipe: Recipe, run: Path, acts: list[str]) -> int:
    os.environ |= {
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "3",
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray"),  # where it notes its address, beside no other Ray's
    }
    with socket.create_server(("", 0)) as server:
        nowhere = server.getsockname()[1]  # else Train's cleaner asks whatever Ray of this machine answers at 8265
    head = {"num_cpus": 1, "include_dashboard": False, "dashboard_port": nowhere}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    failures: list[Exception] = []

    def launch() -> None:
        try:
            launch_training(recipe)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=launch)
    thread.start()
    for act, _, step in (act.partition(":") for act in acts):
        while thread.is_alive() and steps_done(run) < int(step):
            time.sleep(0.1)
        print(f"{act} a node at step {steps_done(run)}", flush=True)
        match act:
            case "lose":
                cluster.remove_node(nodes.pop(), allow_graceful=False)
            case "gain":
                nodes.append(cluster.add_node(num_cpus=1))
            case "warn":
                drain(cluster.address, nodes[-1].node_id)
    thread.join()
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
    for failure in failures:
        print(f"{type(failure).__name__}: {failure}", flush=True)
    return len(failures)


def drain(address: str, node: str) -> None:
    """What an autoscaler does to a node before it takes it away. Without the environment's own address."""
    subprocess.run(
        [
            *(str(Path(sys.executable).parent / "ray"), "drain-node", "--address", address, "--node-id", node),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "drill"),
            *("--deadline-remaining-seconds", str(WARNING_S)),
        ],
        check=True,
    )


def steps_done(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


if __name__ == "__main__":
    recipe = load_recipe(sys.argv[1])
    run = Path(recipe.train.output) / recipe.name
    acts = sys.argv[2:]
    sys.exit(on_nodes(recipe, run, acts) if acts else alone(recipe, run))
