"""Loads a run for sampling: the weights of its newest complete checkpoint, of an export, or of a released model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from torch import Tensor

from sora_train.codec import CodecConfig
from sora_train.codec.text import TextEncoder, text_encoder_of
from sora_train.codec.vae import Vae, load_vae
from sora_train.diffusion import Objective, make_objective
from sora_train.errors import UserError
from sora_train.log import log
from sora_train.manifest import Manifest
from sora_train.model import Transformer, build
from sora_train.model.convert import check_fit, from_diffusers
from sora_train.recipe import Recipe, load_recipe
from sora_train.sample.export_note import ExportNote, Weights, read_note, transformer_hash
from sora_train.sample.lora import LoraFile, load_adapted, merge_files
from sora_train.sample.released import is_released, read_released
from sora_train.train.checkpoint import check_complete, step_folders
from sora_train.train.weights import EXPORT_INFO, EXPORTED, read_trained_weights, read_weights
from sora_train.weight_headers import is_whole

WEIGHTS = "ema.safetensors"


@dataclass
class Run:
    """A trained model with its VAE and text encoder, which are loaded when first used."""

    folder: Path
    checkpoint: Path
    recipe: Recipe
    manifest: Manifest
    model: Transformer
    objective: Objective
    device: torch.device
    exported: ExportNote | None = None
    weights: Weights = "ema"
    released: bool = False
    """Whether it is a pipeline that sora_train did not write."""
    lora: tuple[LoraFile, ...] = ()
    """Files of adapters that were added to the weights."""
    compiled: bool = False
    """Whether the model's blocks are compiled."""

    @cached_property
    def vae(self) -> Vae:
        vae = load_vae(self.recipe.codec.vae, device=self.device, models=self.recipe.codec.models)
        if self.manifest.vae.hash:  # a released pipeline has none to compare
            self.check_vae(vae.hash)
        return vae

    @cached_property
    def text_encoder(self) -> TextEncoder:
        encoder = text_encoder_of(self.recipe.codec, device=self.device)
        if self.manifest.text.hash:
            self.check_text(encoder.hash)
        return encoder

    def predict(
        self,
        x: Float[Tensor, "b f c h w"],
        t: Float[Tensor, " b *f"],
        text: Float[Tensor, "b l e"],
        text_mask: Bool[Tensor, "b l"],
    ) -> Float[Tensor, "b f o h w"]:
        """The model's prediction in the dtype of its weights; float32 in and out, so a sampler's state is float32."""
        dtype = self.model.patch_in.weight.dtype
        return self.model(x.to(dtype), t, text.to(dtype), text_mask).float()

    @property
    def fps(self) -> float:
        return self.manifest.fps

    def check_vae(self, found: str) -> None:
        """Raises UserError if a VAE with this hash does not belong to the weights."""
        trained = self.exported.vae if self.exported else self.manifest.vae.hash
        self._same("codec.vae", self.recipe.codec.vae, found, trained)

    def check_text(self, found: str) -> None:
        """Raises UserError if a text encoder with this hash does not belong to the weights."""
        trained = self.exported.text if self.exported else self.manifest.text.hash
        self._same("codec.text", self.recipe.codec.text, found, trained)

    def _same(self, key: str, name: str, found: str, trained: str) -> None:
        if found != trained:
            raise UserError(
                f"{key} {name!r} is not what {self.folder} was trained with (content {found[:12]}, trained with "
                f"{trained[:12]}); name the folder of the original in {self.checkpoint / 'recipe.yaml'}",
                code="codec",
            )


