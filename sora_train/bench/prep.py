"""`sora bench prep`: clips per second of the whole pipeline beside those of a bare loop that only runs the VAE.

The bare loop has its frames decoded in memory, the same batch size and the same cores, and may choose its own layout of
processes and threads; the pipeline opens, decodes, encodes, embeds and writes. Start-up is left out of both: processes
of the loop begin together after a warm-up, and the pipeline's clock starts when each of its VAEs has brought a batch,
which don't count. Both run in turn, A B A B.
"""

from __future__ import annotations

import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

import numpy as np
import pyarrow as pa

from data_prep.buckets import buckets_of
from data_prep.pipeline import encoding_hash, find_codec, resolve_caption_cleaning, settings_hash
from data_prep.ray_pipeline import run_stages, vae_batch_size
from data_prep.reasons import ClipError
from data_prep.resume import ResumeState
from data_prep.shards import ShardWriter
from data_prep.sink import ShardSink
from data_prep.sources import SourceRow, data_root, read_rows, row_id
from data_prep.stages import local_copy
from data_prep.stats import PrepStats
from data_prep.video.clips import cut_source, read_clip
from data_prep.workers import allocate_cpus, available_cpus
from sora_train.bench.core import Row as Figures
from sora_train.bench.core import Table, say, seconds, spread
from sora_train.bench.options import Common, parse
from sora_train.bench.output import finish
from sora_train.bench.recipes import recipe_in
from sora_train.errors import RecipeError, UserError
from sora_train.recipe import Recipe
from sora_train.schema import SHARD_SCHEMA, encode_row
from sora_train.storage import resolve

WARM_UP_S = 3.0


@dataclass(frozen=True)
class Layout:
    """Processes of the bare loop, and the threads of each."""

    processes: int
    threads: int

    def __str__(self) -> str:
        return f"{self.processes} x {self.threads} threads"


@dataclass(frozen=True)
class Options(Common):
    """How much of it."""

    clips: int = 64
    """Clips that go through the pipeline in a turn; sources are taken again where there are fewer."""
    rounds: int = 2
    """Turns of each."""
    seconds: float = 30.0
    """How long the bare loop runs in a turn."""


def bench(options: Options, recipe: Recipe) -> list[Table]:
    """Both in turn, and the stages one by one. Raises UserError where the recipe has no clip to measure with."""
    if not options.rounds or not options.clips or not options.seconds > 0:
        raise RecipeError("--clips, --rounds and --seconds take more than 0")
    sources, frames = sample(recipe, options.clips)
    return [beside_bare(options, recipe, sources, frames), by_stage(recipe, sources[:16])]


def beside_bare(options: Options, recipe: Recipe, sources: list[SourceRow], frames: np.ndarray) -> Table:
    """Clips per second of the bare loop's layouts and of the pipeline."""
    available = available_cpus()
    layouts = [Layout(1, available), *([Layout(available, 1)] if available > 1 else [])]
    batch = vae_batch_size(recipe, gpus=0)
    found: dict[str, list[float]] = {f"bare VAE, {layout}": [] for layout in layouts} | {"pipeline": []}
    for turn in range(options.rounds):
        for layout in layouts:
            rate = bare(recipe, frames, batch, layout, options.seconds)
            found[f"bare VAE, {layout}"].append(rate)
            say(f"turn {turn + 1}: bare VAE, {layout}: {rate:.3f} clips/s")
        found["pipeline"].append(pipeline(recipe, sources))
        say(f"turn {turn + 1}: pipeline: {found['pipeline'][-1]:.3f} clips/s")
    best = max((name for name in found if name != "pipeline"), key=lambda name: statistics.median(found[name]))
    rows: list[Figures] = [
        {
            "what": name,
            "clips_per_s": spread(rates),
            "of the best bare": statistics.median(rates) / statistics.median(found[best]),
        }
        for name, rates in found.items()
    ]
    notes = [f"{len(sources)} clips, batches of {batch}, VAE in {recipe.codec.precision}, {available} cores"]
    return Table("prep: pipeline beside a bare VAE loop", rows, notes)


def by_stage(recipe: Recipe, sources: list[SourceRow]) -> Table:
    """Seconds that each stage takes of a clip, by itself in this process, with all cores."""
    from data_prep.stages import EncodeVideo
    from sora_train.codec.text import text_encoder_of

    system, _ = resolve(data_root(recipe.data))
    vae = EncodeVideo(recipe.codec, available_cpus(), "cpu")
    text = text_encoder_of(recipe.codec, "cpu", 1)
    took: dict[str, list[float]] = {"decode, cut and fit": [], "VAE": [], "text": [], "write": []}

    def timed(stage: str, act: Callable[[], object]) -> None:
        took[stage].append(seconds(act))

    clips, made, rows = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(folder, buckets_of(recipe.data)[0].name, "bench")

        def decode(row: SourceRow) -> None:
            with local_copy(system, row.path) as path:
                cut = cut_source(path, recipe.data, recipe.selection)
                clips.append(read_clip(path, cut.spans[0], recipe.data, recipe.selection, row.row_id))

        def write(row: SourceRow) -> None:
            rows.append(
                encode_row(
                    sample_id=row.row_id, source=row.source, source_size=row.size, source_version=row.version,
                    content_hash="", start_s=0.0, end_s=1.0, captions=list(row.captions), latents=made[-2][0],
                    text=[one.numpy() for one in made[-1]],
                )
            )  # fmt: skip
            writer.add(pa.Table.from_pylist(rows[-1:], SHARD_SCHEMA))

        for row in sources:
            timed("decode, cut and fit", lambda: decode(row))  # noqa: B023
            timed("VAE", lambda: made.append(vae.encode([clips[-1].frames])))
            timed("text", lambda: made.append(text.encode(list(row.captions))))  # noqa: B023
            timed("write", lambda: write(row))  # noqa: B023
        closing = seconds(writer.close) / len(sources)
    whole = {name: statistics.fmean(values[1:] or values) for name, values in took.items()}
    whole["write"] += closing
    found: list[Figures] = [
        {"stage": name, "seconds_a_clip": spread(took[name][1:] or took[name]), "share": part / sum(whole.values())}
        for name, part in whole.items()
    ]
    return Table("prep: stages", found, ["one clip at a time, the first left out; the share counts writing through"])


