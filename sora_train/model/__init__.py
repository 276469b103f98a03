"""The video transformers. Needs torch, einops, safetensors and jaxtyping, nothing else."""

from sora_train.model.config import ModelConfig, preset
from sora_train.model.latte import Latte
from sora_train.model.wan import Wan

__all__ = ["Latte", "ModelConfig", "Transformer", "Wan", "build", "preset"]

Transformer = Latte | Wan


def build(config: ModelConfig) -> Transformer:
    """A model of the config's family, with random weights."""
    return Wan(config) if config.family == "wan" else Latte(config)
