"""Models with adapters on a frozen base (`lora`), as training builds them."""

from pathlib import Path

import torch
from torch import Tensor, nn

from sora_train.errors import UserError
from sora_train.lora.adapters import adapter_state, add_adapters, load_adapter_state
from sora_train.lora.config import LoraConfig
from sora_train.lora.files import read_lora
from sora_train.lora.int8 import quantise_base
from sora_train.model import ModelConfig, Transformer, build, build_empty
from sora_train.train.frozen_base import check_base
from sora_train.train.initial import cannot_start, load_initial


def build_adapted(config: ModelConfig, lora: LoraConfig, device: torch.device, *, half: bool, new: bool) -> Transformer:
    """The weights of `model.init_from`, frozen, in bfloat16 if `half`, with float32 adapters.

    Those of a `new` run are loaded from `lora.init_from`, if any. Every rank makes the same, by torch's global
    generator. Raises UserError for weights that are damaged or do not fit.
    """
    folder = Path(config.init_from)
    try:
        check_base(folder)
    except (OSError, ValueError) as error:
        raise cannot_start(folder, error) from None
    model = build_empty(config, device, torch.bfloat16 if half else torch.float32)
    load_initial(model, folder)
    adapt(model, lora, half=half)
    if new and lora.init_from:
        load_adapter_state(model, adapter_state(model) | initial_adapters(config, lora))
    return model


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


def adapt(model: Transformer, lora: LoraConfig, *, half: bool) -> None:
    """Puts adapters into a model with weights as training does it: the rest frozen, in `lora.base_precision`, which
    means bfloat16 if `half`.
    """
    add_adapters(model, lora)
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
