"""How well a model keeps given first frames, and how much they change the rest of a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from sora_train.evaluate.heldout import choose_clips
from sora_train.evaluate.metrics import Figures, Progress, captions_of, open_held_out, real_videos
from sora_train.recipe import ValidationConfig
from sora_train.sample import Run, generate_each
from sora_train.sample.condition import encode_given
from sora_train.schema import bucket_name
from sora_train.video import psnr

CLIPS = 8
"""Default number of held-out clips. Each needs two samples."""
MAX_PSNR = 100.0  # of frames that are equal, whose PSNR is infinite


def measure_given(
    run: Run, config: ValidationConfig, folder: str, count: int, report: Progress, remark: Callable[[str], None]
) -> Figures:
    """Samples captions of held-out clips with and without the clips' first frames, from the same noise.

    The frames are given as an image is: decoded from the shards' latents, since shards hold no pixels, and encoded
    again. Raises UserError without held-out clips.
    """
    manifest, shards = run.manifest, open_held_out(run, folder)
    bucket = bucket_name(manifest.frames, manifest.height, manifest.width)
    places = choose_clips(run, shards, count, (bucket,), f"given frames of {bucket}", remark)
    if not places:
        return {}
    frames = 1 + (run.recipe.conditioning.frames - 1) * manifest.vae.time_factor
    starts = [video[:frames] for video in real_videos(run, shards, places, partial(report, "given frames"))]
    prompts, embeddings = captions_of(run, shards, places)
    request = (run, prompts, range(config.seed, config.seed + len(prompts)), config, embeddings)
    given = [encode_given(run, start) for start in starts]
    kept = generate_each(*request, given=given, progress=partial(report, "samples with given frames, step"))
    free = generate_each(*request, progress=partial(report, "samples without given frames, step"))
    return given_figures(zip(starts, kept, free, strict=True))


def given_figures(clips: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Figures:
    """Figures of (given frames, the sample with them, the sample without them), all uint8 `F H W 3`.

    `given_psnr` compares the given frames with the sample's, in dB over all clips, at most MAX_PSNR. `given_effect` is
    the root mean square difference of the frames after them between the two samples, of 255.
    """
    starts, kept, squares = list[np.ndarray](), list[np.ndarray](), list[float]()
    for start, sample, free in clips:
        starts.append(start)
        kept.append(sample[: len(start)])
        later = sample[len(start) :].astype(np.float64) - free[len(start) :]
        squares.append(float(np.square(later).mean()))
    quality = min(MAX_PSNR, psnr(np.stack(kept), np.stack(starts)))
    return {"given_psnr": quality, "given_effect": float(np.sqrt(np.mean(squares))), "given_clips": len(squares)}
