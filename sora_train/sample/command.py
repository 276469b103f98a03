"""`sora sample`: prompts become video files in the run's folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from sora_train.errors import RecipeError, UserError
from sora_train.log import every_few_seconds, log
from sora_train.manifest import commonest_shape
from sora_train.options import SampleOptions
from sora_train.sample.condition import (
    GivenFrames,
    ReadGiven,
    check_room,
    check_takes_frames,
    encode_each,
    given_count,
    given_entry,
    save_given,
    warn_if_none,
)
from sora_train.sample.generate import generate_each, sample_shape
from sora_train.sample.load import Run, load_run
from sora_train.sample.lora import parse_lora
from sora_train.sample.write import read_listing, settings_of, write_listing
from sora_train.sampling import Sampling
from sora_train.schema import bucket_name
from sora_train.settings import build
from sora_train.storage import why_not_writable
from sora_train.text_files import decode_text
from sora_train.video import contact_sheet, slug, write_gif, write_mp4

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".pq", ".xlsx", ".gz")
TABLE = re.compile(r'video_file_name"?\s*[,;\t|]|.*[,;\t|]\s*"?video_file_name|sep=.$|[\[{]\s*"')
"""The beginning of a captions file: a header, or JSON."""


def sample_prompts(path: str | Path, ask: SampleOptions, read: ReadGiven | None = None) -> list[Path]:
    """Samples every prompt with every seed into files in RUN/samples/prompts, or in `ask.out`; logs their names.

    A file is named after its prompt and seed. It replaces a file only if `samples.json` lists that with the same
    prompt, seed, given frames and settings; otherwise its name gets -2. `read` reads the files of --image and --video.
    Raises UserError for what can't be sampled or written.
    """
    seeds, formats = list(dict.fromkeys(ask.seed)), list(dict.fromkeys(ask.format))
    if not formats or not seeds:
        raise RecipeError("--format and --seed need a value each, such as --format mp4 --seed 0")
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**63]:
        raise RecipeError(f"seed {wrong[0]} is out of range; use 0 to 2^63 - 1")
    starts = pair_prompts(ask)
    if ask.out is not None:
        check_writable(Path(ask.out))
    run = load_run(path, weights=ask.weights, lora=parse_lora(ask.lora))
    flags = ask.model_dump(include=set(Sampling.model_fields), exclude_none=True)
    how = build(Sampling, run.recipe.validation.model_dump(include=set(Sampling.model_fields)), flags, "sora sample")
    check_guidance(run, how)
    manifest = run.manifest
    shape = (ask.frames or manifest.frames, ask.height or manifest.height, ask.width or manifest.width)
    sample_shape(run, shape)
    given = read_starts(run, ask, [start for _, start in starts], shape, read)
    settings = settings_of(run, how) | dict(zip(("frames", "height", "width"), shape, strict=True))
    folder = Path(ask.out) if ask.out is not None else run.folder / "samples" / "prompts"
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    asked = [(prompt, seed, each) for (prompt, _), each in zip(starts, given, strict=True) for seed in seeds]
    log.info(f"sampling {len(asked)} of {describe_shape(run, shape)} from {run.checkpoint} on {run.device}")
    progress = every_few_seconds(lambda done, of: log.info(f"sampling: {done} of {of} steps"))
    latents = encode_each(run, [each for _, _, each in asked])
    videos = generate_each(
        run,
        [prompt for prompt, _, _ in asked],
        [seed for _, seed, _ in asked],
        how,
        shape=shape,
        progress=progress,
        given=latents,
    )
    written, listing = list[Path](), read_listing(folder)
    for (prompt, seed, start), video in zip(asked, videos, strict=True):
        about = {"prompt": prompt, "seed": seed, **settings, **given_entry(start)}
        stem = free_stem(folder, f"{slug(prompt)}-seed{seed}", about, listing)
        for suffix in formats:
            file = folder / f"{stem}.{suffix}"
            try:
                save_given(folder, start)
                write_video(file, video, run.fps, prompt)
            except OSError as error:
                raise UserError(
                    f"{file} can't be written ({error}); make room, or name a folder: --out", code="not_writable"
                ) from None
            written.append(file)
            log.info(str(file))
            listing[file.name] = {"file": file.name, **about}
        write_listing(folder, run, list(listing.values()))
    return written


def check_writable(folder: Path) -> None:
    """Raises UserError if the videos can't be written, before any is sampled."""
    if why := why_not_writable(folder):
        raise UserError(f"{folder} can't be written: {why}; name another folder with --out", code="not_writable")


