"""The words behind `sora bench`: which bench, and its help."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from sora_train.commands import VERBS
from sora_train.errors import RecipeError

BENCHES = {
    "model": ("", "forward, backward, step, tokens/s, FLOP/s, MFU and memory beside diffusers' Latte"),
    "data": ("[SHARDS]", "the reader beside raw reads and other readers, warm, cold, S3; the order over 10^9 rows"),
    "prep": ("RECIPE", "the pipeline's clips per second beside a bare VAE loop's, and each stage"),
    "train": ("RECIPE", "a step of `sora train` beside bare torch, what each part adds, workers, start-up"),
    "checkpoint": ("", "for how long a checkpoint stops training, bytes, until it is whole, resuming"),
    "validate": ("RECIPE", "steps a second with and without a validation beside them"),
    "all": ("", "all of these at settings for two CPU cores, in under a quarter of an hour"),
}
MODULES = {"all": "everything"}


def usage() -> str:
    """What `sora bench --help` says."""
    lines = "\n".join(f"  {f'{name} {what}'.rstrip():17}  {says}" for name, (what, says) in BENCHES.items())
    return f"""\
usage: sora bench WHAT [RECIPE] [flags]

{VERBS["bench"][1]} What is compared takes turns (A B A B …) after a warm-up;
medians count, with the lowest and the highest. Each prints its tables as Markdown and appends them as JSON lines, with
command, commit, versions and hardware, to runs/bench.jsonl (--out); --report FILE.html makes a page with plots of
all that file holds, --markdown FILE.md writes the tables. Exit status 1 where a part of it failed.

{lines}

  sora bench model --presets S B --compile no yes
  sora bench train jobs/quickstart.yaml --workers 1 2
  sora bench all --report bench.html

sora bench WHAT --help explains its flags. `model` needs torch, einops, safetensors and jaxtyping alone: where nothing
else is installed, python -m sora_train.bench.model takes the same flags."""


def run(words: Sequence[str]) -> int:
    """One bench; returns the exit status. RecipeError where there is none of that name."""
    if not words or words[0] not in BENCHES:
        what = f"{words[0]} is no bench" if words else "what to measure is missing"
        raise RecipeError(f"{what}; choices: {', '.join(BENCHES)}, such as sora bench model")
    module = import_module(f"sora_train.bench.{MODULES.get(words[0], words[0])}")
    return module.main(words[1:])
