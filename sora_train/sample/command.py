"""`sora sample`: prompts become files that people look at, beside the run."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sora_train.commands import SampleOptions
from sora_train.errors import RecipeError, UserError
from sora_train.log import log
from sora_train.manifest import commonest_shape
from sora_train.sample.generate import Progress, generate_each, sample_shape
from sora_train.sample.load import Run, load_run
from sora_train.sample.write import read_listing, settings_of, write_listing
from sora_train.sampling import Sampling
from sora_train.schema import bucket_name
from sora_train.settings import build
from sora_train.storage import decode_text
from sora_train.video import contact_sheet, slug, write_gif, write_mp4

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".pq", ".xlsx", ".gz")
TABLE = re.compile(r'video_file_name"?\s*[,;\t|]|.*[,;\t|]\s*"?video_file_name|sep=.$|[\[{]\s*"')
"""How the first line of a captions file begins: a header, or JSON."""


def sample_prompts(path: str | Path, ask: SampleOptions) -> list[Path]:
    """Every prompt with every seed as files of the formats asked for, into RUN/samples/prompts or `ask.out`; prints
    where.

    A file is named after its prompt and seed, and replaces only what `samples.json` lists as made of the same prompt,
    seed and settings: otherwise the name goes on with -2. Raises UserError for what can't be sampled or written.
    """
    prompts = list(dict.fromkeys([*ask.prompt, *(read_prompts(ask.prompts) if ask.prompts else ())]))
    if not prompts:
        raise RecipeError('nothing to sample; give a prompt: --prompt "a blue square moving up"')
    for seed in ask.seed:
        if not 0 <= seed < 2**63:
            raise RecipeError(f"seed {seed} is out of range; use 0 to 2^63 - 1")
    formats = tuple(dict.fromkeys(ask.format))
    if not formats or not ask.seed:
        raise RecipeError("--format and --seed need a value each, such as --format mp4 --seed 0")
    run = load_run(path, weights=ask.weights)
    flags = ask.model_dump(include=set(Sampling.model_fields), exclude_none=True)
    how = build(Sampling, run.recipe.validation.model_dump(include=set(Sampling.model_fields)), flags, "sora sample")
    manifest = run.manifest
    shape = (ask.frames or manifest.frames, ask.height or manifest.height, ask.width or manifest.width)
    sample_shape(run, shape)
    warn_of_shape(run, shape)
    settings = settings_of(run, how)
    settings |= dict(zip(("frames", "height", "width"), shape, strict=True))
    folder = Path(ask.out) if ask.out is not None else run.folder / "samples" / "prompts"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} can't be made ({error.strerror}); name another folder with --out") from None
    pairs = [(prompt, seed) for prompt in prompts for seed in dict.fromkeys(ask.seed)]
    log.info(f"sampling {len(pairs)} of {said_shape(run, shape)} from {run.checkpoint} on {run.device}")
    each_prompt, each_seed = zip(*pairs, strict=True)
    written, listing = [], read_listing(folder)
    with shown_progress("sampling") as (progress, say):
        videos = generate_each(run, each_prompt, each_seed, how, shape=shape, progress=progress)
        for (prompt, seed), video in zip(pairs, videos, strict=True):
            about = {"prompt": prompt, "seed": seed, **settings}
            stem = free_stem(folder, f"{slug(prompt)}-seed{seed}", about, listing)
            for suffix in formats:
                file = folder / f"{stem}.{suffix}"
                try:
                    write_video(file, video, run.fps, prompt)
                except OSError as error:
                    raise UserError(f"{file} can't be written ({error}); make room, or name a folder: --out") from None
                written.append(file)
                say(str(file))
                listing[file.name] = {"file": file.name, **about}
            write_listing(folder, run, list(listing.values()))
    return written


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a text file, one a line; blank lines are left out. RecipeError, saying what is wrong, if none, or
    where it is a table of captions, whose lines are no prompts.
    """
    file = Path(path).expanduser()
    try:
        content = file.read_bytes()
    except (OSError, ValueError) as error:
        raise RecipeError(f"--prompts {path} can't be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        text = decode_text(content)
    except ValueError as error:
        raise RecipeError(f"--prompts {path} {error}") from None
    prompts = [line.strip() for line in re.split("\r\n?|\n", text) if line.strip()]
    if file.suffix.lower() in TABLES or (prompts and TABLE.match(prompts[0])):
        raise RecipeError(f"--prompts {path} is a table; write the prompts alone to a text file, one on each line")
    if not prompts:
        raise RecipeError(f"--prompts {path} holds no prompt; write one on each line")
    return prompts


def said_shape(run: Run, shape: tuple[int, int, int]) -> str:
    """The shape of the samples in words: of several that the model was trained on it is the commonest, unless asked."""
    buckets = run.manifest.buckets
    asked, trained = bucket_name(*shape), [name for name, rows in buckets.items() if rows]
    if len(trained) < 2 or shape != commonest_shape(buckets):
        return asked
    return f"{asked} (the commonest of {', '.join(trained)}; --frames, --height and --width take another)"


def warn_of_shape(run: Run, shape: tuple[int, int, int]) -> None:
    """Says on stderr where the model was not trained at a shape of frames, height and width."""
    manifest = run.manifest
    trained = [name for name, rows in manifest.buckets.items() if rows]
    trained = trained or [f"{manifest.frames}x{manifest.height}x{manifest.width}"]
    asked = "x".join(map(str, shape))
    if asked not in trained and shape != (manifest.frames, manifest.height, manifest.width):
        log.warning(
            f"the model was not trained at {asked} (frames x height x width), only at {', '.join(trained)}; "
            "samples may look worse"
        )


def free_stem(folder: Path, stem: str, about: dict[str, Any], listing: dict[str, dict]) -> str:
    """A file name without suffix under which nothing lies that was made otherwise: `stem`, or it with -2, -3, …"""
    count = 1
    while True:
        name = stem if count == 1 else f"{stem}-{count}"
        there = [f"{name}.{suffix}" for suffix in ("mp4", "gif", "png") if (folder / f"{name}.{suffix}").exists()]
        if all(listing.get(file) == {"file": file, **about} for file in there):
            return name
        count += 1


def write_video(file: Path, video: np.ndarray, fps: float, prompt: str) -> None:
    """A video as mp4, as gif, or as png: its frames side by side with the prompt beneath."""
    match file.suffix:
        case ".mp4":
            write_mp4(file, video, fps)
        case ".gif":
            write_gif(file, video, fps)
        case _:
            contact_sheet([video], [prompt], frame_height=max(96, min(256, video.shape[1]))).save(file, optimize=True)


@contextmanager
def shown_progress(what: str) -> Iterator[tuple[Progress, Callable[[str], None]]]:
    """A progress callback, and how to print a line meanwhile: a bar on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield printed(what), lambda line: log.info(line)
        return
    from tqdm import tqdm

    with tqdm(desc=what, unit="step") as bar:

        def report(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield report, lambda line: tqdm.write(line)


def printed(what: str, seconds: float = 5.0) -> Progress:
    """A progress callback that prints a line at most every so many seconds, and none for quick work."""
    started = last = time.monotonic()

    def report(done: int, of: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            log.info(f"{what}: {done} of {of} steps, {now - started:.0f} s")

    return report
