"""The transformer block of every Latte: self-attention, cross-attention to the text, feed-forward.

PixArt-alpha's block (arXiv 2310.00426, figure 4) as Latte uses it (arXiv 2401.03048, section 3): scale, shift and gate
come from the diffusion time through adaLN-single, plus a learned scale-shift table of the block's own.

Tokens arrive as `b g s d`: b clips, each cut into g groups of s tokens. Those of a group attend to each other, with
joint attention all of a clip. Which tokens form a group is the caller's choice: a frame's, or a place's over time.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sora_train.kernels.norm_modulate import fits_norm_modulate, norm_modulate
from sora_train.kernels.short_attention import fits_short_attention, short_attention
from sora_train.model.config import ModelConfig
from sora_train.model.embed import apply_rope
from sora_train.model.sequence import ALONE

MAX_GROUPS = 2**16 - 1
"""CUDA's attention kernels put the batch in a grid dimension of at most this size (pytorch issue 142228)."""


class Attention(nn.Module):
    """Multi-head self-attention within each group, or of all tokens of a clip (`joint`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.joint = config.heads, config.attention == "joint"
        self.ranks = ALONE  # or the ranks that share the tokens of a clip, if joint
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.attention_bias)
        self.out = nn.Linear(config.width, config.width)

    def forward(
        self, x: Float[Tensor, "b g s d"], rope: Float[Tensor, "2 i r"] | None = None, places: int = 0
    ) -> Float[Tensor, "b g s d"]:
        qkv = self.qkv(x)
        if not self.joint and fits_short_attention(qkv, self.heads):
            return self.out(short_attention(qkv if rope is None else rotate(qkv, rope, self.heads), self.heads))
        groups = "b m (g s) k" if self.joint else "(b g) m s k"
        # cut by `chunk`, so one copy makes the gradient; `rearrange(… -> three …)` takes two
        parts, heads = self.ranks.to_heads(*qkv.chunk(3, dim=-1), places=places), self.heads // self.ranks.size
        q, k, v = (rearrange(part, f"b g s (m k) -> {groups}", m=heads) for part in parts)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        y = rearrange(attend(q, k, v), f"{groups} -> b g s (m k)", b=x.shape[0], g=x.shape[1])
        return self.out(self.ranks.to_tokens(y, x.shape[-1]))


def rotate(qkv: Float[Tensor, "b g s ddd"], rope: Float[Tensor, "2 s r"], heads: int) -> Float[Tensor, "b g s ddd"]:
    """Rotary positions for the queries and keys among all three."""
    q, k, v = (rearrange(part, "b g s (m k) -> b g m s k", m=heads) for part in qkv.chunk(3, dim=-1))
    parts = (apply_rope(q, rope), apply_rope(k, rope), v)
    return torch.cat([rearrange(part, "b g m s k -> b g s (m k)") for part in parts], dim=-1)


def attend(
    q: Float[Tensor, "bg m s k"], k: Float[Tensor, "bg m s k"], v: Float[Tensor, "bg m s k"]
) -> Float[Tensor, "bg m s k"]:
    """Attention within each group, in several calls where there are more than `MAX_GROUPS`.

    Temporal attention has a group for each latent position.
    """
    if len(q) <= MAX_GROUPS:
        return scaled_dot_product_attention(q, k, v)
    parts = [slice(begin, begin + MAX_GROUPS) for begin in range(0, len(q), MAX_GROUPS)]
    return torch.cat([scaled_dot_product_attention(q[part], k[part], v[part]) for part in parts])


class TextAttention(nn.Module):
    """Cross-attention of every token of a clip to the tokens of its caption; groups do not matter here."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.width, config.width, bias=config.attention_bias)
        self.kv = nn.Linear(config.width, 2 * config.width, bias=config.attention_bias)
        self.out = nn.Linear(config.width, config.width)

    def forward(
        self, x: Float[Tensor, "b g s d"], text: Float[Tensor, "b l d"], text_mask: Bool[Tensor, "b l"]
    ) -> Float[Tensor, "b g s d"]:
        q = rearrange(self.q(x), "b g s (m k) -> b m (g s) k", m=self.heads)
        k, v = (rearrange(part, "b l (m k) -> b m l k", m=self.heads) for part in self.kv(text).chunk(2, dim=-1))
        y = scaled_dot_product_attention(q, k, v, attn_mask=rearrange(text_mask, "b l -> b 1 1 l"))
        return self.out(rearrange(y, "b m (g s) k -> b g s (m k)", g=x.shape[1]))


class FeedForward(nn.Module):
    """Two linear maps around a GELU."""

    def __init__(self, d: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, inner)
        self.fc2 = nn.Linear(inner, d)

    def forward(self, x: Float[Tensor, "b g s d"]) -> Float[Tensor, "b g s d"]:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


def modulate(
    x: Float[Tensor, "b g s d"], shift: Float[Tensor, "b #g #s d"], scale: Float[Tensor, "b #g #s d"]
) -> Float[Tensor, "b g s d"]:
    """x (1 + scale) + shift, in one pass over x."""
    return torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """A transformer block; with `text`, its tokens also attend to the caption."""

    def __init__(self, config: ModelConfig, text: bool) -> None:
        super().__init__()
        d = config.width
        self.norm1 = nn.LayerNorm(d, eps=config.norm_eps, elementwise_affine=False)
        self.attention = Attention(config)
        self.text_attention = TextAttention(config) if text else None
        self.norm2 = nn.LayerNorm(d, eps=config.norm_eps, elementwise_affine=False)
        self.feed_forward = FeedForward(d, 4 * d)
        self.table = nn.Parameter(torch.randn(6, d) / d**0.5)  # diffusers' `scale_shift_table`
        self.fused = False  # or norms, modulation and residuals run in our kernels where they fit (`train/norms.py`)

    def forward(
        self,
        x: Float[Tensor, "b g s d"],
        modulation: Float[Tensor, "b #g #s 6 d"],
        text: Float[Tensor, "b l d"],
        text_mask: Bool[Tensor, "b l"],
        rope: Float[Tensor, "2 i r"] | None = None,
        places: int = 0,
    ) -> Float[Tensor, "b g s d"]:
        """`modulation` is the diffusion time's share of shift, scale and gate; `rope` is made by `embed.rope_freqs`.

        `places` is a frame's number of tokens, of which x has a share if ranks share a clip of joint attention.
        """
        first, second, gate2 = torch.split(self.table + modulation, [2, 3, 1], dim=3)
        x, h = self.modulated(self.norm1, x, first)
        y = self.attention(h, rope, places)
        if self.text_attention is not None:
            gate1, second = torch.split(second, [1, 2], dim=3)
            x = torch.addcmul(x, gate1.squeeze(3), y)
            y = self.text_attention(x, text, text_mask)
        x, h = self.modulated(self.norm2, x, second, y)
        return torch.addcmul(x, gate2.squeeze(3), self.feed_forward(h))

    def modulated(
        self, norm: nn.LayerNorm, x: Tensor, modulation: Float[Tensor, "b #g #s k d"], y: Tensor | None = None
    ) -> tuple[Float[Tensor, "b g s d"], Float[Tensor, "b g s d"]]:
        """x plus y, if any, and its modulated norm. The modulation is shift and scale, or y's gate, shift and scale."""
        if self.fused and modulation.dtype == x.dtype and fits_norm_modulate(x, modulation):
            return norm_modulate(x, modulation, y, norm.eps)
        *gate, shift, scale = modulation.unbind(3)
        if y is not None:
            x = torch.addcmul(x, gate[0], y) if gate else x + y
        return x, modulate(norm(x), shift, scale)
