"""Models with adapters on a frozen base (`lora`), as training builds them."""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sora_train.errors import UserError
from sora_train.lora.adapters import FUSED, adapter_state, add_adapters, load_adapter_state
from sora_train.lora.config import LoraConfig
from sora_train.lora.files import read_lora
from sora_train.lora.int8 import Int8Linear, quantise_base, quantised
from sora_train.model import ModelConfig, Transformer, build
from sora_train.train.frozen_base import check_base
from sora_train.train.initial import cannot_start, open_initial
from sora_train.train.placement import Weights


def build_adapted(config: ModelConfig, lora: LoraConfig, *, half: bool, new: bool) -> tuple[Transformer, Weights]:
    """The model of `model.init_from` on the meta device, frozen, in bfloat16 if `half`, and its weights.

    The adapters are in memory, in float32, by torch's global generator or, of a `new` run, from `lora.init_from`.
    Raises UserError for weights that do not fit, and as one is read for damaged ones.
    """
    folder = Path(config.init_from)
    try:
        check_base(folder)
    except (OSError, ValueError) as error:
        raise cannot_start(folder, error) from None
    found = open_initial(config, folder)
    read = lru_cache(maxsize=2)(lambda name: found[name]())  # parts of a fused map follow each other, with their bias
    with torch.device("meta"):
        model = build(config)
    adapt(model, lora, half=half, device=torch.device("cpu"))
    if new and lora.init_from:
        load_adapter_state(model, adapter_state(model) | initial_adapters(config, lora))
    base = {
        f"{place}.{leaf}".lstrip("."): partial(frozen_value, read, place, module, leaf)
        for place, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    }
    return model, Weights(base)


def frozen_value(read: Callable[[str], Tensor], place: str, module: nn.Module, leaf: str) -> Tensor:
    """A parameter of the base, by the weights of a model without adapters: its part of a fused map, in 8 bits."""
    *above, last = place.removesuffix(".base_layer").split(".")
    fused = above[-1] if above and above[-1] in FUSED else ""
    source = ".".join([*above, *([] if fused else [last]), "weight" if leaf == "scale" else leaf]).lstrip(".")
    value = read(source)
    if fused:
        value = value.chunk(len(fused))[fused.index(last)]
    if isinstance(module, Int8Linear) and leaf != "bias":
        return quantised(value.to(module.scale.dtype))[leaf == "scale"]
    return value


def initial_adapters(config: ModelConfig, lora: LoraConfig) -> dict[str, Tensor]:
    """The adapters of `lora.init_from`, scaled to the recipe's alpha. Layers that the file lacks start as zero change.

    Raises UserError if they do not fit the model and the recipe's rank and targets.
    """
    with torch.device("meta"):
        model = build(config)
        add_adapters(model, lora)
    own, found = adapter_state(model), read_lora(lora.init_from, config)
    if wrong := sorted({f"{layer} has rank {rank}" for layer, rank in found.ranks.items() if rank != lora.rank}):
        raise UserError(
            f"lora.init_from {lora.init_from}: {wrong[0]}, lora.rank is {lora.rank}. Set it to the rank in the file",
            code="lora",
        )
    if unknown := sorted(found.tensors.keys() - own.keys()):
        raise UserError(
            f"lora.init_from {lora.init_from} has adapters of {unknown[0].rpartition('.lora_')[0]}, which is not among "
            f"lora.targets {', '.join(lora.targets)}. Add its target there",
            code="lora",
        )
    factors = {layer: scale / lora.scale for layer, scale in found.scales.items()}

    def scaled(name: str, matrix: Tensor) -> Tensor:
        layer, _, letter = name.rpartition(".lora_")
        return matrix.float() * factors[layer] if letter.startswith("B") else matrix.float()

    return {name: scaled(name, matrix) for name, matrix in found.tensors.items()}


def adapt(model: Transformer, lora: LoraConfig, *, half: bool, device: torch.device | None = None) -> None:
    """Puts adapters into a model as training does it: the rest frozen, in `lora.base_precision`, which means bfloat16
    if `half`. The adapters are made on the device of the model, if no other is given.
    """
    add_adapters(model, lora, device)
    for parameter in model.parameters():
        if half and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    if lora.base_precision == "int8":
        quantise_base(model)
    require_input_gradients(model)


def require_input_gradients(model: Transformer) -> None:
    """Makes the first block's input require a gradient, as if the layer before it were trained.

    At ZeRO 3, DeepSpeed's hooks wait for the gradient of a block's input.
    """

    def require(module: nn.Module, args: object, output: Tensor) -> None:
        if torch.is_grad_enabled():
            output.requires_grad_()

    model.patch_in.register_forward_hook(require)
