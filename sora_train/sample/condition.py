"""The frames that a sample begins with: whether a model takes them, their latents, and their entry in samples.json."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sora_train.diffusion import ConditioningConfig
from sora_train.errors import RecipeError, UserError
from sora_train.log import log
from sora_train.manifest import Manifest
from sora_train.sample.load import Run


@dataclass(frozen=True)
class GivenFrames:
    """Frames uint8 `F H W 3` of the sample's size, and the sha256 of the file that they are from."""

    frames: np.ndarray
    sha256: str

    @property
    def file_name(self) -> str:
        """Name of the PNG that shows them; other frames have another name."""
        shape = "x".join(map(str, self.frames.shape))
        return f"given-{hashlib.sha256(shape.encode() + self.frames.tobytes()).hexdigest()[:12]}.png"

    @property
    def picture(self) -> np.ndarray:
        """The frames side by side, uint8 `H W 3`."""
        return np.concatenate(list(self.frames), axis=1)


ReadGiven = Callable[[Sequence[str], str, tuple[int, int, int], float, float], list[GivenFrames]]
"""`data_prep.given.read_given`, which this package must not import: names, key, shape, fps, max_enlarge."""


def check_takes_frames(run: Run, key: str) -> None:
    """Raises UserError, with the reason, if a model was not trained to continue given frames."""
    if run.recipe.conditioning.probability > 0:
        return
    why = (
        "its model_index.json lacks expand_timesteps, so it is a text-to-video model"
        if run.released
        else "it was trained with conditioning.probability 0. Train a model with conditioning.probability above 0, "
        "such as 0.5 (it may start from this one: model.init_from)"
    )
    raise UserError(f"{key}: {run.folder} can't continue given frames: {why}", code="unsupported")


def given_count(conditioning: ConditioningConfig, manifest: Manifest, key: str) -> int:
    """How many frames `key` gives: an image one, a video as many as the model was trained with."""
    latents = conditioning.frames
    if key == "--video":
        return 1 + (latents - 1) * manifest.vae.time_factor
    if latents > 1:
        log.warning(
            f"{key} gives 1 latent frame, and the model was trained with {latents} (conditioning.frames). Samples may "
            "look worse; `sora sample --video` gives as many as in training"
        )
    return 1


def warn_if_none(conditioning: ConditioningConfig, key: str, names: Sequence[object]) -> None:
    """Warns of samples without given frames from a model that always had them in training."""
    if conditioning.probability == 1 and (not names or not all(names)):
        log.warning(
            f"conditioning.probability is 1, so the model learned only to continue given frames. Samples without them "
            f"look wrong; use {key}"
        )


def check_room(manifest: Manifest, key: str, count: int, frames: int) -> None:
    """Raises RecipeError if `count` given frames leave nothing to sample of a video of `frames`."""
    factor = manifest.vae.time_factor
    given, latents = (1 + (number - 1) // factor for number in (count, frames))
    if given >= latents:
        raise RecipeError(
            f"{key}: {given} latent frame{'s' * (given > 1)} would be given, and a video of {frames} frame"
            f"{'s' * (frames > 1)} has {latents}: nothing is left to sample. Use {1 + given * factor} frames or more"
        )


@torch.inference_mode()
def encode_given(run: Run, frames: np.ndarray) -> Float[Tensor, "k c h w"]:
    """Normalised latents of frames uint8 `F H W 3`: the mean of the posterior, on the CPU."""
    vae = run.vae
    return vae.normalise(vae.encode(torch.tensor(frames)[None])[0, 0])


def encode_each(run: Run, given: Sequence[GivenFrames | None]) -> list[Tensor | None] | None:
    """Latents of each sample's given frames, for `generate_each`. The same frames are encoded once."""
    if all(each is None for each in given):
        return None
    found = dict[int, Tensor]()
    for each in given:
        if each is not None and id(each) not in found:
            found[id(each)] = encode_given(run, each.frames)
    return [None if each is None else found[id(each)] for each in given]


def given_entry(given: GivenFrames | None) -> dict[str, Any]:
    """What samples.json says of the given frames: their PNG, the original's sha256, their number. Empty for none."""
    if given is None:
        return {}
    return {"given": {"file": given.file_name, "sha256": given.sha256, "frames": len(given.frames)}}


def save_given(folder: Path, given: GivenFrames | None) -> None:
    """Writes the PNG that `given_entry` names, as the frames were fitted."""
    if given is not None:
        Image.fromarray(given.picture).save(folder / given.file_name)
