"""The road from a recipe's videos to its shards, as one chain of Ray Data: rows -> decode -> VAE -> text -> shards."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.buckets import TRANSFORM_VERSION, Bucket
from data_prep.outcome import Outcome
from data_prep.progress import Progress
from data_prep.shards import (
    ShardWriter,
    finished_clips,
    known_failures,
    manifest_or_none,
    sweep,
    take_out,
    write_quarantine,
)
from data_prep.source import Row, data_root, read_rows
from sora_train.codec.files import TextFiles, VaeFiles, find_text_encoder, find_vae
from sora_train.errors import RecipeError, UserError
from sora_train.recipe import Recipe
from sora_train.schema import SCHEMA_VERSION, SHARD_SCHEMA, Counts, LatentFormat, Manifest, TextFacts, VaeFacts

BLOCK_BYTES = 2**23  # frames that travel between two stages at once: small, so that the first clips are out soon
BLOCK_CLIPS = 32


def prep(recipe: Recipe) -> Manifest:
    """Encodes every clip that the recipe names and its shards don't hold yet, and returns the shards' manifest.

    Raises UserError where the captions, codec or shards are no good, too many sources can't be decoded, or nothing is
    left; clips that fail are named in `quarantine.parquet` and don't stop anything.
    """
    started = time.monotonic()
    data, bucket = recipe.data, Bucket(recipe.data.frames, recipe.data.height, recipe.data.width, recipe.data.fps)
    vae, text = find_vae(recipe.codec.vae), find_text_encoder(recipe.codec.text)
    if bucket.height % vae.factor or bucket.width % vae.factor:
        raise RecipeError(
            f"data.height {bucket.height} and data.width {bucket.width} must be multiples of the VAE's {vae.factor}"
        )
    key = encoding_hash(recipe, bucket, vae, text)
    rows = read_rows(data, bucket)
    sweep(data.output)
    done = keep_current(data.output, rows, key)
    known = known_failures(data.output, key)
    rows = [recalled(row, known) for row in rows]
    outcome = Outcome(rows, done, data.max_bad_fraction, data.output)
    todo = [row for row in rows if not row.reason and row.sample_id not in done]
    shape = f"{bucket.name} at {bucket.fps:g} fps"
    print(f"prep: {len(rows)} rows, {len(done)} encoded already, {len(todo)} to encode as {shape}", flush=True)
    previous = manifest_or_none(data.output)
    empty = base64.b64decode(previous.empty_text) if previous and previous.encoding_hash == key else b""
    try:
        outcome.judge()
        if todo:
            empty = encode(recipe, bucket, vae, todo, outcome, key)
        outcome.judge(finished=True)
    finally:
        write_quarantine(data.output, outcome.failures, key)
    manifest = describe(recipe, bucket, vae, text, key, empty or empty_prompt(recipe), outcome)
    manifest.save(data.output)
    print(f"prep: {outcome.summary()} in {time.monotonic() - started:.0f} s; shards in {data.output}", flush=True)
    return manifest


def encode(recipe: Recipe, bucket: Bucket, vae: VaeFiles, todo: list[Row], outcome: Outcome, key: str) -> bytes:
    """Sends rows down the chain and writes what comes out; returns the empty prompt's embedding."""
    from sora_train.launch.cluster import connect

    empty = b""
    writer = ShardWriter(recipe.data.output, bucket.name, key)
    with Progress(len(todo)) as progress, connect(recipe.cluster.address, log_to_driver=False):
        try:
            for table in chain(recipe, bucket, vae, todo):
                empty = empty or next(filter(None, table.column("empty_text").to_pylist()), b"")
                good = pc.is_null(table.column("reason"))
                writer.add(table.filter(good).select(SHARD_SCHEMA.names))
                progress.add(*outcome.add(table.drop_columns(["latents", "text"]).to_pylist()))
                outcome.judge()
        finally:
            writer.close()
    return empty


