"""How a model is given text: what is done to captions before they are embedded, and what stands for no caption.

A released model has both from its own training. `auto` in a recipe becomes that of the weights in `model.init_from`.
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
"""By the class of a released transformer. Pipelines of all others, PixArt-α's among them, mask the padding: `eos`."""


def clean(caption: str, cleaning: str) -> str:
    """The caption as the text encoder reads it."""
    return caption.lower().strip() if cleaning == "lower" else caption


def cleaning_of(codec: CodecConfig, init_from: str) -> str:
    """`codec.caption_cleaning`, also where it is `auto`. Weights of ours have that of the shards they learned from."""
    if codec.caption_cleaning != "auto":
        return codec.caption_cleaning
    if not init_from:
        return "none"
    own = own_file(init_from, "manifest.json")
    return Manifest.load(str(own.parent)).text.caption_cleaning if own else RELEASED_CLEANING


def null_prompt_of(codec: CodecConfig, init_from: str) -> str:
    """`codec.null_prompt`, also where it is `auto`; `init_from` is a local folder or empty."""
    if codec.null_prompt != "auto":
        return codec.null_prompt
    if not init_from:
        return "eos"
    if own := own_file(init_from, "recipe.yaml"):
        stated = (yaml.safe_load(own.read_text(encoding="utf-8")) or {}).get("codec", {}).get("null_prompt", "auto")
        return "eos" if stated == "auto" else stated  # a recipe of before this key
    for place in (Path(init_from, "transformer"), Path(init_from)):
        if (place / "config.json").is_file():
            try:
                name = json.loads((place / "config.json").read_text(encoding="utf-8")).get("_class_name", "")
            except (ValueError, AttributeError) as error:
                raise UserError(f"model.init_from: {place / 'config.json'} can't be read: {error}") from None
            return NULL_PROMPTS.get(name, "eos")
    return "eos"  # that there is no model is said where it is opened


def own_file(folder: str, name: str) -> Path | None:
    """A file beside weights of ours: of an export, a run, or a checkpoint in a run."""
    place = Path(folder).expanduser()
    return next((at / name for at in (place, place.parent.parent) if (at / name).is_file()), None)
