"""Measures seconds for decoding, the VAE and the text encoder on a few clips, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.lookup import data_root
from data_prep.ray_pipeline import vae_batch_size
from data_prep.reasons import ClipError
from data_prep.sources import SourceRow
from data_prep.stages import local_copy
from data_prep.video.decode_process import Decoder
from sora_train.log import log
from sora_train.recipe import Recipe
from sora_train.storage import resolve

CLIPS, CAPTIONS = 8, 32  # measured at most
SECONDS = 20.0  # after which no further clip is measured


@dataclass(frozen=True)
class Measurement:
    """Seconds on one core (opening, decoding) and on `device` (VAE, text): `cpu`, one core, or a GPU's name."""

    clips: int
    device: str
    open_s: float
    """Per source, scene detection included."""
    decode_s: float
    """Per clip."""
    vae_s: float
    """Per million of a clip's pixels, all frames counted."""
    text_s: float
    """Per caption."""


def measure(recipe: Recipe, rows: list[SourceRow], captions: list[str]) -> Measurement | None:
    """Decodes and encodes one clip of each row until the time is up; None if no clip can be encoded.

    Raises UserError if the VAE or the text encoder can't be loaded.
    """
    import torch

    from sora_train.codec.text import text_encoder_of
    from sora_train.codec.vae import vae_of

    has_gpu = torch.cuda.is_available()
    device, name = ("cuda", torch.cuda.get_device_name()) if has_gpu else ("cpu", "cpu")
    clock = time.monotonic if has_gpu else time.process_time  # on a busy CPU only this process's share counts
    batch = vae_batch_size(recipe, gpus=1) if has_gpu else 1
    system, _ = resolve(data_root(recipe.data))
    times: list[tuple[float, float, float]] = []
    threads, decoder = torch.get_num_threads(), Decoder(recipe.data, recipe.selection)
    torch.set_num_threads(1)
    try:
        vae, text = vae_of(recipe.codec, device), text_encoder_of(recipe.codec, device, recipe.prep.text_batch)
        began = time.monotonic()
        for row in [rows[0], *rows]:  # the first clip is a warm-up
            if times and time.monotonic() - began > SECONDS:
                break
            try:
                with local_copy(system, row.path) as path:
                    plan, open_s = _timed(time.monotonic, decoder.plan_clips, path)
                    span = plan.spans[len(plan.spans) // 2]
                    clip, decode_s = _timed(time.monotonic, decoder.read, path, span, row.row_id)
                frames = torch.from_numpy(np.repeat(clip.frames[None], batch, axis=0))
                _, vae_s = _timed(clock, vae.encode, frames)
                times.append((open_s, decode_s, vae_s / (frames.numel() / 3e6)))
            except (ClipError, RuntimeError) as error:
                log.info(f"plan: {row.source} is not measured: {error}")
        if not times:
            return None
        _, text_s = _timed(clock, text.encode, captions[:1])
        if text_s < SECONDS / 4:
            text_s = _timed(clock, text.encode, captions)[1] / len(captions)
    finally:
        decoder.close()
        torch.set_num_threads(threads)
    open_s, decode_s, vae_s = np.median(times[1:] or times, axis=0).tolist()
    return Measurement(len(times[1:] or times), name, open_s, decode_s, vae_s, text_s)


def _timed(clock: Callable[[], float], work: Callable, *arguments: Any) -> tuple[Any, float]:
    start = clock()
    return work(*arguments), clock() - start
