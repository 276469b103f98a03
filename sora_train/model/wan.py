"""Wan, a transformer that denoises video latents (Wan Team 2025, arXiv 2503.20314): Wan 2.1 T2V and Wan 2.2 TI2V.

A clip becomes patch tokens, n of each of f frames. Every block attends over all of space and time with 3-D rotary
positions and then to the caption. Scale, shift and gate come from the diffusion time. They are computed in float32, as
the norms of tokens are. The diffusion time is one of a clip, or one of each latent frame, which Wan 2.2 calls
`expand_timesteps`: with time 0 a frame is given, such as the first one of image-to-video.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention

from sora_train.kernels.norm_modulate import fits_norm_modulate, norm_modulate
from sora_train.model.config import ModelConfig
from sora_train.model.embed import TextEmbedding, TimeEmbedding, apply_rope_pairs, from_patches, rope_freqs, to_patches
from sora_train.model.layers import FeedForward, modulate
from sora_train.model.sequence import ALONE, PLACES


class Wan(nn.Module):
    """Predicts from latents at diffusion time `t` and text embeddings what the objective asks for."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.ranks = config, ALONE
        d = config.width
        self.patch_in = nn.Linear(config.in_channels * config.patch**2, d)
        self.time = TimeEmbedding(d)
        self.time_to_blocks = nn.Linear(d, 6 * d)
        self.text = TextEmbedding(config.text_width, d)
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.depth))
        self.norm_out = Norm(d, eps=config.norm_eps, elementwise_affine=False)
        self.table_out = nn.Parameter(torch.randn(2, d) / d**0.5)
        self.patch_out = nn.Linear(d, config.patch**2 * config.out_channels)
        self.initialise()

    def initialise(self) -> None:
        """The start of Wan's own code (`wan/modules/model.py`, `init_weights`).

        Xavier for every linear map, of which query, key and value are three; the output layer begins at zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, WanAttention):
                [nn.init.xavier_uniform_(part) for part in module.qkv.weight.chunk(3)]
            elif isinstance(module, WanTextAttention):
                [nn.init.xavier_uniform_(part) for part in module.kv.weight.chunk(2)]
        for linear in (self.time.fc1, self.time.fc2, self.text.fc1, self.text.fc2):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.patch_out.weight)

    def forward(
        self,
        x: Float[Tensor, "b f c h w"],
        t: Float[Tensor, "b *f"],
        text: Float[Tensor, "b l e"],
        text_mask: Bool[Tensor, "b l"],
    ) -> Float[Tensor, "b f c h w"]:
        """x: normalised latents; t: 0 (data) to 1000 (noise), of a clip or of each of its frames.

        `text_mask` is True for real text tokens. The others become zeros, as in `WanPipeline`, and all are attended to.
        Raises ValueError if the latents do not divide into patches, or for more text tokens than the model takes.
        """
        f, p, most = x.shape[1], self.config.patch, self.config.text_tokens
        if x.shape[3] % p or x.shape[4] % p:
            raise ValueError(f"latents of {x.shape[3]} x {x.shape[4]} do not divide into patches of {p} x {p}")
        if text.shape[1] > most:
            raise ValueError(f"captions have {text.shape[1]} tokens; Wan takes at most {most}")
        h, w = x.shape[3] // p, x.shape[4] // p

        time = self.time(t if t.ndim == 2 else t[:, None])
        modulation = rearrange(self.time_to_blocks(nn.functional.silu(time)), "b f (six d) -> b f six d", six=6)
        zeros = (0, 0, 0, most - text.shape[1])
        text = self.text(nn.functional.pad(text.masked_fill(~text_mask[..., None], 0), zeros))
        rope = self.rope(f, h, w, x.device)

        x = self.ranks.cut(self.patch_in(to_patches(x, p)), PLACES, h * w)  # ranks may share the places of a clip
        for block in self.blocks:
            x = block(x, modulation, text, rope)
        shift, scale = rearrange(self.table_out.float() + time.float()[:, :, None], "b f two d -> two b f 1 d")
        x = self.patch_out(modulate(self.norm_out(x), shift, scale).to(x.dtype))
        return from_patches(self.ranks.join(x, PLACES, h * w), p, h, w)

    def rope(self, f: int, h: int, w: int, device: torch.device) -> Float[Tensor, "2 s r"]:
        """Rotary embeddings of all tokens: their frame, row and column."""
        axes = [torch.arange(side, dtype=torch.float32, device=device) for side in (f, h, w)]
        positions = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")])
        return rope_freqs(positions, self.config.width // self.config.heads)


class WanBlock(nn.Module):
    """Self-attention, cross-attention to the text, and feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.norm1 = Norm(d, eps=config.norm_eps, elementwise_affine=False)
        self.attention = WanAttention(config)
        self.text_norm = Norm(d, eps=config.norm_eps)
        self.text_attention = WanTextAttention(config)
        self.norm2 = Norm(d, eps=config.norm_eps, elementwise_affine=False)
        self.feed_forward = FeedForward(d, config.inner_width)
        self.table = nn.Parameter(torch.randn(6, d) / d**0.5)  # diffusers' `scale_shift_table`
        self.fused = False  # as in a `Block`

    def forward(
        self,
        x: Float[Tensor, "b f n d"],
        modulation: Float[Tensor, "b #f 6 d"],
        text: Float[Tensor, "b l d"],
        rope: Float[Tensor, "2 s r"],
    ) -> Float[Tensor, "b f n d"]:
        """`modulation` is the diffusion time's share of shift, scale and gate; `rope` is made by `embed.rope_freqs`."""
        table = rearrange(self.table.float() + modulation.float(), "b f six d -> six b f 1 d")
        first, gate1, second, gate2 = torch.split(table, [2, 1, 2, 1])
        x, h = self.modulated(self.norm1, x, first)
        x, h = self.gated(self.text_norm, x, gate1, self.attention(h, rope))
        x, h = self.modulated(self.norm2, x, second, self.text_attention(h, text))
        return torch.addcmul(x, gate2[0], self.feed_forward(h)).to(x.dtype)

    def modulated(
        self, norm: nn.LayerNorm, x: Tensor, modulation: Float[Tensor, "two b #f 1 d"], y: Tensor | None = None
    ) -> tuple[Float[Tensor, "b f n d"], Float[Tensor, "b f n d"]]:
        """x plus y, if any, and its norm with shift and scale, in the tokens' dtype."""
        if self.fused and fits_norm_modulate(x, rows := modulation.movedim(0, 3)):
            return norm_modulate(x, rows, y, norm.eps)
        x = x if y is None else x + y
        return x, modulate(norm(x), *modulation).to(x.dtype)

    def gated(
        self, norm: nn.LayerNorm, x: Tensor, gate: Float[Tensor, "1 b #f 1 d"], y: Tensor
    ) -> tuple[Float[Tensor, "b f n d"], Float[Tensor, "b f n d"]]:
        """x plus gated y, and its norm, in the tokens' dtype. To the kernels, weight and bias are a modulation."""
        if self.fused and fits_norm_modulate(x, gate.movedim(0, 3)):
            affine = (each.expand_as(gate) for each in (norm.bias.float(), norm.weight.float() - 1))
            return norm_modulate(x, torch.cat([gate, *affine]).movedim(0, 3), y, norm.eps)
        x = torch.addcmul(x, gate[0], y).to(x.dtype)
        return x, norm(x).to(x.dtype)


