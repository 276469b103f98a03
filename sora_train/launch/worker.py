"""What each Ray worker runs: Ray's words translated into those of `sora_train.train.loop`, and no more."""

from __future__ import annotations

import errno
import gc
import shutil
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from pyarrow.fs import LocalFileSystem
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode
from ray.train.torch import get_device

from sora_train.data.shards import ShardSet
from sora_train.errors import UserError
from sora_train.launch.clips import saved_clips
from sora_train.launch.private_ray import preemption_info
from sora_train.launch.run_folder import read_fatal_error, record_fatal_error
from sora_train.launch.validation import ValidationStatus
from sora_train.recipe import Recipe, save_recipe
from sora_train.train import checkpoint
from sora_train.train.initial import described
from sora_train.train.known_errors import known_errors
from sora_train.train.loop import train
from sora_train.train.metrics import Events
from sora_train.train.run_dir import STOP_FILE, Home, Report

STALE_S = 600.0  # beyond both attempts of a validation: its supervisor is gone
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def train_worker(config: dict[str, Any]) -> str:
    """`config` is {"recipe": model_dump of the recipe, "run": absolute folder of the run}. Returns "", or why training
    ended before its last step.

    Ray starts workers anew after any exception. What that would not mend is noted in the run's folder, so that the new
    ones end at once, and the driver says it.
    """
    recipe, run = Recipe.model_validate(config["recipe"]), Path(config["run"])
    try:
        return run_training(recipe, run)
    except UserError as error:
        record_fatal_error(run, str(error))
        raise
    except OSError as error:
        if error.errno in DISK_FULL:
            record_fatal_error(run, f"{run} can't be written: {error}; make room there")
        raise


def run_training(recipe: Recipe, run: Path) -> str:
    """What `train_worker` guards."""
    world, rank = ray.train.get_context().get_world_size(), dist.get_rank()
    if (dist.get_world_size(), rank) != (world, ray.train.get_context().get_world_rank()):
        raise RuntimeError(f"torch.distributed has rank {rank} of {dist.get_world_size()}, Ray another of {world}")
    torch.set_num_threads(recipe.cluster.cpus_per_worker)
    gc.collect()
    gc.freeze()  # what the imports made is never garbage: later collections, which stop every rank, skip it
    if get_device().type == "cuda":
        torch.cuda.set_device(get_device())  # where NCCL sends objects; a worker sees all GPUs of its machine

    blind = [""] * world
    dist.all_gather_object(blind, "" if (run / "recipe.yaml").is_file() else socket.gethostname())
    if any(blind):
        raise UserError(
            f"{run} is not there on {', '.join(sorted({*blind} - {''}))}: train.output must be a folder that every "
            "node sees, such as one on NFS"
        )
    # Rank 0 looks, so that all ranks do the same, and go on from the same checkpoint.
    agreed: list[Any] = [read_start_state(run) if rank == 0 else None]
    dist.broadcast_object_list(agreed, src=0)
    why, found = agreed[0]
    if why:
        return why
    step, resume = found[-1] if found else (0, None)
    home = Home(run, checkpoint_reporter(recipe, run, found), preemption_watcher(run))
    cache = int(1e9 * recipe.train.shard_cache_gb)
    shards = ShardSet(recipe.data.output, recipe.data.holdout_fraction, "train", cache_bytes=cache)
    if rank == 0:
        before = saved_clips(run)
        if before is not None and before.fingerprint != shards.fingerprint:
            raise UserError(f"the clips in {recipe.data.output} changed while the run was training; start it again")
        home.cut_back(step)
        workers = f"{world} worker{'s' if world > 1 else ''} on {get_device()}"
        where = f"{workers}, ZeRO {recipe.train.zero_stage}, {recipe.train.precision}"
        start = described(Path(recipe.model.init_from)) if recipe.model.init_from else "scratch"
        home.note("resume" if resume else "start", step, f"from {resume.name if resume else start}; {where}")
    with known_errors(recipe.train, get_device()):
        return train(
            recipe.train,
            recipe.model,
            recipe.diffusion,
            shards,
            device=get_device(),
            home=home,
            resume=resume,
            image_ratio=recipe.data.image_ratio,
            null_prompt=recipe.codec.null_prompt,
        )


def read_start_state(run: Path) -> tuple[str, list[tuple[int, Path]]]:
    """Why not to begin, or an empty string; and the whole checkpoints."""
    if why := read_fatal_error(run):
        return why, []
    if (run / STOP_FILE).exists():
        return "asked to leave before it went on", []
    return "", checkpoint.whole(run / "checkpoints")


