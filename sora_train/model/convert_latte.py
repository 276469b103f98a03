"""Names and settings of Latte in diffusers: `LatteTransformer3DModel`, and PixArt-alpha's `PixArtTransformer2DModel`.

Released weights may name their class as the authors' own code did: `LatteT2V`, `Transformer2DModel`.

Query, key and value maps are one matrix here and three there, and the patch map is a convolution there. An image model
(PixArt-alpha, arXiv 2310.00426) has the same blocks. They become the spatial ones, and the temporal ones start as the
identity, so at first each frame is what the image model makes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sora_train.model.config import ModelConfig
from sora_train.model.latte import Latte
from sora_train.model.layers import Block

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


def latte_names(depth: int, image: bool = False) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Pairs of a module or table here and its counterparts in diffusers, stacked in this order.

    An `image` model has only the spatial blocks, which are the even ones.
    """
    yield "patch_in", ("pos_embed.proj",)
    yield "time.fc1", ("adaln_single.emb.timestep_embedder.linear_1",)
    yield "time.fc2", ("adaln_single.emb.timestep_embedder.linear_2",)
    yield "time_to_blocks", ("adaln_single.linear",)
    yield "text.fc1", ("caption_projection.linear_1",)
    yield "text.fc2", ("caption_projection.linear_2",)
    yield "patch_out", ("proj_out",)
    yield "table_out", ("scale_shift_table",)
    for i in range(0, depth, 2 if image else 1):
        here = f"blocks.{i}"
        there = f"{'temporal_' if i % 2 else ''}transformer_blocks.{i // 2}"
        yield f"{here}.table", (f"{there}.scale_shift_table",)
        yield f"{here}.attention.qkv", tuple(f"{there}.attn1.to_{letter}" for letter in "qkv")
        yield f"{here}.attention.out", (f"{there}.attn1.to_out.0",)
        yield f"{here}.text_attention.q", (f"{there}.attn2.to_q",)  # of temporal blocks only where diffusers has none
        yield f"{here}.text_attention.kv", (f"{there}.attn2.to_k", f"{there}.attn2.to_v")
        yield f"{here}.text_attention.out", (f"{there}.attn2.to_out.0",)
        yield f"{here}.feed_forward.fc1", (f"{there}.ff.net.0.proj",)
        yield f"{here}.feed_forward.fc2", (f"{there}.ff.net.2",)


def is_image_model(config: dict[str, Any]) -> bool:
    """Whether diffusers' config is an image model's."""
    return config.get("_class_name") in IMAGE


def latte_config(config: dict[str, Any]) -> ModelConfig:
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


def latte_settings(config: ModelConfig, frames: int, padded: bool) -> dict[str, Any]:
    """diffusers' config.json of a Latte for clips of `frames` frames.

    Raises ValueError for a setting that diffusers' class can't express.
    """
    for key, value in FULL_LATTE.items():
        if getattr(config, key) != value:
            raise ValueError(f"model.{key} is {getattr(config, key)!r}; diffusers' Latte can only express {value!r}")
    if config.sample_frames not in (0, frames):
        raise ValueError(
            f"model.sample_frames is {config.sample_frames}; for clips of {frames} frames diffusers' Latte can only "
            f"express {frames}, or 0"
        )
    return {
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
