"""Estimates what a recipe's shards will hold and cost, from a sample of its sources and the clips encoded already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import fs

from data_prep.buckets import buckets_of
from data_prep.estimate.measure import CAPTIONS, CLIPS, Measurement, measure
from data_prep.estimate.probe import MAX_FILES, ProbeResult, pick_evenly, probe_files
from data_prep.pipeline import check_shapes, find_codec, resolve_caption_cleaning, resume_state, warn_of_model
from data_prep.reasons import BAD_SOURCE_REASONS
from data_prep.resume import ResumeState
from data_prep.sources import SourceRow, SourceRows, read_rows
from sora_train.codec import CodecConfig
from sora_train.codec.conventions import clean
from sora_train.codec.files import TextFiles, VaeFiles
from sora_train.data.shards import is_held_out
from sora_train.log import log
from sora_train.plan.activations import Sizes
from sora_train.plan.steps import configs_of
from sora_train.recipe import Recipe
from sora_train.schema import bucket_of, bucket_size, shard_files
from sora_train.storage import free_bytes, resolve, storage_errors

TOKENIZED = 500  # rows at most whose captions are counted in tokens
BYTES = 2  # of a float16
SourceClips = tuple[str, Counter[str], float]
"""The source of a row, its clips per bucket, and how many such rows it stands for."""


@dataclass(frozen=True)
class BucketEstimate:
    """One bucket: its clips, those encoded already among them; and per clip `seconds`, `tokens` and `clip_bytes`."""

    name: str
    clips: int
    encoded: int
    held_out: int
    seconds: float
    tokens: int
    clip_bytes: int
    steps: int
    """Steps per epoch, without the clips that are held out."""
    sizes: Sizes
    """Sizes of a clip with the longest caption."""


@dataclass(frozen=True)
class PrepEstimate:
    """The whole estimate. `probed` of the `files` still to process were opened; counts are scaled up from these."""

    rows: int
    sources: int
    files: int
    probed: int
    bad_sources: int
    """Sources that can't be read."""
    longest_s: float
    """Duration of the longest source that was opened."""
    buckets: tuple[BucketEstimate, ...]
    dropped: dict[str, tuple[int, str]]
    """Rows without a clip and an example, by reason, the most frequent first."""
    todo: int
    """Rows to open that give clips."""
    captions: int
    """Distinct captions to embed."""
    cut_share: float
    """Share of all captions with more tokens than codec.max_tokens."""
    text_bytes: int
    stored_bytes: int
    """Bytes of the existing shards."""
    free_bytes: int | None
    """Free bytes on the output's disk; None if it is remote."""
    measured: Measurement | None = None

    @property
    def clips(self) -> int:
        """Clips of all buckets."""
        return sum(bucket.clips for bucket in self.buckets)

    @property
    def encoded(self) -> int:
        """Clips that are in the shards and stay."""
        return sum(bucket.encoded for bucket in self.buckets)

    @property
    def latent_bytes(self) -> int:
        """Bytes of all clips' latents."""
        return sum(bucket.clips * bucket.clip_bytes for bucket in self.buckets)

    def hours(self, measured: Measurement) -> tuple[float, float, float]:
        """Hours left on one core for decoding, and on the measured device for the VAE and for the text encoder."""
        left = {bucket.name: bucket.clips - bucket.encoded for bucket in self.buckets}
        pixels = sum(count * prod(bucket_size(name)) for name, count in left.items())
        decode = self.todo * measured.open_s + sum(left.values()) * measured.decode_s
        return decode / 3600, pixels / 1e6 * measured.vae_s / 3600, self.captions * measured.text_s / 3600


