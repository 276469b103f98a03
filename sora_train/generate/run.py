"""A run that can be sampled: the averaged weights of its newest complete checkpoint, and what belongs to them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sora_train.codec.text import TextEncoder, text_encoder_of
from sora_train.codec.vae import Vae, load_vae
from sora_train.diffusion import Objective, make_objective
from sora_train.errors import UserError
from sora_train.manifest import Manifest
from sora_train.model import Latte
from sora_train.recipe import Recipe, load_recipe
from sora_train.train.checkpoint import read_averaged, step_folders

WEIGHTS = "ema.safetensors"


@dataclass
class Run:
    """A trained model with what it needs to make videos. VAE and text encoder are loaded when first used."""

    folder: Path
    checkpoint: Path
    recipe: Recipe
    manifest: Manifest
    model: Latte
    objective: Objective
    device: torch.device

    @cached_property
    def vae(self) -> Vae:
        vae = load_vae(self.recipe.codec.vae, device=self.device, models=self.recipe.codec.models)
        self._same("codec.vae", self.recipe.codec.vae, vae.hash, self.manifest.vae.hash)
        return vae

    @cached_property
    def text_encoder(self) -> TextEncoder:
        codec = self.recipe.codec
        encoder = text_encoder_of(codec, device=self.device)
        self._same("codec.text", codec.text, encoder.hash, self.manifest.text.hash)
        return encoder

    @property
    def fps(self) -> float:
        return self.manifest.fps

    def _same(self, key: str, name: str, found: str, trained: str) -> None:
        if found != trained:
            raise UserError(
                f"{key} {name!r} is not what {self.folder} was trained with (content {found[:12]}, trained with "
                f"{trained[:12]}); name the folder of the original in {self.checkpoint / 'recipe.yaml'}"
            )


def load_run(path: str | Path, device: str | torch.device | None = None) -> Run:
    """A run's folder, or one of its checkpoints, ready to sample; on a GPU where there is one, unless told otherwise.

    Raises UserError, with what to do, where there is no run, no complete checkpoint, or none that can be read.
    """
    folder, checkpoint = find_checkpoint(path)
    recipe = load_recipe(_beside(checkpoint, folder, "recipe.yaml"))
    manifest = Manifest.load(str(_beside(checkpoint, folder, "manifest.json").parent))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = Latte(recipe.model)
    try:
        model.load_state_dict(read_averaged(checkpoint / WEIGHTS))
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise UserError(f"{checkpoint / WEIGHTS} does not fit the model in its recipe.yaml: {first}") from None
    model.requires_grad_(False).eval().to(device)
    objective = make_objective(recipe.diffusion, recipe.model.learned_variance)
    return Run(folder, checkpoint, recipe, manifest, model, objective, device)


def find_checkpoint(path: str | Path) -> tuple[Path, Path]:
    """The run's folder and the checkpoint to use: the one named, or the run's newest whose weights are whole."""
    if "://" in str(path):
        raise UserError(f"{path} is remote; copy the checkpoint's folder here and name the copy")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        near = [str(place.parent) for place in sorted(folder.parent.glob("*/recipe.yaml"))]
        hint = f"runs there: {', '.join(near)}" if near else "`sora train RECIPE` makes one"
        raise UserError(f"no run at {folder}; {hint}")
    if (folder / WEIGHTS).is_file():
        above = folder.absolute().parent.parent
        if not _is_whole(folder / WEIGHTS):
            raise UserError(f"{folder / WEIGHTS} is cut short or no safetensors; use another checkpoint")
        return (above if (above / "recipe.yaml").is_file() else folder), folder
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is no run: it has no recipe.yaml; name the folder that `sora train` made")
    for checkpoint in reversed(step_folders(folder / "checkpoints")):
        if _is_whole(checkpoint / WEIGHTS):
            return folder, checkpoint
        print(f"warning: {checkpoint} is unfinished or damaged; looking for one before it", file=sys.stderr, flush=True)
    raise UserError(
        f"{folder} has no complete checkpoint yet; one is written every train.checkpoint_every steps and at the end: "
        "wait, or run `sora train` again to resume"
    )


def _is_whole(weights: Path) -> bool:
    """Whether a safetensors file is there in full: its header knows how long it must be."""
    try:
        with safe_open(weights, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _beside(checkpoint: Path, folder: Path, name: str) -> Path:
    """A file of the checkpoint, or else of its run."""
    for place in (checkpoint, folder):
        if (place / name).is_file():
            return place / name
    raise UserError(f"{checkpoint} can't be sampled: {name} is neither in it nor in {folder}")
