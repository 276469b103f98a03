"""Latte, a transformer that denoises video latents (Ma et al. 2024, arXiv 2401.03048, variant 1).

A clip becomes patch tokens, n of each of f frames. With factorised attention, even blocks attend within a frame
(spatial) and odd ones along time (temporal). With joint attention, every block attends over all of space and time.
All blocks are alike: only the grouping of the tokens differs.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sora_train.model.config import ModelConfig
from sora_train.model.embed import (
    TextEmbedding,
    TimeEmbedding,
    frame_positions,
    from_patches,
    pool,
    rope_freqs,
    sinusoid,
    space_positions,
    to_patches,
)
from sora_train.model.layers import Block, TextAttention, modulate
from sora_train.model.sequence import ALONE, FRAMES, PLACES


class Latte(nn.Module):
    """Predicts from latents at diffusion time `t` and text embeddings what the objective asks for."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.ranks = config, ALONE
        d, self.joint = config.width, config.attention == "joint"
        self.patch_in = nn.Linear(config.in_channels * config.patch**2, d)
        self.time = TimeEmbedding(d)
        self.time_to_blocks = nn.Linear(d, 6 * d)
        self.text = TextEmbedding(config.text_width, d)
        self.pooled_text = TextEmbedding(config.text_width, d) if config.pooled_text else None
        text = [self.joint or i % 2 == 0 or config.cross_attention_in == "every" for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, each) for each in text)
        self.norm_out = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.table_out = nn.Parameter(torch.randn(2, d) / d**0.5)
        self.patch_out = nn.Linear(d, config.patch**2 * config.out_channels)
        self.initialise()

    def initialise(self) -> None:
        """PixArt's start: Xavier for every linear map; cross-attention and the output layer begin at zero."""
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
        t: Float[Tensor, "b *f"],
        text: Float[Tensor, "b l e"],
        text_mask: Bool[Tensor, "b l"],
    ) -> Float[Tensor, "b f o h w"]:
        """x: normalised latents; t: 0 (data) to 1000 (noise), of a clip or of each of its frames.

        `text_mask` is True for real text tokens. A single frame, an image, skips the temporal blocks (section 3.4).
        Raises ValueError if the latents do not divide into patches.
        """
        f, p = x.shape[1], self.config.patch
        if x.shape[3] % p or x.shape[4] % p:
            raise ValueError(f"latents of {x.shape[3]} x {x.shape[4]} do not divide into patches of {p} x {p}")
        h, w = x.shape[3] // p, x.shape[4] // p
        n, ranks = h * w, self.ranks  # ranks may share the clips: each computes its own frames, or places
        shared = (PLACES, n) if self.joint else (FRAMES, f)

        time = self.time(t if t.ndim == 2 else t[:, None])
        if self.pooled_text is not None:
            time = time + self.pooled_text(pool(text, text_mask))[:, None]
        modulation = rearrange(self.time_to_blocks(nn.functional.silu(time)), "b f (six d) -> b f 1 six d", six=6)
        text = self.text(text)

        position, frame = self.added_positions(f, h, w, x.device)
        space_rope, time_rope = self.ropes(f, h, w, x.device)
        x = self.patch_in(to_patches(x, p))
        if position is not None:
            x = x + position.to(x.dtype)
        if frame is not None and (self.joint or self.config.temporal_positions == "input"):
            x, frame = x + frame.to(x.dtype), None

        x, of_own = ranks.cut(x, *shared), ranks.cut(modulation, *shared)
        for i, block in enumerate(self.blocks):
            if self.joint or i % 2 == 0:
                x = block(x, of_own, text, text_mask, space_rope, n)
            elif f > 1:
                x = ranks.exchange(x, split=PLACES, join=FRAMES, length=f)
                if i == 1 and frame is not None:
                    x = x + frame.to(x.dtype)
                tokens, of_frames = rearrange(x, "b f n d -> b n f d"), modulation.transpose(1, 2)
                x = rearrange(block(tokens, of_frames, text, text_mask, time_rope), "b n f d -> b f n d")
                x = ranks.exchange(x, split=FRAMES, join=PLACES, length=n)

        table = rearrange(self.table_out + time[:, :, None], "b f two d -> two b f 1 d")
        shift, scale = (ranks.cut(part, *shared) for part in table)
        x = self.patch_out(modulate(self.norm_out(x), shift, scale))
        return from_patches(ranks.join(x, *shared), p, h, w)

    def added_positions(
        self, f: int, h: int, w: int, device: torch.device
    ) -> tuple[Float[Tensor, "n d"] | None, Float[Tensor, "f 1 d"] | None]:
        """Embeddings of position and of frame that are added to the tokens of f frames of h x w patches, if any."""
        config = self.config
        if config.positions == "rotary":
            return None, None
        base, scale = config.sample_size // config.patch, max(config.sample_size // 64, 1)
        position = space_positions(h, w, config.width, base=base, scale=scale, device=device)
        if f == 1 or config.temporal_positions == "rotary":
            return position, None
        frame = sinusoid(frame_positions(f, config.sample_frames, device), config.width).float()
        return position, rearrange(frame, "f d -> f 1 d")

    def ropes(
        self, f: int, h: int, w: int, device: torch.device
    ) -> tuple[Float[Tensor, "2 s r"] | None, Float[Tensor, "2 f r"] | None]:
        """Rotary embeddings of spatial (or joint) and of temporal blocks, if any.

        Each covers the axes along which the tokens of a group differ.
        """
        config = self.config
        k, rotary = config.width // config.heads, config.positions == "rotary"
        if not rotary and config.temporal_positions != "rotary":
            return None, None
        frame = frame_positions(f, config.sample_frames, device)
        if self.joint and not rotary:
            return rope_freqs(frame.repeat_interleave(h * w)[None], k), None
        row, column = (torch.arange(side, dtype=torch.float32, device=device) for side in (h, w))
        axes = [frame, row, column] if self.joint else [row, column]
        space = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")])
        return rope_freqs(space, k) if rotary else None, None if self.joint else rope_freqs(frame[None], k)
