"""Zero gradients for the temporal blocks that images skip. Applied to a model from outside, by forward hooks.

Every parameter needs a gradient at every step. Otherwise ZeRO-3 would reuse stale gradients, its hooks would fire in
another order than for videos, and AdamW's moments would stand still at stage 0 but not at the other stages.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sora_train.model import Transformer


def add_zero_gradients(model: Transformer) -> None:
    """Makes images, when training, add 0 times the output of each temporal block that they skip."""
    if not model.config.factorised:
        return
    blocks, images = list(model.blocks), [False]

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        images[0] = args[0].shape[1] == 1  # b f c h w; a block may see one frame of a video, if ranks share it

    model.register_forward_pre_hook(see)
    for block, following in zip(blocks[1::2], [*blocks[2::2], model.norm_out], strict=True):

        def add_zero(module: nn.Module, args: tuple[Any, ...], block: nn.Module = block) -> tuple[Any, ...] | None:
            if not (images[0] and model.training and torch.is_grad_enabled()):
                return None
            return args[0] + zero_from(block, args[0]), *args[1:]

        following.register_forward_pre_hook(add_zero)


def zero_from(block: nn.Module, x: Float[Tensor, "b f n d"]) -> Float[Tensor, "1 1 1 d"]:
    """Zero that depends on every parameter of a block, so that each gets a gradient of zero.

    The block runs on one zero token, not on data, so the product is finite as long as the weights are.
    """
    d = x.shape[-1]
    zeros = x.new_zeros(1, 1, 1, d).requires_grad_()  # as a video's tokens do: ZeRO-3's hooks wait for the gradient
    text_mask = torch.ones(1, 1, dtype=torch.bool, device=x.device)
    return 0 * block(zeros, zeros[..., None, :].expand(-1, -1, -1, 6, -1), zeros[0], text_mask)
