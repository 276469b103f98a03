"""Writes a run as a folder for the `from_pretrained` of its diffusers pipeline, `LattePipeline` or `WanPipeline`.

What the two classes hold is in `latte.py` and `wan.py`; both have a text encoder and a tokenizer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

from sora_train.codec.files import find_text_encoder, read_config
from sora_train.codec.text import load_tokenizer
from sora_train.export import latte, wan
from sora_train.manifest import Manifest
from sora_train.recipe import Recipe
from sora_train.sample.load import Run

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")
PIPELINES = {"latte": "LattePipeline", "wan": "WanPipeline"}
"""diffusers' class by `model.family`."""


def pipeline_module(family: str) -> ModuleType:
    """The module of a family's pipeline class."""
    return wan if family == "wan" else latte


def refusals(recipe: Recipe, manifest: Manifest) -> list[str]:
    """All reasons why the pipeline class of the run's family can't hold it; [] if it can.

    Each names the key, its value, and what the pipeline takes.
    """
    return pipeline_module(recipe.model.family).refusals(recipe, manifest)


def write_pipeline(run: Run, folder: Path) -> None:
    """Writes all parts of the pipeline and model_index.json, for a run without `refusals`."""
    import diffusers

    family = run.recipe.model.family
    text = write_text_encoder(run, folder)
    index = {
        "_class_name": PIPELINES[family],
        "_diffusers_version": diffusers.__version__,
        **text,
        **pipeline_module(family).write_parts(run, folder),
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_text_encoder(run: Run, folder: Path) -> dict[str, list[str]]:
    """Copies the run's text encoder and tokenizer; returns their entries in model_index.json.

    config.json says float32 whatever the weights' number format, because the text encoder's format becomes the
    pipeline's and T5 overflows in float16.
    """
    files = find_text_encoder(run.recipe.codec.text, run.recipe.codec.models)
    run.check_text(files.hash)
    encoder, tokenizer = folder / "text_encoder", folder / "tokenizer"
    encoder.mkdir()
    tokenizer.mkdir()
    for file in files.files:
        if file.parent == files.place and file.suffix == ".safetensors":
            shutil.copyfile(file, encoder / file.name)
    for file in files.place.glob("*.safetensors.index.json"):
        shutil.copyfile(file, encoder / file.name)
    config = read_config(files.place)
    config.pop("torch_dtype", None)
    text = json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n"
    (encoder / "config.json").write_text(text, encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (files.tokenizer / name).is_file():
            shutil.copyfile(files.tokenizer / name, tokenizer / name)
    name = type(load_tokenizer(tokenizer)).__name__
    if name == "TokenizersBackend":
        name = "PreTrainedTokenizerFast"  # transformers 4 and 5 know this name
    return {
        "text_encoder": ["transformers", files.kind],
        "tokenizer": ["transformers", name],
    }
