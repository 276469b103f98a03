"""Adapters in a model: peft's layers around frozen ones, their weights by name, and their sum with the base.

Query, key and value are one matrix here and three in diffusers. With adapters they become three modules, each with its
own A and B, exactly as peft has them on diffusers' model. A name such as `blocks.0.attention.qkv.q.lora_A.weight` is
that of the module without peft's name of the adapter.
"""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sora_train.lora.config import LoraConfig, Target
from sora_train.model import Transformer

ADAPTER = "default"
"""peft's name of the only adapter."""
FUSED = ("qkv", "kv")
"""Names of linear maps that are several in one. Each letter is a part, in this order."""
MODULES: dict[Target, tuple[str, ...]] = {
    "to_q": ("attention.qkv.q", "text_attention.q"),
    "to_k": ("attention.qkv.k", "text_attention.kv.k"),
    "to_v": ("attention.qkv.v", "text_attention.kv.v"),
    "to_out": ("attention.out", "text_attention.out"),
    "ff": ("feed_forward.fc1", "feed_forward.fc2"),
}
"""Modules of a block by their target; not every block has all."""


class SplitLinear(nn.Module):
    """A linear map as one module for each part of its output, such as `q`, `k` and `v`. Computes the same."""

    def __init__(self, fused: nn.Linear, letters: str) -> None:
        super().__init__()
        n = len(letters)
        weights = fused.weight.chunk(n)
        biases = [None] * n if fused.bias is None else fused.bias.chunk(n)  # pyright: ignore[reportUnnecessaryComparison]
        for letter, weight, bias in zip(letters, weights, biases, strict=True):
            part = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            part.weight = nn.Parameter(weight.detach().clone())
            if bias is not None:
                part.bias = nn.Parameter(bias.detach().clone())
            self.add_module(letter, part)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b _"]:
        return torch.cat([part(x) for part in self.children()], dim=-1)


def add_adapters(model: Transformer, config: LoraConfig, device: torch.device | None = None) -> None:
    """Puts adapters into the blocks of a model and freezes the rest. Changes no output: the matrices B are zero.

    The adapters are float32 whatever the dtype of the base, and on its device if no other is given. torch's generator
    of the CPU draws A, as peft does.
    """
    import peft  # takes seconds
    from peft.tuners.lora import LoraLayer

    split_projections(model)
    names = [name for target in config.targets for name in MODULES[target]]
    wanted = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,  # pyright: ignore[reportArgumentType]  peft takes fractions too
        target_modules=names,
    )
    peft.inject_adapter_in_model(wanted, model, ADAPTER)
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        layer.lora_A.float()
        layer.lora_B.float()
        if device is not None:
            layer.lora_A.to_empty(device=device)
            nn.init.zeros_(layer.lora_B.to_empty(device=device).get_parameter(f"{ADAPTER}.weight"))
        a = layer.get_parameter(f"lora_A.{ADAPTER}.weight")  # peft's own is rounded to the base's dtype
        a.data.copy_(nn.init.kaiming_uniform_(torch.empty(a.shape, device="cpu"), a=5**0.5))
        layer.cast_input_dtype_enabled = False  # autocast casts, which a second copy of the input would not spare
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def split_projections(model: Transformer) -> None:
    """Replaces every fused linear map by a `SplitLinear`, one after the other. Changes no output."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in FUSED and isinstance(child, nn.Linear):
                setattr(module, name, SplitLinear(child, name))


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What has a gradient, in the model's order, with the names that checkpoints use."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield public_name(name), parameter


def public_name(name: str) -> str:
    """A parameter's name without peft's name of the adapter."""
    return name.replace(f".{ADAPTER}.weight", ".weight") if ".lora_" in name else name


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The matrices A and B by name."""
    return {public_name(name): p.detach() for name, p in model.named_parameters() if ".lora_" in name}


@torch.no_grad()
def load_adapter_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies matrices A and B into a model with adapters. Raises ValueError for other names or shapes."""
    own = adapter_state(model)
    if wrong := sorted(own.keys() ^ tensors.keys()):
        where = "the file lacks" if wrong[0] in own else "the model lacks"
        raise ValueError(f"{where} {wrong[0]} (and {len(wrong) - 1} more)")
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(f"{name} is {list(tensors[name].shape)}, the model has {list(parameter.shape)}")
        parameter.copy_(tensors[name])


@torch.no_grad()
def merge(
    model: Transformer, tensors: Mapping[str, Tensor], scale: float | Mapping[str, float], weight: float = 1.0
) -> None:
    """Adds adapters to the weights of a model without adapters: weight × scale × B A, in float32.

    `scale` is alpha / rank, one for all or by module, such as `blocks.0.attention.qkv.q`. Raises ValueError, before
    anything is changed, for a module that the model does not have or matrices of another shape.
    """
    modules = sorted({name.rpartition(".lora_")[0] for name in tensors})
    places = {name: weight_rows(model, name) for name in modules}
    for name, rows in places.items():
        a, b = tensors.get(f"{name}.lora_A.weight"), tensors.get(f"{name}.lora_B.weight")
        if a is None or b is None or (b.shape[0], a.shape[1]) != rows.shape or a.shape[0] != b.shape[1]:
            shapes = [None if matrix is None else list(matrix.shape) for matrix in (a, b)]
            raise ValueError(f"{name}: A and B are {shapes[0]} and {shapes[1]}, the weight is {list(rows.shape)}")
    for name, rows in places.items():
        a, b = (tensors[f"{name}.lora_{letter}.weight"].to(rows.device).float() for letter in "AB")
        factor = weight * (scale if isinstance(scale, float | int) else scale[name])
        rows.copy_(rows.float() + factor * (b @ a))


def weight_rows(model: Transformer, name: str) -> Tensor:
    """The weight of a module, a view of the rows of its part if it is fused. Raises ValueError if there is none."""
    parent, _, letter = name.rpartition(".")
    fused = parent.rpartition(".")[2]
    parted = fused in FUSED and letter in fused
    try:
        linear = model.get_submodule(parent if parted else name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"the model has no layer {name}")
    return linear.weight.detach().chunk(len(fused))[fused.index(letter)] if parted else linear.weight.detach()
