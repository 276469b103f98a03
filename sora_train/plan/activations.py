"""Bytes that the forward pass leaves for the backward pass, from a trace of the model with fake tensors.

Fake tensors have shapes and storages but no memory, so any model can be traced on any machine in a fraction of a
second. What operations made and autograd still refers to after the forward pass is counted; parameters are not.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import layer_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sora_train.model import ModelConfig, build
from sora_train.train.activation_checkpointing import Mode, apply_activation_checkpointing
from sora_train.train.config import TrainConfig

FLOAT, HALF = 4, 2
"""Bytes of a float32 and of a bfloat16."""
TRACED_BLOCKS = 4  # the first two, which may differ, and one of each kind that is repeated


@dataclass(frozen=True)
class Sizes:
    """A micro-batch's shape: b clips of latents of axes f c h w, and captions of l tokens."""

    b: int
    f: int
    h: int
    w: int
    l: int  # noqa: E741
    frame_times: bool = False
    """Whether each frame has a diffusion time, as in training with given frames, instead of each clip."""

    def tokens(self, model: ModelConfig) -> int:
        """Patches of all clips."""
        return self.b * self.f * (self.h // model.patch) * (self.w // model.patch)


@dataclass(frozen=True)
class Activations:
    """Bytes held between the forward and the backward pass of a micro-batch."""

    blocks: tuple[int, ...]
    """Of each block."""
    other: int
    """Before and after the blocks, embedded captions included."""

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.other


def activations(model: ModelConfig, train: TrainConfig, sizes: Sizes) -> Activations:
    """What a recipe's forward pass leaves. Traces one clip and two: bytes grow linearly with clips."""
    half, mode = train.precision == "bf16", train.activation_checkpointing
    depth = min(model.depth, TRACED_BLOCKS + model.depth % 2)
    shallow = replace(model, depth=depth)
    one, two = (trace(shallow, mode, half, half and not train.zero_stage, replace(sizes, b=b)) for b in (1, 2))
    *blocks, other = (a + (sizes.b - 1) * (b - a) for a, b in zip(one, two, strict=True))
    repeated = (model.depth - depth) // 2 * tuple(blocks[2:4])
    return Activations((*blocks, *repeated), other)


@lru_cache(maxsize=256)
def trace(model: ModelConfig, mode: Mode, half: bool, autocast: bool, sizes: Sizes) -> tuple[int, ...]:
    """Bytes that each block leaves, and last what the rest of the model leaves."""
    default, dtype = torch.get_default_dtype(), torch.bfloat16 if half and not autocast else torch.float32
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            made = build(model)
            use_fused_norms(made)
            apply_activation_checkpointing(made, mode)
            x = torch.empty(sizes.b, sizes.f, model.in_channels, sizes.h, sizes.w)
            text, mask = torch.empty(sizes.b, sizes.l, model.text_width), torch.ones(sizes.b, sizes.l).bool()
            # without autocast's cache, which holds bfloat16 weights until the forward pass ends
            cast = torch.autocast("cpu", torch.bfloat16, autocast, cache_enabled=False)
            with LiveStorages(made.parameters()) as live, cast:
                blocks = [0] * len(made.blocks)
                for i, block in enumerate(made.blocks):
                    count_block(block, i, blocks, live)
                # copies, so that of the inputs only what autograd saves is counted
                t = torch.full((sizes.b, sizes.f) if sizes.frame_times else (sizes.b,), 500.0)
                y = made(x.clone(), t, text.clone(), mask.clone())
            total = live.bytes() - y.untyped_storage().nbytes()
    finally:
        torch.set_default_dtype(default)
    return *blocks, total - sum(blocks)


def use_fused_norms(model: nn.Module) -> None:
    """Replaces RMS norms by layer norms, which save as little on a CPU as RMS norms do on a GPU.

    torch has a fused RMS norm for GPUs alone. On a CPU it saves four times as much.
    """
    for norm in model.modules():
        if isinstance(norm, nn.RMSNorm):
            norm.forward = partial(fused_norm, norm)


def fused_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """A layer norm with the weight of an RMS norm."""
    return layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype))


def count_block(block: nn.Module, i: int, blocks: list[int], live: "LiveStorages") -> None:
    """Has a block's forward pass write into `blocks[i]` by how much the live bytes grow."""

    def begin(*_: Any) -> None:
        blocks[i] = -live.bytes()

    def end(*_: Any) -> None:
        blocks[i] += live.bytes()

    block.register_forward_pre_hook(begin)
    block.register_forward_hook(end)


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that were made by operations within and still exist."""

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        super().__init__()
        self.excluded = {StorageWeakRef(tensor.untyped_storage()) for tensor in excluded}
        self.made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(n for ref, n in self.made.items() if ref not in self.excluded and not ref.expired())
