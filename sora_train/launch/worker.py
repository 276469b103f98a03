"""What each Ray worker runs: connects Ray Train with `sora_train.train.loop`."""

from __future__ import annotations

import errno
import gc
import shutil
import socket
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from pyarrow.fs import LocalFileSystem
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode
from ray.train.torch import get_device

from sora_train.data.opening import open_shards
from sora_train.data.shards import ShardSet
from sora_train.errors import UserError, first_of
from sora_train.launch.clips import saved_clips
from sora_train.launch.private_ray import preemption_info
from sora_train.launch.run_folder import read_fatal_error, record_fatal_error
from sora_train.launch.validation import ValidationStatus, stop_requested
from sora_train.plan.table import describe_parameters
from sora_train.recipe import Recipe, save_recipe
from sora_train.train import checkpoint
from sora_train.train.hardware import use_expandable_segments
from sora_train.train.known_errors import known_errors
from sora_train.train.loop import train
from sora_train.train.metrics import Events
from sora_train.train.run_dir import Report, RunDir

STALE_S = 600.0  # a validation this much over both attempts' time has lost its supervisor
MAX_RANGES = 20
"""Ranges of ranks in a message; a thousand lost workers need not be listed one by one."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def train_worker(config: dict[str, Any]) -> str:
    """Trains by `config`: {"recipe": model_dump of the recipe, "run": absolute path of the run's folder}.

    Returns "", or why training ended before its last step. Ray restarts workers after any exception. An error that a
    restart can't fix is recorded in the run's folder, so the new workers end at once and the driver reports it.
    """
    recipe, run = Recipe.model_validate(config["recipe"]), Path(config["run"])
    try:
        return run_training(recipe, run)
    except UserError as error:
        record_fatal_error(run, error)
        raise
    except OSError as error:
        if error.errno in DISK_FULL:
            record_fatal_error(run, UserError(f"{run} can't be written: {error}. Make room there", code="not_writable"))
        raise


def run_training(recipe: Recipe, run: Path) -> str:
    """Sets up this rank and runs the training loop."""
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.set_num_threads(recipe.cluster.cpus_per_worker)
    gc.disable()  # until training begins: imports and the engine are no garbage, and take a second to look through
    if get_device().type == "cuda":
        use_expandable_segments()
        torch.cuda.set_device(get_device())  # where NCCL sends objects; a worker sees all GPUs of its machine

    hosts = [""] * world
    dist.all_gather_object(hosts, "" if (run / "recipe.yaml").is_file() else socket.gethostname())
    if any(hosts):
        raise UserError(
            f"{run} is not there on {first_of(sorted({*hosts} - {''}))}: train.output must be a folder that every "
            "node sees, such as one on NFS",
            code="paths",
        )
    # Rank 0 decides, so all ranks resume from the same checkpoint.
    decided: list[Any] = [read_start_state(run) if rank == 0 else None]
    dist.broadcast_object_list(decided, src=0)
    why, checkpoints = decided[0]
    if why:
        return why
    step, resume, _ = checkpoints[-1] if checkpoints else (0, None, None)
    run_dir = RunDir(run, checkpoint_reporter(recipe, run, checkpoints), preemption_watcher(run))
    cache = int(1e9 * recipe.train.shard_cache_gb)
    # Rank 0 lists the shards: storage is asked once, and all ranks see the same ones.
    folder, fraction = recipe.data.output, recipe.data.holdout_fraction
    listed: list[Any] = [open_shards(folder, fraction) if rank == 0 else None]
    dist.broadcast_object_list(listed, src=0)
    shards = ShardSet(folder, fraction, "train", cache_bytes=cache, listed=listed[0])
    if rank == 0:
        before = saved_clips(run)
        if before is not None and before.fingerprint != shards.fingerprint:
            raise UserError(
                f"the clips in {recipe.data.output} changed during training. Start the run again", code="clips"
            )
        run_dir.truncate(step)
        workers = f"{world} worker{'s' if world > 1 else ''} on {get_device()}"
        if recipe.cluster.sequence_parallel > 1:
            workers += f" in groups of {recipe.cluster.sequence_parallel} that share clips"
        where = f"{workers}, ZeRO {recipe.train.zero_stage}, {recipe.train.precision}"
        if recipe.lora.rank:
            where += f", {describe_parameters(recipe)}"
        start = f"the weights in {recipe.model.init_from}" if recipe.model.init_from else "scratch"
        if not stop_requested(run):  # else the command may have ended, and a start after its end would be a lost driver
            run_dir.events.write(
                "resume" if resume else "start", step, f"from {resume.name if resume else start}; {where}"
            )
    local_rank = ray.train.get_context().get_local_rank()
    warn_if_group_split(recipe.cluster.sequence_parallel, rank, local_rank, run_dir.events, step)
    with known_errors(recipe.train, get_device()):
        return train(
            recipe.train,
            recipe.model,
            recipe.diffusion,
            shards,
            device=get_device(),
            run_dir=run_dir,
            resume=resume,
            image_ratio=recipe.data.image_ratio,
            null_prompt=recipe.codec.null_prompt,
            lora=recipe.lora,
            conditioning=recipe.conditioning,
            sequence_parallel=recipe.cluster.sequence_parallel,
        )


def warn_if_group_split(size: int, rank: int, local_rank: int, events: Events, step: int) -> None:
    """Writes an event if a group of workers that share clips is on two nodes. A node's ranks are consecutive."""
    if rank % size and local_rank == 0:
        events.write(
            "group_split",
            step,
            f"ranks {rank - rank % size} to {rank - rank % size + size - 1} share clips and are on more than one node",
        )


def read_start_state(run: Path) -> tuple[str, list[tuple[int, Path, float | None]]]:
    """Why not to start, or an empty string; and step, folder and loss of the complete checkpoints. For rank 0."""
    if fatal := read_fatal_error(run):
        return str(fatal), []
    if stop_requested(run):
        return "stop requested before training resumed", []
    found = checkpoint.complete_checkpoints(run / "checkpoints")
    return "", [(step, path, (checkpoint.read_state(path) or {}).get("loss")) for step, path in found]


def checkpoint_reporter(recipe: Recipe, run: Path, checkpoints: list[tuple[int, Path, float | None]]) -> Report:
    """Returns the function that reports checkpoints to Ray, so Ray's keep-best policy sees all of them.

    It first reports any on disk that Ray does not know, after a restart or if a worker died before reporting. Ray must
    not hear of a folder twice: it would be deleted while the second report still counts. So when a step is repeated,
    after a rollback or a damaged checkpoint, Ray is asked first what it tracks.
    """
    reported = tracked_by_ray()

    def report_to_ray(folder: Path, metrics: dict[str, Any], wait: Callable[[], None], validate: bool) -> None:
        def wait_until_written(of: Checkpoint, name: str) -> Checkpoint:
            try:
                wait()
            except UserError as error:  # in a thread of Ray's, which ends the workers before the loop sees the error
                record_fatal_error(run, error)
                raise
            return of

        reported.add(folder.name)
        ray.train.report(
            metrics,
            checkpoint=checkpoint_at(folder),
            checkpoint_dir_name=folder.name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=wait_until_written,
            delete_local_checkpoint_after_upload=False,
            validation=validate,
        )

    for step, path, loss in checkpoints:
        if path.name not in reported:
            # A validation that was cut off with the run is requested again.
            cut_off = dist.get_rank() == 0 and ValidationStatus(run).get(step) == "lost"
            validate = cut_off and request_validation(recipe, run, step)
            metrics = {"step": step, "again": True, "loss": sortable_loss(loss)}
            report_to_ray(path, metrics, lambda: None, validate)

    def report(step: int, metrics: dict[str, float], folder: Path, wait: Callable[[], None]) -> None:
        if dist.get_rank() == 0:  # with these, a checkpoint can be sampled without its run or its shards
            folder.mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, folder / "recipe.yaml")
            shutil.copy(run / "manifest.json", folder / "manifest.json")
        if folder.name in reported and folder.name in tracked_by_ray():
            return
        validate = dist.get_rank() == 0 and request_validation(recipe, run, step)
        report_to_ray(folder, {"step": step, "loss": sortable_loss(metrics.get("loss"))}, wait, validate)

    return report


