"""`sora prep`: encodes the clips of a recipe that its shards don't hold yet, and writes the manifest."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable

from data_prep.buckets import TRANSFORM_VERSION, buckets_of
from data_prep.ray_pipeline import run_pipeline
from data_prep.reasons import kind_of
from data_prep.resume import ResumeState, load_progress, reconcile
from data_prep.shard_index import compact_index, sync_index
from data_prep.shards import manifest_or_none, remove_unfinished
from data_prep.sink import ShardSink
from data_prep.sources import SourceRows, read_rows
from data_prep.stats import PrepStats
from data_prep.stored import count_clips, drop_repeats, read_stored
from data_prep.watchdog import PipelineStalled
from sora_train.codec.conventions import HAS_FTFY, cleaning_of
from sora_train.codec.files import TextFiles, VaeFiles, find_text_encoder, find_vae
from sora_train.data.config import undividable_shapes
from sora_train.data.shards import ShardSet
from sora_train.errors import RecipeError, UserError
from sora_train.locks import run_lock
from sora_train.log import log
from sora_train.manifest import SCHEMA_VERSION, Counts, LatentFormat, Manifest, commonest_shape
from sora_train.recipe import Recipe
from sora_train.schema import bucket_name
from sora_train.storage import reject_job_dir

MAX_STARTS_WITHOUT_CLIPS = 3
"""After so many starts of the pipeline in a row that encode no clip, prep ends with an error."""


def prep(recipe: Recipe) -> Manifest:
    """Encodes every clip that the recipe names and its shards don't hold yet. Returns the shards' manifest.

    Clips that fail are listed in `quarantine.parquet` and don't stop the run. Raises UserError if captions, codec or
    shards are invalid, too many sources are bad, or there is no clip.
    """
    started, data = time.monotonic(), recipe.data
    reject_job_dir("data.output", data.output)
    with run_lock(data.output, "sora prep"):  # first: hashing the networks and reading the captions may take minutes
        recipe = resolve_caption_cleaning(recipe)
        vae, text = find_codec(recipe)
        check_shapes(recipe, vae)
        warn_of_model(recipe, vae, text)
        encoding = encoding_hash(recipe, vae, text)
        rows = read_rows(data)
        remove_unfinished(data.output)
        sink = with_restarts(lambda: encode_missing(recipe, rows, vae, text, encoding))
        sync_index(data.output, encoding)
        empty_text = sink.empty_text or empty_prompt(recipe, encoding)
        manifest = build_manifest(recipe, vae, text, encoding, empty_text, sink.state)
        manifest.save(data.output)
        compact_index(data.output)
    log.info(f"prep: {sink.stats.summary()} in {time.monotonic() - started:.0f} s; shards in {data.output}")
    print_warnings(manifest, recipe)
    return manifest


def print_warnings(manifest: Manifest, recipe: Recipe) -> None:
    """Prints remarks on sources, and the buckets that have no clip or too few."""
    from sora_train.plan.steps import small_bucket_warnings
    from sora_train.plan.table import plan_inputs

    if manifest.remarks:
        counts = ", ".join(f"{kind} {count}" for kind, count in manifest.remarks.items())
        log.info(f"prep: sources with remarks: {counts}; docs/data.md explains them")
    for name in (name for name, count in manifest.buckets.items() if not count):
        log.info(f"prep: no clip fills the bucket {name}; `sora prep RECIPE --plan` says why")
    with contextlib.suppress(UserError):  # all clips are held out, which training reports
        train_rows = ShardSet(recipe.data.output, recipe.data.holdout_fraction).rows
        for warning in small_bucket_warnings(recipe, train_rows, plan_inputs(recipe)[0]):
            log.warning(f"prep: {warning}")


def with_restarts(run: Callable[[], ShardSink]) -> ShardSink:
    """Runs again if the pipeline stalls or a GPU fails. Raises UserError if restarts don't help."""
    failed_starts = 0
    while True:
        try:
            return run()
        except PipelineStalled as error:
            # Ray turns a worker's error into one that prints its traceback, and Ray Data adds advice of its own.
            why = str(getattr(error, "cause", error)).splitlines()[0]
            failed_starts = 0 if error.made_progress else failed_starts + 1
            if failed_starts == MAX_STARTS_WITHOUT_CLIPS:
                raise UserError(
                    f"{why}. prep was started {failed_starts} times in a row without encoding a clip: a node, its "
                    "network or a GPU fails each time. See `ray status`, the GPUs (`nvidia-smi`) and the workers' logs "
                    "(/tmp/ray/session_latest/logs), exclude the faulty node, and run the same command again; encoded "
                    "clips are kept",
                    code="workers",
                ) from None
            log.info(f"prep: {why}; restarts with the missing clips")


