"""Diffusion: training objectives and sampling.

`objective.py` has the objectives, `sampler.py` and `guidance.py` the sampling, `conditioning.py` given first frames.
`flow.py`, `ddpm.py` and `variance.py` have the equations.
"""

from sora_train.diffusion.conditioning import ConditioningConfig
from sora_train.diffusion.objective import DiffusionConfig, Model, Objective, make_objective
from sora_train.diffusion.sampler import Sampler, Sampling, resolve_sampler, sample

__all__ = [
    "ConditioningConfig",
    "DiffusionConfig",
    "Model",
    "Objective",
    "Sampler",
    "Sampling",
    "make_objective",
    "resolve_sampler",
    "sample",
]
