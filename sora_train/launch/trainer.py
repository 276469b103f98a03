"""`sora train`: checks everything that can be checked, then hands the run to Ray and watches it.

Resuming is running the same command again. What decides is on disk: the newest whole checkpoint in the run's folder.
SIGTERM, which schedulers send before they take a machine away, has the run make a checkpoint and end.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
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

from sora_train.errors import Stopped, UserError
from sora_train.launch.checks import (
    STEERS,
    absolute,
    check_cluster,
    check_codec,
    check_figures,
    check_folder,
    check_shards,
    check_start,
    differences,
    resources,
    worker_resources,
)
from sora_train.launch.cluster import connect
from sora_train.launch.folder import (
    check_fresh,
    check_whole,
    check_writable,
    clear,
    clear_words,
    goes_on,
    last_checkpoint,
    last_step,
    newest,
    only_one,
    stopped_because,
    write_folder,
)
from sora_train.launch.follow import Follower
from sora_train.launch.preflight import check_quickly
from sora_train.launch.sigterm import Sigterm, shelter_wandb, warn_of_short_stops
from sora_train.launch.validation import Outstanding, prepare, report, supervise
from sora_train.launch.worker import train_worker
from sora_train.recipe import Recipe, load_recipe, save_recipe
from sora_train.train import checkpoint
from sora_train.train.home import LEAVE
from sora_train.train.metrics import Events


def launch_training(recipe: Recipe, fresh: bool = False, overwrite: bool = False, look_first: bool = True) -> Path:
    """Trains the recipe's model, or goes on where it stopped; returns the run's folder. `fresh` begins at step 0, and
    with `overwrite` also where the folder holds a run, which it removes. `look_first` is the quick part of preflight.

    Raises UserError, before anything starts, for shards that are missing or do not fit, a cluster that is too small, or
    a run folder that another recipe made or that can't be written; and where training failed for a reason that no
    repetition mends, or more often than `cluster.max_failures`. Raises Stopped where SIGTERM, or a file `leave` in the
    run's folder, ended it before its last step.
    """
    recipe = absolute(recipe)
    run = Path(recipe.train.output) / recipe.name
    check_writable(run)
    manifest = check_shards(recipe)
    steered: list[str] = []
    with clear_words(run):
        if fresh:
            check_fresh(run, overwrite)
        elif (at := check_folder(run, recipe, manifest) or 0) >= recipe.train.steps:
            print(f"{run} is finished: {at} steps are done; raise train.steps to train on", flush=True)
            make_up(run, recipe)
            return run
        else:
            check_whole(run)
            steered = differences(run, recipe, STEERS) if at else []
    check_codec(recipe, manifest)
    check_start(recipe)
    check_figures(recipe)
    warn_of_short_stops()
    print("starting Ray", flush=True)
    need = resources(recipe, gpu=False, most=True)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")  # a lost worker is noticed so soon
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's page of training runs
    if recipe.cluster.fewest < recipe.cluster.most:
        # Ray takes up to 20 s to see that a node is gone; until then it waits for workers on it, so long at a time.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    with (
        Sigterm(run) as sigterm,
        connect(recipe.cluster.address, min_cpus=math.ceil(need.get("CPU", 0)), log_to_driver=False),
    ):
        sigterm.listen_again()
        gpu = check_cluster(recipe)
        if look_first:
            check_quickly(recipe, manifest, gpu)
        with only_one(run):
            with clear_words(run):
                if fresh:
                    clear(run)
                write_folder(run, recipe, manifest)
                if steered:
                    Events(run).write("changed", at, f"from here on {'; '.join(steered)}")
            with following(recipe, run) as follower:
                sigterm.can_wait = lambda: follower.training
                sigterm.check()
                try:
                    why = fit(recipe, run, gpu)
                except KeyboardInterrupt:
                    by = "SIGTERM" if sigterm.count else "by hand"
                    why = f"{by}; the same command goes on from the last checkpoint"
                    Events(run).write("interrupted", last_step(run), why)
                    raise
                finally:
                    (run / LEAVE).unlink(missing_ok=True)
                    report(run, last_step(run))
                if why:
                    asked = "SIGTERM" if sigterm.count else f"somebody made {run / LEAVE}"
                    step, _ = newest(run) or (0, None)
                    Events(run).write("preempted", step, f"{asked}; the same command goes on")
                    raise Stopped(f"{asked}: {goes_on(run)}")
    print(f"done: {recipe.train.steps} steps. Look at {run / 'report.html'}; checkpoints are beside it", flush=True)
    return run


def make_up(run: Path, recipe: Recipe) -> None:
    """Has a finished run's validations done here that were cut off with it: there are no workers to ask for them."""
    cut_off = [
        (step, path)
        for step, path in checkpoint.whole(run / "checkpoints")
        if Outstanding(run).status(step) in ("asked", "running", "lost")
    ]
    if not cut_off or not recipe.validation.every:
        return
    then = load_recipe(run / "recipe.yaml")
    save_recipe(then.model_copy(update={"validation": recipe.validation}), run / "recipe.yaml")
    with only_one(run), following(recipe, run):
        for step, path in cut_off:
            print(f"its validation of step {step} was cut off, and is made up for now", flush=True)
            supervise(ray.train.Checkpoint(path), run=str(run), timeout_s=recipe.validation.timeout_s, gpu=True)


