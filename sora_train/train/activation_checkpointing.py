"""Activation checkpointing: saves memory by recomputing blocks in the backward pass. Changes no number.

Applied to a model from outside, before `compile.py`. It replaces a block's `forward` and leaves the module, its
parameters' names and its hooks alone: ZeRO-3's hooks, which gather a block's parameters, fire outside of `forward`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,  # pyright: ignore[reportUnknownVariableType]
    create_selective_checkpoint_contexts,  # pyright: ignore[reportUnknownVariableType]
)

from sora_train.model import Transformer

Mode = Literal["none", "selective", "full"]

SAVED_OPS: set[Any] = {torch.ops.aten.add_.Tensor, torch.ops.sora_train.short_attention.default} | {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "_scaled_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    if hasattr(torch.ops.aten, name)  # torch's versions differ
}
"""Operations whose outputs `selective` saves: matmuls and attention, which take nearly all of the time.

`add_` must be saved too. Some linear implementations (ZeRO-3's, and torch's for inputs that are not contiguous) add the
bias in place to the matmul's output. The saved output then already contains it, and recomputing would add it twice.
"""


def save_matmuls_policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Torch's policy for selective checkpointing; torch sets the signature."""
    return CheckpointPolicy.MUST_SAVE if operation in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpointing(model: Transformer, mode: Mode) -> None:
    """`full` recomputes every block, `selective` all of it except matmuls and attention, `none` nothing."""
    if mode == "none":
        return
    for block in model.blocks:
        block.forward = checkpointed(block.forward, mode)


def checkpointed(forward: Callable[..., Tensor], mode: Mode) -> Callable[..., Tensor]:
    """A block's `forward` that saves little for the backward pass."""
    contexts: dict[str, Any] = {}
    if mode == "selective":  # `full` passes no context_fn: Dynamo rejects even torch's own default
        contexts["context_fn"] = partial(
            create_selective_checkpoint_contexts, save_matmuls_policy, allow_cache_entry_mutation=True
        )

    def checkpointed_forward(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        # Nothing in a block is random, so no RNG state has to be restored.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **contexts)

    return checkpointed_forward
