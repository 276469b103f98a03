"""`sora export`: writes the whole folder or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError

from sora_train.codec.files import find_text_encoder, find_vae
from sora_train.errors import RecipeError, UserError
from sora_train.export.adapters import AdaptedRun, find_adapted, write_lora_card
from sora_train.export.card import write_card
from sora_train.export.pipeline import PIPELINES, refusals, write_pipeline
from sora_train.log import log
from sora_train.lora.files import write_lora
from sora_train.recipe import save_recipe
from sora_train.sample.export_note import EXPORT_FORMAT, ExportNote, Weights, read_note, transformer_hash
from sora_train.sample.load import Run, load_run
from sora_train.sample.released import is_released
from sora_train.storage import draft_name, follow_umask, why_not_writable
from sora_train.train.weights import EXPORT_INFO, EXPORTED, save_weights


def export(
    path: str | Path,
    out: str | Path,
    weights_only: bool = False,
    weights: Weights | None = None,
    lora: bool = False,
    merge: bool = False,
) -> Path:
    """Exports a run, a checkpoint or another export to the new folder `out`.

    By default the folder is a diffusers `LattePipeline` or `WanPipeline` with VAE, text encoder and scheduler. Raises
    UserError, with the reasons, if a pipeline can't hold the run's model. With `weights_only` the folder has one
    safetensors file, for any run. Both have recipe.yaml, manifest.json and a model card, and `load_run` reads them.

    A run that trained adapters needs `lora`, which writes the adapters alone, or `merge`, which adds them to their
    base.
    """
    out = Path(out).expanduser()
    check_free(out)
    if is_released(Path(path).expanduser()):
        raise UserError(f"{path} is a released pipeline, not a run: there is nothing to export", code="unsupported")
    adapted = find_adapted(path, weights or "ema")
    check_choice(path, adapted is not None, lora, merge, weights_only)
    if lora and adapted is not None:
        with_draft(out, lambda draft: write_adapters(adapted, draft))
        log.info(f"{out}: the {adapted.weights} adapters of {adapted.checkpoint}; its README.md says how to use them")
        return out
    run = load_run(path, device="cpu", weights=weights, dtype=torch.float32)
    if not weights_only and (reasons := refusals(run.recipe, run.manifest)):
        raise UserError(
            f"{run.folder} can't become a {PIPELINES[run.recipe.model.family]}: {'; '.join(reasons)}. --weights_only "
            "writes its weights and recipe, which `sora sample` reads",
            code="unsupported",
        )
    with_draft(out, lambda draft: write_weights(run, draft) if weights_only else write_whole_pipeline(run, draft))
    log.info(f"{out}: the {run.weights} weights of {run.checkpoint}; its README.md says how to use it")
    return out


def check_choice(path: str | Path, adapted: bool, lora: bool, merge: bool, weights_only: bool) -> None:
    """Raises RecipeError for flags that contradict each other or the run."""
    if lora and (merge or weights_only):
        raise RecipeError(f"--lora writes adapters alone, and --{'merge' if merge else 'weights_only'} a whole model")
    if adapted and not lora and not merge:
        raise RecipeError(
            f"{path} trained adapters on a frozen base. --lora writes the adapters alone, which are small and go with "
            "the base; --merge writes a whole model, the base with the adapters added"
        )
    if not adapted and (lora or merge):
        raise RecipeError(f"{path} has no adapters: it holds a whole model. Leave out --{'lora' if lora else 'merge'}")


def check_free(out: Path) -> None:
    """Raises UserError unless `out` is a new or an empty folder that can be written.

    An export never replaces anything. A name that ends in .safetensors is refused too, because `out` is a folder.
    """
    if out.suffix == ".safetensors":
        raise UserError(
            f"{out} is a file's name, and OUT is a folder that gets several files; name one without .safetensors",
            code="exists",
        )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} is there and no folder; name another one", code="exists")
    if why := why_not_writable(out.absolute().parent):
        raise UserError(f"{out} can't be written: {why}; name another folder", code="not_writable")
    if out.is_dir() and any(out.iterdir()):
        note = read_note(out) if (out / EXPORT_INFO).is_file() else None
        holds = f"holds an export of step {note.step}; remove it first, or" if note else "is not empty;"
        raise UserError(f"{out} {holds} name another folder", code="exists")


def with_draft(out: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder under a temporary name, then renames it.

    If that fails, deletes the folder and raises UserError.
    """
    draft = out.absolute().with_name(draft_name(out.absolute().name))
    try:
        draft.mkdir(parents=True)
        write(draft)
        follow_umask(draft)
        if out.is_dir():
            out.rmdir()  # it is empty; renaming onto it fails on some systems
        draft.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{out} can't be written ({error}); make room there, or name another folder", code="not_writable"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_weights(run: Run, draft: Path) -> None:
    """Writes weights and recipe. VAE and text encoder stay where they are."""
    save_weights(draft / EXPORTED, run.model.state_dict())
    finish(run, draft, ExportNote("weights", run.weights, step_of(run), *codec_hashes(run)))


def write_whole_pipeline(run: Run, draft: Path) -> None:
    """Writes a self-contained pipeline."""
    write_pipeline(run, draft)
    vae, text = find_vae(str(draft)).hash, find_text_encoder(str(draft)).hash
    finish(run, draft, ExportNote("pipeline", run.weights, step_of(run), vae, text, transformer_hash(draft)))


def write_adapters(adapted: AdaptedRun, draft: Path) -> None:
    """Writes files of adapters. The base stays where it is."""
    files = write_lora(draft, adapted.adapter, adapted.recipe.model, adapted.recipe.name)
    write_lora_card(adapted, draft, files)
    manifest = adapted.manifest
    step = step_of_checkpoint(adapted.checkpoint)
    note_it(adapted, draft, ExportNote("lora", adapted.weights, step, manifest.vae.hash, manifest.text.hash))


def finish(run: Run, draft: Path, note: ExportNote) -> None:
    """Writes the files that both kinds of whole models have."""
    write_card(run, draft, note)
    note_it(run, draft, note)


def note_it(run: Run | AdaptedRun, draft: Path, note: ExportNote) -> None:
    """Writes recipe, manifest and what the folder holds."""
    save_recipe(run.recipe, draft / "recipe.yaml")
    run.manifest.save(str(draft))
    text = json.dumps({"format": EXPORT_FORMAT, **asdict(note)}, indent=1)
    (draft / EXPORT_INFO).write_text(text + "\n", encoding="utf-8")


def codec_hashes(run: Run) -> tuple[str, str]:
    """Hashes of the VAE and the text encoder that go with the run's weights."""
    if run.exported is not None:
        return run.exported.vae, run.exported.text
    return run.manifest.vae.hash, run.manifest.text.hash


def step_of(run: Run) -> int:
    """The step of the weights; -1 if the checkpoint's name doesn't say it."""
    return run.exported.step if run.exported is not None else step_of_checkpoint(run.checkpoint)


def step_of_checkpoint(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 if there is none."""
    digits = checkpoint.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() else -1
