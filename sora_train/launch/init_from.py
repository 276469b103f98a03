"""What a new run starts from: `model.init_from` found, checked against the recipe, and described."""

from __future__ import annotations

import os
from pathlib import Path

from sora_train.codec.folders import find_folder
from sora_train.errors import UserError
from sora_train.manifest import Manifest
from sora_train.recipe import Recipe, load_recipe
from sora_train.train.initial import check_initial, own_recipe, starting_point


def find_initial_weights(recipe: Recipe) -> str:
    """The folder of the weights that `model.init_from` names, or "": a hub id is fetched, a run becomes its newest
    checkpoint. UserError where there are none.
    """
    name = recipe.model.init_from
    if not name:
        return ""
    place = os.path.expanduser(name)
    folder = find_folder(
        place if os.path.isdir(place) else name, "model.init_from", ("transformer",), recipe.codec.models
    )
    return str(starting_point(folder.absolute()))


def check_initial_weights(recipe: Recipe) -> None:
    """UserError where training can't start from `model.init_from`, a local folder."""
    folder = recipe.model.init_from
    try:
        if folder:
            check_initial(recipe.model, Path(folder))
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        advice = ". Give model the keys that it has there, or other weights" if " there it is " in str(error) else ""
        raise UserError(f"model.init_from: training can't start from {folder}: {error}{advice}") from None


def initial_weights_warnings(recipe: Recipe, manifest: Manifest) -> list[str]:
    """In what the weights in `model.init_from` were trained otherwise though their shapes fit; [] for diffusers'."""
    folder = Path(recipe.model.init_from)
    place = own_recipe(folder) if recipe.model.init_from else None
    try:
        if place is None:
            return []
        then, facts = load_recipe(place), Manifest.load(str(place.parent))
    except UserError:
        return []
    found: list[str] = []
    pairs = (
        ("diffusion.kind", then.diffusion.kind, recipe.diffusion.kind),
        ("diffusion.prediction", then.diffusion.prediction, recipe.diffusion.prediction),
        ("VAE", facts.vae.hash[:8], manifest.vae.hash[:8]),
        ("text encoder", facts.text.hash[:8], manifest.text.hash[:8]),
    )
    if changed := [f"{what} {was} there, {now} here" for what, was, now in pairs if was != now]:
        found.append(f"its weights were trained otherwise ({'; '.join(changed)}), so training has more to learn anew")
    if recipe.data.holdout_fraction > then.data.holdout_fraction:
        found.append(
            f"data.holdout_fraction was {then.data.holdout_fraction:g} there and is {recipe.data.holdout_fraction:g}: "
            "if its clips are these, it was trained on some that are held out here, and held-out figures look too good"
        )
    return found
