"""The images of `validation.images`: read and fitted before Ray starts, saved in the run's folder for validations.

A validation may run on a node that does not see the original files, and hours later. It does see the run's folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from sora_train.storage import atomic_file

if TYPE_CHECKING:  # validation.py, which imports this module, imports no torch at its top
    from sora_train.manifest import Manifest
    from sora_train.recipe import Recipe
    from sora_train.sample.condition import GivenFrames

IMAGES = "images.safetensors"
"""File in the run's folder: fitted frames by the number of their prompt, and the sha256 of each original."""


def check_image_files(recipe: Recipe) -> None:
    """Raises UserError for an image that does not exist, is a folder, or is empty, before slower checks."""
    from data_prep.given import check_file

    for name in filter(None, recipe.validation.images if recipe.validation.every else ()):
        check_file(name, "validation.images")


def read_images(recipe: Recipe, manifest: Manifest) -> list[GivenFrames | None]:
    """The image of each prompt, fitted to the samples' size. Raises UserError for a file that is no image."""
    from data_prep.given import read_given
    from sora_train.sample.condition import check_room, given_count, warn_if_none

    validation, key = recipe.validation, "validation.images"
    if not validation.every:
        return []
    names = validation.images * (len(validation.prompts) if len(validation.images) == 1 else 1)
    warn_if_none(recipe.conditioning, key, names)
    if not any(names):
        return []
    count = given_count(recipe.conditioning, manifest, key)
    check_room(manifest, key, count, manifest.frames)
    shape = (count, manifest.height, manifest.width)
    distinct = [name for name in dict.fromkeys(names) if name]
    read = read_given(distinct, key, shape, manifest.fps, recipe.data.max_enlarge)
    found = dict(zip(distinct, read, strict=True))
    return [found.get(name) for name in names]


def save_images(run: Path, images: list[GivenFrames | None]) -> None:
    """Writes the images into the run's folder. Without images, removes those of an earlier start."""
    from safetensors.numpy import save_file

    if not any(images):
        (run / IMAGES).unlink(missing_ok=True)
        return
    frames = {f"{i:03d}": image.frames for i, image in enumerate(images) if image is not None}
    about = {"count": len(images), "sha256": {f"{i:03d}": image.sha256 for i, image in enumerate(images) if image}}
    with atomic_file(run / IMAGES) as draft:
        save_file(frames, draft, {"about": json.dumps(about)})


def load_images(run: Path) -> list[GivenFrames | None] | None:
    """The image of each prompt as `save_images` wrote it; None without images."""
    from safetensors import safe_open

    from sora_train.sample.condition import GivenFrames

    if not (run / IMAGES).is_file():
        return None
    with safe_open(run / IMAGES, "np") as file:
        about = json.loads((file.metadata() or {})["about"])
        names = [f"{i:03d}" for i in range(about["count"])]
        return [
            GivenFrames(file.get_tensor(name), about["sha256"][name]) if name in about["sha256"] else None
            for name in names
        ]
