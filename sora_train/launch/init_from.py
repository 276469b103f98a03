"""Initial weights of a new run (`model.init_from`): finds them and checks them against the recipe."""

from __future__ import annotations

import os
from pathlib import Path

from sora_train.codec.folders import find_folder
from sora_train.errors import UserError
from sora_train.manifest import Manifest
from sora_train.recipe import Recipe, load_recipe
from sora_train.settings import read_yaml
from sora_train.train.adapted import initial_adapters
from sora_train.train.checkpoint import complete_checkpoints, read_state
from sora_train.train.frozen_base import base_files, check_base, check_same_base
from sora_train.train.initial import cannot_start, check_initial, own_recipe, resolve_initial


def find_initial_weights(recipe: Recipe) -> str:
    """The folder of the weights that `model.init_from` names, or "". UserError if there are none.

    A hub id is downloaded; a run becomes its newest checkpoint.
    """
    name = recipe.model.init_from
    if not name:
        return ""
    place = os.path.expanduser(name)
    folder = find_folder(
        place if os.path.isdir(place) else name, "model.init_from", ("transformer",), recipe.codec.models
    )
    return str(resolve_initial(folder.absolute()))


def saved_initial_weights(recipe: Recipe, run: Path) -> str:
    """The folder that a run's weights were first loaded from. Adapters whose base is gone there take the recipe's."""
    folder = str((read_yaml(run / "recipe.yaml").get("model") or {}).get("init_from", ""))
    if recipe.lora.rank:
        try:
            base_files(Path(folder))
        except (OSError, ValueError):
            return find_initial_weights(recipe)
    return folder


def check_initial_weights(recipe: Recipe) -> None:
    """UserError if training can't start from the local folder `model.init_from`."""
    folder = recipe.model.init_from
    try:
        if folder:
            check_initial(recipe.model, Path(folder))
        if recipe.lora.rank:
            check_base(Path(folder))
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        raise cannot_start(Path(folder), error) from None
    if recipe.lora.init_from:
        initial_adapters(recipe.model, recipe.lora)


def check_base_unchanged(recipe: Recipe, run: Path) -> str:
    """Compares the frozen base of adapters with that of the newest checkpoint. Returns its hash.

    Reads all of it: about a second for each 10⁹ bytes. UserError if it is another one, or gone.
    """
    state = complete_checkpoints(run / "checkpoints")[-1][1]
    about = read_state(state) or {}
    return check_same_base(about.get("base", ""), about.get("base_from", ""), Path(recipe.model.init_from))


def initial_weights_warnings(recipe: Recipe, manifest: Manifest) -> list[str]:
    """How weights that fit in shape were trained differently; empty for weights of diffusers."""
    folder = Path(recipe.model.init_from)
    place = own_recipe(folder) if recipe.model.init_from else None
    try:
        if place is None:
            return []
        then, facts = load_recipe(place), Manifest.load(str(place.parent))
    except UserError:
        return []
    pairs = {
        "diffusion.kind": (then.diffusion.kind, recipe.diffusion.kind),
        "diffusion.prediction": (then.diffusion.prediction, recipe.diffusion.prediction),
        "VAE": (facts.vae.hash[:8], manifest.vae.hash[:8]),
        "text encoder": (facts.text.hash[:8], manifest.text.hash[:8]),
    }
    found: list[str] = []
    if changed := [f"{what} {was} there, {now} here" for what, (was, now) in pairs.items() if was != now]:
        found.append(f"its weights were trained differently ({'; '.join(changed)}), so training must adapt them")
    if recipe.data.holdout_fraction > then.data.holdout_fraction:
        found.append(
            f"data.holdout_fraction was {then.data.holdout_fraction:g} there and is {recipe.data.holdout_fraction:g}: "
            "it may have seen clips that are held out here, and held-out metrics look too good"
        )
    return found
