"""Runs Ray Train: worker group, restarts of lost workers, checkpoints to keep, validations.

A lost worker is noticed by Ray's controller (every `RAY_TRAIN_HEALTH_CHECK_INTERVAL_S`, set in `trainer.py`). It
calls `EventCallback.after_exception` and restarts all workers, which resume from the newest checkpoint (`worker.py`).

Importing this module takes a second of CPU time, so `trainer.py` imports it while Ray starts.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
from pyarrow.fs import LocalFileSystem
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
    ValidationConfig,
    ValidationTaskConfig,
)
from ray.train.torch import TorchConfig
from ray.util import placement_group_table

from sora_train.errors import UserError
from sora_train.launch.checks import worker_resources
from sora_train.launch.private_ray import Trainer, allow_many_workers, start_autoscaling_coordinator
from sora_train.launch.run_folder import last_step, read_fatal_error, resume_hint
from sora_train.launch.validation import supervise
from sora_train.launch.worker import rank_ranges, train_worker
from sora_train.ray_cluster.connection import root_cause
from sora_train.recipe import Recipe
from sora_train.train.metrics import Events

MAX_CAUSES = 5
"""Causes of lost workers in an event."""


def run_trainer(recipe: Recipe, run: Path, gpu: bool) -> str:
    """Trains with Ray Train. Returns "", or why training ended before its last step. UserError if it failed."""
    start_autoscaling_coordinator()
    trainer = Trainer(
        train_worker,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "run": str(run)},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=recipe.cluster.workers,
            use_gpu=gpu,
            resources_per_worker=worker_resources(recipe, gpu),
            elastic_resize_monitor_interval_s=recipe.cluster.elastic_poll_s,
        ),
        run_config=RunConfig(
            name=recipe.name,  # shown by the dashboard; Ray's own files are in the run's folder for that
            storage_path=str(run.parent),
            storage_filesystem=LocalFileSystem(),  # as `worker.checkpoint_at`
            failure_config=FailureConfig(max_failures=recipe.cluster.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=recipe.train.keep_checkpoints,
                checkpoint_score_attribute="loss" if recipe.train.keep_by == "loss" else None,
                checkpoint_score_order="min",
            ),
            callbacks=[EventCallback(str(run))],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
        validation_config=validation_tasks(recipe, run) if recipe.validation.every else None,
    )
    details = ""
    try:
        why = trainer.fit().return_value or ""
    except ray.train.TrainingFailedError as error:
        why, details = root_cause(error), str(error)
    if (fatal := read_fatal_error(run)) or details:
        raise training_failed(run, fatal or UserError(why, code="workers"), details)
    if not why:
        Events(run).write("end", last_step(run), "all steps are done")
    return why


def validation_tasks(recipe: Recipe, run: Path) -> ValidationConfig:
    """Has Ray run `supervise` for each checkpoint that is reported with `validation=True`."""
    need, timeout_s = dict(recipe.validation.resources), recipe.validation.timeout_s
    cpus, gpus = need.pop("CPU", 0), need.pop("GPU", 0)
    options = {"num_cpus": cpus, "num_gpus": gpus, "resources": need, "max_retries": 3}
    return ValidationConfig(
        fn=supervise,  # type: ignore[arg-type]  # it names its keywords; Ray's protocol has **kwargs
        task_config=ValidationTaskConfig(fn_kwargs={"run": str(run), "timeout_s": timeout_s, "gpu": gpus > 0}),
        ray_remote_kwargs={**options, "name": f"validation of {recipe.name}"},
    )


def resource_wait_reason(recipe: Recipe, gpu: bool) -> str:
    """Why the workers do not start, if Ray waits for resources that others hold; else an empty string."""
    if all(group["state"] != "PENDING" for group in placement_group_table().values()):
        return ""
    free, need = ray.available_resources(), worker_resources(recipe, gpu)
    shown = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in need)
    return (
        f"Ray waits for room: {recipe.cluster.fewest} workers need {need} each, and {shown} are free. Other jobs of "
        "this cluster hold the rest (`ray status`); end one, or lower cluster.workers"
    )


def training_failed(run: Path, why: UserError, details: str) -> UserError:
    """Records a failure as far as the disk has space, and returns the error to raise."""
    step, where = last_step(run), ""
    with contextlib.suppress(OSError, UserError):  # a full disk
        Events(run).write("failed", step, str(why))
        if details:
            (run / "failure.txt").write_text(details, encoding="utf-8")
            where = f"Details are in {run / 'failure.txt'}. "
    message = f"training stopped near step {step}: {why}\n{where}{resume_hint(run)}, once the cause is fixed"
    return UserError(message, code=why.code)


class EventCallback(UserCallback):
    """Writes events that only Ray's controller knows: registered checkpoints and lost workers."""

    def __init__(self, run: str) -> None:
        self.run = run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if checkpoint is not None and "again" not in metrics[0]:
            self.write_event("checkpoint", metrics[0]["step"], checkpoint.path)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """A worker was lost: its process or node died, or it raised."""
        if not read_fatal_error(Path(self.run)):
            self.write_event("worker_lost", last_step(Path(self.run)), describe_lost(worker_exceptions))

    def write_event(self, event: str, step: int, reason: str) -> None:
        with contextlib.suppress(UserError):  # a full disk must not end Ray's controller
            Events(Path(self.run)).write(event, step, reason)


def describe_lost(errors: Mapping[int, Exception]) -> str:
    """The causes of lost workers with their ranks; at most `MAX_CAUSES`, since one lost worker may fail all others."""
    ranks: dict[str, list[int]] = {}
    for rank, error in sorted(errors.items()):
        ranks.setdefault(root_cause(error), []).append(rank)
    shown = list(ranks.items())[:MAX_CAUSES]
    whys = [f"rank{'s' if len(of) > 1 else ''} {rank_ranges(of)}: {cause}" for cause, of in shown]
    if others := len(errors) - sum(len(of) for _, of in shown):
        whys.append(f"and {others} more with other causes")
    return "; ".join(whys)


logging.getLogger("ray.train").setLevel(logging.ERROR)
allow_many_workers()  # here, because the controller imports this module with `EventCallback`
