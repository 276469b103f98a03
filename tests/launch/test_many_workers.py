"""A thousand workers: Ray lets all of them report, and messages about them stay short."""

import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor

from sora_train.errors import UserError
from sora_train.launch.preflight.node_info import NodeInfo, appears
from sora_train.launch.preflight.verdicts import check_nodes
from sora_train.launch.private_ray import allow_many_workers
from sora_train.launch.ray_trainer import EventCallback, describe_lost
from sora_train.launch.worker import rank_ranges


@pytest.mark.ray
def test_more_than_a_thousand_workers_pass_the_barrier_of_a_report(local_ray):
    allow_many_workers()
    actor: Any = SynchronizationActor.remote()  # type: ignore[attr-defined]
    world = 1100
    calls = [
        actor.broadcast_from_rank_zero.remote(world_rank=rank, world_size=world, data="x", caller_method_name="report")
        for rank in range(world)
    ]
    assert set(ray.get(calls, timeout=60)) == {"x"}
    ray.kill(actor)


def test_rays_controller_learns_of_it_with_our_callback():
    assert EventCallback.__module__ == "sora_train.launch.ray_trainer"  # pickled by name, so its module is imported
    assert SynchronizationActor._default_options["max_concurrency"] > 10_000  # type: ignore[attr-defined]


def test_ranks_are_written_as_ranges():
    assert rank_ranges([3, 0, 1, 2, 7, 9, 10]) == "0-3, 7, 9-10"
    assert len(rank_ranges(range(0, 10_000, 2))) < 200


def test_a_thousand_lost_workers_are_a_short_event():
    same = {rank: RuntimeError("NCCL timed out") for rank in range(1024)}
    assert (
        describe_lost({5: ValueError("killed"), 6: RuntimeError("gone")})
        == "rank 5: ValueError: killed; rank 6: RuntimeError: gone"
    )
    assert describe_lost(same) == "ranks 0-1023: RuntimeError: NCCL timed out"
    each = describe_lost({rank: RuntimeError(f"process {rank} died") for rank in range(1024)})
    assert each.startswith("rank 0: RuntimeError: process 0 died; rank 1")
    assert each.endswith("and 1019 more with other causes")


def test_a_thousand_nodes_without_a_folder_are_a_short_message():
    nodes = [NodeInfo(address=f"10.0.{i // 256}.{i % 256}", problems=("no folder",)) for i in range(1000)]
    with pytest.raises(UserError, match=r"^10\.0\.0\.0, .* 10\.0\.0\.9 and 990 more: no folder$"):
        check_nodes(nodes)


def test_files_of_a_thousand_nodes_are_awaited_together(tmp_path: Path):
    ends = time.monotonic() + 0.5
    assert not any(appears(tmp_path / str(node), ends) for node in range(1000))
    assert time.monotonic() - ends < 60  # each would take seconds
