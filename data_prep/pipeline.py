"""The road from a recipe's videos to its shards: what is missing goes down the chain, and all is described."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import time
from collections import Counter

from data_prep.buckets import TRANSFORM_VERSION, Bucket, buckets_of
from data_prep.ledger import SavedProgress
from data_prep.ray_pipeline import encode
from data_prep.resume import reconcile
from data_prep.shards import manifest_or_none, read_stored_clips, remove_unfinished
from data_prep.sink import ShardSink
from data_prep.sources import SourceRow, read_rows
from data_prep.stats import PrepStats
from data_prep.watchdog import PipelineStalled
from sora_train.codec.conventions import cleaning_of
from sora_train.codec.files import TextFiles, VaeFiles, find_text_encoder, find_vae
from sora_train.data.config import small_buckets
from sora_train.data.shards import ShardSet
from sora_train.errors import RecipeError, UserError
from sora_train.locks import run_lock
from sora_train.log import log
from sora_train.manifest import SCHEMA_VERSION, Counts, LatentFormat, Manifest, TextFacts, VaeFacts, commonest_shape
from sora_train.recipe import Recipe
from sora_train.schema import bucket_name, bucket_of
from sora_train.storage import reject_job_dir

MAX_FRUITLESS_STARTS = 3
"""Starts of the pipeline in a row in which no clip is encoded; then prep ends with an error."""


def prep(recipe: Recipe) -> Manifest:
    """Encodes every clip that the recipe names and its shards don't hold yet, and returns the shards' manifest.

    Raises UserError where the captions, codec or shards are no good, too many sources can't be decoded, or nothing is
    left; clips that fail are named in `quarantine.parquet` and don't stop anything. Where Ray hangs, this process
    disconnects and connects again by `cluster.address`, even if the caller had connected.
    """
    started, recipe = time.monotonic(), resolve_caption_cleaning(recipe)
    data = recipe.data
    reject_job_dir("data.output", data.output)
    buckets = buckets_of(data)
    vae, text = find_codec(recipe)
    check_shapes(buckets, vae)
    key = encoding_hash(recipe, vae, text)
    rows = read_rows(data)
    with run_lock(data.output, "sora prep"):
        remove_unfinished(data.output)
        sink = encode_with_restarts(recipe, rows, buckets, vae, text, key)
        stats = sink.stats
        manifest = describe(recipe, vae, text, key, sink.empty_text or empty_prompt(recipe, key), stats)
        manifest.save(data.output)
    log.info(f"prep: {stats.summary()} in {time.monotonic() - started:.0f} s; shards in {data.output}")
    if manifest.remarks:
        counted = ", ".join(f"{kind} {count}" for kind, count in manifest.remarks.items())
        log.info(f"prep: sources with remarks: {counted}; docs/prep.md says what each means")
    for name in (name for name, count in manifest.buckets.items() if not count):
        log.info(f"prep: no clip fills the bucket {name}; `sora prep RECIPE --plan` says why")
    with contextlib.suppress(UserError):  # all clips are held out, which training says
        left = ShardSet(data.output, data.holdout_fraction).rows
        for said in small_buckets(left, recipe.train.batch_size):
            log.warning(f"prep: {said}")
    return manifest


def encode_with_restarts(
    recipe: Recipe, rows: list[SourceRow], buckets: tuple[Bucket, ...], vae: VaeFiles, text: TextFiles, key: str
) -> ShardSink:
    """`encode_missing`, restarted where the pipeline stalls or a GPU fails. UserError where restarts don't help."""
    in_vain = 0
    while True:
        try:
            return encode_missing(recipe, rows, buckets, vae, text, key)
        except PipelineStalled as error:
            # Of a worker's error Ray makes one that prints its traceback, and Ray Data adds advice of its own.
            why = str(getattr(error, "cause", error)).splitlines()[0]
            in_vain = 0 if error.made_progress else in_vain + 1
            if in_vain == MAX_FRUITLESS_STARTS:
                raise UserError(
                    f"{why}. prep was started {in_vain} times in a row without encoding a clip: a node, its network "
                    "or a GPU fails each time. Look at `ray status`, at the GPUs (`nvidia-smi`) and into the logs of "
                    "the workers (/tmp/ray/session_latest/logs), leave the faulty node out, and run the same command "
                    "again: what is encoded stays"
                ) from None
            log.info(f"prep: {why}; restarts with what is missing")