def estimate_prep(recipe: Recipe) -> PrepEstimate:
    """Opens the headers of a sample of the sources to process, and decodes and encodes a few clips.

    Raises UserError as `prep` does if captions, networks or the shards in `data.output` are unusable.
    """
    recipe = resolve_caption_cleaning(recipe)
    vae, text = find_codec(recipe)
    check_shapes(recipe, vae)
    warn_of_model(recipe, vae, text)
    rows = read_rows(recipe.data)
    state = resume_state(recipe, rows, vae, text, quiet=True)
    files = first_of_files(rows, state.is_pending)
    probes = probe_files(some_rows(rows, files, MAX_FILES), recipe.data, recipe.selection)
    found = estimate(recipe, rows, state, probes, vae, text)
    good = [row for row in rows_of_files(rows, state.is_pending, probes) if probes[row.path].clips]
    if not good:
        return found
    log.info(f"plan: {len(probes)} files opened; now a few clips are encoded, to see how long they take")
    good.sort(key=lambda row: sorted(probes[row.path].clips))  # bucket by bucket
    captions = pick_evenly(sorted({caption for row in good for caption in row.captions}), CAPTIONS)
    return replace(found, measured=measure(recipe, pick_evenly(good, CLIPS), captions))


def first_of_files(rows: SourceRows, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Among the rows that a mask chooses, the number of the first one of each file."""
    hashes = [table["source_hash"].to_numpy() for _, table in rows.tables(["source_hash"])]
    chosen = np.flatnonzero(mask)
    _, first = np.unique(np.concatenate([np.empty(0, np.int64), *hashes])[chosen], return_index=True)
    return chosen[np.sort(first)]


def some_rows(rows: SourceRows, numbers: NDArray[np.int64], most: int) -> list[SourceRow]:
    """At most `most` of the rows with these numbers, evenly spaced."""
    mask = np.zeros(len(rows), bool)
    mask[pick_evenly(numbers.tolist(), most)] = True
    return [row for _, some in rows.select(mask) for row in some]


def rows_of_files(rows: SourceRows, mask: NDArray[np.bool_], paths: Iterable[str]) -> list[SourceRow]:
    """Among the rows that a mask chooses, those of some files."""
    wanted = pa.array(list(paths), pa.string())
    found = [pc.is_in(table["path"], value_set=wanted).to_numpy() for _, table in rows.tables(["path"])]
    return [row for _, some in rows.select(mask & np.concatenate([np.empty(0, bool), *found])) for row in some]


def count_tokens(rows: list[SourceRow], text: TextFiles, codec: CodecConfig) -> tuple[float, float]:
    """Mean number of tokens of all captions of a clip, as the text encoder gets them, and the share of captions that it
    cuts, from TOKENIZED rows at most."""
    from sora_train.codec.text import load_tokenizer

    some = pick_evenly(rows, TOKENIZED)
    captions = [clean(caption, codec.caption_cleaning) for row in some for caption in row.captions]
    if not captions:
        return 0.0, 0.0
    ids: Any = load_tokenizer(text.tokenizer)(captions, truncation=False, verbose=False)["input_ids"]
    lengths, most = [len(tokens) for tokens in ids], codec.max_tokens
    return sum(min(n, most) for n in lengths) / len(some), sum(n > most for n in lengths) / len(lengths)


def estimate(
    recipe: Recipe,
    rows: SourceRows,
    state: ResumeState,
    probes: dict[str, ProbeResult],
    vae: VaeFiles,
    text: TextFiles,
) -> PrepEstimate:
    """Counts the clips of finished sources, and scales the probed files up to all that are to process."""
    files = len(first_of_files(rows, state.is_pending))
    scale = files / max(1, len(probes))
    probed = rows_of_files(rows, state.is_pending, probes)
    good = [row for row in probed if probes[row.path].clips]
    clips = [(row.source, Counter(probes[row.path].clips), scale) for row in probed]
    buckets = estimate_buckets(recipe, state, clips, vae)
    per_clip, cut_share = count_tokens(
        good + some_rows(rows, np.flatnonzero(state.is_done), TOKENIZED), text, recipe.codec
    )
    stored_bytes, free = disk_space(recipe.data.output)
    bad = sum(probe.reason in BAD_SOURCE_REASONS for probe in probes.values())
    return PrepEstimate(
        rows=len(rows),
        sources=rows.sources,
        files=files,
        probed=len(probes),
        bad_sources=len(state.stats.bad_sources) + round(scale * bad),
        longest_s=max((probe.seconds for probe in probes.values()), default=0.0),
        buckets=buckets,
        dropped=count_dropped(state, probed, probes, scale),
        todo=round(scale * len(good)),
        captions=round(scale * len({caption for row in good for caption in row.captions})),
        cut_share=cut_share,
        text_bytes=round(BYTES * text.width * per_clip * sum(bucket.clips for bucket in buckets)),
        stored_bytes=stored_bytes,
        free_bytes=free,
    )


def estimate_buckets(
    recipe: Recipe, state: ResumeState, clips: list[SourceClips], vae: VaeFiles
) -> tuple[BucketEstimate, ...]:
    """Clips of each bucket, and what one of them takes. `clips` are those to make of the probed rows."""
    fraction = recipe.data.holdout_fraction
    encoded, finished, held = Counter[str](), Counter[str](), Counter[str]()
    for table in state.kept_sources():
        for row in table.group_by(["source", "shard", "is_finished"]).aggregate([([], "count_all")]).to_pylist():
            bucket, count = bucket_of(row["shard"]), row["count_all"]
            encoded[bucket] += count
            finished[bucket] += count * row["is_finished"]
            held[bucket] += count * row["is_finished"] * is_held_out(row["source"], fraction)
    longest, timed = recipe.codec.max_tokens, recipe.conditioning.frame_times
    shapes = {it.name: vae.latent_shape(it.frames, it.height, it.width) for it in buckets_of(recipe.data)}
    sizes = {
        name: Sizes(1, f, h, w, longest, timed, recipe.cluster.sequence_parallel)
        for name, (f, _, h, w) in shapes.items()
    }
    trains = configs_of(recipe, sizes, recipe.cluster.most)
    buckets: list[BucketEstimate] = []
    for bucket in buckets_of(recipe.data):
        f, c, h, w = shapes[bucket.name]
        counts = [(source, weight * found[bucket.name]) for source, found, weight in clips]
        held_out = held[bucket.name] + round(sum(n for source, n in counts if is_held_out(source, fraction)))
        count = max(finished[bucket.name] + round(sum(n for _, n in counts)), encoded[bucket.name])
        size, tokens = BYTES * vae.moments * f * c * h * w, sizes[bucket.name].tokens(recipe.model)
        steps = -(-(count - held_out) // trains[bucket.name].batch_size)
        row = count, encoded[bucket.name], held_out, bucket.seconds, tokens, size, steps, sizes[bucket.name]
        buckets.append(BucketEstimate(bucket.name, *row))
    return tuple(buckets)


def count_dropped(
    state: ResumeState, probed: list[SourceRow], probes: dict[str, ProbeResult], scale: float
) -> dict[str, tuple[int, str]]:
    """Counts rows without a clip by reason, each with an example: known failures, and opened files times `scale`."""
    counts, examples = Counter[str](state.stats.reasons), dict(state.stats.examples)
    found = [(row, probes[row.path]) for row in probed if probes[row.path].reason]
    for reason, rows in Counter(probe.reason for _, probe in found).items():
        counts[reason] += round(scale * rows)
    for row, probe in found:
        examples.setdefault(probe.reason, f"{row.source}: {probe.message}")
    return {reason: (count, examples[reason]) for reason, count in counts.most_common()}


def disk_space(output: str) -> tuple[int, int | None]:
    """Bytes of shards that exist in the output, and free bytes of its disk, None if it is remote."""
    system, path = resolve(output)
    with storage_errors(output, "read", system):
        stored = sum(info.size or 0 for info in system.get_file_info(shard_files(output)))
    return stored, free_bytes(path) if isinstance(system, fs.LocalFileSystem) else None
