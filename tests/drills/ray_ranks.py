"""Measures Ray Train's report path by the number of workers: start, stall of a report, and the controller's time.

    python -m tests.drills.ray_ranks [--workers 8 16 32 64] [--calls 64 1024 10000] [--bundles 1024 4096]

`--workers`: real worker actors that report as `launch/worker.py` does, each its own part of a checkpoint, but import no
torch: 64 fit into 8 GB. `--calls`: the barrier that each report passes, an actor of Ray's, called by one process for so
many ranks, with the concurrency that `launch/private_ray.py` sets and, with `--default`, with Ray's own.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError
from ray.train import Checkpoint, CheckpointConfig, CheckpointUploadMode, RunConfig, ScalingConfig, UserCallback
from ray.util.placement_group import placement_group, remove_placement_group

REPORTS, STEP_S = 6, 1.0


class Times(UserCallback):
    """Notes when the controller commits each report, and its own CPU time."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        line = {"at": time.time(), "cpu": time.process_time(), "reported": max(each["at"] for each in metrics)}
        with (self.folder / "commits.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def report_often(config: dict[str, Any]) -> None:
    """What each worker does: a part of a checkpoint each second, and a report of it."""
    import ray.train
    from pyarrow.fs import LocalFileSystem

    context, folder = ray.train.get_context(), Path(config["folder"])
    rank, stalls = context.get_world_rank(), list[float]()
    began = time.time()

    def write_part(of: Checkpoint, name: str) -> Checkpoint:
        (Path(of.path) / f"part_{rank:05d}").write_bytes(b"0" * 1000)
        return of

    for number in range(REPORTS):
        time.sleep(STEP_S)
        place = folder / "run" / f"checkpoint_{number}"
        place.mkdir(parents=True, exist_ok=True)
        before = time.perf_counter()
        ray.train.report(
            {"at": time.time()},
            checkpoint=Checkpoint(str(place), LocalFileSystem()),
            checkpoint_dir_name=place.name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=lambda of, name: ((Path(of.path) / f"part_{rank:05d}").write_bytes(b"0" * 1000), of)[
                1
            ],
            delete_local_checkpoint_after_upload=False,
        )
        stalls.append(time.perf_counter() - before)
    memory = psutil.Process().memory_full_info()
    record = {"began": began, "stalls": stalls, "mb": memory.uss / 1e6}
    (folder / f"rank_{rank:05d}.json").write_text(json.dumps(record), encoding="utf-8")


def with_workers(count: int) -> str:
    """A row of the table: a run with so many worker actors."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    folder = Path(tempfile.mkdtemp())
    began = time.time()
    try:
        DataParallelTrainer(
            report_often,
            train_loop_config={"folder": str(folder)},
            scaling_config=ScalingConfig(num_workers=count, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name="run",
                storage_path=str(folder),
                checkpoint_config=CheckpointConfig(num_to_keep=3),
                callbacks=[Times(str(folder))],
            ),
        ).fit()
        ended = time.time()
        ranks = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("rank_*.json")]
        commits = [json.loads(line) for line in (folder / "commits.jsonl").open(encoding="utf-8")]
    finally:
        shutil.rmtree(folder)
    stalls = [stall for each in ranks for stall in each["stalls"][1:]]
    late = [commit["at"] - commit["reported"] for commit in commits]
    cpu = (commits[-1]["cpu"] - commits[0]["cpu"]) / (commits[-1]["at"] - commits[0]["at"])
    return (
        f"| {count} | {max(each['began'] for each in ranks) - began:.1f} | {statistics.median(stalls):.3f} "
        f"| {max(stalls):.3f} | {statistics.median(late):.2f} | {cpu:.0%} | {ended - began:.0f} "
        f"| {statistics.median(each['mb'] for each in ranks):.0f} |"
    )


def barrier(count: int, timeout_s: float = 60.0) -> str:
    """A row of the table: the barrier of a report, called for so many ranks."""
    from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor

    actor: Any = SynchronizationActor.remote()  # type: ignore[attr-defined]
    times: list[float] = []
    ray.get(actor.get_counter.remote())
    name = "ray.train.report"
    for number in range(3):
        began = time.perf_counter()
        calls = [
            actor.broadcast_from_rank_zero.remote(
                world_rank=rank, world_size=count, data="step_00000001", caller_method_name=name,
                collective_seq=number + 1, relaxable=True,
            )
            for rank in range(count)
        ]  # fmt: skip
        try:
            ray.get(calls, timeout=timeout_s)
        except GetTimeoutError:
            ray.kill(actor)
            return f"| {count} | never: no answer in {timeout_s:g} s |"
        times.append(time.perf_counter() - began)
    ray.kill(actor)
    return f"| {count} | {min(times):.3f} |"


def placed(count: int) -> str:
    """A row of the table: placing so many workers."""
    began = time.perf_counter()
    group = placement_group([{"CPU": 0.0001}] * count, strategy="PACK")
    ready = group.wait(120)
    took = time.perf_counter() - began
    remove_placement_group(group)
    return f"| {count} | {took:.2f} |" if ready else f"| {count} | not in 120 s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--calls", type=int, nargs="*", default=[64, 256, 1024, 4096, 10000])
    parser.add_argument("--bundles", type=int, nargs="*", default=[64, 1024, 4096])
    parser.add_argument("--default", action="store_true", help="the barrier's concurrency is Ray's own")
    options = parser.parse_args()
    os.environ.update(RAY_TRAIN_V2_ENABLED="1", RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="1", OMP_NUM_THREADS="1")
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    ray.init(address="local", num_cpus=max([4, *options.workers]) + 1, log_to_driver=False)
    if not options.default:
        from sora_train.launch import private_ray

        private_ray.allow_many_workers()
    if options.calls:
        print("| ranks | s for a report's barrier |\n|---|---|")
        for count in options.calls:
            print(barrier(count), flush=True)
    if options.workers:
        print(
            "| workers | s until all train | s a report stalls: median | worst | s until it is committed "
            "| controller's CPU | s in all | MB a worker |\n|---|---|---|---|---|---|---|---|"
        )
        for count in options.workers:
            print(with_workers(count), flush=True)
    if options.bundles:
        print("| bundles | s until placed |\n|---|---|")
        for count in options.bundles:
            print(placed(count), flush=True)


if __name__ == "__main__":
    main()
