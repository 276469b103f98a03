"""Text conventions of a model: caption cleaning and the null prompt.

A released model needs those that it was trained with. `auto` in a recipe stands for those of the weights in
`model.init_from`.
"""

from __future__ import annotations

import html
import json
import re
from importlib.util import find_spec
from pathlib import Path

import yaml

from sora_train.codec import CodecConfig
from sora_train.codec.hub import downloaded_folder
from sora_train.errors import UserError
from sora_train.manifest import Manifest

CLEANINGS = {"WanTransformer3DModel": "wan"}
"""Caption cleaning by class of a released transformer. That of all others, such as Latte and PixArt-α, is `lower`."""
NULL_PROMPTS = {"LatteTransformer3DModel": "padded", "LatteT2V": "padded"}
"""Null prompt by class of a released transformer.
The pipelines of all others, such as PixArt-α, mask or drop the padding: `eos`."""
HAS_FTFY = find_spec("ftfy") is not None


def clean(caption: str, cleaning: str) -> str:
    """The caption with `cleaning` applied, for the text encoder."""
    if cleaning == "lower":
        return caption.lower().strip()
    if cleaning == "wan":
        if HAS_FTFY:
            import ftfy  # pyright: ignore[reportMissingImports]

            caption = ftfy.fix_text(caption)
        caption = html.unescape(html.unescape(caption)).strip()
        return re.sub(r"[^\S\x1c-\x1f]+", " ", caption).strip()  # `\s` of the `regex` package, which the pipeline uses
    return caption


def cleaning_of(codec: CodecConfig, init_from: str, family: str = "latte") -> str:
    """Resolves `codec.caption_cleaning`, which may be `auto`.

    Weights that sora_train trained use the cleaning of their shards. `family` is the recipe's `model.family`. It
    decides for a hub id that `sora download` has not fetched.
    """
    if codec.caption_cleaning != "auto":
        return codec.caption_cleaning
    if not init_from:
        return "none"
    if own := own_file(init_from, "manifest.json"):
        return Manifest.load(str(own.parent)).text.caption_cleaning
    places = [init_from, *([str(downloaded_folder(codec.models, init_from.partition("@")[0]))] if codec.models else [])]
    name = next(filter(None, map(class_of, places)), "WanTransformer3DModel" if family == "wan" else "")
    return CLEANINGS.get(name, "lower")


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
    return NULL_PROMPTS.get(class_of(init_from), "eos")


def class_of(folder: str) -> str:
    """Class name of the released transformer in a folder, which may be a whole pipeline's.

    Empty if there is none, which is reported where the weights are opened.
    """
    base = Path(folder).expanduser()
    for place in (base / "transformer", base):
        if (place / "config.json").is_file():
            try:
                return json.loads((place / "config.json").read_text(encoding="utf-8")).get("_class_name", "")
            except (ValueError, AttributeError) as error:
                raise UserError(
                    f"model.init_from: {place / 'config.json'} can't be read: {error}", code="weights"
                ) from None
    return ""


def own_file(folder: str, name: str) -> Path | None:
    """A file next to weights that sora_train wrote, if any.

    `folder` is an export, a run, or a checkpoint in a run.
    """
    place = Path(folder).expanduser()
    return next((at / name for at in (place, place.parent.parent) if (at / name).is_file()), None)