def encode_missing(
    recipe: Recipe, rows: list[SourceRow], buckets: tuple[Bucket, ...], vae: VaeFiles, text: TextFiles, key: str
) -> ShardSink:
    """Encodes what the shards don't hold of the rows. Raises UserError as `prep`, and PipelineStalled."""
    data, settings = recipe.data, settings_hash(recipe, key)
    stored, twice = read_stored_clips(data.output, key, encoding_differences(recipe, vae, text))
    saved = SavedProgress.load(data.output, settings)
    stats = PrepStats(len({row.source for row in rows}), data.max_bad_fraction, data.output)
    state = reconcile(data, rows, stored, twice, saved, stats)
    state.remove_stale(data.output)
    shapes = ", ".join(bucket.name for bucket in buckets)
    log.info(
        f"prep: {len(rows)} sources, {stats.written} clips encoded already, {len(state.todo)} sources to go "
        f"through; {shapes} at {data.fps:g} fps"
    )
    sink = ShardSink(recipe, key, settings, stats, state)
    try:
        stats.check_limits()
        if state.todo:
            encode(recipe, buckets, vae, state.todo, sink)
        stats.check_limits(finished=True)
    finally:
        sink.close()
    return sink


def resolve_caption_cleaning(recipe: Recipe) -> Recipe:
    """The recipe with what `codec.caption_cleaning: auto` stands for."""
    cleaning = cleaning_of(recipe.codec, recipe.model.init_from)
    return recipe.model_copy(update={"codec": recipe.codec.model_copy(update={"caption_cleaning": cleaning})})


def find_codec(recipe: Recipe) -> tuple[VaeFiles, TextFiles]:
    """The recipe's VAE and text encoder on disk. Raises UserError where they can't be had."""
    codec = recipe.codec
    return find_vae(codec.vae, codec.models), find_text_encoder(codec.text, codec.models)


def check_shapes(buckets: tuple[Bucket, ...], vae: VaeFiles) -> None:
    """Raises RecipeError where a bucket doesn't divide by what the VAE shrinks by."""
    for bucket in buckets:
        if bucket.height % vae.factor or bucket.width % vae.factor:
            raise RecipeError(f"{bucket.name}: height and width must be multiples of the VAE's {vae.factor}")
        if (bucket.frames - 1) % vae.time_factor:
            below = bucket.frames - 1 - (bucket.frames - 1) % vae.time_factor + 1
            raise RecipeError(
                f"{bucket.name}: this VAE takes {vae.time_factor} k + 1 frames, not {bucket.frames}; "
                f"use {below} or {below + vae.time_factor} (data.frames or data.buckets)"
            )


def encoding_hash(recipe: Recipe, vae: VaeFiles, text: TextFiles) -> str:
    """Over all that decides what a clip's row holds, but for the clip itself."""
    data, codec = recipe.data, resolve_caption_cleaning(recipe).codec
    frames = [TRANSFORM_VERSION, data.fps, data.crop, data.flip]
    text_settings = [text.hash, codec.text_precision, codec.max_tokens]
    if codec.caption_cleaning != "none":  # shards of before this key were encoded without
        text_settings.append(codec.caption_cleaning)
    return _hash([SCHEMA_VERSION, *frames, vae.hash, codec.precision, *text_settings])


