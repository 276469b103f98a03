"""Sampling: loads a checkpoint, turns prompts and seeds into frames, and writes files. No Ray.

Used by `sora sample`, validation and the quickstart.
"""

from sora_train.sample.command import sample_prompts
from sora_train.sample.generate import embed, generate, generate_each
from sora_train.sample.load import Run, find_checkpoint, load_run
from sora_train.sample.write import sample_to_folder

__all__ = [
    "Run",
    "embed",
    "find_checkpoint",
    "generate",
    "generate_each",
    "load_run",
    "sample_prompts",
    "sample_to_folder",
]