def sample(recipe: Recipe, clips: int) -> tuple[list[SourceRow], np.ndarray]:
    """Sources that give a clip, repeated until there are as many as wanted, and frames of some of them.

    Frames are uint8 `[clips, F, H, W, 3]` of the first bucket.
    """
    system, _ = resolve(data_root(recipe.data))
    good: list[SourceRow] = []
    frames: list[np.ndarray] = []
    first = buckets_of(recipe.data)[0]
    for row in read_rows(recipe.data):
        if row.reason or len(good) == clips:
            continue
        try:
            with local_copy(system, row.path) as path:
                cut = cut_source(path, recipe.data, recipe.selection)
                clip = read_clip(path, cut.spans[0], recipe.data, recipe.selection, row.row_id)
        except ClipError:
            continue
        good.append(row)
        if cut.spans[0].bucket == first and len(frames) < 8:
            frames.append(clip.frames)
    if not frames:
        raise UserError(f"no source of {recipe.data.captions} gives a clip of {first.name} to measure with")
    return [_copy(good[i % len(good)], i) for i in range(clips)], np.stack(frames)


def _copy(row: SourceRow, number: int) -> SourceRow:
    """The same source under another id, so that every copy is decoded and encoded."""
    captions = (f"{row.captions[0]} ({number})", *row.captions[1:])
    return SourceRow(row_id(row.source, captions), row.source, captions, row.path, row.size, row.version)


def bare(recipe: Recipe, frames: np.ndarray, batch: int, layout: Layout, seconds: float) -> float:
    """Clips per second of processes that do nothing but encode frames in memory."""
    spawn = mp.get_context("spawn")
    barrier, results = spawn.Barrier(layout.processes), spawn.Queue()
    arguments = (recipe, frames, batch, layout.threads, seconds, barrier, results)
    processes = [spawn.Process(target=loop, args=arguments) for _ in range(layout.processes)]
    for process in processes:
        process.start()
    rates = [results.get(timeout=600 + 4 * seconds) for _ in processes]
    for process in processes:
        process.join()
    return sum(rates)


def loop(
    recipe: Recipe, frames: np.ndarray, batch: int, threads: int, seconds: float, barrier: Barrier, results: Queue
) -> None:
    """One process of the bare loop: puts its clips per second into `results`."""
    import torch

    from data_prep.stages import EncodeVideo

    vae = EncodeVideo(recipe.codec, threads, "cpu").vae
    clips = torch.from_numpy(frames[np.arange(batch) % len(frames)])

    def run(limit: float) -> float:
        started, done = time.monotonic(), 0
        while time.monotonic() - started < limit:
            vae.encode(clips)
            done += batch
        return done / (time.monotonic() - started)

    run(WARM_UP_S)
    barrier.wait(timeout=300)
    results.put(run(seconds))


def pipeline(recipe: Recipe, sources: list[SourceRow]) -> float:
    """Clips per second of the whole road into a folder that is thrown away."""
    from sora_train.ray_cluster.connection import connect

    vae, text = find_codec(recipe)
    key = encoding_hash(recipe, vae, text)
    with tempfile.TemporaryDirectory() as folder:
        there = recipe.model_copy(update={"data": recipe.data.model_copy(update={"output": folder})})
        state = ResumeState(todo=[(row, []) for row in sources])
        stats = PrepStats(len(sources), 1.0, folder)
        sink = ShardSink(there, key, settings_hash(there, key), stats, state)
        marks: list[tuple[float, int]] = []
        with connect(recipe.cluster.address, log_to_driver=False):
            for table in run_stages(there, buckets_of(recipe.data), vae, state.todo):
                sink.consume(table)
                marks.append((time.monotonic(), stats.written))
        sink.close()
    # When each VAE has brought its first batch they all begin another: of what counts from here on nothing is done yet.
    begins = [mark for mark in marks if mark[1]][: allocate_cpus(available_cpus(), 0, recipe.prep).vae.workers]
    (begin, before), (end, after) = begins[-1], marks[-1]
    return (after - before) / (end - begin)


def main(words: Sequence[str], prog: str = "sora bench prep") -> int:
    """The command; returns the exit status."""
    options, rest = parse(Options, words, f"{prog} RECIPE", __doc__ or "")
    return finish(bench(options, resolve_caption_cleaning(recipe_in(rest, "prep"))), options, ["prep", *words])
