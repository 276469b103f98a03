"""Adapters in sampling: the base of a run that trained adapters, and files that `sora sample --lora` adds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sora_train.codec.files import content_hash
from sora_train.errors import RecipeError, UserError
from sora_train.log import log
from sora_train.lora.adapters import merge
from sora_train.lora.files import Adapter, adapter_file, read_lora, with_alpha
from sora_train.model import Transformer
from sora_train.recipe import Recipe
from sora_train.train.checkpoint import EMA_FILE
from sora_train.train.frozen_base import check_same_base
from sora_train.train.initial import load_initial, resolve_initial
from sora_train.train.weights import read_trained_weights, read_weights
from sora_train.weight_headers import read_header


@dataclass(frozen=True)
class LoraFile:
    """A file of adapters, and the factor that they are multiplied by."""

    path: Path
    weight: float = 1.0

    @property
    def record(self) -> dict[str, Any]:
        """What names it in `samples.json`."""
        return {"file": str(self.path), "hash": content_hash((self.path,)), "weight": self.weight}


def parse_lora(words: Sequence[str]) -> tuple[LoraFile, ...]:
    """The files of `--lora FILE[:WEIGHT]`. Raises UserError for a missing file, and a weight that is not finite."""
    return tuple(parse_one(word) for word in words)


def parse_one(word: str) -> LoraFile:
    """One FILE[:WEIGHT]. A path that exists is a file, whatever is in its name."""
    name, colon, number = word.rpartition(":")
    weight = 1.0
    if colon and not Path(word).expanduser().exists():
        try:
            weight = float(number)
        except ValueError:
            if Path(name).expanduser().exists():
                raise RecipeError(f"--lora {word}: the weight is {number!r}. Use a number, such as 0.8") from None
            name = word
        if not abs(weight) < float("inf"):
            raise RecipeError(f"--lora {word}: the weight is {number}. Use a finite number, such as 0.8")
    else:
        name = word
    file = adapter_file(Path(name).expanduser())
    if not file.is_file():
        raise UserError(
            f"--lora: {file} does not exist. Name a file of adapters, with FILE:WEIGHT for a weight", code="lora"
        )
    return LoraFile(file, weight)


def merge_files(model: Transformer, files: Sequence[LoraFile]) -> None:
    """Adds files of adapters to a model's weights. Raises UserError for files that do not fit it."""
    for file in files:
        adapter = read_lora(file.path, model.config)
        merge(model, adapter.tensors, adapter.scales, file.weight)
        rank = max(adapter.ranks.values())
        log.info(f"{file.path}: adapters of {len(adapter.ranks)} layers, rank {rank}, weight {file.weight:g}")


def trained_adapter(checkpoint: Path, recipe: Recipe, weights: str) -> Adapter:
    """The adapters of a checkpoint, averaged (`ema`) or as trained (`raw`). Raises UserError if they are damaged."""
    if weights == "raw":
        shapes = {name: torch.Size(header.shape) for name, header in read_header(checkpoint / EMA_FILE).items()}
        return with_alpha(read_trained_weights(checkpoint, shapes), recipe.lora.scale)
    return with_alpha(read_weights(checkpoint / EMA_FILE), recipe.lora.scale)


def load_adapted(model: Transformer, checkpoint: Path, recipe: Recipe, weights: str) -> None:
    """Loads a checkpoint's base and adds its adapters, into a model without weights. Raises UserError if it can't."""
    adapter = trained_adapter(checkpoint, recipe, weights)
    load_base(model, checkpoint, recipe)
    try:
        merge(model, adapter.tensors, adapter.scales)
    except ValueError as error:
        raise UserError(f"{checkpoint} does not fit the model in its recipe.yaml: {error}", code="checkpoint") from None


def load_base(model: Transformer, checkpoint: Path, recipe: Recipe) -> None:
    """Loads the weights that a checkpoint's adapters were trained on into a model without weights, in float32.

    Raises UserError if they are gone, or are others than in training.
    """
    state = read_base(checkpoint)
    places = [place for place in (state.get("base_from"), recipe.model.init_from) if place]
    folder = next((place for place in map(Path, places) if place.expanduser().is_dir()), None)
    if folder is None:
        raise UserError(
            f"{checkpoint} holds adapters, and their base is neither in {' nor in '.join(places)}. Put it back there",
            code="weights",
        )
    folder = resolve_initial(folder.expanduser())
    if state.get("base"):
        check_same_base(state["base"], state["base_from"], folder)
    else:
        log.warning(f"{checkpoint} has no state.json that names its base; {folder} may be another")
    model.to_empty(device="cpu")
    load_initial(model, folder)


def read_base(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` says of the base; {} if it is not there yet."""
    try:
        return dict(json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
