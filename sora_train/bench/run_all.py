"""`sora bench all`: each bench with settings for a CPU, in a process of its own: one that fails fails alone."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sora_train.bench.core import Table, provenance, read_records, say
from sora_train.bench.options import Common, parse, refuse
from sora_train.bench.output import write_markdown
from sora_train.errors import RecipeError, UserError
from sora_train.quickstart.run import find_recipe

PARTS = ("model", "data", "checkpoint", "prep", "train", "validate")
ABOUT = (
    "Runs every bench at settings for two CPU cores, in under a quarter of an hour: model and checkpoint of preset S, "
    "data on shards that it makes, the others on the quickstart's clips, which it makes and encodes. A part that fails "
    "is said and the others go on; the exit status is 1 then."
)
LIMIT_S, ENDING_S = 420, 30
QUICKSTART = "jobs/quickstart.yaml"


@dataclass(frozen=True)
class Options(Common):
    """What of it."""

    only: tuple[str, ...] = PARTS
    """Parts to run."""
    clips: int = 96
    """Clips that are made for prep, train and validate."""


def commands(options: Options, folder: Path) -> dict[str, list[str]]:
    """The words of each part, after `sora bench`."""
    recipe = [str(find_recipe(QUICKSTART)), "--data.captions", str(folder / "clips/captions.csv"),
              "--data.output", str(folder / "shards")]  # fmt: skip
    found = {
        "model": ["model", "--presets", "S", "--rounds", "4"],
        "data": ["data", "--rows", "256", "--rounds", "3", "--s3"],
        "checkpoint": ["checkpoint", "--presets", "S", "--rounds", "3"],
        "prep": [
            "prep",
            *recipe,
            "--clips",
            "64",
            "--rounds",
            "2",
            "--seconds",
            "6",
            "--prep.vae_batch",
            "4",
            "--cluster.address",
            "local",
        ],
        "train": ["train", *recipe, "--data.holdout_fraction", "0", "--workers", "1", "2", "--steps", "32"],
        "validate": ["validate", *recipe, "--data.holdout_fraction", "0", "--cluster.workers", "1", "--steps", "240"],
    }
    return {name: [*found[name], "--out", options.out] for name in options.only}


def bench(options: Options) -> list[str]:
    """Runs the parts; says which failed."""
    if wrong := [name for name in options.only if name not in PARTS]:
        raise RecipeError(f"--only {' '.join(wrong)}: choices are {', '.join(PARTS)}")
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        wanted = commands(options, folder)
        if {"prep", "train", "validate"} & wanted.keys() and not make_shards(options, folder):
            failed.append("making the quickstart's shards")
        for name, words in wanted.items():
            began = time.monotonic()
            say(shlex.join(["sora", "bench", *words]))
            code = sora("bench", *words)
            if code:
                failed.append(f"{name} (exit status {code})")
            say(f"{name}: {time.monotonic() - began:.0f} s{'' if not code else ', failed'}")
    return failed


def make_shards(options: Options, folder: Path) -> bool:
    """The quickstart's clips, fewer of them, and their shards; whether that worked."""
    from sora_train.quickstart.shapes import make_clips

    say(f"making and encoding {options.clips} clips of the quickstart")
    make_clips(folder / "clips", options.clips)
    return not sora("prep", str(find_recipe(QUICKSTART)), "--data.captions", str(folder / "clips/captions.csv"),
                    "--data.output", str(folder / "shards"), "--cluster.address", "local")  # fmt: skip


def sora(*words: str) -> int:
    """`sora WORDS` in a process of its own; its exit status, or 124 where it took too long. It is asked to end before
    it is killed: it may have started others, such as an S3 server.
    """
    process = subprocess.Popen([sys.executable, "-m", "sora_train.cli", *words])
    try:
        return process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        return 124
    finally:
        try:
            process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            process.kill()


def main(words: Sequence[str], prog: str = "sora bench all") -> int:
    """The command; returns the exit status."""
    options, rest = parse(Options, words, prog, ABOUT)
    refuse(rest, prog)
    out = Path(options.out).expanduser()
    before = len(read_records(out)) if out.exists() else 0
    failed = bench(options)
    records = read_records(out)[before:] if out.exists() else []
    if options.markdown:
        tables = [Table(r["what"], r["rows"], r.get("notes", []), r.get("failed", [])) for r in records]
        write_markdown(tables, provenance(["all", *words]), options.markdown)
    if options.report:
        from sora_train.bench.page import write_page

        write_page(out, options.report)
    if failed:
        raise UserError(f"failed: {'; '.join(failed)}; what the others measured is in {out}")
    return 0
