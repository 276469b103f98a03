"""`sora train`: checks everything that can be checked, then hands the run to Ray and watches it.

Resuming is running the same command again. What decides is on disk: the newest whole checkpoint in the run's folder.
SIGTERM, which schedulers send before they take a machine away, has the run make a checkpoint and end, as have SIGHUP
(a closed terminal) and Ctrl-C.
"""

from __future__ import annotations

import importlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sora_train.data.config import small_buckets
from sora_train.errors import Stopped, UserError
from sora_train.launch.changes import describe_changes
from sora_train.launch.checks import (
    check_cluster,
    check_codec,
    check_metric_models,
    check_shards,
    check_text,
    resolve_recipe,
    run_resources,
)
from sora_train.launch.clips import check_clips, read_clips
from sora_train.launch.init_from import check_initial_weights, initial_weights_warnings
from sora_train.launch.monitor import Monitor
from sora_train.launch.preflight.table import check_quickly
from sora_train.launch.resume import check_resume
from sora_train.launch.run_folder import (
    check_fresh,
    check_some_complete,
    check_writable,
    last_step,
    newest_checkpoint,
    os_errors_as_user_errors,
    prepare_run_folder,
    remove_run,
    resume_hint,
)
from sora_train.launch.signals import SignalHandler, detach_wandb, warn_if_stop_wait_short
from sora_train.launch.validation import ValidationStatus, supervise, update_report
from sora_train.locks import run_lock
from sora_train.log import log
from sora_train.manifest import Manifest
from sora_train.ray_cluster.connection import connect, explain_wait
from sora_train.recipe import Recipe, load_recipe, save_recipe
from sora_train.train import checkpoint
from sora_train.train.metrics import Events
from sora_train.train.run_dir import STOP_FILE


def launch_training(
    recipe: Recipe, fresh: bool = False, overwrite: bool = False, look_first: bool = True, new_data: bool = False
) -> Path:
    """Trains the recipe's model, or goes on where it stopped; returns the run's folder. `fresh` begins at step 0, and
    with `overwrite` also where the folder holds a run, which it removes. `look_first` is the quick part of preflight.
    With `new_data` a run goes on though the shards hold other clips than before.

    Raises UserError, before anything starts, for shards that are missing or do not fit, a cluster that is too small, or
    a run folder that another recipe made or that can't be written; and where training failed for a reason that no
    repetition mends, or more often than `cluster.max_failures`. Raises Stopped where SIGTERM, SIGHUP, Ctrl-C,
    or a file `leave` in the run's folder ended it before its last step with a checkpoint.
    """
    recipe = resolve_recipe(recipe, fresh)
    run = Path(recipe.train.output) / recipe.name
    check_writable(run)
    manifest = check_shards(recipe)
    clips, at, happened = read_clips(recipe), 0, list[tuple[str, str]]()
    with os_errors_as_user_errors(run):
        if fresh:
            check_fresh(run, overwrite)
        elif at := check_resume(run, recipe, manifest, new_data=new_data) or 0:
            other_clips = check_clips(run, recipe.data.output, clips, new_data)
            if at >= recipe.train.steps:
                log.info(f"{run} is finished: {at} steps are done; raise train.steps to train on")
                rerun_missed_validations(run, recipe)
                return run
            happened = describe_resume(run, recipe, at, other_clips, new_data)
        else:
            check_some_complete(run)
    check_codec(recipe, manifest)
    check_text(recipe, manifest)
    if not at:
        check_initial_weights(recipe)
        for remark in initial_weights_warnings(recipe, manifest):
            log.warning(f"model.init_from: {remark}")
    check_metric_models(recipe)
    for said in small_buckets(clips.counts(held_out=False), recipe.train.batch_size):
        log.warning(said)
    log.info(describe_export(recipe, manifest))
    warn_if_stop_wait_short()
    need = run_resources(recipe, gpu=False, most=True)
    background = ThreadPoolExecutor(1)  # Ray takes seconds to start, and leaves a core idle
    ray_train = background.submit(importlib.import_module, "sora_train.launch.ray_trainer")
    background.shutdown(wait=False)
    log.info("starting Ray")
    with (
        SignalHandler(run) as signals,
        connect(recipe.cluster.address, min_cpus=math.ceil(need.get("CPU", 0)), log_to_driver=False) as own,
    ):
        signals.reinstall()
        gpu = check_cluster(recipe)
        if look_first:
            check_quickly(recipe, manifest, gpu, own)
        set_ray_train_env(recipe, own)
        with run_lock(str(run), "sora train"):
            signals.owns = True
            with os_errors_as_user_errors(run):
                if fresh:
                    remove_run(run)
                for event, reason in happened:  # first: a record of the new clips is never without its event
                    Events(run).write(event, at, reason)
                prepare_run_folder(run, recipe, manifest, clips)
            with start_monitor(recipe, run) as monitor:
                signals.can_wait = lambda: monitor.training
                signals.check()
                try:
                    why = ray_train.result().run_trainer(recipe, run, gpu, monitor)
                except KeyboardInterrupt:
                    why = f"{signals.name or 'by hand'}; run the same command to resume from the last checkpoint"
                    Events(run).write("interrupted", last_step(run), why)
                    raise  # without a report: a second signal ends the command now
                except Exception:
                    update_report(run, last_step(run))
                    raise
                finally:
                    (run / STOP_FILE).unlink(missing_ok=True)
                update_report(run, last_step(run))
                if why:
                    asked = signals.name or f"a request by the file {run / STOP_FILE}"
                    step, _ = newest_checkpoint(run) or (0, None)
                    Events(run).write("stopped", step, f"{asked}; run the same command to resume")
                    raise Stopped(f"stopped at step {step} after {asked}. {resume_hint(run)}")
    log.info(f"done: {recipe.train.steps} steps. Look at {run / 'report.html'}; checkpoints are beside it")
    return run


