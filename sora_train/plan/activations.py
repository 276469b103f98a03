"""Bytes that the forward pass leaves for the backward pass, from a trace of the model with fake tensors.

Fake tensors have shapes and storages but no memory, so any model can be traced on any machine in a fraction of a
second. What operations made and autograd still refers to after the forward pass is counted; parameters are not.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import layer_norm, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sora_train.lora.config import NO_LORA, LoraConfig
from sora_train.model import ModelConfig, Transformer, build
from sora_train.model.sequence import SequenceGroup
from sora_train.train.activation_checkpointing import Mode, apply_activation_checkpointing
from sora_train.train.adapted import adapt
from sora_train.train.config import TrainConfig
from sora_train.train.sequence_parallel import share_clips

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
    shared: int = 1
    """Ranks that share the tokens of each clip (`cluster.sequence_parallel`)."""

    def tokens(self, model: ModelConfig) -> int:
        """Patches of all clips."""
        return self.b * self.f * (self.h // model.patch) * (self.w // model.patch)

    def tokens_of_rank(self, model: ModelConfig) -> int:
        """One rank's share of these, rounded up."""
        return -(-self.tokens(model) // self.shared)


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


def activations(model: ModelConfig, train: TrainConfig, sizes: Sizes, lora: LoraConfig = NO_LORA) -> Activations:
    """What a recipe's forward pass leaves. Traces one clip and two: bytes grow linearly with clips."""
    half, mode = train.half, train.activation_checkpointing
    depth = min(model.depth, TRACED_BLOCKS + model.depth % 2)
    shallow = replace(model, depth=depth)
    keeps, autocast = lora.rank > 0 and train.zero_stage == 3, half and not train.zero_stage
    one, two = (trace(shallow, mode, half, autocast, replace(sizes, b=b), lora, keeps) for b in (1, 2))
    *blocks, other = (a + (sizes.b - 1) * (b - a) for a, b in zip(one, two, strict=True))
    repeated = (model.depth - depth) // 2 * tuple(blocks[2:4])
    return Activations((*blocks, *repeated), other)


@lru_cache(maxsize=256)
def trace(
    model: ModelConfig,
    mode: Mode,
    half: bool,
    autocast: bool,
    sizes: Sizes,
    lora: LoraConfig = NO_LORA,
    keep_inputs: bool = False,
) -> tuple[int, ...]:
    """Bytes that each block leaves, and last what the rest of the model leaves.

    With `keep_inputs` frozen linear maps save their inputs, as DeepSpeed's do at ZeRO 3.
    """
    default, dtype = torch.get_default_dtype(), torch.bfloat16 if half and not autocast else torch.float32
    torch.set_default_dtype(dtype)
    try:
        adapted = adapted_on_meta(model, lora, half, autocast) if lora.rank else None
        with FakeTensorMode():
            made = build(model) if adapted is None else with_storages(adapted)
            use_fused_norms(made)
            share_clips(made, Alike(size=sizes.shared))
            apply_activation_checkpointing(made, mode)
            x = torch.empty(sizes.b, sizes.f, model.in_channels, sizes.h, sizes.w)
            text, mask = torch.empty(sizes.b, sizes.l, model.text_width), torch.ones(sizes.b, sizes.l).bool()
            # without autocast's cache, which holds bfloat16 weights until the forward pass ends
            cast = torch.autocast("cpu", torch.bfloat16, autocast, cache_enabled=False)
            keeping = saving_linear() if keep_inputs else nullcontext()
            with LiveStorages(made.parameters()) as live, cast, keeping:
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


def adapted_on_meta(model: ModelConfig, lora: LoraConfig, half: bool, autocast: bool) -> Transformer:
    """A model with adapters in the dtypes of training. peft can't make it of fake tensors."""
    with torch.device("meta"):
        made = build(model)
        adapt(made, lora, half=half)
    return made.to(torch.bfloat16) if half and not autocast else made


def with_storages(model: Transformer) -> Transformer:
    """The same model with parameters that have storages, which those on the meta device share."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad))
    return model


class Alike(SequenceGroup):
    """A group in which all ranks hold the same tensors, so a trace of one rank needs no others."""

    def all_to_all(self, shares: Tensor) -> Tensor:
        return shares.clone()

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.size)


@contextmanager
def saving_linear() -> Iterator[None]:
    """Replaces torch's linear function by one that saves its input, as DeepSpeed does at ZeRO 3."""
    before = torch.nn.functional.linear
    torch.nn.functional.linear = LinearThatSaves.apply
    try:
        yield
    finally:
        torch.nn.functional.linear = before


class LinearThatSaves(torch.autograd.Function):
    """A linear map whose backward pass could make the gradient of its weight, needed or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        raise NotImplementedError("only forward passes are traced")


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
