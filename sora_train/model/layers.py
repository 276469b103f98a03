"""The one block that every variant is built of: attention, attention to the text, feed-forward.

PixArt-alpha's block (arXiv 2310.00426, figure 4) as Latte uses it (arXiv 2401.03048, section 3): scale, shift and gate
come from the diffusion time through adaLN-single, plus a learned table of the block's own.

Tokens arrive as `b g s d`: b clips, each cut into g groups of s tokens that attend to each other. Which tokens form
a group is the caller's choice, and the only difference between spatial, temporal and joint attention.
"""

from functools import partial
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,  # pyright: ignore[reportUnknownVariableType]
    create_selective_checkpoint_contexts,  # pyright: ignore[reportUnknownVariableType]
)

from sora_train.model.embed import rotate

DEAR: set[Any] = {torch.ops.aten.add_.Tensor} | {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    if hasattr(torch.ops.aten, name)  # torch's versions differ
}
"""What selective checkpointing keeps: the outputs of matmuls and attention, where nearly all of the time goes.

The sum in place is a linear map's bias, where torch or ZeRO-3's own linear function adds it after the matmul: what was
kept of the matmul has it then, and it would be added once more.
"""

MAX_GROUPS = 2**16 - 1
"""The largest grid of CUDA in the dimension that its attention kernels use for the batch."""


def dear(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Torch's policy for selective checkpointing; the signature is torch's."""
    return CheckpointPolicy.MUST_SAVE if operation in DEAR else CheckpointPolicy.PREFER_RECOMPUTE


class Attention(nn.Module):
    """Multi-head attention of each group's tokens to one another."""

    def __init__(self, d: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d, bias=bias)
        self.out = nn.Linear(d, d)

    def forward(
        self, x: Float[Tensor, "b g s d"], turn: Float[Tensor, "2 s half"] | None = None
    ) -> Float[Tensor, "b g s d"]:
        b = len(x)
        q, k, v = rearrange(self.qkv(x), "b g s (three m k) -> three (b g) m s k", three=3, m=self.heads)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        return self.out(rearrange(attend(q, k, v), "(b g) m s k -> b g s (m k)", b=b))


def attend(q: Float[Tensor, "bg m s k"], k: Float[Tensor, "bg m s k"], v: Float[Tensor, "bg m s k"]) -> Tensor:
    """Attention within each group. CUDA's kernels take at most 65,535 groups at once (pytorch issue 142228), and
    temporal attention has one for each latent position: more go in several calls.
    """
    if len(q) <= MAX_GROUPS:
        return scaled_dot_product_attention(q, k, v)
    parts = [slice(begin, begin + MAX_GROUPS) for begin in range(0, len(q), MAX_GROUPS)]
    return torch.cat([scaled_dot_product_attention(q[part], k[part], v[part]) for part in parts])


class TextAttention(nn.Module):
    """Attention of every token of a clip to the words of its caption: groups do not matter here."""

    def __init__(self, d: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(d, d, bias=bias)
        self.kv = nn.Linear(d, 2 * d, bias=bias)
        self.out = nn.Linear(d, d)

    def forward(
        self, x: Float[Tensor, "b g s d"], text: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"]
    ) -> Float[Tensor, "b g s d"]:
        g = x.shape[1]
        q = rearrange(self.q(x), "b g s (m k) -> b m (g s) k", m=self.heads)
        k, v = rearrange(self.kv(text), "b l (two m k) -> two b m l k", two=2, m=self.heads)
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.out(rearrange(y, "b m (g s) k -> b g s (m k)", g=g))


class FeedForward(nn.Module):
    """Two linear maps around a GELU, four times as wide inside."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, 4 * d)
        self.fc2 = nn.Linear(4 * d, d)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, in one pass over x."""
    return torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """A transformer block; with `text`, its tokens also read the caption."""

    def __init__(self, d: int, heads: int, text: bool, attention_bias: bool, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d, eps=norm_eps, elementwise_affine=False)
        self.attention = Attention(d, heads, attention_bias)
        self.text_attention = TextAttention(d, heads, attention_bias) if text else None
        self.norm2 = nn.LayerNorm(d, eps=norm_eps, elementwise_affine=False)
        self.feed_forward = FeedForward(d)
        self.table = nn.Parameter(torch.randn(6, d) / d**0.5)
        self.checkpointing: Literal["none", "selective", "full"] = "none"

    def forward(
        self,
        x: Float[Tensor, "b g s d"],
        time: Float[Tensor, "b 6 d"],
        text: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"],
        turn: Float[Tensor, "2 s half"] | None = None,
    ) -> Float[Tensor, "b g s d"]:
        """`turn` rotates the attention's queries and keys (`embed.rotation`)."""
        return self.run(x, rearrange(self.table + time, "b six d -> six b 1 1 d"), text, mask, turn)

    def run(
        self,
        x: Float[Tensor, "b g s d"],
        modulation: Float[Tensor, "6 b 1 1 d"],
        text: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"],
        turn: Float[Tensor, "2 s half"] | None,
    ) -> Float[Tensor, "b g s d"]:
        """`compute`, and what of it is kept for the backward pass. Modules' hooks, as ZeRO-3's, fire outside of this
        method: it is what is compiled, and where recomputation begins.
        """
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self.compute(x, modulation, text, mask, turn)
        contexts: dict[str, Any] = {}
        if self.checkpointing == "selective":  # `full` passes none at all: the compiler refuses torch's own default
            contexts["context_fn"] = partial(
                create_selective_checkpoint_contexts, dear, allow_cache_entry_mutation=True
            )
        y: Tensor | None = checkpoint(  # pyright: ignore[reportUnknownVariableType]
            self.compute,
            *(x, modulation, text, mask, turn),
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in a block is random
            **contexts,
        )
        assert isinstance(y, Tensor)
        return y

    def compute(
        self,
        x: Float[Tensor, "b g s d"],
        modulation: Float[Tensor, "6 b 1 1 d"],
        text: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"],
        turn: Float[Tensor, "2 s half"] | None,
    ) -> Float[Tensor, "b g s d"]:
        """The block, its adaLN table and the diffusion time already added up."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = torch.addcmul(x, gate1, self.attention(modulate(self.norm1(x), shift1, scale1), turn))
        if self.text_attention is not None:
            x = x + self.text_attention(x, text, mask)
        return torch.addcmul(x, gate2, self.feed_forward(modulate(self.norm2(x), shift2, scale2)))
