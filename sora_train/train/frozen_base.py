"""The frozen base of adapters: what it may be, and the hash that names it.

A checkpoint of adapters holds no base. `state.json` has its hash, so a run never resumes on another base.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from sora_train.codec.files import content_hash
from sora_train.errors import UserError
from sora_train.model.convert import transformer_folder, weight_files
from sora_train.model.convert_latte import is_image_model
from sora_train.train.initial import own_weights_file
from sora_train.train.placement import together
from sora_train.train.state import State


def check_base(folder: Path) -> None:
    """Raises ValueError if the weights in a folder are an image model's, which no adapters make a video model."""
    if own_weights_file(folder) is not None:
        return
    settings = json.loads((transformer_folder(folder) / "config.json").read_text(encoding="utf-8"))
    if is_image_model(settings):
        raise ValueError(
            "it is an image model, whose temporal layers begin as the identity and must be trained themselves. Set "
            "lora.rank to 0, or name the weights of a video model"
        )


def base_files(folder: Path) -> tuple[Path, ...]:
    """The files of the weights in a folder that `model.init_from` may name."""
    own = own_weights_file(folder)
    if own is not None:
        return (own,)
    transformer = transformer_folder(folder)
    return (*weight_files(transformer), transformer / "config.json")


def base_hash(folder: Path) -> str:
    """sha256 of the weights in a folder. Reads all of them: about a second for each 10⁹ bytes."""
    try:
        return content_hash(base_files(folder))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the frozen base of the adapters can't be read: {error}. Put it back there, or name a copy of it with "
            "model.init_from",
            code="weights",
        ) from None


def with_base(state: State, folder: Path, device: torch.device) -> State:
    """The state of a run whose base is in `folder`. Collective.

    UserError on every rank if a checkpoint's base was another. Only rank 0 reads the files: DeepSpeed broadcasts its
    weights.
    """
    check = partial(check_same_base, state.base, state.base_from, folder)
    found = [together(check if dist.get_rank() == 0 else str, device)]
    dist.broadcast_object_list(found, src=0)
    return replace(state, base=found[0], base_from=str(folder))


def check_same_base(trained_on: str, trained_from: str, folder: Path) -> str:
    """The hash of the weights in `folder`. UserError if adapters were trained on others, whose hash is `trained_on`.

    An empty `trained_on` is that of a new run.
    """
    found = base_hash(folder)
    if trained_on not in ("", found):
        raise UserError(
            f"the adapters were trained on other weights: those of {trained_from} had the hash {trained_on[:12]}, and "
            f"{folder} has {found[:12]}. Put the original back, name a copy of it with model.init_from, or begin a new "
            "run (--name)",
            code="weights",
        )
    return found