def chain(recipe: Recipe, bucket: Bucket, vae: VaeFiles, todo: list[Row]) -> Iterator[pa.Table]:
    """Tables of encoded and failed rows, in the order of `todo`."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    from data_prep.encode import Decode, EmbedText, EncodeVideo, Share, share_out, to_table

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True  # the same captions give the same shards
    context.issue_detectors_config.detectors = []  # they warn of the memory that importing torch takes
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that the bars are off
    total = ray.cluster_resources()
    decoders, vaes, texts = share_out(int(total.get("CPU", 1)), int(total.get("GPU", 0)))
    device = "cuda" if vaes.gpus else "cpu"
    size = max(1, min(BLOCK_CLIPS, BLOCK_BYTES // bucket.clip_bytes))
    shape = (vae.moments, bucket.frames, vae.channels, bucket.height // vae.factor, bucket.width // vae.factor)

    def stage(dataset: ray.data.Dataset, work: type, share: Share, **arguments: object) -> ray.data.Dataset:
        pool = ActorPoolStrategy(size=share.workers)
        return dataset.map_batches(
            work, fn_constructor_kwargs=arguments, batch_size=None, batch_format="pyarrow",
            compute=pool, num_cpus=share.cpus, num_gpus=share.gpus or None,
        )  # fmt: skip

    rows = ray.data.from_arrow([to_table(todo[i : i + size]) for i in range(0, len(todo), size)])
    decoded = stage(rows, Decode, decoders, root=data_root(recipe.data), bucket=bucket, timeout_s=recipe.data.timeout_s)
    latents = stage(decoded, EncodeVideo, vaes, codec=recipe.codec, bucket=bucket, threads=vaes.threads, device=device)
    encoded = stage(latents, EmbedText, texts, codec=recipe.codec, shape=shape, threads=texts.threads, device=device)
    for table in encoded.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(table, pa.Table)
        yield table


def keep_current(folder: str, rows: list[Row], key: str) -> set[str]:
    """Takes out of the shards what the rows no longer ask for, or whose file has changed; returns the ids that stay.

    Raises UserError where the shards hold nothing but other sources: that is a wrong folder, not a change.
    """
    shards = finished_clips(folder, key)
    asked = {row.sample_id: row for row in rows if not row.reason or row.reason == "missing_file"}
    held = {source for clips in shards.values() for source, _, _ in clips.values()}
    if held and held.isdisjoint(row.source for row in rows):
        raise UserError(
            f"data.output: {folder} holds {sum(map(len, shards.values()))} clips of other sources (as {min(held)}), "
            "none that data.captions names; set data.output to another folder, or delete this one"
        )
    stay: set[str] = set()
    for file, clips in shards.items():
        outdated = {
            sample
            for sample, (_, size, version) in clips.items()
            if sample in stay or not _is_current(asked.get(sample), size, version)
        }
        if outdated:
            name = file.rpartition("/")[2]
            print(f"prep: {len(outdated)} clips of {name} are outdated (file or captions changed) and go", flush=True)
            take_out(folder, file, outdated)
        stay |= clips.keys() - outdated
    return stay


def recalled(row: Row, known: dict[tuple[str, int, str], tuple[str, str]]) -> Row:
    """The row with the reason that an earlier run found, where its file is still the same."""
    found = known.get((row.sample_id, row.size, row.version))
    return row if row.reason or found is None else replace(row, reason=found[0], message=found[1])


def _is_current(row: Row | None, size: int, version: str) -> bool:
    """Whether an encoded clip is still asked for and its file as it was; of a file that is gone the clip stays."""
    return row is not None and (row.reason == "missing_file" or (row.size, row.version) == (size, version))


def encoding_hash(recipe: Recipe, bucket: Bucket, vae: VaeFiles, text: TextFiles) -> str:
    """Over all that decides what a clip's row holds, but for the clip itself."""
    parts = [SCHEMA_VERSION, TRANSFORM_VERSION, asdict(bucket), vae.hash, text.hash, recipe.codec.max_tokens]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def empty_prompt(recipe: Recipe) -> bytes:
    """The empty prompt's embedding, made in this process: only where a run was killed between shards and manifest."""
    from sora_train.codec.text import load_text_encoder

    return load_text_encoder(recipe.codec.text, recipe.codec.max_tokens).encode([""])[0].half().numpy().tobytes()


def describe(
    recipe: Recipe, bucket: Bucket, vae: VaeFiles, text: TextFiles, key: str, empty: bytes, outcome: Outcome
) -> Manifest:
    """The manifest, its counts taken from the shards themselves. RuntimeError where they don't add up."""
    clips = [sample for ids in finished_clips(recipe.data.output, key).values() for sample in ids]
    kinds = Counter(failure["kind"] for failure in outcome.failures)
    counts = Counts(
        rows=len(outcome.rows), written=len(clips), quarantined=kinds["quarantined"], filtered=kinds["filtered"]
    )
    if len(set(clips)) != len(clips) or counts.rows != counts.written + counts.quarantined + counts.filtered:
        raise RuntimeError(
            f"the counts of {recipe.data.output} don't add up: {counts}, {len(set(clips))} different clips"
        )
    return Manifest(
        encoding_hash=key,
        vae=VaeFacts(
            name=recipe.codec.vae, hash=vae.hash, channels=vae.channels, factor=vae.factor, mean=vae.mean, std=vae.std
        ),
        text=TextFacts(name=recipe.codec.text, hash=text.hash, width=text.width, max_tokens=recipe.codec.max_tokens),
        latents=LatentFormat(moments=vae.moments),
        frames=bucket.frames,
        fps=bucket.fps,
        height=bucket.height,
        width=bucket.width,
        buckets={bucket.name: len(clips)},
        empty_text=base64.b64encode(empty).decode(),
        empty_tokens=len(empty) // 2 // text.width,
        counts=counts,
        reasons=dict(sorted(Counter(failure["reason"] for failure in outcome.failures).items())),
    )