def encoding_differences(recipe: Recipe, vae: VaeFiles, text: TextFiles) -> str:
    """In what the shards that are there were encoded otherwise, by their manifest: "data.fps was 8.0, is 5.0"."""
    data, codec, there = recipe.data, recipe.codec, manifest_or_none(recipe.data.output)
    if there is None:
        return "other frames, VAE, text encoder or code"
    before = there.settings.get("data", {})
    pairs = {
        "data.fps": (there.fps, data.fps),
        "data.crop": (before.get("crop"), data.crop),
        "data.flip": (before.get("flip"), data.flip),
        "codec.vae": (f"{there.vae.name} ({there.vae.hash[:8]})", f"{codec.vae} ({vae.hash[:8]})"),
        "codec.precision": (there.vae.precision, codec.precision),
        "codec.text": (f"{there.text.name} ({there.text.hash[:8]})", f"{codec.text} ({text.hash[:8]})"),
        "codec.text_precision": (there.text.precision, codec.text_precision),
        "codec.max_tokens": (there.text.max_tokens, codec.max_tokens),
        "codec.caption_cleaning": (there.text.caption_cleaning, codec.caption_cleaning),
    }
    changed = [f"{key} was {was}, is {now}" for key, (was, now) in pairs.items() if was != now]
    return "; ".join(changed) or "this version of sora_train cuts or encodes otherwise"


def settings_hash(recipe: Recipe, key: str) -> str:
    """Over all that decides which clips there are."""
    data = recipe.data
    cutting = [data.shapes, data.start_s, data.stride_s, data.clips_per_video, data.max_enlarge]
    return _hash([key, *cutting, recipe.selection.model_dump(mode="json")])


def _hash(parts: list) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def vae_facts(recipe: Recipe, vae: VaeFiles) -> VaeFacts:
    """What the manifest says of the VAE."""
    return VaeFacts(
        name=recipe.codec.vae,
        hash=vae.hash,
        channels=vae.channels,
        factor=vae.factor,
        time_factor=vae.time_factor,
        precision=recipe.codec.precision,
        mean=vae.mean,
        std=vae.std,
    )


def empty_prompt(recipe: Recipe, key: str) -> bytes:
    """The empty prompt's embedding where this run made none: the manifest's, or else it is made in this process."""
    previous = manifest_or_none(recipe.data.output)
    if previous and previous.encoding_hash == key and previous.empty_tokens == 2:
        return base64.b64decode(previous.empty_text)
    from sora_train.codec.text import null_tokens, text_encoder_of

    return null_tokens(text_encoder_of(recipe.codec))


def describe(recipe: Recipe, vae: VaeFiles, text: TextFiles, key: str, empty: bytes, stats: PrepStats) -> Manifest:
    """The manifest, its counts taken from the shards themselves. RuntimeError where they don't add up."""
    clips, twice = read_stored_clips(recipe.data.output, key)
    kinds = Counter(failure["kind"] for failure in stats.failures)
    counts = Counts(asked=stats.asked, written=len(clips), quarantined=kinds["quarantined"], filtered=kinds["filtered"])
    if twice or counts.asked != counts.written + counts.quarantined + counts.filtered:
        raise RuntimeError(
            f"the counts of {recipe.data.output} don't add up: {counts}, {len(twice)} shards repeat clips"
        )
    found = Counter(bucket_of(clip.shard) for clip in clips.values())
    frames, height, width = commonest_shape(found) or recipe.data.shapes[0]
    return Manifest(
        encoding_hash=key,
        vae=vae_facts(recipe, vae),
        text=TextFacts(
            name=recipe.codec.text,
            hash=text.hash,
            width=text.width,
            max_tokens=recipe.codec.max_tokens,
            precision=recipe.codec.text_precision,
            caption_cleaning=recipe.codec.caption_cleaning,
        ),
        latents=LatentFormat(moments=vae.moments),
        frames=frames,
        fps=recipe.data.fps,
        height=height,
        width=width,
        buckets={bucket: found[bucket] for bucket in (bucket_name(*shape) for shape in recipe.data.shapes)},
        settings=recipe.model_dump(mode="json", include={"data", "selection"}, exclude={"data": {"output"}}),
        empty_text=base64.b64encode(empty).decode(),
        empty_tokens=len(empty) // 2 // text.width,
        counts=counts,
        reasons=dict(sorted(Counter(failure["reason"] for failure in stats.failures).items())),
        remarks=dict(sorted(Counter(kind for record in stats.records.values() for kind in record.remarks).items())),
    )
