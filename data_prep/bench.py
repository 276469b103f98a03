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
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier

import numpy as np

from data_prep.buckets import buckets_of
from data_prep.clips import cut_source, read_clip
from data_prep.encode import local_copy
from data_prep.harvest import Harvest
from data_prep.outcome import Outcome
from data_prep.pipeline import chain, clips_at_once, encoding_hash, find_codec, settings_hash
from data_prep.reasons import ClipError
from data_prep.source import Row, data_root, read_rows, row_id
from data_prep.stock import Stock
from data_prep.workers import cores, share_out
from sora_train.errors import UserError
from sora_train.places import resolve
from sora_train.recipe import Recipe

WARM_UP_S = 3.0


@dataclass(frozen=True)
class Layout:
    """Processes of the bare loop, and the threads of each."""

    processes: int
    threads: int

    def __str__(self) -> str:
        return f"{self.processes} x {self.threads} threads"


def bench_prep(recipe: Recipe, clips: int = 64, rounds: int = 2, seconds: float = 30.0) -> dict:
    """Runs both in turn and returns clips/s of each round, the medians, and their ratio.

    Raises UserError where the recipe has no clip to measure with.
    """
    available = cores()
    layouts = [Layout(1, available), *([Layout(available, 1)] if available > 1 else [])]
    sources, frames = sample(recipe, clips)
    batch = clips_at_once(recipe, gpus=0)
    found: dict[str, list[float]] = {str(layout): [] for layout in layouts} | {"pipeline": []}
    for turn in range(rounds):
        for layout in layouts:
            found[str(layout)].append(bare(recipe, frames, batch, layout, seconds))
            print(f"bench: round {turn + 1}: bare VAE, {layout}: {found[str(layout)][-1]:.3f} clips/s", flush=True)
        found["pipeline"].append(pipeline(recipe, sources))
        print(f"bench: round {turn + 1}: pipeline: {found['pipeline'][-1]:.3f} clips/s", flush=True)
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    best = max((name for name in medians if name != "pipeline"), key=medians.__getitem__)
    return {
        "clips": len(sources),
        "batch": batch,
        "precision": recipe.codec.precision,
        "cores": available,
        "rounds": found,
        "medians": medians,
        "best_bare": best,
        "ratio": medians["pipeline"] / medians[best],
    }


def sample(recipe: Recipe, clips: int) -> tuple[list[Row], np.ndarray]:
    """Sources that give a clip, repeated until there are as many as wanted, and frames of some of them.

    Frames are uint8 `[clips, F, H, W, 3]` of the first bucket.
    """
    system, _ = resolve(data_root(recipe.data))
    good: list[Row] = []
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


def _copy(row: Row, number: int) -> Row:
    """The same source under another id, so that every copy is decoded and encoded."""
    captions = (f"{row.captions[0]} ({number})", *row.captions[1:])
    return Row(row_id(row.source, captions), row.source, captions, row.path, row.size, row.version)


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
    recipe: Recipe, frames: np.ndarray, batch: int, threads: int, seconds: float, barrier: Barrier, results: mp.Queue
) -> None:
    """One process of the bare loop: puts its clips per second into `results`."""
    import torch

    from data_prep.encode import EncodeVideo

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


def pipeline(recipe: Recipe, sources: list[Row]) -> float:
    """Clips per second of the whole road into a folder that is thrown away."""
    from sora_train.launch.cluster import connect

    vae, text = find_codec(recipe)
    key = encoding_hash(recipe, vae, text)
    with tempfile.TemporaryDirectory() as folder:
        there = recipe.model_copy(update={"data": recipe.data.model_copy(update={"output": folder})})
        stock = Stock(todo=[(row, []) for row in sources])
        outcome = Outcome(len(sources), 1.0, folder)
        harvest = Harvest(there, key, settings_hash(there, key), outcome, stock)
        marks: list[tuple[float, int]] = []
        with connect(recipe.cluster.address, log_to_driver=False):
            for table in chain(there, buckets_of(recipe.data), vae, stock.todo):
                harvest.bring_in(table)
                marks.append((time.monotonic(), outcome.written))
        harvest.close()
    # When each VAE has brought its first batch they all begin another: of what counts from here on nothing is done yet.
    begins = [mark for mark in marks if mark[1]][: share_out(cores(), 0, recipe.prep).vae.workers]
    (begin, before), (end, after) = begins[-1], marks[-1]
    return (after - before) / (end - begin)


def format_result(result: dict) -> str:
    """The same for people."""
    lines = [f"{'layout':24}{'clips/s':>10}{'rounds':>28}"]
    for name, rate in result["medians"].items():
        rounds = ", ".join(f"{value:.3f}" for value in result["rounds"][name])
        lines.append(f"{name:24}{rate:>10.3f}{rounds:>28}")
    lines.append(
        f"pipeline / best bare loop ({result['best_bare']}): {result['ratio']:.3f}; {result['clips']} clips, "
        f"batches of {result['batch']}, VAE in {result['precision']}, {result['cores']} cores"
    )
    return "\n".join(lines)
