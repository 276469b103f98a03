"""Writes folders of samples with a contact sheet, and the list of their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sora_train.diffusion import Sampling, resolve_sampler
from sora_train.sample.condition import GivenFrames, encode_each, given_entry, save_given
from sora_train.sample.generate import Progress, generate_each
from sora_train.sample.load import Run
from sora_train.storage import atomic_write_text
from sora_train.video import contact_sheet, slug, write_mp4

SHEET_CLIPS = 24  # more would be too small to see


def sample_to_folder(
    run: Run,
    prompts: Sequence[str],
    embeddings: Sequence[Float[Tensor, "_ e"]] | None,
    folder: str | Path,
    seeds: Sequence[int] = (0,),
    how: Sampling | None = None,
    negative: Float[Tensor, "_ e"] | None = None,
    progress: Progress | None = None,
    on_video: Callable[[np.ndarray], None] | None = None,
    given: Sequence[GivenFrames | None] | None = None,
) -> list[Path]:
    """Writes an mp4 for every prompt and seed, `sheet.png` of the first 24, and last `samples.json`, which lists all.

    Files are named `000-a-red-circle.mp4`, counted over prompts and, within each, seeds. `how` and `negative` are those
    of `generate_each`. `on_video` gets the frames of each video before encoding. `given` has the first frames of each
    prompt's videos; a PNG of them is written too. Returns the paths of the mp4 files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(i, seed) for i in range(len(prompts)) for seed in seeds]
    texts = None if embeddings is None else [embeddings[i] for i, _ in pairs]
    starts = [given[i] if given else None for i, _ in pairs]
    videos = generate_each(
        run,
        [prompts[i] for i, _ in pairs],
        [seed for _, seed in pairs],
        how,
        embeddings=texts,
        negative=negative,
        progress=progress,
        given=encode_each(run, starts),
    )
    listing, shown = [], []
    for count, ((i, seed), video) in enumerate(zip(pairs, videos, strict=True)):
        name = f"{count:03d}-{slug(prompts[i])}.mp4"
        write_mp4(folder / name, video, run.fps)
        if on_video is not None:
            on_video(video)
        save_given(folder, starts[count])
        listing.append({"file": name, "prompt": prompts[i], "seed": seed, **given_entry(starts[count])})
        if len(shown) < SHEET_CLIPS:
            shown.append(video)
    contact_sheet(shown, [entry["prompt"] for entry in listing[: len(shown)]]).save(folder / "sheet.png")
    write_listing(folder, run, listing)
    return [folder / entry["file"] for entry in listing]


def settings_of(run: Run, how: Sampling) -> dict[str, Any]:
    """What decides a video's content besides prompt, seed and shape: checkpoint, weights and sampling config."""
    name = resolve_sampler(how.sampler, run.objective.config.kind)
    about = how.model_dump(mode="json", include=set(Sampling.model_fields)) | {"sampler": name}
    lora = {"lora": [file.record for file in run.lora]} if run.lora else {}
    return {"checkpoint": run.checkpoint.name, "weights": run.weights, **lora} | about


def write_listing(folder: Path, run: Run, listing: list[dict]) -> None:
    """Writes `samples.json`: the prompt of each file, since file names hold only safe letters."""
    about = {"checkpoint": run.checkpoint.name, "fps": run.fps, "samples": listing}
    atomic_write_text(folder / "samples.json", json.dumps(about, indent=1))


def read_listing(folder: Path) -> dict[str, dict]:
    """The entries of a folder's `samples.json` by file name; empty if it is missing or unreadable."""
    try:
        entries = json.loads((folder / "samples.json").read_text(encoding="utf-8"))["samples"]
        return {entry["file"]: entry for entry in entries}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
