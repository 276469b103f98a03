"""Diffusion: what is learned (`objective.py`, `flow.py`, `ddpm.py`) and how samples are drawn (`sampler.py`)."""

from sora_train.diffusion.objective import DiffusionConfig, Objective, make_objective
from sora_train.diffusion.sampler import sample

__all__ = ["DiffusionConfig", "Objective", "make_objective", "sample"]
