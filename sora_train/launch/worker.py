"""What each Ray worker runs: Ray's words translated into those of `sora_train.train.loop`, and no more."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device

from sora_train.data.shards import ShardSet
from sora_train.launch.validation import Outstanding
from sora_train.recipe import Recipe, save_recipe
from sora_train.train import checkpoint
from sora_train.train.loop import train
from sora_train.train.metrics import Events, JsonLines

STALE_S = 600.0  # beyond both attempts of a validation: its supervisor is gone


def train_worker(config: dict[str, Any]) -> None:
    """`config` is {"recipe": model_dump of the recipe, "run": absolute folder of the run}."""
    recipe, run = Recipe.model_validate(config["recipe"]), Path(config["run"])
    world, rank = ray.train.get_context().get_world_size(), dist.get_rank()
    if (dist.get_world_size(), rank) != (world, ray.train.get_context().get_world_rank()):
        raise RuntimeError(f"torch.distributed has rank {rank} of {dist.get_world_size()}, Ray another of {world}")
    torch.set_num_threads(recipe.cluster.cpus_per_worker)
    if get_device().type == "cuda":
        torch.cuda.set_device(get_device())  # where NCCL sends objects; a worker sees all GPUs of its machine
    shards = ShardSet(recipe.data.output, recipe.data.holdout_fraction, "train")

    # Rank 0 looks, so that all ranks go on from the same checkpoint.
    found = checkpoint.whole(run / "checkpoints") if rank == 0 else []
    agreed = [found]
    dist.broadcast_object_list(agreed, src=0)
    found = agreed[0]
    step, resume = found[-1] if found else (0, None)
    metrics, events = JsonLines(run / "metrics.jsonl"), Events(run)
    if rank == 0:
        metrics.cut_back(step)
        where = f"{world} workers on {get_device()}, ZeRO {recipe.train.zero_stage}, {recipe.train.precision}"
        events.write("resume" if resume else "start", step, f"from {resume.name if resume else 'scratch'}; {where}")
    report_again(found)

    def keep(step: int, write: Callable[[Path], None]) -> None:
        folder = Path(tempfile.mkdtemp(prefix=f"sora_{checkpoint.name_of(step)}_"))
        write(folder)
        if rank == 0:
            # With these a checkpoint is sampled without its run or its shards.
            save_recipe(recipe, folder / "recipe.yaml")
            shutil.copy(run / "manifest.json", folder / "manifest.json")
        ray.train.report(
            {"step": step},
            checkpoint=Checkpoint(folder),
            checkpoint_dir_name=checkpoint.name_of(step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            validation=rank == 0 and ask_for_validation(recipe, run, step),
        )

    train(
        recipe.train,
        recipe.model,
        recipe.diffusion,
        shards,
        device=get_device(),
        log=metrics.write,
        keep=keep,
        resume=resume,
    )


def report_again(found: list[tuple[int, Path]]) -> None:
    """Tells Ray of the checkpoints on disk that it has not heard of, so that it keeps the newest N of all.

    A run that starts again has a new controller; and a worker may die between an upload and its registration.
    """
    known = ray.train.get_checkpoint()
    known_step = int(Path(known.path).name.removeprefix("step_")) if known else -1
    for step, path in found:
        if step > known_step:
            ray.train.report(
                {"step": step, "again": True},
                checkpoint=Checkpoint(path),
                checkpoint_dir_name=path.name,
                checkpoint_upload_mode=CheckpointUploadMode.ASYNC,  # in the background: the controller takes one a poll
                checkpoint_upload_fn=_already_there,
                delete_local_checkpoint_after_upload=False,
            )


def _already_there(found: Checkpoint, name: str) -> Checkpoint:
    return found


def ask_for_validation(recipe: Recipe, run: Path, step: int) -> bool:
    """Whether to have a checkpoint validated: where it is due, and none is outstanding. Ray would queue without bound.

    The last checkpoint's is asked for in any case: the run waits for it, and nothing can pile up behind it.
    """
    every, last = recipe.validation.every, step == recipe.train.steps
    outstanding = Outstanding(run)
    if not every or (step % every and not last) or outstanding.status(step) == "done":
        return False
    running = outstanding.steps(older_than_s=2 * recipe.validation.timeout_s + STALE_S)
    if running and not last:
        Events(run).write("validation_dropped", step, f"the one of step {running[0]} is still running")
        return False
    outstanding.mark(step, "asked")
    return True