def checkpoint_at(folder: Path) -> Checkpoint:
    """A folder as Ray's Checkpoint.

    Without a file system Ray would resolve symbolic links of the path, but not those of the run's folder, and then not
    find the one in the other.
    """
    return Checkpoint(folder, LocalFileSystem())


def tracked_by_ray() -> set[str]:
    """Names of checkpoint folders that Ray tracks, after all reports are committed.

    Collective: the set can change whenever a validation ends, so rank 0 asks once and broadcasts.
    """
    names: list[Any] = [None]
    if dist.get_rank() == 0:
        reported = ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        names = [{Path(each.checkpoint.path).name for each in reported}]
    dist.broadcast_object_list(names, src=0)
    return names[0]


def sortable_loss(loss: float | None) -> float:
    """A loss that Ray can sort by: NaN, which comes last, if there is none."""
    return float("nan") if loss is None else loss


def preemption_watcher(run: Path) -> Callable[[int], bool]:
    """Returns a function that says, once for each announcement, that nodes are about to be preempted.

    Only rank 0 asks: the loop combines all ranks' requests.
    """
    known: list[Any] = [None]

    def preemption_requested(step: int) -> bool:
        info = preemption_info() if dist.get_rank() == 0 else None
        if info is None or info == known[0]:
            return False
        known[0] = info
        by = f" by {datetime.fromtimestamp(info.deadline_ms / 1000, UTC):%H:%M:%S} UTC" if info.deadline_ms else ""
        ranks = rank_ranges(info.preempted_ranks)
        Events(run).write("preempted", step, f"the nodes of ranks {ranks} go away{by}; saving a checkpoint now")
        return True

    return preemption_requested


def rank_ranges(ranks: Iterable[int]) -> str:
    """Ranks as text, such as `0-7, 16`; at most `MAX_RANGES` of them."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [f"{first}-{last}" if last > first else f"{first}" for first, last in runs]
    return ", ".join(texts[:MAX_RANGES] + ["…"] * (len(texts) > MAX_RANGES))


def request_validation(recipe: Recipe, run: Path, step: int) -> bool:
    """Whether to validate a checkpoint: if one is due and none is outstanding, since Ray's queue is unbounded.

    The last checkpoint's validation is always requested: the run waits for it, and nothing can queue behind it.
    """
    every, last = recipe.validation.every, step == recipe.train.steps
    status = ValidationStatus(run)
    if not every or (step % every and not last) or status.get(step) == "done" or stop_requested(run):
        return False
    running = status.outstanding_steps(older_than_s=2 * recipe.validation.timeout_s + STALE_S)
    if running and not last:
        Events(run).write("validation_dropped", step, f"the one of step {running[0]} is still running")
        return False
    status.set(step, "asked")
    return True