def encode_missing(recipe: Recipe, rows: SourceRows, vae: VaeFiles, text: TextFiles, encoding: str) -> ShardSink:
    """Encodes the clips of the rows that the shards don't hold. Raises UserError as `prep`, and PipelineStalled."""
    data = recipe.data
    sync_index(data.output, encoding, encoding_differences(recipe, vae, text))
    state = resume_state(recipe, rows, vae, text)
    stats = state.stats
    state.remove_stale(data.output)
    shapes = ", ".join(bucket.name for bucket in buckets_of(data))
    log.info(
        f"prep: {len(rows)} sources, {stats.written} clips already encoded, {state.pending} sources to process; "
        f"{shapes} at {data.fps:g} fps"
    )
    sink = ShardSink(recipe, encoding, settings_hash(recipe, encoding), state)
    try:
        stats.check_limits()
        if state.pending:
            run_pipeline(recipe, vae, sink)
        stats.check_limits(finished=True)
    finally:
        sink.close()
    return sink


def resume_state(recipe: Recipe, rows: SourceRows, vae: VaeFiles, text: TextFiles, quiet: bool = False) -> ResumeState:
    """Compares the rows with the shards, to find what is left to encode. `quiet` logs no remarks about single files."""
    data, encoding = recipe.data, encoding_hash(recipe, vae, text)
    stored = read_stored(data.output, encoding, encoding_differences(recipe, vae, text))
    saved = load_progress(data.output, settings_hash(recipe, encoding))
    stats = PrepStats(rows.sources, data.max_bad_fraction, data.output, quiet)
    return reconcile(data, rows, stored, saved, stats)


def resolve_caption_cleaning(recipe: Recipe) -> Recipe:
    """The recipe with the value that `codec.caption_cleaning: auto` stands for."""
    cleaning = cleaning_of(recipe.codec, recipe.model.init_from, recipe.model.family)
    return recipe.model_copy(update={"codec": recipe.codec.model_copy(update={"caption_cleaning": cleaning})})


def find_codec(recipe: Recipe) -> tuple[VaeFiles, TextFiles]:
    """The files of the recipe's VAE and text encoder. Raises UserError if they are missing or cut short."""
    codec = recipe.codec
    return find_vae(codec.vae, codec.models), find_text_encoder(codec.text, codec.models)


def check_shapes(recipe: Recipe, vae: VaeFiles) -> None:
    """Raises RecipeError if a bucket does not give whole latents of the VAE and patches of the model."""
    if wrong := undividable_shapes(recipe.data, vae.factor, vae.time_factor, recipe.model.patch):
        raise RecipeError("\n".join(wrong))


def warn_of_model(recipe: Recipe, vae: VaeFiles, text: TextFiles) -> None:
    """Warns if the recipe's model can't be trained on the shards; another recipe's may, so it is not an error."""
    for key, width, what in (
        ("in_channels", vae.channels, "the VAE's latents have {} channels"),
        ("text_width", text.width, "the text encoder's embeddings are {} wide"),
    ):
        if (given := getattr(recipe.model, key)) != width:
            log.warning(
                f"prep: {what.format(width)}, and model.{key} is {given}. To train on these shards set it to {width}"
            )


def encoding_hash(recipe: Recipe, vae: VaeFiles, text: TextFiles) -> str:
    """Hash of everything that determines a clip's row, except the clip itself."""
    data, codec = recipe.data, resolve_caption_cleaning(recipe).codec
    frames = [TRANSFORM_VERSION, data.fps, data.crop, data.flip]
    text_settings = [text.hash, codec.text_precision, codec.max_tokens]
    if codec.caption_cleaning != "none":  # shards made before this key existed have none
        text_settings.append(codec.caption_cleaning)
    if codec.caption_cleaning == "wan":
        text_settings.append(f"ftfy {HAS_FTFY}")
    return _hash([SCHEMA_VERSION, *frames, vae.hash, codec.precision, *text_settings])


