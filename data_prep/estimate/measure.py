"""What encoding costs, from a few clips: seconds for opening, decoding, the VAE and the text encoder, warm-up left out.

Runs in this process, or as a task on a GPU of the cluster where only the cluster has any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from data_prep.ray_pipeline import vae_batch_size
from data_prep.reasons import ClipError
from data_prep.sources import SourceRow, data_root
from data_prep.stages import local_copy
from data_prep.video.decode_process import Decoder
from data_prep.workers import allocate_cpus, available_cpus
from sora_train.codec.files import TextFiles
from sora_train.data.config import DataConfig
from sora_train.log import log
from sora_train.recipe import Recipe
from sora_train.storage import resolve

T = TypeVar("T")
Clock = Callable[[], float]
CLIPS, SECONDS, CAPTIONS = 8, 20.0, 32  # most that is measured
WAIT_S = 180  # for a GPU of the cluster, loading of the networks included


@dataclass(frozen=True)
class Measured:
    """Over `clips` clips. `device` is `cpu` or the name of a GPU; `threads` are those of the networks there."""

    clips: int
    device: str
    threads: int
    open_s: float
    """Seconds a source, scene detection included, on one core."""
    decode_s: float
    """Seconds a clip, on one core."""
    vae_s: float
    vae_pixels: float
    """Frames x height x width of the measured clips: the VAE's time grows with them."""
    text_s: float
    """Seconds a caption."""
    load_s: float = 0.0
    """Seconds until both networks are loaded in one process, imports included."""


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, evenly spread, the first among them."""
    return [items[i * len(items) // most] for i in range(most)] if len(items) > most else list(items)


def timed(work: Callable[..., T], *arguments: Any, clock: Clock = time.monotonic) -> tuple[T, float]:
    """What the work gives, and the seconds that it took."""
    start = clock()
    return work(*arguments), clock() - start


def measure(recipe: Recipe, rows: list[SourceRow], captions: list[str], seconds: float = SECONDS) -> Measured | None:
    """Decodes and encodes a clip of each row until the time is over; None where not one of them can be.

    Raises UserError where the networks can't be loaded.
    """
    import torch

    from sora_train.codec.text import text_encoder_of
    from sora_train.codec.vae import vae_of

    before = torch.get_num_threads()
    device, at_once = "cpu", 1
    clock: Clock = time.monotonic
    if torch.cuda.is_available():
        device, at_once = "cuda", vae_batch_size(recipe, gpus=1)
    else:
        threads = allocate_cpus(available_cpus(), 0, recipe.prep).vae.threads
        torch.set_num_threads(threads)

        def clock() -> float:  # what the threads did, not what they waited for on a busy machine
            return time.process_time() / threads

    decoder = Decoder(recipe.data, recipe.selection)
    try:
        vae, vae_load_s = timed(vae_of, recipe.codec, device)

        def encode(frames: np.ndarray) -> None:
            vae.encode(torch.from_numpy(np.repeat(frames[None], at_once, axis=0)))

        clips = measure_clips(recipe.data, rows, decoder, encode, seconds, clock)
        if not clips:
            return None
        text, text_load_s = timed(text_encoder_of, recipe.codec, device, recipe.prep.text_batch)
        text_s = measure_text(text.encode, captions, seconds / 2, clock)
        name, used = torch.cuda.get_device_name() if device == "cuda" else "cpu", torch.get_num_threads()
    finally:
        decoder.close()
        torch.set_num_threads(before)
    each = np.array(clips)
    open_s, decode_s, _, pixels = each.mean(0).tolist()
    vae_s = pixels * float(np.median(each[:, 2] / each[:, 3])) / at_once  # of a busy machine the median says more
    return Measured(len(clips), name, used, open_s, decode_s, vae_s, pixels, text_s, vae_load_s + text_load_s)


def measure_on_cluster(recipe: Recipe, rows: list[SourceRow], captions: list[str]) -> Measured | None:
    """The same, with a GPU of the cluster that this process is connected to where it has none itself.

    None also where no GPU becomes free.
    """
    import ray
    import torch
    from ray.exceptions import GetTimeoutError

    if torch.cuda.is_available() or not ray.is_initialized() or not ray.cluster_resources().get("GPU"):
        return measure(recipe, rows, captions)
    task = ray.remote(num_gpus=1, num_cpus=1, max_retries=0)(measure).remote(recipe, rows, captions)
    try:
        return ray.get(task, timeout=WAIT_S)
    except GetTimeoutError:
        ray.cancel(task, force=True)
        return None


def measure_clips(
    data: DataConfig,
    rows: list[SourceRow],
    decoder: Decoder,
    encode: Callable[[np.ndarray], Any],
    seconds: float,
    clock: Clock = time.monotonic,
) -> list[tuple[float, float, float, float]]:
    """Seconds to open, to decode and to encode, and pixels, of a clip of each row; a row that fails is skipped."""
    clips: list[tuple[float, float, float, float]] = []
    system, _ = resolve(data_root(data))
    began = time.monotonic()
    with suppress(ClipError), local_copy(system, rows[-1].path) as path:
        decoder.plan_clips(path, headers_only=True)  # starts the child
    for row in rows:
        if clips and time.monotonic() - began > seconds:
            break
        try:
            with local_copy(system, row.path) as path:
                cut, open_s = timed(decoder.plan_clips, path)
                clip, decode_s = timed(decoder.read, path, cut.spans[len(cut.spans) // 2], row.row_id)
            _, vae_s = timed(encode, clip.frames, clock=clock)
            if not clips and vae_s < seconds / 2:  # else there is no time for more than a warm-up
                _, vae_s = timed(encode, clip.frames, clock=clock)
        except (ClipError, RuntimeError) as error:
            why = error.message if isinstance(error, ClipError) else error
            log.info(f"plan: {row.source} is left out of the measurement: {why}")
            continue
        clips.append((open_s, decode_s, vae_s, clip.frames.size / 3))
    return clips


def has_cluster(address: str) -> bool:
    """Whether `cluster.address` means a cluster that is running already."""
    import ray

    from sora_train.ray_cluster.connection import running_cluster

    return ray.is_initialized() or (address == "auto" and bool(running_cluster())) or address not in ("auto", "local")


def measure_text(encode: Callable[[list[str]], Any], captions: list[str], seconds: float, clock: Clock) -> float:
    """Seconds a caption, in one batch of all of them where there is time for that."""
    _, one = timed(encode, captions[:1])
    if one > seconds / 2:
        return one
    _, one = timed(encode, captions[:1])
    batch = captions[: max(1, int(seconds / max(one, 1e-6)))]
    return timed(encode, batch, clock=clock)[1] / len(batch)


def tokens_of(text: TextFiles, max_tokens: int, cleaning: str = "none") -> Callable[[list[str]], list[int]]:
    """Counts the tokens of captions as the text encoder keeps them."""

    def count(captions: list[str]) -> list[int]:
        from sora_train.codec.conventions import clean
        from sora_train.codec.text import load_tokenizer

        if not captions:
            return []
        captions = [clean(caption, cleaning) for caption in captions]
        ids = load_tokenizer(text.tokenizer)(captions, truncation=True, max_length=max_tokens)["input_ids"]
        return [len(tokens) for tokens in ids]  # pyright: ignore[reportArgumentType]

    return count
