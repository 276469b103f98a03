"""A recipe: everything from raw video to sample in one YAML file, so that latents and model can't drift apart.

Needs no Ray.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import yaml
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from sora_train.codec import CodecConfig
from sora_train.data.config import DataConfig, PrepConfig, SelectionConfig, image_ratio_error
from sora_train.diffusion import DiffusionConfig, resolve_sampler
from sora_train.errors import RecipeError, UserError
from sora_train.model import ModelConfig
from sora_train.model.config import PRESETS, with_preset
from sora_train.sampling import Sampling
from sora_train.section import Section
from sora_train.settings import build, read_yaml
from sora_train.storage import atomic_write_text
from sora_train.train.config import TrainConfig
from sora_train.train.deepspeed_config import contradictions

PIXELS_PER_LATENT = 8
"""Pixels on a side that one latent stands for: the VAEs that are read here shrink by eight."""
I3D_FRAMES = 16
"""The shortest clips whose Fréchet video distance is measured."""


class ValidationConfig(Sampling):
    """Samples and figures that a task of their own makes while training goes on."""

    every: NonNegativeInt = 0
    """Steps between two validations, a multiple of `train.checkpoint_every`; 0 is off."""
    prompts: tuple[str, ...] = ()
    """What to sample."""
    seed: NonNegativeInt = 0
    """Fixes the noise that videos begin as: the same at every step, so that one sees them change over training."""
    holdout_clips: NonNegativeInt = 64
    """Most clips of data.holdout_fraction whose loss is measured, in ten bins of diffusion time; 0 is none."""
    fvd: bool = False
    """Measure the Fréchet video distance to held-out clips (16 frames or more) by `i3d`; slow on a CPU. It follows the
    original TensorFlow code: values do not compare with those that StyleGAN-V or Latte published."""
    fvd_clips: int = Field(default=256, ge=2)
    """Most held-out captions that clips are made of for it; values of fewer than 256 clips say little."""
    i3d: str = ""
    """File of I3D's weights (Kinetics-400, 400 logits), safetensors."""
    clip: str = ""
    """CLIP that scores how well samples show their prompts: a folder of transformers' or a hub id; empty is none."""
    weights: Literal["ema", "raw"] = "ema"
    """`ema` takes the averaged weights, `raw` those that training stands at."""
    timeout_s: PositiveFloat = 1800.0
    """After this the sampling task is ended, noted in `events.jsonl`, and training goes on."""
    resources: dict[str, float] = {"CPU": 1.0}
    """What the task takes from the Ray cluster beside the training, for instance `{GPU: 1}`."""


class ClusterConfig(Section):
    """Where training runs."""

    address: str = "auto"
    """Ray cluster: `auto` joins the one this machine or job belongs to, or starts one here, as `local` always does."""
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Training workers: one per GPU, or processes on CPUs. With two numbers, the fewest and the most, training goes on
    with those that are left when nodes are lost, and takes more when nodes come."""
    elastic_poll_s: PositiveFloat = 60.0
    """Seconds between two looks for nodes that have come, where `workers` are two numbers."""
    gpu: Literal["auto", "yes", "no"] = "auto"
    """Whether a worker takes a GPU; `auto` does where the cluster has enough."""
    cpus_per_worker: PositiveInt = 1
    """CPU cores (and threads) of a worker."""
    max_failures: NonNegativeInt = 3
    """How many times lost workers are replaced and the run resumed from its last checkpoint."""

    @field_validator("workers", mode="wrap")
    @classmethod
    def is_a_number_or_two(
        cls, given: object, take: Callable[[object], int | tuple[int, int]]
    ) -> int | tuple[int, int]:
        """pydantic has a rejection for each of the two forms; a person needs one."""
        try:
            return take(given)
        except ValidationError:
            raise ValueError(
                f"cluster.workers is {given!r}; it takes a number of workers, such as 4, or the fewest and the most, "
                "such as [2, 4]"
            ) from None

    @property
    def fewest(self) -> int:
        """Workers that training needs at least."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """Workers that training takes at most."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class TrackingConfig(Section):
    """Where curves and videos go beside the run's own files."""

    wandb: Literal["online", "offline", "off"] = "off"
    """Weights & Biases: figures, videos, alerts, how busy nodes are; `offline` writes files for `wandb sync`."""
    project: str = "sora_train"
    """wandb project."""


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
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig = ValidationConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("model", mode="before")
    @classmethod
    def lays_the_preset_under(cls, model: object) -> object:
        """What `model.preset` stands for, under the keys that are given."""
        return with_preset(model) if isinstance(model, dict) else model

    @field_validator("name")
    @classmethod
    def names_a_folder(cls, name: str) -> str:
        """A run's name is its folder's, so it may not lead anywhere else."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"name {name!r} can't be a run's folder; use letters, digits, '.', '_' and '-', beginning with "
                "a letter or digit, such as `first-run`"
            )
        return name


def load_recipe(path: str | Path, overrides: Mapping[str, object] | None = None) -> Recipe:
    """The recipe in a YAML file, with `overrides` ({"train.steps": 40}) laid over it. A preset among them takes the
    place of what the file itself says of the model's shape.

    Raises RecipeError where the file can't be read, a key is unknown, a value is wrong, or keys contradict each other.
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
    """Writes every key, so that the run's own recipe.yaml says what the defaults were on that day."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    atomic_write_text(Path(path), text)


def check(recipe: Recipe) -> list[str]:
    """The contradictions between keys that each are fine alone: a sentence each, with the keys and the remedy."""
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
    try:
        resolve_sampler(validation.sampler, recipe.diffusion.kind)
    except UserError as error:
        wrong.append(f"validation.{error}")

    if validation.fvd:
        wrong += fvd_lacks(recipe)

    grid = PIXELS_PER_LATENT * recipe.model.patch
    for frames, height, width in data.shapes:
        for side, size in (("height", height), ("width", width)):
            if size % grid:
                key = f"data.buckets: {side} of {frames}x{height}x{width}" if data.buckets else f"data.{side} {size}"
                choices = " or ".join(str(n) for n in (size // grid * grid, (size // grid + 1) * grid) if n)
                wrong.append(
                    f"{key} does not divide by {grid} (VAE {PIXELS_PER_LATENT} x model.patch {recipe.model.patch}); "
                    f"use {choices}"
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
    fewest, most = recipe.cluster.fewest, recipe.cluster.most
    if fewest > most:
        wrong.append(f"cluster.workers are {fewest} at least and {most} at most; use [{most}, {fewest}]")
    if max(fewest, most) > train.batch_size:
        wrong.append(
            f"cluster.workers {max(fewest, most)} is more than train.batch_size {train.batch_size}, so that some "
            f"would never see a clip; use at most {train.batch_size} workers or a larger batch"
        )
    if 0 < train.guard_spike < 1:
        wrong.append(
            f"train.guard_spike {train.guard_spike:g} would refuse steps like all others; use 1 or more, such as 5, or "
            "0 to let any finite gradient norm pass"
        )
    if not all(0 <= beta < 1 for beta in train.betas):
        wrong.append(f"train.betas are {train.betas}; both must be at least 0 and below 1")
    wrong += contradictions(train)
    return wrong


def fvd_lacks(recipe: Recipe) -> list[str]:
    """What `validation.fvd` needs and a recipe does not have."""
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
