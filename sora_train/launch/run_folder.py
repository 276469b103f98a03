"""A run's folder as the driver and the workers see it: whether it can be written, what begins and what ends a run."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sora_train.errors import UserError
from sora_train.launch.clips import CLIPS, Clips
from sora_train.launch.environment import environment
from sora_train.launch.validation import EMBEDDINGS, ValidationStatus
from sora_train.manifest import Manifest
from sora_train.recipe import Recipe, save_recipe
from sora_train.storage import DRAFT_PREFIX, atomic_write_text, broken_link
from sora_train.train import checkpoint
from sora_train.train.metrics import Events, JsonLines
from sora_train.train.run_dir import STOP_FILE, Home

START_EVENTS, END_EVENTS = ("start", "resume"), ("end", "failed", "stopped", "interrupted")
"""Events with which training begins, and those with which a command's training is over."""
FATAL_ERROR_FILE = "stop.json"
"""Why a worker ended the run, where no repetition would mend it: workers that Ray starts anew find it and end too."""
RAY_CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""Ray's list of checkpoints. It would bring a whole run down over one that somebody removed; workers report anew."""
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
    "heldout.json",
    RAY_CHECKPOINT_LIST,
    FATAL_ERROR_FILE,
    STOP_FILE,
)
"""Files that a run writes, beside its checkpoints and its samples."""


def check_writable(run: Path) -> None:
    """UserError where the run's folder can't be made or written. Leaves nothing behind."""
    if broken := broken_link(run):
        raise UserError(f"the run's folder {run} can't be written: {broken}. Make that folder, or remove the link")
    above = next(place for place in (run, *run.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=above) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        raise UserError(
            f"the run's folder {run} can't be written: {error.strerror or error} ({above}); "
            "give another place with --train.output, or make room there"
        ) from None


def check_fresh(run: Path, overwrite: bool) -> None:
    """UserError where the folder holds a run that nobody said may go."""
    steps = checkpoint.step_folders(run / "checkpoints")
    if not overwrite and (steps or (run / "metrics.jsonl").exists()):
        held = f"a run with checkpoints up to {steps[-1].name}" if steps else "the records of a run"
        raise UserError(
            f"{run} holds {held}, which --fresh would remove; add --overwrite if it may go, give this one another name "
            "(--name), or leave --fresh out to go on"
        )


def remove_run(run: Path) -> None:
    """Removes what a run wrote, and nothing else: neither shards nor anybody's own files."""
    checkpoints = checkpoint.step_folders(run / "checkpoints")
    for path in (*checkpoints, *run.glob("checkpoints/damaged_step_*"), *run.glob("samples/step_*"), run / "trained"):
        shutil.rmtree(path, ignore_errors=True)
    for name in RUN_FILES:
        (run / name).unlink(missing_ok=True)


def prepare_run_folder(run: Path, recipe: Recipe, manifest: Manifest, clips: Clips) -> None:
    """What a run says of itself; leftovers of a run that was cut off are cleared away."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    drafts = (path.name for path in run.glob(f"{DRAFT_PREFIX}*"))
    for name in (RAY_CHECKPOINT_LIST, FATAL_ERROR_FILE, STOP_FILE, *drafts):
        (run / name).unlink(missing_ok=True)
    save_run_description(run, recipe, manifest, clips)
    record_lost_driver(run)
    atomic_write_text(run / "environment.json", json.dumps(environment(), indent=1))
    quarantine_damaged(run)
    last = max((step for step, _ in checkpoint.whole(folder)), default=0)
    outstanding = ValidationStatus(run)
    for step in outstanding.outstanding_steps():
        outstanding.set(step, "lost")
    Home(run).cut_back(last)


def save_run_description(run: Path, recipe: Recipe, manifest: Manifest, clips: Clips) -> None:
    """Writes what a run is made of: its recipe, how its clips were encoded, and which they are."""
    run.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, run / "recipe.yaml")
    manifest.model_copy(update={"held_out": clips.counts(held_out=True)}).save(str(run))
    clips.save(run)


def record_lost_driver(run: Path) -> None:
    """Notes that the command before this one ended without a word: its own last event would say why it ended."""
    told = [event["event"] for event in Events(run).lines.read() if event.get("event") in START_EVENTS + END_EVENTS]
    if told and told[-1] in START_EVENTS:
        why = "the command before this one ended without a word, as by `kill -9` or with its machine"
        Events(run).write("driver_lost", last_step(run), why)


def quarantine_damaged(run: Path) -> None:
    """Removes checkpoints that a kill left unfinished; what is damaged is kept under another name, and named."""
    for path in checkpoint.step_folders(run / "checkpoints"):
        if checkpoint.unfinished(path):
            shutil.rmtree(path)
        elif isinstance(flaw := checkpoint.examine(path), str):
            aside = path.with_name(f"damaged_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            Events(run).write("damaged", int(path.name[5:]), f"{flaw}: put aside as {aside}")


def check_some_complete(run: Path) -> None:
    """UserError where a run has checkpoints and none is whole: it would begin anew, and nobody asked for that."""
    flaws = {
        path: flaw
        for path in checkpoint.step_folders(run / "checkpoints")
        if not checkpoint.unfinished(path) and isinstance(flaw := checkpoint.examine(path), str)
    }
    if flaws and not checkpoint.whole(run / "checkpoints"):
        named = "; ".join(f"{path.name}: {flaw}" for path, flaw in flaws.items())
        raise UserError(
            f"no checkpoint in {run / 'checkpoints'} is whole ({named}). Put a whole one there, or begin anew with "
            "--fresh --overwrite"
        )


@contextmanager
def os_errors_as_user_errors(run: Path) -> Iterator[None]:
    """Files of a run that can't be read or written as UserErrors."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or run} can't be read or written ({error.strerror or error}): it belongs to the run; "
            "move it away, or mend its permissions"
        ) from None


def record_fatal_error(run: Path, reason: str) -> None:
    """Notes why the run must end; the first reason stays. On a full disk there is no note, and Ray tries again."""
    note = run / FATAL_ERROR_FILE
    with contextlib.suppress(OSError), note.open("x", encoding="utf-8") as file:
        json.dump({"reason": reason}, file)


def read_fatal_error(run: Path) -> str:
    """The reason in `stop.json`; an empty string where there is none."""
    try:
        return str(json.loads((run / FATAL_ERROR_FILE).read_text(encoding="utf-8"))["reason"])
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError):  # cut off by a full disk
        return f"a worker met what can't be mended, and could not write it into {run / FATAL_ERROR_FILE}"


def last_step(run: Path) -> int:
    """The last step that was written down."""
    return max((record["step"] for record in JsonLines(run / "metrics.jsonl").read()), default=0)


def newest_checkpoint(run: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest whole checkpoint."""
    found = checkpoint.whole(run / "checkpoints")
    return found[-1] if found else None


def resume_hint(run: Path) -> str:
    """The newest whole checkpoint and what the same command does next, as sentences."""
    if found := newest_checkpoint(run):
        return f"The last checkpoint is {found[1]}. Run the same command to resume from it"
    return "There is no checkpoint yet. The same command begins at step 0"
