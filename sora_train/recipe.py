"""The recipe: one YAML file for the whole pipeline, from raw video to samples.

With one file, latents and model can't disagree. This module does not import Ray.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    field_validator,
)

from sora_train.codec import CodecConfig
from sora_train.data.config import DataConfig, PrepConfig, SelectionConfig, image_ratio_error
from sora_train.diffusion import ConditioningConfig, DiffusionConfig, resolve_sampler
from sora_train.errors import RecipeError, UserError
from sora_train.lora.config import LoraConfig
from sora_train.model import ModelConfig
from sora_train.model.config import PRESETS, with_preset
from sora_train.sampling import Sampling
from sora_train.section import Section
from sora_train.settings import build, read_yaml
from sora_train.storage import atomic_write_text
from sora_train.train.config import TrainConfig
from sora_train.train.deepspeed_config import contradictions
from sora_train.workers import ClusterConfig

I3D_FRAMES = 16
"""Minimum number of frames of a clip for the Fréchet video distance."""


class ValidationConfig(Sampling):
    """Samples and metrics, computed in a separate task during training."""

    every: NonNegativeInt = 0
    """Steps between validations, a multiple of `train.checkpoint_every`; 0: off."""
    prompts: tuple[str, ...] = ()
    """Prompts of the samples."""
    images: tuple[str, ...] = ()
    """Images that the samples begin with, for a model with `conditioning.probability` above 0. One for all prompts, or
    one for each; an empty name gives none. They are read and fitted when training starts."""
    seed: NonNegativeInt = 0
    """Seed of the samples' initial noise.
    It is the same at every validation, so samples of different steps are comparable."""
    holdout_clips: NonNegativeInt = 64
    """Maximum number of held-out clips for the held-out loss; 0: off.
    The clips are those of data.holdout_fraction. The loss is measured in ten bins of diffusion time."""
    fvd: bool = False
    """Measure the Fréchet video distance (FVD) to held-out clips with `i3d`.
    Clips need 16 frames or more. Slow on a CPU. It follows the original TensorFlow code, so values are not comparable
    with those that StyleGAN-V or Latte published."""
    fvd_clips: int = Field(default=256, ge=2)
    """Maximum number of held-out captions to sample for FVD.
    With fewer than 256 clips the value depends mostly on their number."""
    i3d: str = ""
    """Safetensors file of I3D's weights (Kinetics-400, 400 logits)."""
    clip: str = ""
    """CLIP model that scores the similarity of samples and prompts; empty: off.
    A folder in transformers' format or a hub id."""
    weights: Literal["ema", "raw"] = "ema"
    """Weights to sample from: `ema` (the average) or `raw` (as trained)."""
    timeout_s: PositiveFloat = 1800.0
    """Time limit of a validation task, in seconds.
    A task that exceeds it is stopped and recorded in `events.jsonl`. Training continues."""
    resources: dict[str, NonNegativeFloat] = {"CPU": 1.0}
    """Ray resources of the task, in addition to training's; such as `{GPU: 1}`."""


class TrackingConfig(Section):
    """Experiment tracking, in addition to the run's own files."""

    wandb: Literal["online", "offline", "off"] = "off"
    """Weights & Biases mode: logs metrics, videos, alerts and node utilisation.
    `offline` writes files for `wandb sync`."""
    project: str = "sora_train"
    """Weights & Biases project."""


