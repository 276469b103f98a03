"""From a run to videos: a checkpoint is loaded, prompts and seeds become frames, frames become files. No Ray.

`sora sample`, validation and the quickstart's final samples all go through here.
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
