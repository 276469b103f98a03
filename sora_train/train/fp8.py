"""`train.precision: fp8`: the products of the blocks in FP8, by torchao's float8 linear layers with dynamic scaling.

Inputs, weights and gradients are rounded to 8 bits just before each product, whose result is bfloat16. Parameters,
their names, masters, moments and EMA are those of bf16. Patches, time, modulation, captions and the output layer stay
in bf16, as do layers of too few tokens (keys and values of the caption) or of sizes that do not divide by 16.
"""

import importlib.util
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sora_train.errors import UserError
from sora_train.model import Transformer

LEAST_CAPABILITY = (8, 9)
"""CUDA compute capability of the first GPUs with FP8 products (Ada); Hopper has 9.0."""
BF16_LAYERS = ("text_attention.kv",)


def check_fp8(device: torch.device | None = None) -> None:
    """Raises UserError without torchao, and for a GPU without FP8 products. A CPU emulates them."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            "train.precision is fp8, which needs torchao. Install it on every node (pip install torchao), or "
            "set train.precision to bf16",
            code="package",
        )
    if device is not None and device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < LEAST_CAPABILITY:
            raise UserError(
                f"train.precision is fp8, and {torch.cuda.get_device_name(device)} has compute capability "
                f"{found[0]}.{found[1]}. FP8 needs 8.9 or more (Ada, Hopper). Set train.precision to bf16",
                code="unsupported",
            )


def use_fp8(model: Transformer, device: torch.device) -> None:
    """Swaps linear layers of the blocks for FP8 ones, with the same parameters. Raises as `check_fp8` does."""
    check_fp8(device)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    # Scales of powers of two round a value the same whatever the largest one of its micro-batch, except near zero.
    config = Float8LinearConfig(emulate=device.type == "cpu", pad_inner_dim=True, round_scales_to_power_of_2=True)
    convert_to_float8_training(model, module_filter_fn=takes_fp8, config=config)
    product = product_of_weight()
    layers = [layer for layer in model.modules() if isinstance(layer, Float8Linear)]
    if not layers:
        raise UserError(
            f"train.precision is fp8, but no layer of model.width {model.config.width} has sizes that divide by 16. "
            "Change the width, or set train.precision to bf16",
            code="unsupported",
        )
    for layer in layers:
        layer.forward = partial(fp8_forward, layer, product)


def takes_fp8(layer: nn.Module, name: str) -> bool:
    """Whether a linear layer, by its name in the model, computes in FP8."""
    sizes = layer.weight.shape if isinstance(layer, nn.Linear) else (1,)
    return name.startswith("blocks.") and not name.endswith(BF16_LAYERS) and not any(size % 16 for size in sizes)


def fp8_forward(layer: Any, product: Any, input: Tensor) -> Tensor:
    """The forward pass of one of torchao's layers, which saves the weight for the backward pass, not a view of it.

    ZeRO 3 frees a block's gathered weights after its forward pass. torchao's own would keep them.
    """
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        input = input.to(torch.get_autocast_dtype(kind))
    y = product.apply(input, layer.weight, layer.linear_mm_config, layer.config)
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


def product_of_weight() -> Any:
    """torchao's product with its gradients, as a function of the weight instead of its transpose."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args as theirs

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, products: Any, config: Any) -> Tensor:
            ctx.save_for_backward(x, weight)
            ctx.how = {"linear_mm_config": products, "config": config}
            return theirs.forward(SimpleNamespace(save_for_backward=lambda *_: None), x, weight.t(), products, config)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
            x, weight = ctx.saved_tensors
            of_x, of_weight, *_ = theirs.backward(SimpleNamespace(saved_tensors=(x, weight.t()), **ctx.how), grad)
            return of_x, of_weight.t(), None, None

    return torch._dynamo.allow_in_graph(Product)