class Recipe(Section):
    """A training job, from videos to samples."""

    name: str = "run"
    """Name of the run; its folder is `train.output/name`."""
    data: DataConfig = DataConfig()
    selection: SelectionConfig = SelectionConfig()
    prep: PrepConfig = PrepConfig()
    codec: CodecConfig = CodecConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig = ValidationConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("model", mode="before")
    @classmethod
    def lays_the_preset_under(cls, model: object) -> object:
        """Fills the keys of `model` that are not given from `model.preset`."""
        return with_preset(model) if isinstance(model, dict) else model

    @field_validator("name")
    @classmethod
    def names_a_folder(cls, name: str) -> str:
        """Refuses a name that would lead outside `train.output`."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
            raise ValueError(
                f"name {name!r} can't be a run's folder; use up to 200 letters, digits, '.', '_' and '-', beginning "
                "with a letter or digit, such as `first-run`"
            )
        return name


def load_recipe(path: str | Path, overrides: Mapping[str, object] | None = None) -> Recipe:
    """Loads a recipe from a YAML file and applies `overrides` ({"train.steps": 40}).

    A preset in `overrides` replaces the model's shape in the file. Raises RecipeError if the file can't be read, a key
    is unknown, a value is wrong, or keys contradict each other.
    """
    settings, overrides = read_yaml(path), overrides or {}
    if (chosen := overrides.get("model.preset")) and isinstance(model := settings.get("model"), dict):
        settings["model"] = {key: value for key, value in model.items() if key not in PRESETS.get(str(chosen), ())}
    recipe = build(Recipe, settings, overrides, str(path))
    wrong = check(recipe)
    if wrong:
        raise RecipeError("\n".join(f"{path}: {sentence}" for sentence in wrong))
    return recipe


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Writes every key, so a run's recipe.yaml also records the defaults."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    atomic_write_text(Path(path), text)


def check(recipe: Recipe) -> list[str]:
    """Finds contradictions between keys that are each valid alone.

    Each is one sentence with the keys, their values and what to change.
    """
    data, train, validation = recipe.data, recipe.train, recipe.validation
    wrong: list[str] = []

    if validation.every % train.checkpoint_every:
        below = validation.every // train.checkpoint_every * train.checkpoint_every
        choices = " or ".join(str(n) for n in (below, below + train.checkpoint_every) if n)
        wrong.append(
            f"validation.every {validation.every} is no multiple of train.checkpoint_every {train.checkpoint_every}, "
            f"and only checkpoints are validated; use {choices}, or 0 for none"
        )
    if validation.every and not validation.prompts:
        wrong.append("validation.prompts is empty but validation.every is not 0; give prompts, or set the latter to 0")
    wrong += images_errors(recipe)
    try:
        resolve_sampler(validation.sampler, recipe.diffusion.kind)
    except UserError as error:
        wrong.append(f"validation.{error}")

    if validation.fvd:
        wrong += fvd_lacks(recipe)
    if validation.guidance_without == "text_and_frames" and recipe.conditioning.probability in (0, 1):
        wrong.append(
            "validation.guidance_without text_and_frames needs a model that learned clips with given frames and clips "
            f"without, and conditioning.probability is {recipe.conditioning.probability:g}; use text, or a probability "
            "between 0 and 1"
        )

    if recipe.lora.rank and not recipe.model.init_from:
        wrong.append(
            f"lora.rank is {recipe.lora.rank} and model.init_from is empty; adapters are trained on weights that "
            "exist, so name them there, or set lora.rank to 0 to train all weights"
        )
    if recipe.lora.rank and train.precision == "fp8":
        wrong.append(
            "train.precision fp8 is for training all weights, and lora.rank is "
            f"{recipe.lora.rank}; use bf16 for adapters"
        )
    if recipe.model.learned_variance and recipe.diffusion.kind == "flow":
        wrong.append(
            "model.learned_variance is true, but with diffusion.kind flow there is no variance to learn; "
            "use diffusion.kind ddpm, or model.learned_variance false"
        )
    if data.clips_per_video and not data.stride_s:
        wrong.append(
            f"data.clips_per_video {data.clips_per_video} needs data.stride_s: without it every video gives one clip"
        )
    if lacking := image_ratio_error(data.image_ratio, data.shapes):
        wrong.append(lacking)
    low, high = recipe.selection.min_motion, recipe.selection.max_motion
    if high and low > high:
        wrong.append(f"selection.min_motion {low:g} is above selection.max_motion {high:g}; nothing would be left")
    if recipe.selection.max_seconds and recipe.selection.min_seconds > recipe.selection.max_seconds:
        wrong.append("selection.min_seconds is above selection.max_seconds; nothing would be left")
    wrong += workers_errors(recipe)
    if 0 < train.guard_spike < 1:
        wrong.append(
            f"train.guard_spike {train.guard_spike:g} would refuse steps like all others; use 1 or more, such as 5, or "
            "0 to let any finite gradient norm pass"
        )
    if not all(0 <= beta < 1 for beta in train.betas):
        wrong.append(f"train.betas are {train.betas}; both must be at least 0 and below 1")
    if train.profile and train.profile[0] > train.steps:
        wrong.append(
            f"train.profile begins at step {train.profile[0]} and train.steps is {train.steps}; use an earlier step"
        )
    wrong += contradictions(train)
    return wrong


def workers_errors(recipe: Recipe) -> list[str]:
    """Finds numbers of workers that contradict each other, the batch or the model."""
    cluster, batch_size, model = recipe.cluster, recipe.train.batch_size, recipe.model
    fewest, most, group = cluster.fewest, cluster.most, cluster.sequence_parallel
    found: list[str] = []
    if fewest > most:
        found.append(f"cluster.workers are {fewest} at least and {most} at most; use [{most}, {fewest}]")
    if max(fewest, most) > batch_size * group:
        found.append(
            f"cluster.workers {max(fewest, most)} is more than train.batch_size {batch_size}"
            + (f" times cluster.sequence_parallel {group}" if group > 1 else "")
            + f", so some would never see a clip; use at most {batch_size * group} workers or a larger batch"
        )
    if group > 1 and fewest != most:
        found.append(
            f"cluster.sequence_parallel is {group} and cluster.workers are {fewest} to {most}; groups need a fixed "
            f"number of workers, such as {max(group, fewest // group * group)}"
        )
    elif most % group:
        choices = " or ".join(str(n) for n in (most // group * group, -(-most // group) * group) if n)
        found.append(
            f"cluster.workers {most} is not a multiple of cluster.sequence_parallel {group}, the workers that share a "
            f"clip; use {choices} workers"
        )
    if not model.shares_clips_by(group):
        fits = [n for n in range(group, 0, -1) if model.shares_clips_by(n) and most % n == 0]
        found.append(
            f"cluster.sequence_parallel {group} does not divide model.heads {model.heads}, which the workers of a "
            f"group share in attention; use {fits[0]}"
        )
    return found


def images_errors(recipe: Recipe) -> list[str]:
    """Finds what is wrong with the number of `validation.images`, and what they need."""
    images, prompts, found = recipe.validation.images, recipe.validation.prompts, list[str]()
    if len(images) not in (0, 1, len(prompts)):
        found.append(
            f"validation.images names {len(images)} images for {len(prompts)} prompts; name one for all, or one for "
            "each prompt"
        )
    if any(images) and not recipe.conditioning.probability:
        found.append(
            "validation.images are given, but conditioning.probability is 0: the model would not learn to begin with "
            "an image. Set conditioning.probability above 0, such as 0.5, or remove validation.images"
        )
    return found


def fvd_lacks(recipe: Recipe) -> list[str]:
    """Finds what `validation.fvd` needs and the recipe lacks."""
    lacks: list[str] = []
    if not recipe.validation.i3d:
        lacks.append("validation.i3d is empty; name the safetensors of I3D's weights")
    if not recipe.data.holdout_fraction:
        lacks.append(
            "data.holdout_fraction is 0, so that there are no clips to compare with; hold some out, such as 0.02"
        )
    if (longest := max(frames for frames, _, _ in recipe.data.shapes)) < I3D_FRAMES:
        lacks.append(f"clips have {longest} frames and I3D needs {I3D_FRAMES}; raise data.frames")
    return [f"validation.fvd is true, but {sentence}, or set validation.fvd to false" for sentence in lacks]