def load_run(
    path: str | Path,
    device: str | torch.device | None = None,
    weights: Weights | None = None,
    dtype: torch.dtype | None = None,
    lora: Sequence[LoraFile] = (),
) -> Run:
    """Loads a run's folder, one of its checkpoints, an export of `sora export`, or a released diffusers pipeline.

    It is loaded on the GPU if any, unless `device` says otherwise. The weights get the dtype of the recipe's
    `train.precision`, or `dtype`. `weights` is `ema` (averaged) or `raw` (as trained); None is `ema` for a run, and
    whatever an export holds. A run that trained adapters is its base with them added; then the files of `lora` are
    added. Raises UserError, with what to do, if there is no run, no complete checkpoint, or none that can be read.
    """
    at = Path(path).expanduser()
    note, released = read_note(at), is_released(at)
    if released and weights is not None:
        raise UserError(
            f"{at} is a released pipeline with one kind of weights; leave out --weights", code="unsupported"
        )
    if note is not None and note.kind == "lora":
        raise UserError(
            f"{at} holds adapters alone. Name their base, and add them: sora sample BASE --lora {at}",
            code="unsupported",
        )
    folder, checkpoint = (at, at) if note or released else find_checkpoint(path, weights or "ema")
    recipe, manifest = read_released(at) if released else read_recipe(folder, checkpoint, note, weights)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.device("meta"):  # random weights would take longer than reading the real ones
        model = build(recipe.model)
    if recipe.lora.rank and note is None:
        load_adapted(model, checkpoint, recipe, weights or "ema")
    else:
        place, tensors = _read(model, checkpoint, note, weights, released)
        try:
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise UserError(f"{place} does not fit the model in its recipe.yaml: {first}", code="checkpoint") from None
    merge_files(model, lora)  # before the weights are rounded to a lower precision
    if dtype is None:
        dtype = torch.bfloat16 if recipe.train.half else torch.float32
    model.requires_grad_(False).eval().to(device, dtype)
    objective = make_objective(recipe.diffusion, recipe.model.learned_variance, recipe.conditioning)
    held = note.weights if note is not None else weights or "ema"
    return Run(folder, checkpoint, recipe, manifest, model, objective, device, note, held, released, tuple(lora))


def read_recipe(
    folder: Path, checkpoint: Path, note: ExportNote | None = None, weights: Weights | None = None
) -> tuple[Recipe, Manifest]:
    """Recipe and manifest of a checkpoint or an export, with the codec as it was in training."""
    if note is not None and weights not in (None, note.weights):
        raise UserError(
            f"{folder} holds the {note.weights} weights alone; for the {weights} ones name the run", code="unsupported"
        )
    remedy = (
        "export the run again"
        if note is not None
        else "copy it from another checkpoint, or manifest.json from the shards"
    )
    recipe = load_recipe(_beside(checkpoint, folder, "recipe.yaml", remedy))
    facts = _beside(checkpoint, folder, "manifest.json", remedy)
    try:
        manifest = Manifest.load(str(facts.parent))
    except UserError:  # its own message tells to encode the clips again
        raise UserError(f"{facts} is damaged, or of another version of sora_train; {remedy}", code="run") from None
    codec = as_trained(recipe.codec, manifest)
    if note is not None and note.kind == "pipeline":  # it is self-contained and may have been moved
        codec = codec.model_copy(update={"vae": str(folder), "text": str(folder), "models": ""})
    return recipe.model_copy(update={"codec": codec}), manifest


def as_trained(codec: CodecConfig, manifest: Manifest) -> CodecConfig:
    """A run's codec config without `auto`. Runs older than `null_prompt` learned `eos`."""
    null_prompt = "eos" if codec.null_prompt == "auto" else codec.null_prompt
    cleaning = manifest.text.caption_cleaning
    return codec.model_copy(update={"caption_cleaning": cleaning, "null_prompt": null_prompt})