def check_guidance(run: Run, how: Sampling) -> None:
    """Raises RecipeError for guidance without given frames from a model that learned only one of both kinds."""
    probability = run.recipe.conditioning.probability
    if how.guidance_without == "text_and_frames" and probability in (0, 1):
        raise RecipeError(
            f"--guidance_without text_and_frames needs a model that learned clips with given frames and clips without, "
            f"and {run.folder} was trained with conditioning.probability {probability:g}. Use text"
        )


def pair_prompts(ask: SampleOptions) -> list[tuple[str, str | None]]:
    """The prompts, each with the image or video that it continues, if any; no pair twice.

    One prompt goes with all images, and one image with all prompts. Raises RecipeError if the numbers don't match.
    """
    prompts = [*ask.prompt, *(read_prompts(ask.prompts) if ask.prompts else ())]
    if not prompts:
        raise RecipeError('nothing to sample; give a prompt: --prompt "a blue square moving up"')
    if ask.image and ask.video:
        raise RecipeError("--image and --video are two beginnings of one video: use one of them")
    starts: list[str | None] = [*(ask.image or ask.video)] or [None]
    if 1 not in (len(prompts), len(starts)) and len(prompts) != len(starts):
        key = "--image" if ask.image else "--video"
        raise RecipeError(
            f"{key} names {len(starts)} files for {len(prompts)} prompts. Name one for all, or one for each prompt"
        )
    count = max(len(prompts), len(starts))
    prompts = prompts * count if len(prompts) == 1 else prompts
    starts = starts * count if len(starts) == 1 else starts
    return list(dict.fromkeys(zip(prompts, starts, strict=True)))


def read_starts(
    run: Run, ask: SampleOptions, starts: Sequence[str | None], shape: tuple[int, int, int], read: ReadGiven | None
) -> list[GivenFrames | None]:
    """The given frames of each sample. Raises UserError if the model takes none, or if a file can't be read."""
    names, conditioning = [name for name in starts if name is not None], run.recipe.conditioning
    warn_if_none(conditioning, "--image", names)
    if not names:
        return [None] * len(starts)
    if read is None:
        raise ValueError("data_prep.given.read_given is needed to read images and videos")
    key = "--image" if ask.image else "--video"
    check_takes_frames(run, key)
    count = given_count(conditioning, run.manifest, key)
    check_room(run.manifest, key, count, shape[0])
    return [*read(names, key, (count, *shape[1:]), run.fps, run.recipe.data.max_enlarge)]


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a text file, one on each line. Raises RecipeError for no prompt, or a table of captions."""
    file = Path(path).expanduser()
    try:
        text = decode_text(file.read_bytes())
    except OSError as error:
        raise RecipeError(f"--prompts {path} can't be read ({error.strerror or error})") from None
    except ValueError as error:
        raise RecipeError(f"--prompts {path} {error}") from None
    prompts = [line.strip() for line in re.split("\r\n?|\n", text) if line.strip()]
    if file.suffix.lower() in TABLES or (prompts and TABLE.match(prompts[0])):
        raise RecipeError(f"--prompts {path} is a table; write the prompts alone to a text file, one on each line")
    if not prompts:
        raise RecipeError(f"--prompts {path} has no prompt; write one on each line")
    return prompts


def describe_shape(run: Run, shape: tuple[int, int, int]) -> str:
    """The shape of the samples, for a log; warns if the model was not trained at it."""
    manifest, asked = run.manifest, bucket_name(*shape)
    default = bucket_name(manifest.frames, manifest.height, manifest.width)
    trained = [name for name, rows in manifest.buckets.items() if rows] or [default]
    if asked not in (*trained, default):
        log.warning(
            f"the model was not trained at {asked} (frames x height x width), only at {', '.join(trained)}; "
            "samples may look worse"
        )
    if len(trained) < 2 or shape != commonest_shape(manifest.buckets):
        return asked
    return f"{asked} (the commonest of {', '.join(trained)}; --frames, --height and --width take another)"


def free_stem(folder: Path, stem: str, about: dict[str, Any], listing: dict[str, dict]) -> str:
    """The first of `stem`, `stem-2`, ... of which no file exists that was made with other settings."""
    for number in count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        files = [f"{name}.{suffix}" for suffix in ("mp4", "gif", "png") if (folder / f"{name}.{suffix}").exists()]
        if all(listing.get(file) == {"file": file, **about} for file in files):
            return name
    raise AssertionError("count has no end")


def write_video(file: Path, video: np.ndarray, fps: float, prompt: str) -> None:
    """Writes mp4, gif, or as png the frames side by side with the prompt below."""
    match file.suffix:
        case ".mp4":
            write_mp4(file, video, fps)
        case ".gif":
            write_gif(file, video, fps)
        case _:
            contact_sheet([video], [prompt], frame_height=max(96, min(256, video.shape[1]))).save(file, optimize=True)
