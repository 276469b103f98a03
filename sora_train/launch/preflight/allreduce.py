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
from sora_train.launch.preflight.verdicts import Skip
from sora_train.ray_cluster.connection import root_cause
from sora_train.recipe import Recipe

PLACE_S, JOIN_S = 15.0, 30.0
TIMEOUT = timedelta(seconds=JOIN_S)
BYTES = {"gloo": 2**23, "nccl": 2**27}
ROUNDS = 5
MIN_NCCL_GBPS = 1.0
"""GPUs would wait for a slower network. CPU training is slow enough not to."""


def check_allreduce(recipe: Recipe, gpu: bool) -> str:
    """Places ranks as training would and has them sum. Takes at most `PLACE_S + 2 JOIN_S`."""
    world, backend = recipe.cluster.fewest, "nccl" if gpu else "gloo"
    if world == 1:
        raise Skip("one worker needs no network")
    need = worker_resources(recipe, gpu)
    group = placement_group([need] * world, strategy="PACK")
    try:
        if not group.wait(PLACE_S):
            raise Skip(f"{world} workers of {need} were not free within {PLACE_S:g} s")
        seconds = run_ranks(group, need, world, backend)
    finally:
        remove_placement_group(group)
    gbps = bandwidth(world, BYTES[backend], seconds)
    message = f"{backend} over {world} ranks: {gbps:.3g} GB/s"
    if backend == "nccl" and gbps < MIN_NCCL_GBPS:
        raise UserError(f"{message} is too slow to train on. {interface_hint(backend)}")
    return f"{message}, sums exact"


def run_ranks(group: PlacementGroup, need: dict[str, float], world: int, backend: str) -> float:
    """Seconds of the slowest rank's best all-reduce. UserError names the nodes of ranks that failed."""
    host = ray.util.get_node_ip_address()
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    options = {"num_cpus": need["CPU"], "num_gpus": need.get("GPU", 0), "max_retries": 0}
    tasks = [
        ray.remote(all_reduce)
        .options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, i), **options)
        .remote(host, store.port, backend, i, world)
        for i in range(world)
    ]
    done, _ = ray.wait(tasks, num_returns=world, timeout=2 * JOIN_S)
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    bundles = placement_group_table(group)["bundles_to_node_id"]
    best, failed, absent = 0.0, {}, {}
    for i, task in enumerate(tasks):
        name = f"rank {i} on {addresses.get(bundles.get(i, ''), 'a lost node')}"
        if not store.check([f"joined {i}"]):
            absent[name] = "never connected"
        try:
            exact, seconds = ray.get(task) if task in done else (None, 0.0)
            best = max(best, seconds)
            if not exact:
                failed[name] = "wrong sum" if exact is False else f"no answer in {2 * JOIN_S:g} s"
        except Exception as error:
            failed[name] = root_cause(error)
    if failed := absent or failed:  # the others fail only because they waited for the absent ones
        named = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise UserError(f"{backend} all-reduce failed: {named}. {interface_hint(backend)}")
    return best


def all_reduce(host: str, port: int, backend: str, rank: int, world: int) -> tuple[bool, float]:
    """What each rank runs: joins the process group, then sums. For a process of its own."""
    torch.set_num_threads(1)
    store = dist.TCPStore(host, port, timeout=TIMEOUT)
    store.set(f"joined {rank}", "")
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        return time_sums(world, rank, BYTES[backend] // 4, torch.device("cuda" if backend == "nccl" else "cpu"))
    finally:
        dist.destroy_process_group()


def time_sums(world: int, rank: int, count: int, device: torch.device) -> tuple[bool, float]:
    """Whether all-reduces of integers, which float32 adds exactly, are right, and the seconds of the fastest."""
    numbers = torch.arange(count, device=device) % 997
    expected = (numbers * world + world * (world - 1) // 2).float()
    exact, fastest = True, float("inf")
    for _ in range(ROUNDS):
        x = (numbers + rank).float()
        dist.barrier()
        began = time.monotonic()
        dist.all_reduce(x)
        exact &= torch.equal(x, expected)  # waits for the device
        fastest = min(fastest, time.monotonic() - began)
    return exact, fastest


def bandwidth(world: int, count: int, seconds: float) -> float:
    """NCCL's bus bandwidth in GB/s: in a ring each rank sends 2 (n - 1) / n of the bytes."""
    return 2 * (world - 1) / world * count / max(seconds, 1e-9) / 1e9


def interface_hint(backend: str) -> str:
    return (
        f"Ranks may use the wrong network interface: set {backend.upper()}_SOCKET_IFNAME to the one that the nodes "
        "share (see `ip addr`), and open all ports between them. For wrong sums, leave these nodes out or try "
        "NCCL_P2P_DISABLE=1"
    )
