"""Initial weights of a new run (`model.init_from`), in diffusers' format or in this project's.

Of a run or a checkpoint they are the averaged weights, as for sampling; optimizer, EMA and step start from zero.
"""

from pathlib import Path

from safetensors import SafetensorError

from sora_train.errors import RecipeError, UserError
from sora_train.model import ModelConfig, Transformer
from sora_train.model.config import with_preset
from sora_train.model.convert import check_fit, check_readable, check_whole, config_differences, load_diffusers
from sora_train.settings import build, read_yaml
from sora_train.train.checkpoint import EMA_FILE, complete_checkpoints
from sora_train.train.weights import EXPORTED, read_weights


def resolve_initial(folder: Path) -> Path:
    """The folder of the weights; for a run, its newest complete checkpoint. Raises UserError if it has none."""
    if not (folder / "checkpoints").is_dir():
        return folder
    if not (found := complete_checkpoints(folder / "checkpoints")):
        raise UserError(
            f"model.init_from: the run {folder} has no whole checkpoint yet; wait for one, or name another",
            code="init_from",
        )
    return found[-1][1]


def own_weights_file(folder: Path) -> Path | None:
    """The weights' file in an own checkpoint or export; None for a folder in diffusers' format."""
    return next((folder / name for name in (EMA_FILE, EXPORTED) if (folder / name).is_file()), None)


def own_recipe(folder: Path) -> Path | None:
    """The recipe that an own checkpoint or export was trained with, in the folder or in the checkpoint's run."""
    places = (folder / "recipe.yaml", folder.absolute().parent.parent / "recipe.yaml")
    return next((place for place in places if place.is_file()), None)


def check_initial(config: ModelConfig, folder: Path) -> None:
    """Checks that a model of this shape can load the weights in a folder.

    Raises ValueError, with every key that differs, if not, or if they are cut short; FileNotFoundError without weights.
    """
    weights = own_weights_file(folder)
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
    if wrong := config_differences(config, found):
        raise ValueError("; ".join(wrong))
    check_whole(weights)


def load_initial(model: Transformer, folder: Path) -> None:
    """Loads the weights into the model. Raises UserError if they are damaged or do not fit."""
    weights = own_weights_file(folder)
    try:
        if weights is None:
            load_diffusers(model, folder)
        else:
            model.load_state_dict(read_weights(weights))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        said = str(error).splitlines()[-1].strip()
        raise UserError(f"model.init_from: training can't start from {folder}: {said}", code="init_from") from None