class Norm(nn.LayerNorm):
    """Layer norm in float32, whatever the dtype of tokens and weights."""

    def forward(self, input: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        weight, bias = (None, None) if self.weight is None else (self.weight.float(), self.bias.float())  # pyright: ignore[reportUnnecessaryComparison]
        return layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)


class RmsNorm(nn.RMSNorm):
    """RMS norm in the tokens' dtype. torch's fused kernel takes no float32 weight with bf16 tokens, as autocast has."""

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class WanAttention(nn.Module):
    """Multi-head self-attention of all tokens of a clip; the RMS norm of queries and keys is across heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, self.heads, self.ranks = config.width, config.heads, ALONE
        self.qkv = nn.Linear(d, 3 * d)
        self.norm_q, self.norm_k = (RmsNorm(d, eps=config.norm_eps) for _ in range(2))
        self.out = nn.Linear(d, d)

    def forward(self, x: Float[Tensor, "b f n d"], rope: Float[Tensor, "2 s r"]) -> Float[Tensor, "b f n d"]:
        f, d = x.shape[1], x.shape[3]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        parts = self.ranks.to_heads(self.norm_q(q), self.norm_k(k), v, places=rope.shape[1] // f)
        q, k, v = (rearrange(y, "b f n (m k) -> b m (f n) k", m=self.heads // self.ranks.size) for y in parts)
        y = scaled_dot_product_attention(apply_rope_pairs(q, rope), apply_rope_pairs(k, rope), v)
        return self.out(self.ranks.to_tokens(rearrange(y, "b m (f n) k -> b f n (m k)", f=f), d))


class WanTextAttention(nn.Module):
    """Cross-attention of every token of a clip to the tokens of its caption, zeros included."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, self.heads = config.width, config.heads
        self.q = nn.Linear(d, d)
        self.kv = nn.Linear(d, 2 * d)
        self.norm_q, self.norm_k = (RmsNorm(d, eps=config.norm_eps) for _ in range(2))
        self.out = nn.Linear(d, d)

    def forward(self, x: Float[Tensor, "b f n d"], text: Float[Tensor, "b l d"]) -> Float[Tensor, "b f n d"]:
        q = rearrange(self.norm_q(self.q(x)), "b f n (m k) -> b m (f n) k", m=self.heads)
        k, v = self.kv(text).chunk(2, dim=-1)
        k, v = (rearrange(y, "b l (m k) -> b m l k", m=self.heads) for y in (self.norm_k(k), v))
        y = scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(y, "b m (f n) k -> b f n (m k)", f=x.shape[1]))
