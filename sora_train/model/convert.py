"""Weights to and from diffusers: `LatteTransformer3DModel` both ways, PixArt-alpha's `PixArtTransformer2DModel` in.

Released weights may name their class as the authors' own code did: `LatteT2V`, `Transformer2DModel`.

The conversion renames tensors: query, key and value maps are one matrix here and three there, and the patch map is a
convolution there. An image model (PixArt-alpha, arXiv 2310.00426) has the same blocks. They become the spatial ones,
and the temporal ones start as the identity, so at first each frame is what the image model makes.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from sora_train.model.config import ModelConfig
from sora_train.model.latte import Latte
from sora_train.model.layers import Block

WEIGHTS = "diffusion_pytorch_model.safetensors"
EXPECTED = {"norm_type": "ada_norm_single", "activation_fn": "gelu-approximate", "norm_elementwise_affine": False}
FULL_LATTE = {
    "attention": "factorised",
    "cross_attention_in": "spatial",
    "positions": "sinusoid",
    "temporal_positions": "temporal",
    "pooled_text": False,
}
VIDEO, IMAGE = ("LatteTransformer3DModel", "LatteT2V"), ("PixArtTransformer2DModel", "Transformer2DModel")
PADDED = "_padded_variance"
"""A key of config.json that diffusers ignores: the variance half of the output is zeros."""
BUFFERS = {"pos_embed.pos_embed", "temp_pos_embed", "caption_projection.y_embedding"}
"""Tensors of released weights that are ignored: positions, which are computed here, and the null caption of the
original training code; diffusers' pipelines embed "" instead."""


def module_names(depth: int, image: bool = False) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Pairs of a module here and its counterparts in diffusers, stacked in this order.

    An `image` model has only the spatial blocks, which are the even ones.
    """
    yield "patch_in", ("pos_embed.proj",)
    yield "time.fc1", ("adaln_single.emb.timestep_embedder.linear_1",)
    yield "time.fc2", ("adaln_single.emb.timestep_embedder.linear_2",)
    yield "time_to_blocks", ("adaln_single.linear",)
    yield "text.fc1", ("caption_projection.linear_1",)
    yield "text.fc2", ("caption_projection.linear_2",)
    yield "patch_out", ("proj_out",)
    for i in range(0, depth, 2 if image else 1):
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


def table_names(depth: int, image: bool = False) -> Iterator[tuple[str, str]]:
    """Names of the scale-shift tables of adaLN, here and in diffusers."""
    yield "table_out", "scale_shift_table"
    for i in range(0, depth, 2 if image else 1):
        yield f"blocks.{i}.table", f"{'temporal_' if i % 2 else ''}transformer_blocks.{i // 2}.scale_shift_table"


def is_image_model(config: dict[str, Any]) -> bool:
    """Whether diffusers' config is an image model's. Raises ValueError for a class that can't be read."""
    name = config.get("_class_name")
    if name not in VIDEO + IMAGE:
        raise ValueError(f"_class_name is {name!r}; {', '.join(VIDEO + IMAGE)} can be read")
    return name in IMAGE


