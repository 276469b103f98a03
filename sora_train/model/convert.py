"""Latte's weights to and from diffusers' `LatteTransformer3DModel` (the released text-to-video model has that form).

A renaming: query, key and value maps are one matrix here and three there; the patch map is a convolution there.
"""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from sora_train.model.latte import Latte, ModelConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
EXPECTED = {"norm_type": "ada_norm_single", "activation_fn": "gelu-approximate", "norm_elementwise_affine": False}
FULL_LATTE = {"attention": "factorised", "text_in": "spatial", "frame_positions": "temporal", "pooled_text": False}


def names(depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Pairs of a module here and the one, or the ones stacked in order, that it is in diffusers."""
    yield "patch_in", ("pos_embed.proj",)
    yield "time.fc1", ("adaln_single.emb.timestep_embedder.linear_1",)
    yield "time.fc2", ("adaln_single.emb.timestep_embedder.linear_2",)
    yield "time_to_blocks", ("adaln_single.linear",)
    yield "text.fc1", ("caption_projection.linear_1",)
    yield "text.fc2", ("caption_projection.linear_2",)
    yield "patch_out", ("proj_out",)
    for i in range(depth):
        here = f"blocks.{i}"
        there = f"{'temporal_' if i % 2 else ''}transformer_blocks.{i // 2}"
        yield f"{here}.attention.qkv", tuple(f"{there}.attn1.to_{letter}" for letter in "qkv")
        yield f"{here}.attention.out", (f"{there}.attn1.to_out.0",)
        if i % 2 == 0:
            yield f"{here}.text_attention.q", (f"{there}.attn2.to_q",)
            yield f"{here}.text_attention.kv", (f"{there}.attn2.to_k", f"{there}.attn2.to_v")
            yield f"{here}.text_attention.out", (f"{there}.attn2.to_out.0",)
        yield f"{here}.feed_forward.fc1", (f"{there}.ff.net.0.proj",)
        yield f"{here}.feed_forward.fc2", (f"{there}.ff.net.2",)


def tables(depth: int) -> Iterator[tuple[str, str]]:
    """Names of the adaLN tables, here and in diffusers."""
    yield "table_out", "scale_shift_table"
    for i in range(depth):
        yield f"blocks.{i}.table", f"{'temporal_' if i % 2 else ''}transformer_blocks.{i // 2}.scale_shift_table"


def config_from_diffusers(config: dict[str, Any]) -> ModelConfig:
    """The shape of a `LatteTransformer3DModel`; ValueError names what this project has no counterpart for."""
    for key, value in EXPECTED.items():
        if config.get(key) != value:
            raise ValueError(f"{key} is {config.get(key)!r}; only the released Latte's {value!r} can be read")
    heads, head_width, channels = config["num_attention_heads"], config["attention_head_dim"], config["in_channels"]
    width = heads * head_width
    out = config.get("out_channels") or channels
    if out not in (channels, 2 * channels):
        raise ValueError(f"out_channels is {out}; expected {channels}, or {2 * channels} with a learned variance")
    if config.get("cross_attention_dim") != width:
        raise ValueError(f"cross_attention_dim is {config.get('cross_attention_dim')}; expected the width, {width}")
    return ModelConfig(
        width=width,
        depth=2 * config["num_layers"],
        heads=heads,
        patch=config["patch_size"],
        in_channels=channels,
        learned_variance=out == 2 * channels,
        text_width=config["caption_channels"],
        sample_size=config.get("sample_size", 64),
        attention_bias=config.get("attention_bias", False),
        norm_eps=config.get("norm_eps", 1e-5),
    )


def transformer_folder(folder: Path) -> Path:
    """The folder itself, or `transformer` in it where it is a whole pipeline's. FileNotFoundError if neither."""
    for place in (folder / "transformer", folder):
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(f"{folder / 'config.json'} is missing: not a model in diffusers' format")


def check_fit(config: ModelConfig, folder: Path) -> None:
    """ValueError, with every key that differs, where a model of this shape can't take the weights in a folder."""
    found = config_from_diffusers(json.loads((transformer_folder(folder) / "config.json").read_text()))
    wrong = [
        f"model.{field.name} is {getattr(config, field.name)!r}, there it is {getattr(found, field.name)!r}"
        for field in fields(ModelConfig)
        if field.name != "init_from" and getattr(config, field.name) != getattr(found, field.name)
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a diffusers folder, in one file or in several with an index."""
    index = folder / f"{WEIGHTS}.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [WEIGHTS]
    weights: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).is_file() or Path(name).name != name:
            raise FileNotFoundError(f"{folder / name} is missing: expected safetensors weights beside config.json")
        weights |= load_file(folder / name)
    return weights


def from_diffusers(folder: str | Path) -> Latte:
    """Reads a `LatteTransformer3DModel`, from its own folder or from a pipeline's.

    Raises FileNotFoundError where there is none, ValueError naming unexpected or missing tensors and settings.
    """
    folder = transformer_folder(Path(folder))
    model = Latte(config_from_diffusers(json.loads((folder / "config.json").read_text())))
    there = read_weights(folder)
    here: dict[str, Tensor] = {}
    wanted = model.state_dict()
    used: set[str] = set()

    def take(name: str) -> Tensor:
        if name not in there:
            raise ValueError(f"{folder} has no tensor {name}")
        used.add(name)
        return there[name]

    for ours, theirs in names(model.config.depth):
        for part in ("weight", "bias"):
            if (key := f"{ours}.{part}") in wanted:
                here[key] = torch.cat([take(f"{name}.{part}") for name in theirs]).reshape(wanted[key].shape)
    for ours, name in tables(model.config.depth):
        here[ours] = take(name)
    if unexpected := sorted(set(there) - used):
        raise ValueError(f"{folder} has tensors that a Latte has no place for: {', '.join(unexpected[:5])}")
    model.load_state_dict(here)
    return model


def to_diffusers(model: Latte, folder: str | Path, frames: int = 16) -> None:
    """Writes a folder that `LatteTransformer3DModel.from_pretrained` reads, for clips of `frames` frames.

    Raises ValueError, naming the setting, for a model that diffusers' class can't express.
    """
    config, folder = model.config, Path(folder)
    for key, value in FULL_LATTE.items():
        if getattr(config, key) != value:
            raise ValueError(f"model.{key} is {getattr(config, key)!r}; diffusers' Latte can only express {value!r}")
    weights = model.state_dict()
    there: dict[str, Tensor] = {}
    for ours, theirs in names(config.depth):
        for part in ("weight", "bias"):
            if (key := f"{ours}.{part}") in weights:
                for name, tensor in zip(theirs, weights[key].chunk(len(theirs)), strict=True):
                    there[f"{name}.{part}"] = tensor.contiguous()
    patch = there["pos_embed.proj.weight"]
    there["pos_embed.proj.weight"] = patch.reshape(config.width, config.in_channels, config.patch, config.patch)
    there |= {name: weights[ours].contiguous() for ours, name in tables(config.depth)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(there, folder / WEIGHTS, metadata={"format": "pt"})
    settings = {
        "_class_name": "LatteTransformer3DModel",
        **EXPECTED,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth // 2,
        "cross_attention_dim": config.width,
        "attention_bias": config.attention_bias,
        "sample_size": config.sample_size,
        "patch_size": config.patch,
        "norm_eps": config.norm_eps,
        "caption_channels": config.text_width,
        "video_length": frames,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
