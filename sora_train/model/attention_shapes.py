"""The kinds of attention that a model's blocks have, by their tokens: to measure backends of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sora_train.kernels.short_attention import LONGEST, WIDEST
from sora_train.model.config import ModelConfig

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""From queries, keys and values `g m s k`, and a mask or None."""


@dataclass(frozen=True)
class AttentionShape:
    """The tokens of one kind of attention: `g` groups of `s` queries and `l` keys, with heads `m k`."""

    kind: str
    """`spatial`, `temporal`, `joint` or `text`."""
    g: int
    s: int
    l: int  # noqa: E741
    m: int
    k: int
    masked: bool = False
    blocks: int = 1
    """Blocks that have it."""

    @property
    def is_short(self) -> bool:
        """Whether the kernels for short groups take it, in bfloat16."""
        return self.kind in ("spatial", "temporal") and self.s <= LONGEST and self.k <= WIDEST

    @property
    def flops(self) -> int:
        """Of the forward pass; the backward pass has 2.5 times as many."""
        return 4 * self.g * self.m * self.s * self.l * self.k

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Queries, keys and values in one tensor `g s (three m k)`; to the text, queries in one of their own."""
        draw = torch.Generator(device).manual_seed(0)  # not the generator that training uses
        widths = [(self.s, 1), (self.l, 2)] if self.kind == "text" else [(self.s, 3)]
        sizes = ((self.g, tokens, parts * self.m * self.k) for tokens, parts in widths)
        made = (torch.randn(size, generator=draw, device=device, dtype=dtype) for size in sizes)
        return tuple(x.requires_grad_() for x in made)

    def mask(self, device: torch.device) -> Tensor | None:
        """Captions of a quarter to all of the tokens."""
        if not self.masked:
            return None
        lengths = torch.linspace(max(self.l / 4, 1), self.l, self.g + 2)[1:-1].long()
        return (torch.arange(self.l) < lengths[:, None])[:, None, None].to(device)

    def run(
        self, inputs: tuple[Tensor, ...], mask: Tensor | None, attend: Attend = scaled_dot_product_attention
    ) -> Tensor:
        """From the projection's output to the input of the next one, `g s (m k)`."""
        parts = [inputs[0], *inputs[1].chunk(2, -1)] if self.kind == "text" else inputs[0].chunk(3, -1)
        q, k, v = (rearrange(part, "g s (m k) -> g m s k", m=self.m) for part in parts)
        return rearrange(attend(q, k, v, mask), "g m s k -> g s (m k)")


def attention_shapes(
    model: ModelConfig, latents: tuple[int, int, int], b: int, text_tokens: int, shared: int = 1
) -> Iterator[AttentionShape]:
    """The kinds of attention in a model's blocks, for `b` clips of latents `f h w`, each on `shared` ranks."""
    f, h, w = latents
    n, m, k = h * w // model.patch**2, model.heads, model.width // model.heads
    tokens, half = f * -(-n // shared), model.depth // 2
    if model.factorised:
        tokens = -(-f // shared) * n
        yield AttentionShape("spatial", b * -(-f // shared), n, n, m, k, blocks=half)
        # in training, images skip these blocks, which run on one token of zeros
        yield AttentionShape("temporal", b * -(-n // shared) if f > 1 else 1, f, f, m, k, blocks=half)
    else:
        yield AttentionShape("joint", b, f * n, f * n, m // shared, k, blocks=model.depth)
    text = AttentionShape("text", b, tokens, model.text_tokens or text_tokens, m, k, not model.text_tokens, model.depth)
    yield replace(text, blocks=half) if model.factorised and model.cross_attention_in == "spatial" else text
