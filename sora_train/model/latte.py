"""Latte, a transformer that denoises video latents (Ma et al. 2024, arXiv 2401.03048, variant 1).

A clip becomes patch tokens, `n` of each of `f` frames. Factorised, the blocks take turns: even ones attend within a
frame, odd ones along time. Joint, every block attends over all of space and time. Both are the same block; the tokens
are grouped by another line of einops.
"""

from typing import Literal

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
    rotation,
    sinusoid,
    space_positions,
    to_patches,
)
from sora_train.model.layers import Block, TextAttention, modulate


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

    def checkpoint(self, mode: Literal["none", "selective", "full"]) -> None:
        """Saves memory in training: `full` computes every block again in the backward pass, `selective` all of it but
        matmuls and attention, `none` nothing.
        """
        for module in self.modules():
            if isinstance(module, Block):
                module.checkpointing = mode

    def compile_blocks(self, shapes: int) -> None:
        """Compiles each kind of block when it first sees a shape; blocks of one kind share the graph.

        `shapes` is how many inputs there are that differ in the clip's shape, the caption's padded length or whether
        gradients are taken. There are at most `graphs_at_most(shapes)` graphs; one more is an error, since a step that
        compiles takes a hundred times as long.
        """
        import torch._dynamo  # takes a second

        limit = self.graphs_at_most(shapes)
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.config.accumulated_recompile_limit = limit
        for module in self.modules():
            if isinstance(module, Block):
                run = torch.compile(module.run, fullgraph=True, dynamic=False)  # pyright: ignore[reportUnknownMemberType]
                module.run = run

    def graphs_at_most(self, shapes: int) -> int:
        """The most graphs that `compile_blocks` makes: one for each kind of block and shape, and one for the single
        token with which images pass the temporal blocks.
        """
        return shapes if self.config.attention == "joint" else 2 * shapes + 1

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
        p = self.config.patch
        if h % p or w % p:
            raise ValueError(f"latents of {h} x {w} do not divide into patches of {p} x {p}")
        joint = self.config.attention == "joint"

        time = self.time(t)
        if self.pooled_text is not None:
            time = time + self.pooled_text(pool(text, text_mask))
        time6 = rearrange(self.time_to_blocks(nn.functional.silu(time)), "b (six d) -> b six d", six=6)
        text = self.text(text)

        place, frame = self.added_positions(f, h // p, w // p, x.device)
        turn_space, turn_time = self.rotations(f, h // p, w // p, x.device)
        x = self.patch_in(to_patches(x, p))
        if place is not None:
            x = x + place.to(x.dtype)
        if frame is not None and (joint or self.config.frame_positions == "input"):
            x, frame = x + frame.to(x.dtype), None

        for i, block in enumerate(self.blocks):
            if joint:
                tokens = rearrange(x, "b f n d -> b 1 (f n) d")
                x = rearrange(block(tokens, time6, text, text_mask, turn_space), "b 1 (f n) d -> b f n d", f=f)
            elif i % 2 == 0:
                x = block(x, time6, text, text_mask, turn_space)
            elif f > 1:
                if i == 1 and frame is not None:
                    x = x + frame.to(x.dtype)
                tokens = rearrange(x, "b f n d -> b n f d")
                x = rearrange(block(tokens, time6, text, text_mask, turn_time), "b n f d -> b f n d")
            elif self.training and torch.is_grad_enabled():
                x = x + nothing_of(block, x, turn_time)

        shift, scale = rearrange(self.table_out + time[:, None], "b two d -> two b 1 1 d")
        return from_patches(self.patch_out(modulate(self.norm_out(x), shift, scale)), p, h // p, w // p)

    def added_positions(
        self, f: int, h: int, w: int, device: torch.device
    ) -> tuple[Float[Tensor, "n d"] | None, Float[Tensor, "f 1 d"] | None]:
        """What tokens of f frames of h x w patches are given to know their place and their frame; None is nothing."""
        config = self.config
        if config.positions == "rotary":
            return None, None
        base, scale = config.sample_size // config.patch, max(config.sample_size // 64, 1)
        place = space_positions(h, w, config.width, base=base, scale=scale, device=device)
        if f == 1 or config.frame_positions == "rotary":
            return place, None
        frame = sinusoid(frame_positions(f, config.sample_frames, device), config.width).float()
        return place, frame[:, None]

    def rotations(
        self, f: int, h: int, w: int, device: torch.device
    ) -> tuple[Float[Tensor, "2 s half"] | None, Float[Tensor, "2 f half"] | None]:
        """How queries and keys turn in spatial (or joint) and in temporal blocks, made once for all; None is no turn.

        A block turns them on the axes along which its tokens differ, which share the head's width.
        """
        config = self.config
        k, rotary, joint = config.width // config.heads, config.positions == "rotary", config.attention == "joint"
        if not rotary and config.frame_positions != "rotary":
            return None, None
        frame = frame_positions(f, config.sample_frames, device)
        if joint and not rotary:
            return rotation(frame.repeat_interleave(h * w)[None], k), None
        row, column = (torch.arange(side, dtype=torch.float32, device=device) for side in (h, w))
        axes = [frame, row, column] if joint else [row, column]
        space = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")])
        return rotation(space, k) if rotary else None, None if joint else rotation(frame[None], k)


def nothing_of(block: nn.Module, x: Float[Tensor, "b f n d"], turn: Tensor | None) -> Float[Tensor, "1 1 1 d"]:
    """Zero, by way of every parameter of a block that is left out, so that each gets a gradient of zero.

    Without one, ZeRO-3 would keep the gradients of the step before, AdamW's moments would stand still at stage 0 alone,
    and modules' hooks would come in another order than for videos. One token of zeros goes in and no data, so that
    nothing but weights that are not finite themselves could make 0 x infinity of it.
    """
    d = x.shape[-1]
    zeros = x.new_zeros(1, 1, 1, d).requires_grad_()  # as a video's tokens, for the hooks that wait behind the block
    heard = torch.ones(1, 1, dtype=torch.bool, device=x.device)
    return 0 * block(zeros, zeros[0].expand(1, 6, d), zeros[0], heard, turn)
