"""One all-reduce between as many ranks as will train: exact sums, bandwidth, and the nodes that fail."""

from __future__ import annotations

import time
from datetime import timedelta

import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sora_train.errors import UserError
from sora_train.launch.checks import worker_resources
from sora_train.launch.preflight.verdicts import MOST
from sora_train.ray_cluster.connection import root_cause
from sora_train.recipe import Recipe

PLACEMENT_TIMEOUT_S, JOIN_TIMEOUT_S = 15.0, 30.0
COUNT = {"gloo": 2**21, "nccl": 2**25}
"""Float32 numbers that are summed."""


def check_allreduce(recipe: Recipe, gpu: bool) -> str:
    """Places ranks as training would and has them sum. Takes at most `PLACEMENT_TIMEOUT_S + 2 JOIN_TIMEOUT_S`."""
    world, backend, need = recipe.cluster.fewest, "nccl" if gpu else "gloo", worker_resources(recipe, gpu)
    if world == 1:
        return "skipped: there is only one worker"
    group = placement_group([need] * world, strategy="PACK")
    try:
        if not group.wait(PLACEMENT_TIMEOUT_S):
            return f"not tried: {world} workers of {need} could not be placed within {PLACEMENT_TIMEOUT_S:g} s"
        seconds = run_ranks(group, need, world, backend)
    finally:
        remove_placement_group(group)
    sent = 2 * (world - 1) / world * 4 * COUNT[backend]  # in a ring, by each rank
    return f"{backend} over {world} ranks: {sent / max(seconds, 1e-9) / 1e9:.3g} GB/s, sums exact"


def run_ranks(group: PlacementGroup, need: dict[str, float], world: int, backend: str) -> float:
    """Seconds of the slowest rank's all-reduce. UserError names the nodes of ranks that failed."""
    host = ray.util.get_node_ip_address()
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    options = {"num_cpus": need["CPU"], "num_gpus": need.get("GPU", 0), "max_retries": 0}
    tasks = [
        ray.remote(all_reduce)
        .options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank), **options)
        .remote(host, store.port, backend, rank, world)
        for rank in range(world)
    ]
    done, _ = ray.wait(tasks, num_returns=world, timeout=2 * JOIN_TIMEOUT_S)
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    nodes = placement_group_table(group)["bundles_to_node_id"]
    times, failed = [0.0], list[str]()
    for rank, task in enumerate(tasks):
        try:
            if task not in done:
                raise TimeoutError(f"no answer in {2 * JOIN_TIMEOUT_S:g} s")
            times.append(ray.get(task))
        except Exception as error:
            failed.append(f"rank {rank} on {addresses.get(nodes.get(rank), 'a lost node')}: {root_cause(error)}")
    if failed:
        raise UserError(
            f"{backend} all-reduce failed on {len(failed)} of {world} ranks: {'; '.join(failed[:MOST])}. Ranks may use "
            f"the wrong network interface: set {backend.upper()}_SOCKET_IFNAME to the one that the nodes share (see "
            "`ip addr`), and open all ports between them. For wrong sums, leave these nodes out or try "
            "NCCL_P2P_DISABLE=1",
            code="cluster",
        )
    return max(times)


def all_reduce(host: str, port: int, backend: str, rank: int, world: int) -> float:
    """What each rank runs, in a process of its own: joins the process group and sums. Returns the seconds of a sum."""
    timeout = timedelta(seconds=JOIN_TIMEOUT_S)
    store = dist.TCPStore(host, port, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        return time_sum(rank, world, COUNT[backend], torch.device("cuda" if backend == "nccl" else "cpu"))
    finally:
        dist.destroy_process_group()


def time_sum(rank: int, world: int, count: int, device: torch.device) -> float:
    """Seconds of the second all-reduce of two; the first is warm-up. Raises if a sum is wrong.

    The numbers are integers, which float32 adds exactly.
    """
    numbers, began = torch.arange(count, device=device) % 997, 0.0
    for _ in range(2):
        x = (numbers + rank).float()
        dist.barrier()
        began = time.monotonic()
        dist.all_reduce(x)
        if not torch.equal(x, (numbers * world + world * (world - 1) // 2).float()):  # waits for the device
            raise ArithmeticError("wrong sum")
    return time.monotonic() - began
