"""`sora bench WHAT`: finds the bench, reads its flags, runs it, prints and records its tables."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from sora_train.commands import COMMANDS
from sora_train.errors import RecipeError
from sora_train.flags import help_text, parse_flags
from sora_train.recipe import Recipe, load_recipe
from sora_train.settings import build, keys
from sora_train.terminal import print_result

BENCHES = {
    "model": ("", "forward, backward, optimizer, tokens/s, FLOP/s, MFU and memory, next to diffusers' model",
              "--presets S B --compile no yes"),
    "attention": ("", "attention of a model's blocks by torch's backends and our kernels",
                  "--presets latte_t2v XL_heads128 --batch 8"),
    "data": ("SHARDS", "shard reader and loader next to raw reads of the same bytes", "runs/quickstart/shards"),
    "prep": ("RECIPE", "clips per second of the pipeline next to a bare VAE loop", "jobs/quickstart.yaml"),
    "train": ("RECIPE", "a step of `sora train` next to bare torch, by workers, and start-up",
              "jobs/quickstart.yaml --workers 1 2"),
    "checkpoint": ("", "how long a checkpoint blocks training, writing, resuming", "--presets S --tmp /shared/disk"),
    "validate": ("RECIPE", "seconds per step with and without a validation running",
                 "jobs/quickstart.yaml --cluster.workers 1"),
}  # fmt: skip
"""What each takes besides flags, what it measures, and an example."""


def usage() -> str:
    """The text of `sora bench --help`."""
    lines = "\n".join(f"  {f'{name} {takes}'.rstrip():17}  {about}" for name, (takes, about, _) in BENCHES.items())
    return f"""\
usage: sora bench WHAT [RECIPE] [flags]

{COMMANDS["bench"].does} After a warm-up, variants run in alternation (A B A B …). Prints tables as
Markdown with the median, minimum and maximum, and appends them with command, commit, versions and hardware as JSON
lines to runs/bench.jsonl (--out). Exits with 1 if any part failed. A bench of a recipe takes the recipe's keys as flags
too.

{lines}

  sora bench model {BENCHES["model"][2]}
  sora bench train {BENCHES["train"][2]}

`sora bench WHAT --help` explains its flags."""


def run(words: Sequence[str]) -> int:
    """Runs one bench and returns its exit status. RecipeError if there is none of that name."""
    name = words[0] if words else ""
    if name not in BENCHES:
        what = f"{name} is not a bench" if words else "what to measure is missing"
        raise RecipeError(f"{what}; choices: {', '.join(BENCHES)}, such as sora bench model")
    from sora_train.bench.core import append, finish

    takes, _, example = BENCHES[name]
    module = import_module(f"sora_train.bench.{name}")
    wants_help = not {"-h", "--help"}.isdisjoint(words)
    rest = [word for word in words[1:] if word not in ("-h", "--help")]
    flags, given = parse_flags(rest, module.Options, *([Recipe] if takes == "RECIPE" else []))
    own = {key for key, _ in keys(module.Options)}
    options = build(module.Options, {}, {key: flags.pop(key) for key in own & flags.keys()}, f"sora bench {name}")
    if wants_help:
        paragraphs = ((module.__doc__ or "").partition(": ")[2], f"Example: sora bench {name} {example}")
        print_result(help_text(f"sora bench {name} {takes} [flags]".replace("  ", " "), paragraphs, [options]))
        return 0
    if len(given) != bool(takes):
        wanted = f"one {takes}" if takes else "only flags"
        raise RecipeError(f"takes {wanted}, got {' '.join(given) or 'none'}: sora bench {name} {example}")
    inputs = [load_recipe(given[0], flags)] if takes == "RECIPE" else given
    append([], {}, options.out)  # an error here costs less than one after the measurement
    return finish(module.bench(options, *inputs), words, options.out)
