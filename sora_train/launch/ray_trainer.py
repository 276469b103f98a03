"""Ray Train's part of a run: worker group, restarts, checkpoints to keep, validations.

Importing it takes a second of a core, so that `trainer` does it while Ray starts.
"""

from __future__ import annotations

import contextlib
import logging
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
from sora_train.launch.monitor import Monitor
from sora_train.launch.private_ray import Trainer, start_autoscaling_coordinator
from sora_train.launch.run_folder import last_step, read_fatal_error, resume_hint
from sora_train.launch.validation import prepare_prompts, supervise
from sora_train.launch.worker import train_worker
from sora_train.ray_cluster.connection import root_cause
from sora_train.recipe import Recipe
from sora_train.train.metrics import Events


def run_trainer(recipe: Recipe, run: Path, gpu: bool, monitor: Monitor) -> str:
    """Ray's part: worker group, restarts, checkpoints to keep, validations. Returns "", or why training ended early."""
    events = Events(run)
    start_autoscaling_coordinator()
    monitor.wait_reason = lambda: resource_wait_reason(recipe, gpu)
    validation = None
    if recipe.validation.every:
        timeout_s, on_gpu = recipe.validation.timeout_s, recipe.validation.resources.get("GPU", 0) > 0
        options = remote_options(recipe.validation.resources)

        def embed() -> None:
            # In the place that validations will have. Nobody waits: a validation without them makes its own.
            task = ray.remote(prepare_prompts).options(**options, name=f"prompts of {recipe.name}")
            try:
                task.remote(str(run), timeout_s, on_gpu)
            except Exception as error:  # whatever Ray makes of a cluster that is going must not end who follows the run
                with contextlib.suppress(UserError):  # of a full disk
                    events.write("validation_failed", 0, f"prompts can't be embedded: {root_cause(error)}")

        monitor.on_first_step = embed
        validation = ValidationConfig(
            fn=supervise,  # type: ignore[arg-type]  # it names its keywords, where Ray's protocol has **kwargs
            task_config=ValidationTaskConfig(fn_kwargs={"run": str(run), "timeout_s": timeout_s, "gpu": on_gpu}),
            ray_remote_kwargs={**options, "name": f"validation of {recipe.name}"},
        )
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
            name=recipe.name,  # as the dashboard shows it; so Ray keeps its own files in the run's folder
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
        validation_config=validation,
    )
    account = ""
    try:
        why = trainer.fit().return_value or ""
    except ray.train.TrainingFailedError as error:
        why, account = root_cause(error), str(error)
    if (reason := read_fatal_error(run)) or account:
        raise training_failed(run, events, reason or why, account)
    if not why:
        events.write("end", last_step(run), "all steps are done")
    return why


def resource_wait_reason(recipe: Recipe, gpu: bool) -> str:
    """Why the workers do not start yet, where Ray waits for resources that others hold; else an empty string."""
    if all(group["state"] != "PENDING" for group in placement_group_table().values()):
        return ""
    free, need = ray.available_resources(), worker_resources(recipe, gpu)
    shown = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in need)
    return (
        f"Ray waits for room: {recipe.cluster.fewest} workers need {need} each, and {shown} are free. Other jobs of "
        "this cluster hold the rest (`ray status`); end one, or lower cluster.workers"
    )


def training_failed(run: Path, events: Events, why: str, account: str) -> UserError:
    """Notes a failure, as far as the disk has room, and says it."""
    step, where = last_step(run), ""
    with contextlib.suppress(OSError, UserError):  # a full disk, as the system and as `Events` say it
        events.write("failed", step, why)
        if account:
            (run / "failure.txt").write_text(account, encoding="utf-8")
            where = f"The whole account is in {run / 'failure.txt'}. "
    return UserError(f"training stopped near step {step}: {why}\n{where}{resume_hint(run)}, once the cause is fixed")


class EventCallback(UserCallback):
    """Writes down what Ray's controller alone knows: which checkpoints count, and that workers were lost."""

    def __init__(self, run: str) -> None:
        self.run = run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if checkpoint is not None and "again" not in metrics[0]:
            self.write_event("checkpoint", metrics[0]["step"], checkpoint.path)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if not read_fatal_error(Path(self.run)):
            why = "; ".join(f"rank {rank}: {root_cause(error)}" for rank, error in sorted(worker_exceptions.items()))
            self.write_event("worker_lost", last_step(Path(self.run)), why)

    def write_event(self, event: str, step: int, reason: str) -> None:
        with contextlib.suppress(UserError):  # a full disk must not bring Ray's controller down as well
            Events(Path(self.run)).write(event, step, reason)


def remote_options(wanted: dict[str, float]) -> dict[str, Any]:
    """Resources in the words of `ray.remote`, which has names of their own for two of them."""
    rest = {kind: count for kind, count in wanted.items() if kind not in ("CPU", "GPU")}
    return {"num_cpus": wanted.get("CPU", 0), "num_gpus": wanted.get("GPU", 0), "resources": rest, "max_retries": 3}


logging.getLogger("ray.train").setLevel(logging.ERROR)
