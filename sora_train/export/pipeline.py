"""Writes a run as a folder for diffusers' `LattePipeline.from_pretrained`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from sora_train.codec.files import VaeFiles, find_text_encoder, find_vae, read_config
from sora_train.codec.text import load_tokenizer
from sora_train.codec.vae import load_vae
from sora_train.diffusion.sampler import make_solver
from sora_train.export.fold import fold_latent_norm
from sora_train.manifest import Manifest
from sora_train.model.convert import to_diffusers
from sora_train.model.convert_latte import FULL_LATTE
from sora_train.recipe import Recipe
from sora_train.sample.load import Run

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")


def refusals(recipe: Recipe, manifest: Manifest) -> list[str]:
    """All reasons why a LattePipeline can't hold a run; [] if it can.

    Each names the key, its value, and what the pipeline takes.
    """
    found = [
        f"model.{key} is {have}, and diffusers' Latte has only {value}"
        for key, value in FULL_LATTE.items()
        if (have := getattr(recipe.model, key)) != value
    ]
    frames = latent_frames(manifest)
    if recipe.model.sample_frames not in (0, frames):
        found.append(f"model.sample_frames is {recipe.model.sample_frames}, and diffusers' Latte takes 0 or {frames}")
    if recipe.diffusion.kind != "ddpm":
        found.append(f"diffusion.kind is {recipe.diffusion.kind}, and its scheduler takes steps of ddpm alone")
    elif recipe.diffusion.prediction != "epsilon":
        found.append(f"diffusion.prediction is {recipe.diffusion.prediction}, and released Lattes predict epsilon")
    files = find_vae(recipe.codec.vae, recipe.codec.models)
    if manifest.vae.time_factor != 1:
        found.append(f"the VAE makes {manifest.vae.time_factor} frames one, and the pipeline decodes frame by frame")
    elif files.kind != "AutoencoderKL" and not is_scalar(files):
        found.append(
            f"latents are normalised per channel (mean {list(files.mean)}, std {list(files.std)}), and an {files.kind} "
            "has no 1 x 1 convolutions that could take that up"
        )
    return found


def latent_frames(manifest: Manifest) -> int:
    """Latent frames of the most common clip shape, which is the default of samples."""
    return manifest.vae.latent_shape(manifest.frames, manifest.height, manifest.width)[0]


def is_scalar(files: VaeFiles) -> bool:
    """Whether one factor (`scaling_factor`) normalises all of a VAE's latents."""
    return not any(files.mean) and len(set(files.std)) == 1


def write_pipeline(run: Run, folder: Path) -> None:
    """Writes all parts of the pipeline, for a run without `refusals`.

    The parts are transformer, VAE, text encoder, tokenizer, scheduler and model_index.json.
    """
    import diffusers

    to_diffusers(run.model, folder / "transformer", latent_frames(run.manifest), pad_variance=True)
    kind = write_vae(run, folder / "vae")
    tokenizer = write_text_encoder(run, folder)
    make_solver(run.objective, order=1).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "LattePipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", tokenizer],
        "transformer": ["diffusers", "LatteTransformer3DModel"],
        "vae": ["diffusers", kind],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_vae(run: Run, folder: Path) -> str:
    """Writes the run's VAE in float32 with its normalisation folded in.

    Returns the name of its class.
    """
    vae = load_vae(run.recipe.codec.vae, models=run.recipe.codec.models)
    run.check_vae(vae.hash)
    files, model = vae.files, vae.model.to(memory_format=torch.contiguous_format)
    if not is_scalar(files):
        fold_latent_norm(model, files.mean, files.std)
    elif read_config(files.place).get("latents_mean") is not None:
        model.register_to_config(scaling_factor=1 / files.std[0], latents_mean=None, latents_std=None)
    model.save_pretrained(folder)
    return files.kind


def write_text_encoder(run: Run, folder: Path) -> str:
    """Copies the run's text encoder and tokenizer; returns the tokenizer's class.

    For the pass without a prompt, LattePipeline pads "". If the model learned `codec.null_prompt: eos`, its tokenizer
    is changed to pad with `</s>`. Padding attends only to the `</s>` before it, so every padding token has the
    embedding of `</s>`, and attention over equal tokens equals attention over one.

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
    if run.recipe.codec.null_prompt == "eos":
        pad_with_eos(tokenizer)
    name = type(load_tokenizer(tokenizer)).__name__
    return "PreTrainedTokenizerFast" if name == "TokenizersBackend" else name  # transformers 4 and 5 know this name


def pad_with_eos(tokenizer: Path) -> None:
    """Makes the tokenizer in a folder pad with its `</s>`."""
    eos = load_tokenizer(tokenizer).eos_token
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        place = tokenizer / name
        if place.is_file() or name == "tokenizer_config.json":
            settings = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
            place.write_text(json.dumps(settings | {"pad_token": eos}, indent=2) + "\n", encoding="utf-8")
