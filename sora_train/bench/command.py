"""`sora bench WHAT`: finds the bench and runs it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from sora_train.commands import COMMANDS
from sora_train.errors import RecipeError

BENCHES = {
    "model": ("", "forward, backward, optimizer, tokens/s, FLOP/s, MFU and memory, next to diffusers' Latte"),
    "data": ("SHARDS", "shard reader and loader next to raw reads of the same bytes"),
    "prep": ("RECIPE", "clips per second of the pipeline next to a bare VAE loop"),
    "train": ("RECIPE", "a step of `sora train` next to bare torch, by workers, and start-up"),
    "checkpoint": ("", "how long a checkpoint blocks training, writing, resuming"),
    "validate": ("RECIPE", "seconds per step with and without a validation running"),
}


def usage() -> str:
    """The text of `sora bench --help`."""
    lines = "\n".join(f"  {f'{name} {what}'.rstrip():17}  {about}" for name, (what, about) in BENCHES.items())
    return f"""\
usage: sora bench WHAT [RECIPE] [flags]

{COMMANDS["bench"].does} After a warm-up, variants run in alternation (A B A B …). Prints tables as
Markdown with the median, minimum and maximum, and appends them with command, commit, versions and hardware as JSON
lines to runs/bench.jsonl (--out). Exits with 1 if any part failed.

{lines}

  sora bench model --presets S B --compile no yes
  sora bench train jobs/quickstart.yaml --workers 1 2

`sora bench WHAT --help` explains its flags. `model` needs only torch, einops, safetensors and jaxtyping: on a machine
without the rest, python -m sora_train.bench.model takes the same flags."""


def run(words: Sequence[str]) -> int:
    """Runs one bench and returns its exit status. RecipeError if there is none of that name."""
    if not words or words[0] not in BENCHES:
        what = f"{words[0]} is not a bench" if words else "what to measure is missing"
        raise RecipeError(f"{what}; choices: {', '.join(BENCHES)}, such as sora bench model")
    return import_module(f"sora_train.bench.{words[0]}").main(words[1:])
