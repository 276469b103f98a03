"""Exports a run as a diffusers pipeline (`LattePipeline`, `WanPipeline`) or one safetensors file. No Ray.

`sora_train.sample.load_run` reads both.
"""

from sora_train.export.folder import export

__all__ = ["export"]
