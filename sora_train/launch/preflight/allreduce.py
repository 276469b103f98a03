"""A short process group like the training's: does every rank get the exact sum, and how fast."""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sora_train.launch.checks import worker_resources
from sora_train.launch.preflight.verdicts import Check, failed, interfaces, judge_allreduce
from sora_train.recipe import Recipe

PLACE_S, JOIN_S = 15.0, 30.0
TIMEOUT = timedelta(seconds=JOIN_S)
BYTES = {"gloo": 2**23, "nccl": 2**27}
ROUNDS = 5


class Rank:
    """One process of the group, which holds what a worker of the training would."""

    store: dist.TCPStore | None = None

    def meet(self, world: int) -> tuple[str, int]:
        """Opens the store through which ranks find each other, and says where it is. For rank 0."""
        host = ray.util.get_node_ip_address()
        self.store = dist.TCPStore(host, 0, world, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        return host, self.store.port

    def reduce(self, backend: str, meeting: tuple[str, int], rank: int, world: int) -> tuple[bool, float]:
        """Whether sums are exact, and seconds of the fastest of several."""
        device = torch.device("cuda" if backend == "nccl" else "cpu")
        torch.set_num_threads(1)
        store = self.store or dist.TCPStore(*meeting, world, timeout=TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        try:
            return sums(world, rank, BYTES[backend] // 4, device)
        finally:
            dist.destroy_process_group()


def sums(world: int, rank: int, count: int, device: torch.device) -> tuple[bool, float]:
    """All-reduces of whole numbers, which float32 adds exactly; on the process group that is there."""
    numbers = torch.arange(count, device=device) % 997
    expected = (numbers * world + world * (world - 1) // 2).float()
    exact, fastest = True, float("inf")
    for _ in range(ROUNDS):
        x = (numbers + rank).float()
        dist.barrier()
        begin = time.monotonic()
        dist.all_reduce(x)
        exact &= torch.equal(x, expected)  # waits for the device
        fastest = min(fastest, time.monotonic() - begin)
    return exact, fastest


def bandwidth(world: int, count: int, seconds: float) -> float:
    """GB/s that a rank sends and receives: a ring moves 2 (n - 1) / n of the bytes (NCCL's `bus bandwidth`)."""
    return 2 * (world - 1) / world * count / max(seconds, 1e-9) / 1e9


def check_allreduce(recipe: Recipe, gpu: bool) -> Check:
    """The row of the table; ends within `PLACE_S + 2 JOIN_S` and gives everything back."""
    world, backend = recipe.cluster.fewest, "nccl" if gpu else "gloo"
    if world == 1:
        return Check("network", "skipped", "one worker needs none")
    need = worker_resources(recipe, gpu)
    group = placement_group([need] * world, strategy="PACK")
    ranks: list[Any] = []
    try:
        if not group.wait(PLACE_S):
            return Check("network", "skipped", f"{world} workers of {need} were not free within {PLACE_S:g} s")
        started = ray.remote(Rank)
        ranks = [
            started.options(
                num_cpus=need["CPU"],
                num_gpus=need.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i),
            ).remote()
            for i in range(world)
        ]
        meeting = ray.get(ranks[0].meet.remote(world), timeout=JOIN_S)
        told = [rank.reduce.remote(backend, meeting, i, world) for i, rank in enumerate(ranks)]
        results = ray.get(told, timeout=2 * JOIN_S)
    except GetTimeoutError:
        return failed("network", f"{world} ranks did not come together by {backend}: {interfaces(backend)}")
    except (RayError, RuntimeError) as error:
        last = str(error).strip().splitlines()[-1][:300]
        return failed("network", f"{backend} failed: {last}; {interfaces(backend)}")
    finally:
        for rank in ranks:
            with contextlib.suppress(RayError):
                ray.kill(rank)
        remove_placement_group(group)
    slowest = max(seconds for _, seconds in results)
    return judge_allreduce([right for right, _ in results], bandwidth(world, BYTES[backend], slowest), backend)
