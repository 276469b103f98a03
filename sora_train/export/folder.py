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
from sora_train.errors import UserError
from sora_train.export.card import write_card
from sora_train.export.pipeline import PIPELINES, refusals, write_pipeline
from sora_train.log import log
from sora_train.recipe import save_recipe
from sora_train.sample.export_note import EXPORT_FORMAT, ExportNote, Weights, read_note, transformer_hash
from sora_train.sample.load import Run, load_run
from sora_train.sample.released import is_released
from sora_train.storage import draft_name, follow_umask
from sora_train.train.weights import EXPORT_INFO, EXPORTED, save_weights


def export(path: str | Path, out: str | Path, weights_only: bool = False, weights: Weights | None = None) -> Path:
    """Exports a run, a checkpoint or another export to the new folder `out`.

    By default the folder is a diffusers `LattePipeline` or `WanPipeline` with VAE, text encoder and scheduler. Raises
    UserError, with the reasons, if a pipeline can't hold the run's model. With `weights_only` the folder has one
    safetensors file, for any run. Both have recipe.yaml, manifest.json and a model card, and `load_run` reads them.
    """
    out = Path(out).expanduser()
    check_free(out)
    if is_released(Path(path).expanduser()):
        raise UserError(f"{path} is a released pipeline, not a run: there is nothing to export")
    run = load_run(path, device="cpu", weights=weights, dtype=torch.float32)
    if not weights_only and (reasons := refusals(run.recipe, run.manifest)):
        raise UserError(
            f"{run.folder} can't become a {PIPELINES[run.recipe.model.family]}: {'; '.join(reasons)}. --weights_only "
            "writes its weights and recipe, which `sora sample` reads"
        )
    with_draft(out, lambda draft: write_weights(run, draft) if weights_only else write_whole_pipeline(run, draft))
    log.info(f"{out}: the {run.weights} weights of {run.checkpoint}; its README.md says how to use it")
    return out


def check_free(out: Path) -> None:
    """Raises UserError unless `out` is a new or an empty folder.

    An export never replaces anything. A name that ends in .safetensors is refused too, because `out` is a folder.
    """
    if out.suffix == ".safetensors":
        raise UserError(
            f"{out} is a file's name, and OUT is a folder that gets several files; name one without .safetensors"
        )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} is there and no folder; name another one")
    if out.is_dir() and any(out.iterdir()):
        note = read_note(out) if (out / EXPORT_INFO).is_file() else None
        holds = f"holds an export of step {note.step}; remove it first, or" if note else "is not empty;"
        raise UserError(f"{out} {holds} name another folder")


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
        raise UserError(f"{out} can't be written ({error}); make room there, or name another folder") from None
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


def finish(run: Run, draft: Path, note: ExportNote) -> None:
    """Writes the files that both kinds of export have."""
    save_recipe(run.recipe, draft / "recipe.yaml")
    run.manifest.save(str(draft))
    write_card(run, draft, note)
    text = json.dumps({"format": EXPORT_FORMAT, **asdict(note)}, indent=1)
    (draft / EXPORT_INFO).write_text(text + "\n", encoding="utf-8")


def codec_hashes(run: Run) -> tuple[str, str]:
    """Hashes of the VAE and the text encoder that go with the run's weights."""
    if run.exported is not None:
        return run.exported.vae, run.exported.text
    return run.manifest.vae.hash, run.manifest.text.hash


def step_of(run: Run) -> int:
    """The step of the weights; -1 if the checkpoint's name doesn't say it."""
    if run.exported is not None:
        return run.exported.step
    digits = run.checkpoint.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() else -1
