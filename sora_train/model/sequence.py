"""Sequence parallelism: the ranks of a group share the tokens of each clip, and exchange them before attention.

Tokens are `b f n d`: f frames of n places. Joint attention and Wan are cut by places: a rank holds its share of every
frame. For attention it exchanges all heads of its own tokens for its own heads of all tokens (Ulysses, Jacobs et al.
2023, arXiv 2309.14509). Factorised attention is cut by frames in spatial blocks and by places in temporal ones, with an
exchange of tokens between them (DSP, Zhao et al. 2024, arXiv 2403.10266).

An axis that does not divide is padded with zeros at its end. Every exchange drops the padding of the axis that it joins
and no attention runs along the axis that it pads, so nothing is masked. Each rank ends with the output of all tokens,
and so with the same loss, but its gradient is that of its own tokens alone: the sum over the group is the clip's
gradient. `train/sequence_parallel.py` makes the groups.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed._functional_collectives import wait_tensor  # pyright: ignore[reportUnknownVariableType]
from torch.nn.functional import pad

FRAMES, PLACES, CHANNELS = 1, 2, 3
"""Axes of tokens `b f n d`."""


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share each clip, as one of them sees it. In a group of one, every function returns its input."""

    rank: int = 0
    size: int = 1
    name: str = ""
    """Torch's name of the process group."""

    def cut(self, x: Tensor, axis: int, length: int) -> Tensor:
        """This rank's share of an axis of that length. An axis of 1 that stands for all of it is left as it is."""
        if self.size == 1 or x.shape[axis] != length:
            return x
        return self.padded(x, axis).chunk(self.size, axis)[self.rank].clone()  # not a view, which would hold all of x

    def exchange(self, x: Tensor, *, split: int, join: int, length: int) -> Tensor:
        """From a share of axis `join` to all `length` of it, and from all of axis `split` to a share: an all-to-all."""
        return self.exchange_all((x,), split=split, join=join, length=length)[0]

    def exchange_all(self, parts: tuple[Tensor, ...], *, split: int, join: int, length: int) -> tuple[Tensor, ...]:
        """The same with several tensors of one shape, in one message."""
        if self.size == 1:
            return parts
        shares = zip(*(self.padded(x, split).chunk(self.size, split) for x in parts), strict=True)
        got = self.all_to_all(torch.stack([share for of_rank in shares for share in of_rank])).unbind()
        joined = (torch.cat(got[i :: len(parts)], join) for i in range(len(parts)))
        return tuple(x.narrow(join, 0, length).contiguous() for x in joined)

    def join(self, x: Tensor, axis: int, length: int) -> Tensor:
        """All `length` of an axis, of which each rank has a share. Only the own share passes a gradient back."""
        if self.size == 1:
            return x
        shares = list(self.all_gather(x.detach().contiguous()).chunk(self.size))
        shares[self.rank] = x
        return torch.cat(shares, axis).narrow(axis, 0, length)

    def to_heads(self, *parts: Float[Tensor, "b f n d"], places: int) -> tuple[Float[Tensor, "b f p e"], ...]:
        """Exchanges all heads of own tokens for own heads of all tokens, of queries, keys and values in one message."""
        return self.exchange_all(parts, split=CHANNELS, join=PLACES, length=places)

    def to_tokens(self, x: Float[Tensor, "b f p e"], width: int) -> Float[Tensor, "b f n d"]:
        """The inverse: all heads of own tokens."""
        return self.exchange(x, split=PLACES, join=CHANNELS, length=width)

    # the operators that torch's own functional collectives call: they have gradients, and torch.compile traces them

    def all_to_all(self, shares: Float[Tensor, "shares *rest"]) -> Float[Tensor, "shares *rest"]:
        """Sends equally many shares to each rank, in the order of the ranks, and receives theirs for this rank."""
        rows = [len(shares) // self.size] * self.size
        return wait_tensor(torch.ops._c10d_functional.all_to_all_single(shares, rows, rows, self.name))

    def all_gather(self, x: Float[Tensor, "b *rest"]) -> Float[Tensor, "all *rest"]:
        """The tensors of all ranks, along the first axis."""
        return wait_tensor(torch.ops._c10d_functional.all_gather_into_tensor(x, self.size, self.name))

    def padded(self, x: Tensor, axis: int) -> Tensor:
        """With zeros at the end of an axis, so it divides."""
        lacking = -x.shape[axis] % self.size
        return pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, lacking)) if lacking else x


ALONE = SequenceGroup()
