"""What a recipe's shards will hold and take, reckoned from the headers of its sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from pyarrow import fs

from data_prep.buckets import Bucket, buckets_of
from data_prep.estimate.measure import Measured, spread
from data_prep.estimate.probe import Look
from data_prep.reasons import BAD_SOURCE_REASONS, kind_of
from data_prep.sources import SourceRow
from sora_train.codec.files import VaeFiles
from sora_train.data import order
from sora_train.data.config import SelectionConfig
from sora_train.data.shards import is_held_out
from sora_train.errors import UserError
from sora_train.recipe import Recipe
from sora_train.schema import shard_files
from sora_train.storage import free_bytes, resolve

TOKENIZED = 2000  # captions at most
RAY_START_S = (
    10.0  # of a Ray of its own on two cores, roughly: prep of four clips had the first after 20 to 25 s in all
)
HALF = 2  # bytes of a float16


@dataclass(frozen=True)
class BucketPlan:
    """What one bucket gets: `seconds` of a clip, `tokens` that the model sees of it, `clip_bytes` of its latents."""

    name: str
    clips: int
    held_out: int
    seconds: float
    tokens: int
    clip_bytes: int
    steps: int
    """Of an epoch: the clips that are not held out, in batches."""


@dataclass(frozen=True)
class Dropped:
    """Rows that give no clip for one reason, with one of them as an example."""

    reason: str
    kind: str
    rows: int
    example: str


@dataclass(frozen=True)
class Work:
    """Hours: of one core for opening and decoding, of the measured device for the VAE and the text encoder."""

    decode: float
    vae: float
    text: float
    measured: Measured
    start_s: float = 0.0
    """Seconds before the first clip: Ray starts, and every actor imports and loads its network."""


@dataclass(frozen=True)
class Plan:
    """The whole of it; `dataclasses.asdict` makes plain JSON of it."""

    rows: int
    sources: int
    undecodable: int
    """Sources whose headers show that they can't be decoded."""
    video_s: float
    """Length of all sources that give clips."""
    longest_s: float
    largest: str
    """Width x height of the largest of them."""
    stills: int
    buckets: tuple[BucketPlan, ...]
    dropped: tuple[Dropped, ...]
    unknown: tuple[str, ...]
    """Keys that are on and that only decoding can apply."""
    batch_size: int
    steps: int
    """Of an epoch."""
    train_steps: int
    captions: int
    """Distinct ones: each is embedded once."""
    tokenized: int
    """How many of them the size of all was reckoned from."""
    latent_bytes: int
    text_bytes: int
    output: str
    held_bytes: int
    """Of shards that are there already."""
    free_bytes: int | None
    """On the output's disk; None where it is remote."""
    image_ratio: float | None = None
    """Share of the training steps that take pictures, where it is set."""
    work: Work | None = None

    @property
    def clips(self) -> int:
        """In all buckets together."""
        return sum(bucket.clips for bucket in self.buckets)


def giving(rows: list[SourceRow], looks: dict[str, Look]) -> list[SourceRow]:
    """Rows that give clips."""
    return [row for row in rows if not row.reason and not looks[row.path].reason]


