"""The video transformers. Needs torch, einops, safetensors and jaxtyping, nothing else."""

import torch

from sora_train.model.config import ModelConfig, preset
from sora_train.model.latte import Latte
from sora_train.model.wan import Wan

__all__ = ["Latte", "ModelConfig", "Transformer", "Wan", "build", "build_empty", "preset"]

Transformer = Latte | Wan


def build(config: ModelConfig) -> Transformer:
    """A model of the config's family, with random weights."""
    return Wan(config) if config.family == "wan" else Latte(config)


def build_empty(config: ModelConfig, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Transformer:
    """The same on a device with zeros in place of random weights, which take longer than reading others."""
    with torch.device("meta"):
        model = build(config)
    model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model