def checkpoint_reporter(recipe: Recipe, run: Path, found: list[tuple[int, Path]]) -> Report:
    """What tells Ray of each checkpoint. Tells it first of those on disk that it has not heard of, so that it keeps the
    right ones of all: a run that starts again has a new controller, and a worker may die before one is registered.

    Ray must not hear of a folder twice: it would be deleted while the second still counts. A rollback, or a checkpoint
    that was damaged since, has steps done again; Ray is asked what it holds before such a one is told.
    """
    told = tracked_by_ray()

    def tell(folder: Path, metrics: dict[str, Any], wait: Callable[[], None], validate: bool) -> None:
        def when_there(of: Checkpoint, name: str) -> Checkpoint:
            try:
                wait()
            except UserError as error:  # in a thread of Ray's, which ends the workers before the loop meets it
                record_fatal_error(run, str(error))
                raise
            return of

        told.add(folder.name)
        ray.train.report(
            metrics,
            checkpoint=checkpoint_at(folder),
            checkpoint_dir_name=folder.name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,  # in the background: the controller takes one a poll
            checkpoint_upload_fn=when_there,
            delete_local_checkpoint_after_upload=False,
            validation=validate,
        )

    for step, path in found:
        if path.name not in told:
            about = checkpoint.read_state(path) or {}
            # A validation that was cut off with the run is asked for again.
            cut_off = dist.get_rank() == 0 and ValidationStatus(run).get(step) == "lost"
            validate = cut_off and request_validation(recipe, run, step)
            tell(path, {"step": step, "again": True, "loss": sortable_loss(about.get("loss"))}, lambda: None, validate)

    def report(step: int, metrics: dict[str, float], folder: Path, wait: Callable[[], None]) -> None:
        if dist.get_rank() == 0:
            # With these a checkpoint is sampled without its run or its shards.
            folder.mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, folder / "recipe.yaml")
            shutil.copy(run / "manifest.json", folder / "manifest.json")
        if folder.name in told and folder.name in tracked_by_ray():
            return
        validate = dist.get_rank() == 0 and request_validation(recipe, run, step)
        tell(folder, {"step": step, "loss": sortable_loss(metrics.get("loss"))}, wait, validate)

    return report


def checkpoint_at(folder: Path) -> Checkpoint:
    """A checkpoint as Ray names it. Without a file system Ray would resolve the path's symbolic links, and then not
    find it under the run's folder, whose links it leaves alone.
    """
    return Checkpoint(folder, LocalFileSystem())


def tracked_by_ray() -> set[str]:
    """Names of the checkpoint folders that Ray keeps count of, once it has taken in all that it was told. Collective:
    what it keeps may change at any time with a validation that ends, so that rank 0 asks for all.
    """
    held: list[Any] = [None]
    if dist.get_rank() == 0:
        reported = ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        held = [{Path(one.checkpoint.path).name for one in reported}]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def sortable_loss(loss: float | None) -> float:
    """A loss that Ray can order by: not-a-number, which comes last, where there is none."""
    return float("nan") if loss is None else loss


def preemption_watcher(run: Path) -> Callable[[int], bool]:
    """Whether Ray has told rank 0 since the last time that nodes are about to be taken away.

    Only rank 0 asks: the loop adds up all ranks' wishes anyway.
    """
    known: list[Any] = [None]

    def notice(step: int) -> bool:
        said = preemption_info() if dist.get_rank() == 0 else None
        if said is None or said == known[0]:
            return False
        known[0] = said
        by = f" by {datetime.fromtimestamp(said.deadline_ms / 1000, UTC):%H:%M:%S} UTC" if said.deadline_ms else ""
        ranks = ", ".join(map(str, said.preempted_ranks))
        Events(run).write("preempted", step, f"the nodes of ranks {ranks} go{by}; a checkpoint is made at once")
        return True

    return notice


def request_validation(recipe: Recipe, run: Path, step: int) -> bool:
    """Whether to have a checkpoint validated: where it is due, and none is outstanding. Ray would queue without bound.

    The last checkpoint's is asked for in any case: the run waits for it, and nothing can pile up behind it.
    """
    every, last = recipe.validation.every, step == recipe.train.steps
    outstanding = ValidationStatus(run)
    if not every or (step % every and not last) or outstanding.get(step) == "done" or (run / STOP_FILE).exists():
        return False
    running = outstanding.outstanding_steps(older_than_s=2 * recipe.validation.timeout_s + STALE_S)
    if running and not last:
        Events(run).write("validation_dropped", step, f"the one of step {running[0]} is still running")
        return False
    outstanding.set(step, "asked")
    return True