def reckon(
    recipe: Recipe,
    rows: list[SourceRow],
    looks: dict[str, Look],
    vae: VaeFiles,
    text_width: int,
    count_tokens: Callable[[list[str]], list[int]],
) -> Plan:
    """The plan without its hours, from what every file was found to be."""
    data, patch = recipe.data, recipe.model.patch
    good = giving(rows, looks)
    clips, held_out = Counter[str](), Counter[str]()
    for row in good:
        clips.update(looks[row.path].clips)
        if is_held_out(row.source, data.holdout_fraction):
            held_out.update(looks[row.path].clips)
    buckets: list[BucketPlan] = []
    for bucket in buckets_of(data):
        f, c, h, w = vae.latent_shape(bucket.frames, bucket.height, bucket.width)
        name, size = bucket.name, HALF * vae.moments * f * c * h * w
        left = clips[name] - held_out[name]
        steps = order.Plan((order.Bucket(name, left),), recipe.train.batch_size, 0).steps_per_epoch if left else 0
        tokens = f * (h // patch) * (w // patch)
        buckets.append(BucketPlan(name, clips[name], held_out[name], bucket.seconds, tokens, size, steps))
    weights = [(caption, sum(looks[row.path].clips.values())) for row in good for caption in row.captions]
    some = spread(weights, TOKENIZED)
    tokens = sum(n * copies for n, (_, copies) in zip(count_tokens([c for c, _ in some]), some, strict=True))
    share = sum(copies for _, copies in weights) / max(1, sum(copies for _, copies in some))
    found = [looks[path] for path in {row.path for row in good}]
    videos = [look for look in found if not look.still]
    largest = max(found, key=lambda look: look.width * look.height, default=Look())
    held_bytes, free_bytes = room(data.output)
    return Plan(
        rows=len(rows),
        sources=len({row.source for row in rows}),
        undecodable=len({row.source for row in rows if reason_of(row, looks)[0] in BAD_SOURCE_REASONS}),
        video_s=sum(look.seconds for look in videos),
        longest_s=max((look.seconds for look in videos), default=0.0),
        largest=f"{largest.width}x{largest.height}",
        stills=len(found) - len(videos),
        buckets=tuple(buckets),
        dropped=dropped(rows, looks),
        unknown=unknown(recipe.selection),
        batch_size=recipe.train.batch_size,
        steps=sum(bucket.steps for bucket in buckets),
        train_steps=recipe.train.steps,
        captions=len({caption for caption, _ in weights}),
        tokenized=len(some),
        latent_bytes=sum(bucket.clips * bucket.clip_bytes for bucket in buckets),
        text_bytes=round(HALF * text_width * tokens * share),
        output=data.output,
        held_bytes=held_bytes,
        free_bytes=free_bytes,
        image_ratio=data.image_ratio,
    )


def reason_of(row: SourceRow, looks: dict[str, Look]) -> tuple[str, str]:
    """Why a row gives no clip, and the message; both empty where it gives some."""
    found = row if row.reason else looks[row.path]
    return found.reason, found.message


def dropped(rows: list[SourceRow], looks: dict[str, Look]) -> tuple[Dropped, ...]:
    """Reasons, the commonest first."""
    counts, examples = Counter[str](), dict[str, str]()
    for row in rows:
        reason, message = reason_of(row, looks)
        if reason:
            counts[reason] += 1
            examples.setdefault(reason, f"{row.source}: {message}")
    return tuple(Dropped(reason, kind_of(reason), n, examples[reason]) for reason, n in counts.most_common())


def unknown(selection: SelectionConfig) -> tuple[str, ...]:
    """The filters that are on and that need decoded frames or whole files."""
    keys = ("black", "frozen", "min_motion", "max_motion", "min_sharpness", "scene_cuts", "duplicates")
    on = [key for key in keys if getattr(selection, key)]
    return tuple(f"selection.{key}" for key in [*on, *["near_duplicates"] * (selection.near_duplicates is not None)])


def room(output: str) -> tuple[int, int | None]:
    """Bytes of shards in the output already, and free bytes of its disk, None where it is remote."""
    try:
        system, path = resolve(output)
        held = sum(info.size or 0 for info in system.get_file_info(shard_files(output)))
    except (OSError, ValueError) as error:
        raise UserError(f"data.output: {output} can't be reached: {error}") from None
    if not isinstance(system, fs.LocalFileSystem):
        return held, None
    return held, free_bytes(path)


def cost(draft: Plan, buckets: tuple[Bucket, ...], measured: Measured, loads_per_core: float = 1.0) -> Work:
    """Hours for all of the plan's clips at the measured seconds. `loads_per_core` actors load networks on a core."""
    pixels = {bucket.name: bucket.frames * bucket.height * bucket.width for bucket in buckets}
    vae_clips = sum(bucket.clips * pixels[bucket.name] for bucket in draft.buckets) / measured.vae_pixels
    opened = draft.rows - sum(drop.rows for drop in draft.dropped)
    decode = opened * measured.open_s + draft.clips * measured.decode_s
    vae, text = vae_clips * measured.vae_s, draft.captions * measured.text_s
    start_s = RAY_START_S + measured.load_s * max(1.0, loads_per_core)
    return Work(decode / 3600, vae / 3600, text / 3600, measured, start_s)