def following(recipe: Recipe, run: Path) -> Follower:
    """What tells people and wandb of a run, to be entered."""
    if recipe.tracking.wandb != "off":
        shelter_wandb()
    return Follower(run, recipe.train.steps, tracking(recipe), recipe.model_dump(mode="json"))


def fit(recipe: Recipe, run: Path, gpu: bool) -> str:
    """Ray's part: worker group, restarts, checkpoints to keep, validations. Returns "", or why training ended early."""
    events = Events(run)
    validation = None
    if recipe.validation.every:
        timeout_s, on_gpu = recipe.validation.timeout_s, recipe.validation.resources.get("GPU", 0) > 0
        options = remote_options(recipe.validation.resources)
        # At once, in the place that validations will have. Nobody waits: a validation without them makes its own.
        ray.remote(prepare).options(**options, name=f"prompts of {recipe.name}").remote(str(run), timeout_s, on_gpu)
        validation = ValidationConfig(
            fn=supervise,  # type: ignore[arg-type]  # it names its keywords, where Ray's protocol has **kwargs
            task_config=ValidationTaskConfig(fn_kwargs={"run": str(run), "timeout_s": timeout_s, "gpu": on_gpu}),
            ray_remote_kwargs={**options, "name": f"validation of {recipe.name}"},
        )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "run": str(run)},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=recipe.cluster.workers,
            use_gpu=gpu,
            resources_per_worker=worker_resources(recipe, gpu),
            elastic_resize_monitor_interval_s=recipe.cluster.resize_s,
        ),
        run_config=RunConfig(
            name=recipe.name,  # as the dashboard shows it; so Ray keeps its own files in the run's folder
            storage_path=str(run.parent),
            failure_config=FailureConfig(max_failures=recipe.cluster.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=recipe.train.keep_checkpoints,
                checkpoint_score_attribute="loss" if recipe.train.keep_by == "loss" else None,
                checkpoint_score_order="min",
            ),
            callbacks=[NoteEvents(str(run))],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
        validation_config=validation,
    )
    handler = signal.getsignal(signal.SIGINT)  # Ray sets its own and leaves it there
    account = ""
    try:
        why = trainer.fit().return_value or ""
    except ray.train.TrainingFailedError as error:
        why, account = reason_of(error), str(error)
    except SystemExit:  # what Ray makes of Ctrl-C, after it has ended the workers
        raise KeyboardInterrupt from None
    finally:
        if signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)
    if (reason := stopped_because(run)) or account:
        raise failed(run, events, reason or why, account)
    if not why:
        events.write("end", last_step(run), "all steps are done")
    return why


def failed(run: Path, events: Events, why: str, account: str) -> UserError:
    """Notes a failure, as far as the disk has room, and says it."""
    step, where = last_step(run), ""
    with contextlib.suppress(OSError):
        events.write("failed", step, why)
        if account:
            (run / "failure.txt").write_text(account, encoding="utf-8")
            where = f"The whole account is in {run / 'failure.txt'}; "
    mended = "once that is mended, the same command goes on"
    return UserError(f"training stopped near step {step}: {why}\n{where}{last_checkpoint(run)}; {mended}")


class NoteEvents(UserCallback):
    """Writes down what Ray's controller alone knows: which checkpoints count, and that workers were lost."""

    def __init__(self, run: str) -> None:
        self.run = run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if checkpoint is not None and "again" not in metrics[0]:
            self.note("checkpoint", metrics[0]["step"], checkpoint.path)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if not stopped_because(Path(self.run)):
            why = "; ".join(f"rank {rank}: {reason_of(error)}" for rank, error in sorted(worker_exceptions.items()))
            self.note("worker_lost", last_step(Path(self.run)), why)

    def note(self, event: str, step: int, reason: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not bring Ray's controller down as well
            Events(Path(self.run)).write(event, step, reason)


def remote_options(wanted: dict[str, float]) -> dict[str, Any]:
    """Resources in the words of `ray.remote`, which has names of their own for two of them."""
    rest = {kind: count for kind, count in wanted.items() if kind not in ("CPU", "GPU")}
    return {"num_cpus": wanted.get("CPU", 0), "num_gpus": wanted.get("GPU", 0), "resources": rest, "max_retries": 3}


def tracking(recipe: Recipe) -> dict[str, Any]:
    return {"mode": recipe.tracking.wandb, "project": recipe.tracking.project}


def reason_of(error: BaseException) -> str:
    """The first cause of what Ray wraps, in one line."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = failures[min(failures)]
    cause = getattr(error, "cause", None) or getattr(error, "health_check_failure", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    text = lines[-1] if lines and lines[0].startswith("Traceback") else " ".join(lines[:3])
    return text if isinstance(cause, UserError) else f"{type(cause).__name__}: {text}"[:500]


logging.getLogger("ray.train").setLevel(logging.ERROR)