def settings_hash(recipe: Recipe, encoding: str) -> str:
    """Hash of the encoding, and of everything that determines a source's clips and the filters."""
    data = recipe.data
    clip_settings = [data.shapes, data.start_s, data.stride_s, data.clips_per_video, data.max_enlarge]
    return _hash([encoding, *clip_settings, recipe.selection.model_dump(mode="json")])


def _hash(parts: list) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def encoding_differences(recipe: Recipe, vae: VaeFiles, text: TextFiles) -> str:
    """How the existing shards' encoding differs, by their manifest, such as "data.fps was 8.0, is 5.0"."""
    data, codec, old = recipe.data, recipe.codec, manifest_or_none(recipe.data.output)
    if old is None:
        return "other frames, VAE, text encoder or code"
    before = old.settings.get("data", {})
    pairs = {
        "data.fps": (old.fps, data.fps),
        "data.crop": (before.get("crop"), data.crop),
        "data.flip": (before.get("flip"), data.flip),
        "codec.vae": (f"{old.vae.name} ({old.vae.hash[:8]})", f"{codec.vae} ({vae.hash[:8]})"),
        "codec.precision": (old.vae.precision, codec.precision),
        "codec.text": (f"{old.text.name} ({old.text.hash[:8]})", f"{codec.text} ({text.hash[:8]})"),
        "codec.text_precision": (old.text.precision, codec.text_precision),
        "codec.max_tokens": (old.text.max_tokens, codec.max_tokens),
        "codec.caption_cleaning": (old.text.caption_cleaning, codec.caption_cleaning),
    }
    changed = [f"{key} was {was}, is {now}" for key, (was, now) in pairs.items() if was != now]
    ftfy = ", or ftfy was installed or removed" if codec.caption_cleaning == "wan" else ""
    return "; ".join(changed) or f"this version of sora_train cuts or encodes differently{ftfy}"


def empty_prompt(recipe: Recipe, encoding: str) -> bytes:
    """The empty prompt's embedding if the pipeline made none: from the manifest, or computed in this process."""
    previous = manifest_or_none(recipe.data.output)
    if previous and previous.encoding_hash == encoding and previous.empty_tokens == 2:
        return base64.b64decode(previous.empty_text)
    from sora_train.codec.text import null_tokens, text_encoder_of

    return null_tokens(text_encoder_of(recipe.codec))


def build_manifest(
    recipe: Recipe, vae: VaeFiles, text: TextFiles, encoding: str, empty_text: bytes, state: ResumeState
) -> Manifest:
    """The manifest, with counts taken from the shards. Raises RuntimeError if they don't add up."""
    data, codec, stats = recipe.data, recipe.codec, state.stats
    kinds = Counter[str]()
    for reason, count in stats.reasons.items():
        kinds[kind_of(reason)] += count
    missing = kinds["quarantined"] + kinds["filtered"]
    # A writer on a node that was taken for lost may have finished after all.
    if count_clips(data.output).total() > stats.asked - missing and (repeated := drop_repeats(data.output, encoding)):
        log.info(f"prep: drops {repeated} clips that an earlier shard has too")
    found = count_clips(data.output)
    counts = Counts(
        asked=stats.asked, written=found.total(), quarantined=kinds["quarantined"], filtered=kinds["filtered"]
    )
    if counts.asked != counts.written + missing:
        raise RuntimeError(f"the counts of {data.output} don't add up: {counts}")
    frames, height, width = commonest_shape(found) or data.shapes[0]
    return Manifest(
        encoding_hash=encoding,
        vae=vae.facts(codec, vae.hash),
        text=text.facts(codec, text.hash),
        latents=LatentFormat(moments=vae.moments),
        frames=frames,
        fps=data.fps,
        height=height,
        width=width,
        buckets={bucket: found[bucket] for bucket in (bucket_name(*shape) for shape in data.shapes)},
        settings=recipe.model_dump(mode="json", include={"data", "selection"}, exclude={"data": {"output"}}),
        empty_text=base64.b64encode(empty_text).decode(),
        empty_tokens=len(empty_text) // 2 // text.width,
        counts=counts,
        reasons=dict(sorted(stats.reasons.items())),
        remarks=dict(sorted(state.remarks.items())),
    )  # fmt: skip
