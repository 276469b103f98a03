"""The video transformer. Needs torch, einops, safetensors and jaxtyping, nothing else."""

from sora_train.model.latte import Latte, ModelConfig

__all__ = ["Latte", "ModelConfig"]
