"""The video transformer. Needs torch, einops, safetensors and jaxtyping, nothing else."""

from sora_train.model.config import ModelConfig, preset
from sora_train.model.latte import Latte

__all__ = ["Latte", "ModelConfig", "preset"]
