"""A run's folder as the driver and the workers use it: preparation, locks on damage, and why a run ended."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from sora_train.errors import UserError
from sora_train.launch.clips import CLIPS, Clips
from sora_train.launch.images import IMAGES
from sora_train.launch.validation import EMBEDDINGS, ValidationStatus
from sora_train.manifest import Manifest
from sora_train.provenance import git_commit, package_versions
from sora_train.recipe import Recipe, save_recipe
from sora_train.storage import DRAFT_PREFIX, atomic_write_text, why_not_writable
from sora_train.train import checkpoint
from sora_train.train.metrics import STOP_FILE, Events, JsonLines
from sora_train.train.run_dir import TRYING_FILE, RunDir

START_EVENTS, END_EVENTS = ("start", "resume"), ("end", "failed", "stopped", "interrupted")
"""Events with which training starts, and those with which a command's training ends."""
FATAL_ERROR_FILE = "stop.json"
"""Why a worker ended the run for good. Workers that Ray restarts find it and end too."""
RAY_CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""Ray's list of checkpoints. A checkpoint in it that somebody removed would fail the run, so workers report again."""
RUN_FILES = (
    "metrics.jsonl",
    "events.jsonl",
    "recipe.yaml",
    "environment.json",
    "manifest.json",
    CLIPS,
    "wandb.json",
    "report.html",
    "failure.txt",
    EMBEDDINGS,
    IMAGES,
    "heldout.json",
    RAY_CHECKPOINT_LIST,
    FATAL_ERROR_FILE,
    STOP_FILE,
    TRYING_FILE,
)
"""Files that a run writes, next to its checkpoints and samples."""
PACKAGES = ("sora_train", "torch", "ray", "deepspeed", "diffusers", "transformers", "pyarrow", "numpy", "wandb")


def check_writable(run: Path) -> None:
    """UserError if the run's folder can't be created or written. Leaves nothing behind."""
    if why := why_not_writable(run):
        raise UserError(
            f"the run's folder {run} can't be written: {why}. Set another folder with --train.output, or free space "
            "there",
            code="not_writable",
        )


def check_fresh(run: Path, overwrite: bool) -> None:
    """UserError if the folder holds a run, unless `overwrite`."""
    steps = checkpoint.step_folders(run / "checkpoints")
    if not overwrite and (steps or (run / "metrics.jsonl").exists()):
        held = f"a run with checkpoints up to {steps[-1].name}" if steps else "the records of a run"
        raise UserError(
            f"{run} holds {held}, which --fresh would remove. Add --overwrite to remove it, give this run another name "
            "(--name), or leave out --fresh to resume",
            code="exists",
        )


def check_some_complete(run: Path) -> None:
    """UserError if a run has checkpoints and none is complete: it must not silently start at step 0."""
    flaws = {
        path: flaw
        for path in checkpoint.step_folders(run / "checkpoints")
        if not checkpoint.is_unfinished(path) and isinstance(flaw := checkpoint.check_complete(path), str)
    }
    if flaws and not checkpoint.complete_checkpoints(run / "checkpoints"):
        named = "; ".join(f"{path.name}: {flaw}" for path, flaw in flaws.items())
        raise UserError(
            f"no checkpoint in {run / 'checkpoints'} is complete ({named}). Copy a complete one there, or start again "
            "with --fresh --overwrite",
            code="checkpoint",
        )


def remove_run(run: Path) -> None:
    """Removes what a run wrote, and nothing else: no shards and no files of others."""
    checkpoints = checkpoint.step_folders(run / "checkpoints")
    samples, damaged = run.glob("samples/step_*"), run.glob("checkpoints/damaged_step_*")
    for path in (*checkpoints, *damaged, *samples, run / "trained", run / "profile"):
        shutil.rmtree(path, ignore_errors=True)
    for name in RUN_FILES:
        (run / name).unlink(missing_ok=True)


