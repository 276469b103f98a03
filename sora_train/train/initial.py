"""Initial weights of a new run (`model.init_from`), in diffusers' format or in this project's.

Of a run or a checkpoint they are the averaged weights, as for sampling; optimizer, EMA and step start from zero.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from sora_train.errors import RecipeError, UserError
from sora_train.model import Latte, ModelConfig, Transformer
from sora_train.model import build as build_model
from sora_train.model.config import with_preset
from sora_train.model.convert import (
    check_fit,
    check_weights,
    config_differences,
    open_diffusers,
    transformer_folder,
)
from sora_train.model.convert_latte import start_as_identity
from sora_train.settings import build, read_yaml
from sora_train.train.checkpoint import EMA_FILE, complete_checkpoints
from sora_train.train.placement import DrawnShares, Weights
from sora_train.train.weights import EXPORTED, open_weights
from sora_train.weight_headers import WeightsError, check_tensors, read_header

T = TypeVar("T")


def resolve_initial(folder: Path) -> Path:
    """The folder of the weights; for a run, its newest complete checkpoint. Raises UserError if it has none."""
    if not (folder / "checkpoints").is_dir():
        return folder
    if not (found := complete_checkpoints(folder / "checkpoints")):
        raise UserError(
            f"model.init_from: the run {folder} has no whole checkpoint yet; wait for one, or name another",
            code="checkpoint",
        )
    return found[-1][1]


def own_weights_file(folder: Path) -> Path | None:
    """The weights' file in an own checkpoint or export; None for a folder in diffusers' format."""
    return next((folder / name for name in (EMA_FILE, EXPORTED) if (folder / name).is_file()), None)


def own_recipe(folder: Path) -> Path | None:
    """The recipe that an own checkpoint or export was trained with, in the folder or in the checkpoint's run."""
    places = (folder / "recipe.yaml", folder.absolute().parent.parent / "recipe.yaml")
    return next((place for place in places if place.is_file()), None)


def check_initial(config: ModelConfig, folder: Path) -> Transformer:
    """Checks that a model of this shape can load the weights in a folder. Returns one on the meta device.

    Reads configs and the headers of weights. Raises ValueError, with every key that differs, if not, or if it holds
    adapters; WeightsError if tensors are cut short, missing, unexpected or of another shape; FileNotFoundError without
    a config.
    """
    weights = own_weights_file(folder)
    if weights is None:
        check_fit(config, folder)
    else:
        check_own_recipe(config, folder)
    with torch.device("meta"):
        model = build_model(config)
    if weights is None:
        check_weights(model, folder)
    else:
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        there = read_header(weights)
        if any(".lora_" in name for name in there):
            raise ValueError(
                "it holds adapters (LoRA), no whole model. Name their base with model.init_from and these with "
                "lora.init_from, or the pipeline that `sora export --merge` makes of both"
            )
        check_tensors(there, shapes, weights)
    return model


def check_own_recipe(config: ModelConfig, folder: Path) -> None:
    """Raises ValueError, with every key that differs, if an own checkpoint or export is of another shape."""
    recipe = own_recipe(folder)
    if recipe is None:
        raise FileNotFoundError(f"{folder / 'recipe.yaml'} is missing, which says what shape the model has")
    try:
        found = build(ModelConfig, with_preset(read_yaml(recipe).get("model") or {}), {}, str(recipe))
    except RecipeError as error:
        raise ValueError(str(error)) from None
    if wrong := config_differences(config, found):
        raise ValueError("; ".join(wrong))


def make_model(config: ModelConfig, rank: int, world: int, resumed: bool) -> tuple[Transformer, Weights]:
    """The model of a run's first step on the meta device, and its weights; none if `resumed`.

    Random weights are those of `build`, drawn on the CPU for all devices alike; a rank has only its share of them, see
    `DrawnShares`. Raises UserError for weights that do not fit; for damaged ones, when they are read.
    """
    with torch.device("meta"):
        model = build_model(config)
    if resumed:
        return model, Weights()
    read = open_initial(config, Path(config.init_from)) if config.init_from else {}
    if read.keys() >= dict(model.named_parameters()).keys():
        return model, Weights(read)
    with torch.device("meta"), DrawnShares(model, rank, world) as drawn:
        model = build_model(config)
        if read and isinstance(model, Latte):  # an image model's
            start_as_identity(model)
    return model, Weights(read, drawn.shares)


def load_initial(model: Transformer, folder: Path) -> None:
    """Loads all weights of the model. Raises UserError if they are damaged or do not fit."""
    wanted = model.state_dict()
    for name, read in open_initial(model.config, folder).items():
        wanted[name].copy_(read())


def open_initial(config: ModelConfig, folder: Path) -> dict[str, Callable[[], Tensor]]:
    """The weights in a folder by name; each is read when called. Raises UserError, then too, for wrong ones."""

    def clear(act: Callable[[], T]) -> T:
        try:
            return act()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise cannot_start(folder, error) from None

    def open_all() -> dict[str, Callable[[], Tensor]]:
        model = check_initial(config, folder)
        weights = own_weights_file(folder)
        return open_diffusers(model, transformer_folder(folder)) if weights is None else open_weights(weights)

    return {name: partial(clear, read) for name, read in clear(open_all).items()}


def cannot_start(folder: Path, error: Exception) -> UserError:
    """The UserError, with what to do, for weights in a folder that training can't start from."""
    remedy = ""
    if " there it is " in str(error):
        remedy = ". Set the keys of model to those of the weights, or use other weights"
    elif isinstance(error, WeightsError) and own_weights_file(folder):
        remedy = ". Use another checkpoint, or export the run again"
    elif isinstance(error, WeightsError):
        remedy = ". Fetch the weights again (`sora download` compares each file with the hub's), or use others"
    said = str(error).splitlines()[-1].strip()
    return UserError(f"model.init_from: training can't start from {folder}: {said}{remedy}", code="weights")
