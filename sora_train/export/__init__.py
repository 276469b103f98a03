"""Export of a run as a `LattePipeline` of diffusers, or as one safetensors file. No Ray.

`sora_train.sample.load_run` reads both back.
"""

from sora_train.export.folder import export

__all__ = ["export"]
