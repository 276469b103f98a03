"""A frozen base in 8 bits (`lora.base_precision: int8`): the weights of the blocks' linear maps as int8.

Each weight is an int8 number times a scale of its row, which is a bfloat16 number: both are exact in training's dtype.
Weights are widened just before each product. Nothing but the product's result lasts until the backward pass, which
widens them again.
"""

from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn.functional import linear

from sora_train.model import Transformer

LARGEST = 127


def quantised(weight: Float[Tensor, "o i"]) -> tuple[Int8[Tensor, "o i"], Float[Tensor, "o 1"]]:
    """int8 numbers and the scale of each row, in the dtype of the weight; weight ≈ numbers × scale."""
    largest = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scale = (largest / LARGEST).bfloat16()
    numbers = (weight.float() / scale.float()).round().clamp(-LARGEST, LARGEST)
    return numbers.to(torch.int8), scale.to(weight.dtype)


class Int8Linear(nn.Module):
    """A frozen linear map of int8 weights. Parameters, not buffers: ZeRO 3 partitions them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        numbers, scale = quantised(layer.weight.detach())
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return WidenedProduct.apply(x, self.weight, self.scale, self.bias)


class WidenedProduct(torch.autograd.Function):
    """A linear map that saves int8 weights, not the widened ones; these have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*b i"],
        numbers: Int8[Tensor, "o i"],
        scale: Float[Tensor, "o 1"],
        bias: Float[Tensor, "o"] | None,
    ) -> Float[Tensor, "*b o"]:
        ctx.save_for_backward(numbers, scale)
        return linear(x, numbers.to(scale.dtype) * scale, bias)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "*b o"]) -> tuple[Float[Tensor, "*b i"], None, None, None]:
        numbers, scale = ctx.saved_tensors
        return grad @ (numbers.to(grad.dtype) * scale.to(grad.dtype)), None, None, None


def quantise_base(model: Transformer) -> None:
    """Replaces the frozen linear maps of the blocks, those with adapters too, by int8 ones."""
    for module in list(model.blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and not child.weight.requires_grad:
                setattr(module, name, Int8Linear(child))
