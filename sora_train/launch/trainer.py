"""`sora train`: checks the recipe, runs it with Ray Train and watches it.

The same command resumes a run from the newest complete checkpoint in its folder. SIGTERM (sent by schedulers), SIGHUP
(a closed terminal) and Ctrl-C make the run save a checkpoint and end.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from threading import Thread

from sora_train.errors import Stopped, UserError
from sora_train.launch.checks import (
    alive_nodes,
    check_cluster,
    check_codec,
    check_metric_models,
    check_shards,
    check_text,
    idle_gpus,
    resolve_recipe,
    run_resources,
    split_groups,
)
from sora_train.launch.clips import Clips, check_clips, read_clips
from sora_train.launch.images import check_image_files, read_images, save_images
from sora_train.launch.init_from import check_base_unchanged, check_initial_weights, initial_weights_warnings
from sora_train.launch.monitor import Monitor
from sora_train.launch.preflight.table import check_quickly
from sora_train.launch.resume import check_resume, describe_changes
from sora_train.launch.run_folder import (
    check_fresh,
    check_some_complete,
    check_writable,
    last_step,
    os_errors_as_user_errors,
    prepare_run_folder,
    remove_run,
    resume_hint,
)
from sora_train.launch.signals import SignalHandler, detach_wandb, warn_if_stop_wait_short
from sora_train.launch.validation import ValidationStatus, update_report
from sora_train.locks import run_lock
from sora_train.log import log
from sora_train.manifest import Manifest
from sora_train.plan.steps import small_bucket_warnings
from sora_train.plan.table import plan_inputs
from sora_train.ray_cluster.connection import connect
from sora_train.recipe import Recipe
from sora_train.train import checkpoint
from sora_train.train.metrics import STOP_FILE, Events


def launch_training(
    recipe: Recipe, fresh: bool = False, overwrite: bool = False, preflight: bool = True, new_data: bool = False
) -> Path:
    """Trains the recipe's model, or resumes its run. Returns the run's folder.

    Args:
        fresh: start at step 0; with `overwrite` even if the folder holds a run, which is removed.
        preflight: run the quick checks of `sora preflight`.
        new_data: resume although the shards hold other clips than before.

    Raises:
        UserError: before anything starts, if the recipe, shards, cluster or folder are wrong; later, if training failed
            for a reason that a retry can't fix, or more often than `cluster.max_failures`.
        Stopped: if a signal or the file `leave` in the run's folder ended the run before its last step.
    """
    recipe = resolve_recipe(recipe, fresh)
    folder = Path(recipe.train.output) / recipe.name
    manifest, clips, step, changes = check_run(recipe, folder, fresh, overwrite, new_data)
    if step >= recipe.train.steps:
        missed = [] if step > recipe.train.steps or not recipe.validation.every else missed_validations(folder)
        log.info(f"{folder} is finished: {step} steps are done. Raise train.steps to train on")
        if not missed:
            return folder
        log.info(f"the validations of steps {missed} were cut off: the run resumes at its last step to rerun them")
    images = read_images(recipe, manifest)
    warn_if_stop_wait_short()
    # A slow module, imported while Ray starts, which leaves a core idle.
    Thread(target=importlib.import_module, args=("sora_train.launch.ray_trainer",), daemon=True).start()
    cpus = math.ceil(run_resources(recipe, gpu=False, most=True).get("CPU", 0))
    log.info("starting Ray")
    with SignalHandler(folder) as signals, connect(recipe.cluster.address, min_cpus=cpus) as own:
        signals.reinstall()
        gpu = check_cluster(recipe)
        for why in (idle_gpus(recipe, alive_nodes()), split_groups(recipe, gpu, alive_nodes())):
            if why:
                log.warning(why)
        if preflight:
            check_quickly(recipe, manifest, gpu)
        set_ray_train_env(recipe, own)
        with run_lock(str(folder), "sora train"):
            signals.owns_run = True
            with os_errors_as_user_errors(folder):
                if fresh:
                    remove_run(folder)
                for event, reason in changes.items():  # first: the record of new clips never lacks its event
                    Events(folder).write(event, step, reason)
                prepare_run_folder(folder, recipe, manifest, clips)
                save_images(folder, images)
            with start_monitor(recipe, folder) as monitor:
                signals.can_wait = lambda: monitor.training
                from sora_train.launch import ray_trainer

                monitor.wait_reason = lambda: ray_trainer.resource_wait_reason(recipe, gpu)
                signals.check()
                run_until_end(folder, signals, lambda: ray_trainer.run_trainer(recipe, folder, gpu))
    log.info(f"done: {recipe.train.steps} steps. See {folder / 'report.html'} and {folder / 'checkpoints'}")
    return folder


def check_run(
    recipe: Recipe, folder: Path, fresh: bool, overwrite: bool, new_data: bool
) -> tuple[Manifest, Clips, int, dict[str, str]]:
    """Checks everything that needs no cluster. UserError if something is wrong.

    Returns the shards' manifest and clips, the step to resume from (0 for a new run), and what differs from the run's
    last start, as reasons by event.
    """
    check_writable(folder)
    check_image_files(recipe)
    manifest = check_shards(recipe)
    clips, step, changes = read_clips(recipe), 0, dict[str, str]()
    with os_errors_as_user_errors(folder):
        if fresh:
            check_fresh(folder, overwrite)
        elif step := check_resume(folder, recipe, manifest, new_data=new_data) or 0:
            clip_changes = check_clips(folder, recipe.data.output, clips, new_data)
            if changed := describe_changes(folder, recipe, step):
                changes["changed"] = changed
            if clip_changes:
                changes["new_data"] = f"{clip_changes}; an epoch of these begins here"
            elif new_data:
                log.info(f"--new-data changes nothing: the clips are those that {folder} was trained on")
        else:
            check_some_complete(folder)
    if step < recipe.train.steps:
        for event, reason in changes.items():
            log.info(f"{event.replace('_', ' ')} at step {step}: {reason}")
        check_models(recipe, manifest, clips, step)
    return manifest, clips, step, changes


def check_models(recipe: Recipe, manifest: Manifest, clips: Clips, step: int) -> None:
    """Checks the models that a run needs, and warns of what may surprise."""
    from sora_train.export.pipeline import PIPELINES, refusals

    check_codec(recipe, manifest)
    check_text(recipe, manifest)
    if not step:
        check_initial_weights(recipe)
        for warning in initial_weights_warnings(recipe, manifest):
            log.warning(f"model.init_from: {warning}")
    elif recipe.lora.rank:
        check_base_unchanged(recipe, Path(recipe.train.output) / recipe.name)
    check_metric_models(recipe)
    for warning in small_bucket_warnings(recipe, clips.counts(held_out=False), plan_inputs(recipe)[0]):
        log.warning(warning)
    with contextlib.suppress(UserError):  # the VAE is out of reach
        if reasons := refusals(recipe, manifest):
            name = PIPELINES[recipe.model.family]
            command = "sora export --merge" if recipe.lora.rank else "sora export"
            log.info(f"`{command}` will need --weights_only, no {name} is possible: {'; '.join(reasons)}")


def run_until_end(folder: Path, signals: SignalHandler, train: Callable[[], str]) -> None:
    """Trains, then writes the report. Stopped if the run was asked to end.

    The event of the end comes first: a second signal, or a scheduler's SIGKILL, may end the command during the report.
    """
    asked, step = "", 0
    try:
        if train():
            asked = signals.name or f"a request by the file {folder / STOP_FILE}"
            step = max((step for step, _ in checkpoint.complete_checkpoints(folder / "checkpoints")), default=0)
            Events(folder).write("stopped", step, f"{asked}; run the same command to resume")
    except KeyboardInterrupt:
        why = f"{signals.name or 'by hand'}; run the same command to resume from the last checkpoint"
        Events(folder).write("interrupted", last_step(folder), why)
        raise  # without a report, and with the stop file: workers that still start must not train
    except Exception:
        (folder / STOP_FILE).unlink(missing_ok=True)
        update_report(folder, last_step(folder))
        raise
    (folder / STOP_FILE).unlink(missing_ok=True)
    update_report(folder, last_step(folder))
    if asked:
        raise Stopped(f"stopped at step {step} after {asked}. {resume_hint(folder)}")


def set_ray_train_env(recipe: Recipe, own: bool) -> None:
    """Sets Ray Train's environment variables, unless the user has set them.

    A Ray that this command started (`own`) ends with it on this machine alone. Nobody looks at its list of runs and no
    node is preempted, so two processes that take seconds to start are left out.
    """
    settings = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}  # how soon a lost worker is noticed
    if own:
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    else:
        settings["RAY_TRAIN_ENABLE_STATE_TRACKING"] = "1"  # for the dashboard's list of training runs
    if recipe.cluster.fewest < recipe.cluster.most:
        # Ray notices a lost node after up to 20 s, and until then waits this long for workers on it.
        settings["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def missed_validations(folder: Path) -> list[int]:
    """Steps of checkpoints whose validation was cut off with its command."""
    steps = [step for step, _ in checkpoint.complete_checkpoints(folder / "checkpoints")]
    return [step for step in steps if ValidationStatus(folder).get(step) in ("asked", "running", "lost")]


def start_monitor(recipe: Recipe, folder: Path) -> Monitor:
    """The run's monitor, as a context manager."""
    if recipe.tracking.wandb != "off":
        detach_wandb()
    tracking = {"mode": recipe.tracking.wandb, "project": recipe.tracking.project}
    return Monitor(folder, recipe.train.steps, tracking, recipe.model_dump(mode="json"))