def _read(
    model: Transformer, folder: Path, note: ExportNote | None, weights: Weights | None, released: bool
) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of a checkpoint, an export or a released pipeline, and the path that they are from."""
    remedy = "fetch it again" if released else "export the run again"
    if note is None and not released:
        if weights == "raw":
            shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            return folder, read_trained_weights(folder, shapes)
        return folder / WEIGHTS, read_weights(folder / WEIGHTS)
    if note is not None and note.kind == "weights":
        if not is_whole(folder / EXPORTED):
            raise UserError(f"{folder / EXPORTED} is missing, cut short or no safetensors; {remedy}", code="run")
        return folder / EXPORTED, read_weights(folder / EXPORTED)
    try:
        if note is not None and note.transformer and transformer_hash(folder) != note.transformer:
            raise UserError(f"{folder / 'transformer'} is damaged or was changed since; {remedy}", code="run")
        check_fit(model.config, folder)
        return folder / "transformer", from_diffusers(folder).state_dict()
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder / 'transformer'} can't be read: {error}; {remedy}", code="run") from None


def find_checkpoint(path: str | Path, weights: Weights = "ema") -> tuple[Path, Path]:
    """The run's folder and a checkpoint: the one at `path`, or the run's newest one with complete weights."""
    if "://" in str(path):
        raise UserError(f"{path} is remote; copy the checkpoint's folder here and name the copy", code="paths")
    folder = Path(path).expanduser()
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the folder: {folder.parent}", code="run")
    if not folder.is_dir():
        near = [str(place.parent) for place in sorted(folder.parent.glob("*/recipe.yaml"))]
        hint = f"runs there: {', '.join(near)}" if near else "`sora train RECIPE` makes one"
        raise UserError(f"no run at {folder}; {hint}", code="run")
    if (folder / WEIGHTS).is_file():
        above = folder.absolute().parent.parent
        if not is_whole(folder / WEIGHTS):
            raise UserError(
                f"{folder / WEIGHTS} is cut short or no safetensors; use another checkpoint", code="checkpoint"
            )
        return (above if (above / "recipe.yaml").is_file() else folder), folder
    if any((folder / name).is_file() for name in ("model_index.json", EXPORTED)):
        raise UserError(
            f"{folder} is an export without {EXPORT_INFO}, or of other software; copy the whole folder that "
            "`sora export` made, or export the run again",
            code="run",
        )
    if (folder / "config.json").is_file():
        whole = folder.absolute().parent
        found = any((whole / name).is_file() for name in ("model_index.json", "transformer/config.json"))
        where = f"its parent folder: {whole}" if found else "a folder with its VAE and text encoder too"
        raise UserError(f"{folder} is one network of a pipeline; name {where}", code="run")
    if not (folder / "recipe.yaml").is_file():
        raise UserError(
            f"{folder} is no run: it has no recipe.yaml; name the folder that `sora train` made", code="run"
        )
    checkpoints = step_folders(folder / "checkpoints")
    for checkpoint in reversed(checkpoints):
        if is_whole(checkpoint / WEIGHTS) and (weights == "ema" or isinstance(check_complete(checkpoint), dict)):
            return folder, checkpoint
        log.warning(f"{checkpoint} is unfinished or damaged; looking for one before it")
    if checkpoints:
        averaged = weights == "raw" and any(is_whole(checkpoint / WEIGHTS) for checkpoint in checkpoints)
        raise UserError(
            f"{folder} has no complete checkpoint: none of its {len(checkpoints)} is whole; "
            + ("the averaged weights can be had (--weights ema)" if averaged else "run `sora train` again"),
            code="checkpoint",
        )
    raise UserError(
        f"{folder} has no complete checkpoint yet; one is written every train.checkpoint_every steps and at the end: "
        "wait, or run `sora train` again to resume",
        code="checkpoint",
    )


def _beside(checkpoint: Path, folder: Path, name: str, remedy: str) -> Path:
    """A file in the checkpoint, or in its run."""
    for place in (checkpoint, folder):
        if (place / name).is_file():
            return place / name
    places = " nor in ".join(map(str, dict.fromkeys((checkpoint, folder))))
    raise UserError(f"{checkpoint} can't be read: there is no {name} in {places}; {remedy}", code="run")
