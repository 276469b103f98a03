"""`sora bench prep`: clips per second of the pipeline compared with a loop that only runs the VAE.

The bare loop has decoded frames in memory and the same batch size and cores. Start-up doesn't count: the pipeline's
clock starts when each of its VAE workers has delivered its first batch. `sora prep RECIPE --plan` times the stages.
"""

from __future__ import annotations

import multiprocessing as mp
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np

from data_prep.buckets import buckets_of
from data_prep.pipeline import encoding_hash, find_codec, resolve_caption_cleaning, settings_hash
from data_prep.ray_pipeline import allocate_cpus, run_stages, vae_batch_size
from data_prep.reasons import ClipError
from data_prep.resume import ResumeState
from data_prep.sink import ShardSink
from data_prep.sources import SourceRow, data_root, read_rows, row_id
from data_prep.stages import EncodeVideo, local_copy
from data_prep.stats import PrepStats
from data_prep.video.clips import plan_clips, read_clip
from sora_train.bench.core import Flags, Row, Table, finish, interleave, log, spread
from sora_train.bench.runs import recipe_in
from sora_train.errors import UserError
from sora_train.provenance import usable_cores
from sora_train.recipe import Recipe
from sora_train.storage import resolve

WARM_UP_S = 3.0


def rates_table(options: Namespace, recipe: Recipe, sources: list[SourceRow], frames: np.ndarray) -> Table:
    """Clips per second of the bare loop, as one process or one per core, and of the pipeline."""
    count, batch = usable_cores(), vae_batch_size(recipe, gpus=0)

    def bare(processes: int) -> Callable[[], float]:
        return lambda: bare_rate(recipe, frames, batch, processes, count // processes, options.seconds)

    calls = {f"bare VAE, {n} x {count // n} threads": bare(n) for n in sorted({1, count})}
    rates, errors = interleave({**calls, "pipeline": lambda: pipeline_rate(recipe, sources)}, options.rounds, warm_up=0)
    best = max((statistics.median(rates[name]) for name in calls if name in rates), default=None)
    rows: list[Row] = [
        {
            "what": name,
            "clips_per_s": spread(each),
            "of the best bare": statistics.median(each) / best if best else None,
        }
        for name, each in rates.items()
    ]
    note = f"{len(sources)} clips, batches of {batch}, VAE in {recipe.codec.precision}, {count} cores"
    failed = [f"{name}: {error}" for name, error in errors.items()]
    return Table("prep: pipeline beside a bare VAE loop", rows, [note], failed)


def bare_rate(
    recipe: Recipe, frames: np.ndarray, batch: int, processes: int, threads: int, limit_s: float
) -> float:  # fmt: skip
    """Clips per second of processes that only encode frames from memory."""
    spawn = mp.get_context("spawn")
    arguments = (recipe, frames[np.arange(batch) % len(frames)], threads, spawn.Barrier(processes))
    with ProcessPoolExecutor(processes, spawn, load_vae, arguments) as pool:
        return sum(pool.map(encode_for, [limit_s] * processes))


_loaded: dict[str, Any] = {}


def load_vae(recipe: Recipe, clips: np.ndarray, threads: int, barrier: Barrier) -> None:
    """Prepares a process of the bare loop, and waits for the others."""
    import torch

    _loaded.update(vae=EncodeVideo(recipe.codec, threads, "cpu").vae, clips=torch.from_numpy(clips))
    encode_for(WARM_UP_S)
    barrier.wait(timeout=300)


def encode_for(limit_s: float) -> float:
    """Clips per second of this process, over so many seconds."""
    began, done = time.monotonic(), 0
    while time.monotonic() - began < limit_s:
        _loaded["vae"].encode(_loaded["clips"])
        done += len(_loaded["clips"])
    return done / (time.monotonic() - began)


def pipeline_rate(recipe: Recipe, sources: list[SourceRow]) -> float:
    """Clips per second of the whole pipeline, into a temporary folder."""
    from sora_train.ray_cluster.connection import connect

    vae, text = find_codec(recipe)
    key = encoding_hash(recipe, vae, text)
    marks: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        there = recipe.model_copy(update={"data": recipe.data.model_copy(update={"output": folder})})
        stats = PrepStats(len(sources), 1.0, folder)
        state = ResumeState(stats, todo=[(row, []) for row in sources])
        sink = ShardSink(there, key, settings_hash(there, key), state)
        with connect(recipe.cluster.address, log_to_driver=False):
            for table in run_stages(there, vae, state.todo):
                sink.consume(table)
                marks.append((time.monotonic(), stats.written))
        sink.close()
    # when each VAE worker has delivered one batch, all of them have just begun the next
    workers = allocate_cpus(usable_cores(), 0, recipe.prep).vae.workers
    first = [mark for mark in marks if mark[1]][:workers][-1]
    return (marks[-1][1] - first[1]) / (marks[-1][0] - first[0])


def decode(recipe: Recipe, row: SourceRow) -> Any:
    """The first clip of a source. ClipError if it has none."""
    system, _ = resolve(data_root(recipe.data))
    with local_copy(system, row.path) as path:
        cut = plan_clips(path, recipe.data, recipe.selection)
        return read_clip(path, cut.spans[0], recipe.data, recipe.selection, row.row_id)


def sample(recipe: Recipe, clips: int) -> tuple[list[SourceRow], np.ndarray]:
    """Sources that give a clip, repeated to `clips`, and frames `[n, F, H, W, 3]` of the first bucket."""
    good: list[SourceRow] = []
    frames: list[np.ndarray] = []
    bucket = buckets_of(recipe.data)[0]
    for row in read_rows(recipe.data):
        if row.reason or len(good) == clips:
            continue
        try:
            clip = decode(recipe, row)
        except ClipError:
            continue
        good.append(row)
        if clip.frames.shape[:3] == (bucket.frames, bucket.height, bucket.width) and len(frames) < 8:
            frames.append(clip.frames)
    if not frames:
        raise UserError(f"no source in {recipe.data.captions} gives a clip of {bucket.name}: check data.captions")

    def copy(row: SourceRow, number: int) -> SourceRow:
        captions = (f"{row.captions[0]} ({number})", *row.captions[1:])  # another id, so that each is encoded
        return SourceRow(row_id(row.source, captions), row.source, captions, row.path, row.size, row.version)

    return [copy(good[i % len(good)], i) for i in range(clips)], np.stack(frames)


def main(words: Sequence[str], prog: str = "sora bench prep") -> int:
    """The command; returns the exit status."""
    flags = Flags(f"{prog} RECIPE", " ".join((__doc__ or "").split()))
    flags.flag("clips", 64, "clips for the pipeline per turn; sources are repeated if there are fewer")
    flags.flag("rounds", 2, "turns of each")
    flags.flag("seconds", 30.0, "how long the bare loop runs per turn")
    options, rest = flags.parse_with_rest(words)
    recipe = resolve_caption_cleaning(recipe_in(rest, "prep"))
    sources, frames = sample(recipe, options.clips)
    log(f"{len(sources)} clips")
    return finish([rates_table(options, recipe, sources, frames)], ["prep", *words], options.out)
