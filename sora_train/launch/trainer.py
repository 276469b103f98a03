"""`sora train`: checks everything that can be checked, then hands the run to Ray and watches it.

Resuming is running the same command again. What decides is on disk: the newest whole checkpoint in the run's folder.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import ray
import ray.train
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
from ray.train.torch import TorchConfig, TorchTrainer

from sora_train.errors import UserError
from sora_train.launch.checks import (
    absolute,
    check_cluster,
    check_codec,
    check_folder,
    check_shards,
    check_start,
    resources,
    worker_resources,
)
from sora_train.launch.cluster import connect
from sora_train.launch.environment import environment
from sora_train.launch.follow import Follower
from sora_train.launch.validation import Outstanding, prepare, supervise
from sora_train.launch.worker import train_worker
from sora_train.manifest import Manifest
from sora_train.recipe import Recipe, save_recipe
from sora_train.train import checkpoint
from sora_train.train.metrics import Events, JsonLines


def launch_training(recipe: Recipe) -> Path:
    """Trains the recipe's model, or goes on where it stopped; returns the run's folder.

    Raises UserError, before anything starts, for shards that are missing or do not fit, a cluster that is too small, or
    a run folder that another recipe made; and where training failed more often than `cluster.max_failures`.
    """
    recipe = absolute(recipe)
    run = Path(recipe.train.output) / recipe.name
    manifest = check_shards(recipe)
    at = check_folder(run, recipe, manifest)
    if at is not None and at >= recipe.train.steps:
        print(f"{run} is finished: {at} steps are done; raise train.steps to train on", flush=True)
        return run
    check_codec(recipe, manifest)
    check_start(recipe)
    print("starting Ray", flush=True)
    need = resources(recipe, gpu=False)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")  # a lost worker is noticed so soon
    with connect(recipe.cluster.address, min_cpus=math.ceil(need.get("CPU", 0)), log_to_driver=False):
        gpu = check_cluster(recipe)
        write_folder(run, recipe, manifest)
        with Follower(run, recipe.train.steps, tracking(recipe), recipe.model_dump(mode="json")):
            fit(recipe, run, gpu)
    print(f"done: {recipe.train.steps} steps. Checkpoints, samples and metrics are in {run}", flush=True)
    return run


def fit(recipe: Recipe, run: Path, gpu: bool) -> None:
    """Ray's part: worker group, restarts, checkpoints to keep, validations."""
    events = Events(run)
    validation = None
    if recipe.validation.every:
        timeout_s, on_gpu = recipe.validation.timeout_s, recipe.validation.resources.get("GPU", 0) > 0
        options = remote_options(recipe.validation.resources)
        # At once, in the place that validations will have. Nobody waits: a validation without them makes its own.
        ray.remote(prepare).options(**options).remote(str(run), timeout_s, on_gpu)
        validation = ValidationConfig(
            fn=supervise,  # type: ignore[arg-type]  # it names its keywords, where Ray's protocol has **kwargs
            task_config=ValidationTaskConfig(fn_kwargs={"run": str(run), "timeout_s": timeout_s, "gpu": on_gpu}),
            ray_remote_kwargs=options,
        )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "run": str(run)},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=recipe.cluster.workers, use_gpu=gpu, resources_per_worker=worker_resources(recipe, gpu)
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=str(run),
            failure_config=FailureConfig(max_failures=recipe.cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=recipe.train.keep_checkpoints),
            callbacks=[NoteEvents(str(run))],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
        validation_config=validation,
    )
    handler = signal.getsignal(signal.SIGINT)  # Ray sets its own and leaves it there
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        step = last_step(run)
        (run / "failure.txt").write_text(str(error), encoding="utf-8")
        why = reason_of(error)
        events.write("failed", step, why)
        raise UserError(
            f"training stopped near step {step}: {why}\nThe whole account is in {run / 'failure.txt'}; "
            "the same command goes on from the last checkpoint"
        ) from error
    except SystemExit:  # what Ray makes of Ctrl-C, after it has ended the workers
        raise KeyboardInterrupt from None
    except KeyboardInterrupt:
        events.write("interrupted", last_step(run), "by hand; the same command goes on from the last checkpoint")
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)
    events.write("end", last_step(run), "all steps are done")


class NoteEvents(UserCallback):
    """Writes down what Ray's controller alone knows: which checkpoints count, and that workers were lost."""

    def __init__(self, run: str) -> None:
        self.run = run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if checkpoint is not None and "again" not in metrics[0]:
            Events(Path(self.run)).write("checkpoint", metrics[0]["step"], checkpoint.path)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        why = "; ".join(f"rank {rank}: {reason_of(error)}" for rank, error in sorted(worker_exceptions.items()))
        Events(Path(self.run)).write("worker_lost", last_step(Path(self.run)), why)


def write_folder(run: Path, recipe: Recipe, manifest: Manifest) -> None:
    """What a run says of itself; leftovers of a run that was cut off are cleared away."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, run / "recipe.yaml")
    manifest.save(str(run))
    (run / "environment.json").write_text(json.dumps(environment(), indent=1), encoding="utf-8")
    # Ray's list of checkpoints would bring a whole run down over one that somebody removed; workers report anew.
    (folder / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    whole = {path: step for step, path in checkpoint.whole(folder)}
    for path in folder.glob("step_*"):
        if path not in whole:
            shutil.rmtree(path)
    outstanding = Outstanding(run)
    for step in outstanding.steps():
        outstanding.mark(step, "lost")
    JsonLines(run / "metrics.jsonl").cut_back(max(whole.values(), default=0))


def remote_options(wanted: dict[str, float]) -> dict[str, Any]:
    """Resources in the words of `ray.remote`, which has names of their own for two of them."""
    rest = {kind: count for kind, count in wanted.items() if kind not in ("CPU", "GPU")}
    return {"num_cpus": wanted.get("CPU", 0), "num_gpus": wanted.get("GPU", 0), "resources": rest, "max_retries": 3}


def tracking(recipe: Recipe) -> dict[str, Any]:
    return {"mode": recipe.tracking.wandb, "project": recipe.tracking.project}


def last_step(run: Path) -> int:
    """The last step that was written down."""
    records = JsonLines(run / "metrics.jsonl").read()
    return records[-1]["step"] if records else 0


def reason_of(error: BaseException) -> str:
    """The first cause of what Ray wraps, in one line."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = failures[min(failures)]
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    text = lines[-1] if lines and lines[0].startswith("Traceback") else " ".join(lines[:3])
    return f"{type(cause).__name__}: {text}"[:500]


logging.getLogger("ray.train").setLevel(logging.ERROR)
