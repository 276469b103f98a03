"""Estimates what a recipe's shards will hold and cost, from the headers of a sample of its sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from pyarrow import fs

from data_prep.buckets import buckets_of
from data_prep.estimate.measure import Measurement
from data_prep.estimate.probe import ProbeResult, pick_evenly
from data_prep.reasons import BAD_SOURCE_REASONS
from data_prep.sources import SourceRow
from sora_train.codec.files import VaeFiles
from sora_train.data.shards import is_held_out
from sora_train.recipe import Recipe
from sora_train.schema import bucket_size, shard_files
from sora_train.storage import free_bytes, resolve, storage_errors

TOKENIZED = 2000  # captions at most
BYTES = 2  # of a float16


@dataclass(frozen=True)
class BucketEstimate:
    """One bucket. `tokens` and `clip_bytes` are per clip; `steps` per epoch, without the clips that are held out."""

    name: str
    clips: int
    held_out: int
    seconds: float
    tokens: int
    clip_bytes: int
    steps: int


@dataclass(frozen=True)
class Dropped:
    """Rows that give no clip for one reason, and one of them as an example."""

    reason: str
    rows: int
    example: str


@dataclass(frozen=True)
class PrepEstimate:
    """The whole estimate. `probed` of `files` were opened; counts of clips are scaled up from these."""

    rows: int
    sources: int
    files: int
    probed: int
    undecodable: int
    """Sources that can't be read."""
    video_s: float
    """Length of all videos that give clips."""
    longest_s: float
    largest: tuple[int, int]
    """Width and height of the largest source."""
    images: int
    buckets: tuple[BucketEstimate, ...]
    dropped: tuple[Dropped, ...]
    captions: int
    """Distinct ones: each is embedded once."""
    latent_bytes: int
    text_bytes: int
    stored_bytes: int
    """Of shards that exist already."""
    free_bytes: int | None
    """On the output's disk; None if it is remote."""
    measured: Measurement | None = None

    @property
    def clips(self) -> int:
        """In all buckets."""
        return sum(bucket.clips for bucket in self.buckets)

    @property
    def steps(self) -> int:
        """Per epoch."""
        return sum(bucket.steps for bucket in self.buckets)

    def hours(self, measured: Measurement) -> tuple[float, float, float]:
        """Hours of one core for decoding, and of the measured device for the VAE and for the text encoder."""
        opened = self.rows - sum(drop.rows for drop in self.dropped)
        pixels = sum(bucket.clips * prod(bucket_size(bucket.name)) for bucket in self.buckets)
        decode = opened * measured.open_s + self.clips * measured.decode_s
        return decode / 3600, pixels / 1e6 * measured.vae_s / 3600, self.captions * measured.text_s / 3600


def usable_rows(rows: list[SourceRow], probes: dict[str, ProbeResult]) -> list[SourceRow]:
    """Probed rows that give clips."""
    return [row for row in rows if not row.reason and row.path in probes and not probes[row.path].reason]


def estimate(
    recipe: Recipe,
    rows: list[SourceRow],
    probes: dict[str, ProbeResult],
    vae: VaeFiles,
    text_width: int,
    count_tokens: Callable[[list[str]], list[int]],
) -> PrepEstimate:
    """Scales the probed files up to all of them. Seconds are measured elsewhere."""
    data, good = recipe.data, usable_rows(rows, probes)
    files = {row.path for row in rows if not row.reason}
    scale = len(files) / max(1, len(probes))
    dropped = count_dropped(rows, probes, scale)
    buckets = estimate_buckets(recipe, good, probes, vae, scale)
    weights = [(caption, sum(probes[row.path].clips.values())) for row in good for caption in row.captions]
    some = pick_evenly(weights, TOKENIZED)
    tokens = sum(n * copies for n, (_, copies) in zip(count_tokens([c for c, _ in some]), some, strict=True))
    share = scale * sum(copies for _, copies in weights) / max(1, sum(copies for _, copies in some))
    found = [probes[path] for path in {row.path for row in good}]
    videos = [probe for probe in found if not probe.is_image]
    largest = max(found, key=lambda probe: probe.width * probe.height, default=ProbeResult())
    stored, free = disk_space(data.output)
    bad = {row.source for row in rows if row.reason in BAD_SOURCE_REASONS}
    return PrepEstimate(
        rows=len(rows),
        sources=len({row.source for row in rows}),
        files=len(files),
        probed=len(probes),
        undecodable=len(bad) + round(scale * sum(probe.reason in BAD_SOURCE_REASONS for probe in probes.values())),
        video_s=scale * sum(probe.seconds for probe in videos),
        longest_s=max((probe.seconds for probe in videos), default=0.0),
        largest=(largest.width, largest.height),
        images=round(scale * (len(found) - len(videos))),
        buckets=buckets,
        dropped=dropped,
        captions=round(scale * len({caption for caption, _ in weights})),
        latent_bytes=sum(bucket.clips * bucket.clip_bytes for bucket in buckets),
        text_bytes=round(BYTES * text_width * tokens * share),
        stored_bytes=stored,
        free_bytes=free,
    )


def estimate_buckets(
    recipe: Recipe, rows: list[SourceRow], probes: dict[str, ProbeResult], vae: VaeFiles, scale: float
) -> tuple[BucketEstimate, ...]:
    """Clips of each bucket, and what one of them takes."""
    clips, held_out = Counter[str](), Counter[str]()
    for row in rows:
        clips.update(probes[row.path].clips)
        if is_held_out(row.source, recipe.data.holdout_fraction):
            held_out.update(probes[row.path].clips)
    buckets: list[BucketEstimate] = []
    for bucket in buckets_of(recipe.data):
        f, c, h, w = vae.latent_shape(bucket.frames, bucket.height, bucket.width)
        count, held = round(scale * clips[bucket.name]), round(scale * held_out[bucket.name])
        size, tokens = BYTES * vae.moments * f * c * h * w, f * (h // recipe.model.patch) * (w // recipe.model.patch)
        steps = -(-(count - held) // recipe.train.batch_size)
        buckets.append(BucketEstimate(bucket.name, count, held, bucket.seconds, tokens, size, steps))
    return tuple(buckets)


def count_dropped(rows: list[SourceRow], probes: dict[str, ProbeResult], scale: float) -> tuple[Dropped, ...]:
    """Rows without clips by reason, the most frequent first."""
    counts, examples = dict[str, float](), dict[str, str]()
    for row in rows:
        found = row if row.reason else probes.get(row.path)
        if found and found.reason:
            counts[found.reason] = counts.get(found.reason, 0.0) + (1 if row.reason else scale)
            examples.setdefault(found.reason, f"{row.source}: {found.message}")
    by_count = sorted(counts.items(), key=lambda item: -item[1])
    return tuple(Dropped(reason, round(n), examples[reason]) for reason, n in by_count)


def disk_space(output: str) -> tuple[int, int | None]:
    """Bytes of shards that exist in the output, and free bytes of its disk, None if it is remote."""
    system, path = resolve(output)
    with storage_errors(output, "read", system):
        stored = sum(info.size or 0 for info in system.get_file_info(shard_files(output)))
    return stored, free_bytes(path) if isinstance(system, fs.LocalFileSystem) else None