def config_from_diffusers(config: dict[str, Any]) -> ModelConfig:
    """The model config of a Latte or a PixArt-alpha. Raises ValueError for settings without a counterpart."""
    image = is_image_model(config)
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
    if not config.get("caption_channels"):
        raise ValueError("caption_channels is not given; expected the width of the text embeddings")
    size = config.get("sample_size", 64)
    conditions = config.get("use_additional_conditions")
    if image and (size == 128 if conditions is None else conditions):
        raise ValueError(
            f"use_additional_conditions is {conditions} with sample_size {size}: a PixArt-alpha for 1024 px, which "
            "takes resolution and aspect ratio, unlike Latte. Start from its 512 px weights"
        )
    scale = config.get("interpolation_scale")
    if scale not in (None, max(size // 64, 1)):
        raise ValueError(f"interpolation_scale is {scale}; expected {max(size // 64, 1)} for sample_size {size}")
    return ModelConfig(
        width=width,
        depth=2 * config["num_layers"],
        heads=heads,
        patch=config["patch_size"],
        in_channels=channels,
        learned_variance=out == 2 * channels and not config.get(PADDED, False),
        text_width=config["caption_channels"],
        temporal_positions="rotary" if image else "temporal",
        sample_size=size,
        attention_bias=config.get("attention_bias", False),
        norm_eps=config.get("norm_eps", 1e-5),
    )


def transformer_folder(folder: Path) -> Path:
    """The folder itself, or `transformer` in a pipeline's. Raises FileNotFoundError if neither has a config.json."""
    for place in (folder / "transformer", folder):
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(f"{folder / 'config.json'} is missing: not a model in diffusers' format")


def check_fit(config: ModelConfig, folder: Path) -> None:
    """Raises ValueError, with every key that differs, if a model of this shape can't load the weights in a folder."""
    settings = json.loads((transformer_folder(folder) / "config.json").read_text())
    wrong = config_differences(config, config_from_diffusers(settings))
    if wrong and is_image_model(settings):
        wrong.append(
            "it is an image model: its blocks become the spatial ones of a factorised model, half of model.depth, and "
            "each frame stays its image only where model.temporal_positions adds nothing to tokens, as rotary"
        )
    if wrong:
        raise ValueError("; ".join(wrong))


def config_differences(config: ModelConfig, found: ModelConfig) -> list[str]:
    """A phrase for every key in which weights of the config `found` do not fit a model of `config`."""
    free = ("preset", "sample_frames", "init_from")  # a Latte may be made for other lengths than it was trained on
    return [
        f"model.{field.name} is {getattr(config, field.name)!r}, there it is {getattr(found, field.name)!r}"
        for field in fields(ModelConfig)
        if field.name not in free and getattr(config, field.name) != getattr(found, field.name)
    ]


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a diffusers folder: one, or several with an index. FileNotFoundError if one is missing."""
    index = folder / f"{WEIGHTS}.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [WEIGHTS]
    for name in names:
        if not (folder / name).is_file() or Path(name).name != name:
            raise FileNotFoundError(f"{folder / name} is missing: expected safetensors weights next to config.json")
    return [folder / name for name in names]


def check_readable(folder: Path) -> None:
    """ValueError, naming the file, where weights are cut short: a file says how long it must be."""
    for path in weight_files(transformer_folder(folder)):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a diffusers folder."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        weights |= load_file(path)
    return weights


def from_diffusers(folder: str | Path) -> Latte:
    """Loads a Latte, or a PixArt-alpha as a Latte's spatial blocks, from its own folder or a pipeline's.

    Raises FileNotFoundError without a model, and ValueError for unexpected or missing tensors and settings.
    """
    folder = transformer_folder(Path(folder))
    settings = json.loads((folder / "config.json").read_text())
    model, image = Latte(config_from_diffusers(settings)), is_image_model(settings)
    depth, wanted = model.config.depth, model.state_dict()
    there = {name: tensor for name, tensor in read_weights(folder).items() if name not in BUFFERS}
    sources = {
        f"{ours}.{part}": [f"{name}.{part}" for name in theirs]
        for ours, theirs in module_names(depth, image)
        for part in ("weight", "bias")
        if f"{ours}.{part}" in wanted
    }
    sources |= {ours: [name] for ours, name in table_names(depth, image)}
    known = [name for theirs in sources.values() for name in theirs]
    if missing := [name for name in known if name not in there]:
        raise ValueError(f"{folder} lacks {first_five(missing)}")
    if unexpected := there.keys() - set(known):
        raise ValueError(f"{folder} has tensors that Latte does not have: {first_five(sorted(unexpected))}")
    if settings.get(PADDED, False):
        for name in ("proj_out.weight", "proj_out.bias"):
            there[name] = without_variance(there[name], model.config)
    here = {ours: torch.cat([there[name] for name in theirs]) for ours, theirs in sources.items()}
    if image:
        start_as_identity(model)
    model.load_state_dict({ours: here[ours].reshape(w.shape) if ours in here else w for ours, w in wanted.items()})
    return model


def first_five(tensors: Collection[str]) -> str:
    """The number of tensors and the names of the first five."""
    more = ", …" if len(tensors) > 5 else ""
    return f"{len(tensors)} tensors: {', '.join(list(tensors)[:5])}{more}"


@torch.no_grad()
def start_as_identity(model: Latte) -> None:
    """Makes temporal blocks the identity: the outputs of attention and feed-forward are zero.

    The gates stay open, so the maps set to zero get gradients at the first step, and all others from the second.
    """
    for block in list(model.blocks)[1::2]:
        assert isinstance(block, Block)
        for linear in (block.attention.out, block.feed_forward.fc2):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)


def without_variance(out: Float[Tensor, "ppo *d"], config: ModelConfig) -> Float[Tensor, "_ *d"]:
    """Weight or bias of the output layer without the second half of the channels."""
    pixels = config.patch**2
    return out.view(pixels, 2, config.in_channels, -1)[:, 0].reshape(pixels * config.in_channels, *out.shape[1:])


def with_variance(out: Float[Tensor, "ppc *d"], config: ModelConfig) -> Float[Tensor, "_ *d"]:
    """Weight or bias of the output layer with a second half of the channels of zeros; inverts `without_variance`."""
    halves = out.view(config.patch**2, 1, config.in_channels, -1)
    padded = torch.cat([halves, torch.zeros_like(halves)], dim=1)
    return padded.reshape(2 * out.shape[0], *out.shape[1:])


def to_diffusers(model: Latte, folder: str | Path, frames: int = 16, pad_variance: bool = False) -> None:
    """Writes a folder that `LatteTransformer3DModel.from_pretrained` reads, for clips of `frames` frames.

    With `pad_variance`, a model without a learned variance gets one of zeros, because LattePipeline drops half of the
    output; `from_diffusers` removes it again. Raises ValueError for a setting that diffusers' class can't express.
    """
    config, folder = model.config, Path(folder)
    for key, value in FULL_LATTE.items():
        if getattr(config, key) != value:
            raise ValueError(f"model.{key} is {getattr(config, key)!r}; diffusers' Latte can only express {value!r}")
    if config.sample_frames not in (0, frames):
        raise ValueError(
            f"model.sample_frames is {config.sample_frames}; for clips of {frames} frames diffusers' Latte can only "
            f"express {frames}, or 0"
        )
    weights = model.state_dict()
    there: dict[str, Tensor] = {}
    for ours, theirs in module_names(config.depth):
        for part in ("weight", "bias"):
            if (key := f"{ours}.{part}") in weights:
                for name, tensor in zip(theirs, weights[key].chunk(len(theirs)), strict=True):
                    there[f"{name}.{part}"] = tensor.contiguous()
    patch = there["pos_embed.proj.weight"]
    there["pos_embed.proj.weight"] = patch.reshape(config.width, config.in_channels, config.patch, config.patch)
    there |= {name: weights[ours].contiguous() for ours, name in table_names(config.depth)}
    padded = pad_variance and not config.learned_variance
    if padded:
        there |= {name: with_variance(there[name], config) for name in ("proj_out.weight", "proj_out.bias")}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(there, folder / WEIGHTS, metadata={"format": "pt"})
    settings = {
        "_class_name": "LatteTransformer3DModel",
        **EXPECTED,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.in_channels,
        "out_channels": 2 * config.in_channels if padded else config.out_channels,
        "num_layers": config.depth // 2,
        "cross_attention_dim": config.width,
        "attention_bias": config.attention_bias,
        "sample_size": config.sample_size,
        "patch_size": config.patch,
        "norm_eps": config.norm_eps,
        "caption_channels": config.text_width,
        "video_length": frames,
        **({PADDED: True} if padded else {}),
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