def prepare_run_folder(run: Path, recipe: Recipe, manifest: Manifest, clips: Clips) -> None:
    """Writes the run's description and cleans up after an interrupted command."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    drafts = (path.name for path in run.glob(f"{DRAFT_PREFIX}*"))
    for name in (RAY_CHECKPOINT_LIST, FATAL_ERROR_FILE, STOP_FILE, TRYING_FILE, *drafts):
        (run / name).unlink(missing_ok=True)
    save_run_description(run, recipe, manifest, clips)
    record_lost_driver(run)
    atomic_write_text(run / "environment.json", json.dumps(environment(), indent=1))
    quarantine_damaged(run)
    RunDir(run).truncate(max((step for step, _ in checkpoint.complete_checkpoints(folder)), default=0))
    record_lost_validations(run)


def save_run_description(run: Path, recipe: Recipe, manifest: Manifest, clips: Clips) -> None:
    """Writes the recipe, the shards' encoding and the clips of a run."""
    run.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, run / "recipe.yaml")
    manifest.model_copy(update={"held_out": clips.counts(held_out=True)}).save(str(run))
    clips.save(run)


def environment() -> dict[str, Any]:
    """Versions and hardware of the driver's machine and of the cluster, for `environment.json`."""
    return {
        "python": platform.python_version(),
        "packages": package_versions(PACKAGES),
        "commit": git_commit() or None,
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "nodes": [
            {"address": node["NodeManagerAddress"], **node["Resources"]} for node in ray.nodes() if node["Alive"]
        ],
    }


def record_lost_driver(run: Path) -> None:
    """Writes an event if the previous command died without one, as by `kill -9` or with its machine."""
    kinds = [event["event"] for event in Events(run).lines.read() if event.get("event") in START_EVENTS + END_EVENTS]
    if kinds and kinds[-1] in START_EVENTS:
        why = "the previous command ended without an event, as by `kill -9` or with its machine"
        Events(run).write("driver_lost", last_step(run), why)


def record_lost_validations(run: Path) -> None:
    """Marks validations that ended with their command, to repeat them. One without a checkpoint becomes an event."""
    validations, there = ValidationStatus(run), {s for s, _ in checkpoint.complete_checkpoints(run / "checkpoints")}
    for step in validations.outstanding_steps():
        validations.set(step, "lost")
    for step in validations.lost_steps():
        if step not in there:
            validations.set(step, "failed")
            why = "it ended with its command, and its checkpoint has been deleted since"
            Events(run).write("validation_dropped", step, why)


def quarantine_damaged(run: Path) -> None:
    """Removes unfinished checkpoints; renames damaged ones and writes an event for each."""
    for path in checkpoint.step_folders(run / "checkpoints"):
        if checkpoint.is_unfinished(path):
            shutil.rmtree(path)
        elif isinstance(flaw := checkpoint.check_complete(path), str):
            aside = path.with_name(f"damaged_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            Events(run).write("damaged", int(path.name[5:]), f"{flaw}: renamed to {aside}")


@contextmanager
def os_errors_as_user_errors(run: Path) -> Iterator[None]:
    """Reports files of a run that can't be read or written as UserErrors."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or run} can't be read or written ({error.strerror or error}). It belongs to the run: "
            "move it away, or fix its permissions",
            code="not_writable",
        ) from None


def record_fatal_error(run: Path, error: UserError) -> None:
    """Writes why the run must end; the first reason is kept. A full disk leaves no file, and Ray tries again."""
    file = run / FATAL_ERROR_FILE
    with contextlib.suppress(OSError), file.open("x", encoding="utf-8") as opened:
        json.dump({"reason": str(error), "code": error.code}, opened)


def read_fatal_error(run: Path) -> UserError | None:
    """The error with which a worker ended the run, if one did."""
    file = run / FATAL_ERROR_FILE
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return UserError(saved["reason"], code=saved["code"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):  # cut off by a full disk
        why = f"a worker failed with an unrecoverable error but could not write the reason to {file}"
        return UserError(why, code="workers")


def last_step(run: Path) -> int:
    """The last logged step."""
    return JsonLines(run / "metrics.jsonl").last_step()


def resume_hint(run: Path) -> str:
    """The newest complete checkpoint and what the same command does next, as sentences."""
    if found := checkpoint.complete_checkpoints(run / "checkpoints"):
        return f"The last checkpoint is {found[-1][1]}. Run the same command to resume from it"
    return "There is no checkpoint yet. The same command starts at step 0"