def describe_resume(run: Path, recipe: Recipe, at: int, other_clips: str, new_data: bool) -> list[tuple[str, str]]:
    """What a run does otherwise from step `at` on, as kinds and reasons of events; says it before it happens.

    `other_clips` is what `check_clips` returned.
    """
    happened: list[tuple[str, str]] = []
    if said := describe_changes(run, recipe, at):
        happened.append(("changed", said))
    if other_clips:
        happened.append(("new_data", f"{other_clips}; an epoch of these begins here"))
    elif new_data:
        log.info(f"--new-data changes nothing: the clips are those that {run} was trained on")
    for event, reason in happened:
        log.info(f"{event.replace('_', ' ')} at step {at}: {reason}")
    return happened


def describe_export(recipe: Recipe, manifest: Manifest) -> str:
    """Whether `sora export` will make a pipeline of the run, in a line; the reasons if not."""
    from sora_train.export.pipeline import refusals

    try:
        reasons = refusals(recipe, manifest)
    except UserError as error:  # the VAE is not within reach
        reasons = [str(error)]
    if not reasons:
        return "`sora export` will be able to write this run as a LattePipeline of diffusers"
    return f"`sora export` will write this run with --weights_only, not as a LattePipeline: {'; '.join(reasons)}"


def set_ray_train_env(recipe: Recipe, own: bool) -> None:
    """Ray Train's settings, which it takes from this process's environment; what the user has set there counts.

    `own`: Ray was started by this command and ends with it, on this machine alone. Then nobody looks at Train's list of
    runs and no node is announced to go, so that two processes which take seconds to start are left out.
    """
    settings = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}  # a lost worker is noticed so soon
    if own:
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    else:
        settings["RAY_TRAIN_ENABLE_STATE_TRACKING"] = "1"  # what the dashboard's API says of training runs
    if recipe.cluster.fewest < recipe.cluster.most:
        # Ray takes up to 20 s to see that a node is gone; until then it waits for workers on it, so long at a time.
        settings["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def rerun_missed_validations(run: Path, recipe: Recipe) -> None:
    """Runs the validations of a finished run that ended with its command, as Ray tasks with `validation.resources`."""
    cut_off = [
        (step, path)
        for step, path in checkpoint.whole(run / "checkpoints")
        if ValidationStatus(run).get(step) in ("asked", "running", "lost")
    ]
    if not cut_off or not recipe.validation.every:
        return
    need = recipe.validation.resources
    with connect(recipe.cluster.address, min_cpus=math.ceil(need.get("CPU", 0)), log_to_driver=False):
        import ray

        from sora_train.launch.ray_trainer import remote_options
        from sora_train.launch.worker import checkpoint_at

        have = ray.cluster_resources()
        if short := [f"{count:g} {kind}" for kind, count in need.items() if count > have.get(kind, 0)]:
            steps = ", ".join(str(step) for step, _ in cut_off)
            log.info(
                f"the validations of steps {steps} were cut off and can't run here: the cluster lacks "
                f"{' and '.join(short)} (validation.resources). Run the same command where it has them"
            )
            return
        with run_lock(str(run), "sora train"), start_monitor(recipe, run):
            then = load_recipe(run / "recipe.yaml")
            save_recipe(then.model_copy(update={"validation": recipe.validation}), run / "recipe.yaml")
            (run / STOP_FILE).unlink(missing_ok=True)
            asked = {"run": str(run), "timeout_s": recipe.validation.timeout_s, "gpu": need.get("GPU", 0) > 0}
            for step, path in cut_off:
                log.info(f"its validation of step {step} was cut off, and is made up for now")
                task = ray.remote(supervise).options(  # pyright: ignore
                    **remote_options(need), name=f"validation of {recipe.name}"
                )
                with explain_wait(f"the validation of step {step} runs, or waits for {need} of the cluster"):
                    ray.get(task.remote(checkpoint_at(path), **asked))


def start_monitor(recipe: Recipe, run: Path) -> Monitor:
    """What tells people and wandb of a run, to be entered."""
    if recipe.tracking.wandb != "off":
        detach_wandb()
    return Monitor(run, recipe.train.steps, tracking(recipe), recipe.model_dump(mode="json"))


def tracking(recipe: Recipe) -> dict[str, Any]:
    return {"mode": recipe.tracking.wandb, "project": recipe.tracking.project}
