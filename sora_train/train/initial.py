"""The weights that a new run starts from (`model.init_from`), in diffusers' format or in this project's.

Of a run or a checkpoint they are the averaged weights, as for sampling; optimizer, EMA and step begin anew.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sora_train.errors import RecipeError, UserError
from sora_train.model import Latte, ModelConfig
from sora_train.model.config import with_preset
from sora_train.model.convert import check_fit, check_readable, differing, from_diffusers
from sora_train.settings import build, read_yaml
from sora_train.train.checkpoint import AVERAGED, whole
from sora_train.train.weights import EXPORTED, NOTE, read_whole


def starting_point(folder: Path) -> Path:
    """The folder that holds the weights: of a run its newest whole checkpoint, which is then fixed.

    Raises UserError for a run without one.
    """
    if not (folder / "checkpoints").is_dir():
        return folder
    if not (found := whole(folder / "checkpoints")):
        raise UserError(f"model.init_from: the run {folder} has no whole checkpoint yet; wait for one, or name another")
    return found[-1][1]


def own_weights(folder: Path) -> Path | None:
    """The weights' file in a checkpoint or an export of this project; None for a folder in diffusers' format."""
    return next((folder / name for name in (AVERAGED, EXPORTED) if (folder / name).is_file()), None)


def own_recipe(folder: Path) -> Path | None:
    """The recipe that an own checkpoint or export was trained with, in the folder or in the checkpoint's run."""
    places = (folder / "recipe.yaml", folder.absolute().parent.parent / "recipe.yaml")
    return next((place for place in places if place.is_file()), None)


def check_initial(config: ModelConfig, folder: Path) -> None:
    """ValueError, with every key that differs, where a model of this shape can't take the weights in a folder; also
    where they are cut short. FileNotFoundError where there are none.
    """
    weights = own_weights(folder)
    if weights is None:
        check_fit(config, folder)
        check_readable(folder)
        return
    recipe = own_recipe(folder)
    if recipe is None:
        raise FileNotFoundError(f"{folder / 'recipe.yaml'} is missing, which says what shape the model has")
    try:
        found = build(ModelConfig, with_preset(read_yaml(recipe).get("model") or {}), {}, str(recipe))
    except RecipeError as error:
        raise ValueError(str(error)) from None
    if wrong := differing(config, found):
        raise ValueError("; ".join(wrong))
    try:
        with safe_open(weights, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged: {error}") from None


def load_initial(model: Latte, folder: Path) -> None:
    """Puts the weights into the model. Raises UserError where they are damaged or do not fit."""
    weights = own_weights(folder)
    try:
        model.load_state_dict(from_diffusers(folder).state_dict() if weights is None else read_whole(weights))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        said = str(error).splitlines()[-1].strip()
        raise UserError(f"model.init_from: training can't start from {folder}: {said}") from None


def described(folder: Path) -> str:
    """What a run starts from, in words."""
    if (weights := own_weights(folder)) is not None and weights.name == AVERAGED:
        return f"the averaged (EMA) weights of {folder}"
    try:
        which = json.loads((folder / NOTE).read_text(encoding="utf-8"))["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"the weights in {folder}"
    return f"the {'averaged (EMA)' if which == 'ema' else which} weights in the export {folder}"
