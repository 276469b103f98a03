"""Latte, a transformer that denoises video latents (Ma et al. 2024, arXiv 2401.03048, variant 1).

A clip becomes patch tokens, `n` of each of `f` frames. Factorised, the blocks take turns: even ones attend within a
frame, odd ones along time. Joint, every block attends over all of space and time. Both are the same block; the tokens
are grouped by another line of einops.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sora_train.model.embed import (
    TextEmbedding,
    TimeEmbedding,
    from_patches,
    pool,
    space_positions,
    time_positions,
    to_patches,
)
from sora_train.model.layers import Block, TextAttention, modulate


@dataclass(frozen=True)
class ModelConfig:
    """The transformer's shape."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    width: int = 384
    """Width of the token vectors."""
    depth: int = 12
    """Number of blocks; factorised, spatial and temporal ones together, so an even number."""
    heads: int = 6
    """Attention heads; they divide the width."""
    patch: int = 2
    """Side of a patch in latents."""
    in_channels: int = 4
    """Channels of the latents, as the VAE makes them."""
    learned_variance: bool = False
    """Twice as many output channels: the second half is the variance of DDPM's reverse step."""
    text_width: int = 4096
    """Width of the text embeddings, as the text encoder makes them (4096 for T5-XXL)."""
    attention: Literal["factorised", "joint"] = "factorised"
    """Space and time in turns, as Latte; or full attention over all of space and time in every block."""
    text_in: Literal["spatial", "every"] = "spatial"
    """Which blocks read the caption when factorised: the spatial ones, as the released Latte, or every block."""
    frame_positions: Literal["temporal", "input"] = "temporal"
    """Where a token learns its frame: at the first temporal block, as Latte, or at the input, as joint always does."""
    pooled_text: bool = False
    """Whether the mean of the caption's embeddings is added to the time embedding, which reaches every block."""
    sample_size: int = 32
    """Latents on a side that positions are scaled for; other shapes interpolate (64 for 512 px and an 8x VAE)."""
    attention_bias: bool = True
    """Biases in the query, key and value maps."""
    norm_eps: float = 1e-6
    """Added to the variance in layer norms."""
    init_from: str = ""
    """Latte whose weights training starts from: a folder in diffusers' format, or a hub id; empty is from scratch."""

    def __post_init__(self) -> None:
        for key in ("width", "depth", "heads", "patch", "in_channels", "text_width", "sample_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key} is {getattr(self, key)}; it must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"model.width {self.width} does not divide over model.heads {self.heads}")
        if self.width % 4:
            raise ValueError(
                f"model.width {self.width} must be a multiple of 4: positions take sines and cosines of two axes"
            )
        if self.attention == "factorised" and self.depth % 2:
            raise ValueError(f"model.depth {self.depth} must be even: spatial and temporal blocks take turns")
        if self.sample_size % self.patch:
            raise ValueError(f"model.sample_size {self.sample_size} must be a multiple of model.patch {self.patch}")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learned_variance else 1)


class Latte(nn.Module):
    """Denoises latents of a clip at diffusion time `t`, told what to show by text embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d, joint = config.width, config.attention == "joint"
        self.patch_in = nn.Linear(config.in_channels * config.patch**2, d)
        self.time = TimeEmbedding(d)
        self.time_to_blocks = nn.Linear(d, 6 * d)
        self.text = TextEmbedding(config.text_width, d)
        self.pooled_text = TextEmbedding(config.text_width, d) if config.pooled_text else None
        self.blocks = nn.ModuleList(
            Block(
                d,
                config.heads,
                text=joint or i % 2 == 0 or config.text_in == "every",
                attention_bias=config.attention_bias,
                norm_eps=config.norm_eps,
            )
            for i in range(config.depth)
        )
        self.norm_out = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.table_out = nn.Parameter(torch.randn(2, d) / d**0.5)
        self.patch_out = nn.Linear(d, config.patch**2 * config.out_channels)
        self.initialise()

    def initialise(self) -> None:
        """PixArt's start: Xavier for every map; the text's way in and the output begin at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                    nn.init.zeros_(module.bias)
        embeddings = [self.time, self.text] + ([self.pooled_text] if self.pooled_text is not None else [])
        for linear in [self.time_to_blocks, *(fc for e in embeddings for fc in (e.fc1, e.fc2))]:
            nn.init.normal_(linear.weight, std=0.02)
        text_attentions = [module for module in self.modules() if isinstance(module, TextAttention)]
        for linear in [self.patch_out, *(attention.out for attention in text_attentions)]:
            nn.init.zeros_(linear.weight)

    def forward(
        self,
        x: Float[Tensor, "b f c h w"],
        t: Float[Tensor, "b"],
        text: Float[Tensor, "b l e"],
        text_mask: Bool[Tensor, "b l"],
    ) -> Float[Tensor, "b f o h w"]:
        """x: normalised latents; t: 0 (data) to 1000 (noise); text: embeddings, of which `text_mask` marks the real.

        With a single frame the temporal blocks are left out: images train the spatial ones alone (section 3.4).
        Raises ValueError if the latents do not divide into patches.
        """
        f, h, w = x.shape[1], x.shape[3], x.shape[4]
        p, d = self.config.patch, self.config.width
        if h % p or w % p:
            raise ValueError(f"latents of {h} x {w} do not divide into patches of {p} x {p}")
        joint = self.config.attention == "joint"

        time = self.time(t)
        if self.pooled_text is not None:
            time = time + self.pooled_text(pool(text, text_mask))
        time6 = rearrange(self.time_to_blocks(nn.functional.silu(time)), "b (six d) -> b six d", six=6)
        text = self.text(text)

        size = self.config.sample_size
        place = space_positions(h // p, w // p, d, base=size // p, scale=max(size // 64, 1), device=x.device)
        frame = time_positions(f, d, x.device)[:, None]  # f 1 d
        x = self.patch_in(to_patches(x, p)) + place.to(x.dtype)
        frames_at_input = joint or self.config.frame_positions == "input"
        if frames_at_input and f > 1:
            x = x + frame.to(x.dtype)

        for i, block in enumerate(self.blocks):
            if joint:
                x = rearrange(
                    block(rearrange(x, "b f n d -> b 1 (f n) d"), time6, text, text_mask), "b 1 (f n) d -> b f n d", f=f
                )
            elif i % 2 == 0:
                x = block(x, time6, text, text_mask)
            elif f > 1:
                if i == 1 and not frames_at_input:
                    x = x + frame.to(x.dtype)
                x = rearrange(block(rearrange(x, "b f n d -> b n f d"), time6, text, text_mask), "b n f d -> b f n d")

        shift, scale = rearrange(self.table_out + time[:, None], "b two d -> two b 1 1 d")
        return from_patches(self.patch_out(modulate(self.norm_out(x), shift, scale)), p, h // p, w // p)
