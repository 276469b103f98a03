"""`sora bench prep`: clips per second of the pipeline compared with a loop that only runs the VAE.

The bare loop encodes noise from memory, in one process per core, with the pipeline's batch size. Start-up doesn't
count: the pipeline's clock starts when each of its VAE workers has delivered its first batch. `sora prep RECIPE --plan`
times the stages.
"""

from __future__ import annotations

import multiprocessing as mp
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing.synchronize import Barrier

from pydantic import PositiveFloat, PositiveInt

from data_prep.buckets import buckets_of
from data_prep.compare import NO_PROGRESS
from data_prep.pipeline import encoding_hash, find_codec, resolve_caption_cleaning, settings_hash
from data_prep.ray_pipeline import allocate_cpus, run_stages, vae_batch_size
from data_prep.resume import reconcile
from data_prep.sink import ShardSink
from data_prep.sources import SourceRow, SourceRows, read_rows, row_id
from data_prep.stages import EncodeVideo
from data_prep.stats import PrepStats
from data_prep.stored import NO_CLIPS
from sora_train.bench.core import BenchOptions, Row, Table, interleave, spread
from sora_train.errors import UserError
from sora_train.provenance import usable_cores
from sora_train.recipe import Recipe

WARM_UP_S = 3.0


class Options(BenchOptions):
    """The flags."""

    clips: PositiveInt = 64
    """Clips for the pipeline per turn; sources are repeated if there are fewer."""
    rounds: PositiveInt = 2
    """Turns of each."""
    seconds: PositiveFloat = 30.0
    """How long the bare loop runs per turn."""


def bench(options: Options, recipe: Recipe) -> list[Table]:
    """Clips per second of the bare loop and of the pipeline, in turns."""
    recipe = resolve_caption_cleaning(recipe)
    sources = sample(recipe, options.clips)
    calls = {"bare VAE": lambda: bare_rate(recipe, options.seconds), "pipeline": lambda: pipeline_rate(recipe, sources)}
    rates, errors = interleave(calls, options.rounds, warm_up=0)
    bare = statistics.median(rates["bare VAE"]) if "bare VAE" in rates else None
    rows: list[Row] = [
        {"what": name, "clips_per_s": spread(each), "of bare": statistics.median(each) / bare if bare else None}
        for name, each in rates.items()
    ]
    note = f"{len(sources)} clips, batches of {vae_batch_size(recipe, gpus=0)}, {usable_cores()} cores, "
    failed = [f"{name}: {error}" for name, error in errors.items()]
    return [Table("prep", rows, [f"{note}VAE in {recipe.codec.precision}"], failed)]


def bare_rate(recipe: Recipe, limit_s: float) -> float:
    """Clips per second of one process per core that only encodes noise."""
    spawn, count = mp.get_context("spawn"), usable_cores()
    barrier = spawn.Manager().Barrier(count)
    with ProcessPoolExecutor(count, spawn) as pool:
        return sum(pool.map(encode_noise, [recipe] * count, [limit_s] * count, [barrier] * count))


def encode_noise(recipe: Recipe, limit_s: float, barrier: Barrier) -> float:
    """Clips per second of this process over `limit_s` seconds, after a warm-up and when all processes are ready."""
    import torch

    vae, bucket, batch = EncodeVideo(recipe.codec, 1, "cpu").vae, buckets_of(recipe.data)[0], vae_batch_size(recipe, 0)
    clips = torch.randint(256, (batch, bucket.frames, bucket.height, bucket.width, 3), dtype=torch.uint8)

    def rate(limit_s: float) -> float:
        began, done = time.monotonic(), 0
        while time.monotonic() - began < limit_s:
            vae.encode(clips)
            done += batch
        return done / (time.monotonic() - began)

    rate(WARM_UP_S)
    barrier.wait(timeout=300)
    return rate(limit_s)


def pipeline_rate(recipe: Recipe, sources: list[SourceRow]) -> float:
    """Clips per second of the whole pipeline, into a temporary folder."""
    from sora_train.ray_cluster.connection import connect

    vae, text = find_codec(recipe)
    key = encoding_hash(recipe, vae, text)
    marks: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        there = recipe.model_copy(update={"data": recipe.data.model_copy(update={"output": folder})})
        stats = PrepStats(len(sources), 1.0, folder)
        state = reconcile(there.data, SourceRows.of(sources), NO_CLIPS, NO_PROGRESS, stats)
        sink = ShardSink(there, key, settings_hash(there, key), state)
        with connect(recipe.cluster.address):
            for block in run_stages(there, vae, [(row, []) for row in sources]):
                sink.consume(block.facts(), block.table)
                marks.append((time.monotonic(), stats.written))
            sink.flush()
    # when each VAE worker has delivered one batch, all of them have just begun the next
    workers = allocate_cpus(usable_cores(), 0, recipe.prep).vae.workers
    began = [mark for mark in marks if mark[1]][:workers][-1:]
    if not began:
        raise UserError(
            f"no source in {recipe.data.captions} gives a clip: check data.captions with sora prep --plan", code="media"
        )
    return (marks[-1][1] - began[0][1]) / (marks[-1][0] - began[0][0])


def sample(recipe: Recipe, clips: int) -> list[SourceRow]:
    """The recipe's first sources, repeated up to `clips`. Each copy has its own caption, so it is encoded again."""
    good = list(islice((row for row in read_rows(recipe.data) if not row.reason), clips))
    if not good:
        raise UserError(f"no source in {recipe.data.captions} can be read: check data.captions", code="media")

    def copy(row: SourceRow, number: int) -> SourceRow:
        captions = (f"{row.captions[0]} ({number})", *row.captions[1:])
        return SourceRow(row_id(row.source, captions), row.source, captions, row.path, row.size, row.version)

    return [copy(good[i % len(good)], i) for i in range(clips)]
