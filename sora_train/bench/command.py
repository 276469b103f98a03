"""`sora bench WHAT`: finds the bench; and `sora bench all`, which runs each in a process of its own."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module

from sora_train.bench.core import Flags, log
from sora_train.commands import COMMANDS
from sora_train.errors import RecipeError, UserError

BENCHES = {
    "model": ("", "forward, backward, optimizer, tokens/s, FLOP/s, MFU and memory, next to diffusers' Latte"),
    "data": ("[SHARDS]", "shard reader and loader next to raw reads of the same bytes"),
    "prep": ("RECIPE", "clips per second of the pipeline next to a bare VAE loop"),
    "train": ("RECIPE", "a step of `sora train` next to bare torch, by part, by workers, and start-up"),
    "checkpoint": ("", "how long a checkpoint blocks training, writing, resuming"),
    "validate": ("RECIPE", "steps per second with and without a validation running"),
    "all": ("", "all of these with settings for two CPU cores, in about a quarter of an hour"),
}
SETTINGS = {
    "model": "--presets S --rounds 4",
    "data": "--rows 256 --rounds 3",
    "checkpoint": "--presets S --rounds 3",
    "prep": "--clips 64 --rounds 2 --seconds 6 --prep.vae_batch 4",
    "train": "--data.holdout_fraction 0 --workers 1 2 --steps 32",
    "validate": "--data.holdout_fraction 0 --cluster.workers 1 --steps 240",
}
"""The flags of each part of `sora bench all`."""
LIMIT_S = 420


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
    if words[0] == "all":
        return run_all(words[1:])
    return import_module(f"sora_train.bench.{words[0]}").main(words[1:])


def run_all(words: Sequence[str]) -> int:
    """Runs all benches. UserError at the end if some failed."""
    from sora_train.bench.runs import wait
    from sora_train.quickstart.run import find_recipe
    from sora_train.quickstart.shapes import make_clips

    flags = Flags("sora bench all", f"Runs {BENCHES['all'][1]}. Continues if one fails, and exits with 1 at the end.")
    flags.flag("only", list(SETTINGS), "benches to run", choices=SETTINGS)
    flags.flag("clips", 96, "clips to make for prep, train and validate")
    options = flags.parse(words)
    failed: list[str] = []

    def sora(*command: str) -> None:
        began = time.monotonic()
        log(shlex.join(["sora", *command]))
        code = wait(subprocess.Popen([sys.executable, "-m", "sora_train.cli", *command]), LIMIT_S)
        log(f"{command[0]} {command[1]}: {time.monotonic() - began:.0f} s{', failed' if code else ''}")
        if code:
            failed.append(f"{command[0]} {command[1]} (exit status {code})")

    with tempfile.TemporaryDirectory() as folder:
        recipe = [str(find_recipe("jobs/quickstart.yaml")), "--data.captions", f"{folder}/clips/captions.csv",
                  "--data.output", f"{folder}/shards", "--cluster.address", "local"]  # fmt: skip
        if any(BENCHES[name][0] == "RECIPE" for name in options.only):
            make_clips(f"{folder}/clips", options.clips)
            sora("prep", *recipe)
        for name in options.only:
            given = recipe if BENCHES[name][0] == "RECIPE" else []
            sora("bench", name, *given, *SETTINGS[name].split(), "--out", options.out)
    if failed:
        raise UserError(f"failed: {'; '.join(failed)}. The results of the others are in {options.out}")
    return 0
