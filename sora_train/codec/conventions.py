"""Text conventions of a model: caption cleaning and the null prompt.

A released model needs those that it was trained with. `auto` in a recipe stands for those of the weights in
`model.init_from`.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from sora_train.codec import CodecConfig
from sora_train.errors import UserError
from sora_train.manifest import Manifest

RELEASED_CLEANING = "lower"
NULL_PROMPTS = {"LatteTransformer3DModel": "padded", "LatteT2V": "padded"}
"""Null prompt by class of a released transformer.
The pipelines of all others, such as PixArt-α, mask the padding: `eos`."""


def clean(caption: str, cleaning: str) -> str:
    """The caption with `cleaning` applied, for the text encoder."""
    return caption.lower().strip() if cleaning == "lower" else caption


def cleaning_of(codec: CodecConfig, init_from: str) -> str:
    """Resolves `codec.caption_cleaning`, which may be `auto`.

    Weights that sora_train trained use the cleaning of their shards.
    """
    if codec.caption_cleaning != "auto":
        return codec.caption_cleaning
    if not init_from:
        return "none"
    own = own_file(init_from, "manifest.json")
    return Manifest.load(str(own.parent)).text.caption_cleaning if own else RELEASED_CLEANING


def null_prompt_of(codec: CodecConfig, init_from: str) -> str:
    """Resolves `codec.null_prompt`, which may be `auto`.

    `init_from` is a local folder or empty.
    """
    if codec.null_prompt != "auto":
        return codec.null_prompt
    if not init_from:
        return "eos"
    if own := own_file(init_from, "recipe.yaml"):
        stated = (yaml.safe_load(own.read_text(encoding="utf-8")) or {}).get("codec", {}).get("null_prompt", "auto")
        return "eos" if stated == "auto" else stated  # a recipe from before this key existed
    for place in (Path(init_from, "transformer"), Path(init_from)):
        if (place / "config.json").is_file():
            try:
                name = json.loads((place / "config.json").read_text(encoding="utf-8")).get("_class_name", "")
            except (ValueError, AttributeError) as error:
                raise UserError(f"model.init_from: {place / 'config.json'} can't be read: {error}") from None
            return NULL_PROMPTS.get(name, "eos")
    return "eos"  # a missing model is reported where it is opened


def own_file(folder: str, name: str) -> Path | None:
    """A file next to weights that sora_train wrote, if any.

    `folder` is an export, a run, or a checkpoint in a run.
    """
    place = Path(folder).expanduser()
    return next((at / name for at in (place, place.parent.parent) if (at / name).is_file()), None)
