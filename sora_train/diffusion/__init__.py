"""Diffusion: what is learned (`objective.py`) and how samples are drawn (`sampler.py`, `guidance.py`).

`flow.py`, `ddpm.py` and `variance.py` are the equations.
"""

from sora_train.diffusion.objective import DiffusionConfig, Model, Objective, make_objective
from sora_train.diffusion.sampler import Sampler, Sampling, fitting, sample

__all__ = [
    "DiffusionConfig",
    "Model",
    "Objective",
    "Sampler",
    "Sampling",
    "fitting",
    "make_objective",
    "sample",
]
