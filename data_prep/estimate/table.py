"""Formats an estimate as text, and checks it for what would make prep or training fail."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.estimate.estimate import BucketEstimate, Dropped, PrepEstimate
from data_prep.reasons import BAD_SOURCE_REASONS
from sora_train.data.config import DataConfig, SelectionConfig, small_bucket_warnings
from sora_train.errors import RecipeError, UserError
from sora_train.provenance import usable_cores
from sora_train.recipe import Recipe
from sora_train.schema import bucket_size
from sora_train.storage import in_bytes


def check_estimate(estimate: PrepEstimate, data: DataConfig) -> None:
    """Raises UserError or RecipeError, with the remedy, if prep or training could only fail."""
    if estimate.undecodable > data.max_bad_fraction * estimate.sources:
        bad = _examples([drop for drop in estimate.dropped if drop.reason in BAD_SOURCE_REASONS])
        raise UserError(
            f"{estimate.undecodable} of {estimate.sources} sources can't be read, more than data.max_bad_fraction "
            f"{data.max_bad_fraction:g} allows: {bad}. Repair or remove them, check data.root, or raise "
            "data.max_bad_fraction"
        )
    if not estimate.clips:
        raise UserError(
            f"no clip in {estimate.rows} rows: {_examples(list(estimate.dropped))}. Check data.root, data.buckets and "
            "selection"
        )
    empty = [bucket.name for bucket in estimate.buckets if not bucket.clips]
    if empty:
        raise RecipeError("\n".join(explain_empty_bucket(name, estimate, data) for name in empty))
    if not estimate.steps:
        raise RecipeError(
            f"data.holdout_fraction {data.holdout_fraction:g} holds out all {estimate.clips} clips. Lower it, or add "
            "sources"
        )


def _examples(dropped: list[Dropped]) -> str:
    return "; ".join(f"{drop.rows} {drop.reason} ({drop.example})" for drop in dropped[:3])


def explain_empty_bucket(name: str, estimate: PrepEstimate, data: DataConfig) -> str:
    """`data.buckets: no clip fills 49x480x832 (…). Remove it, …`."""
    frames, height, width = bucket_size(name)
    largest_width, largest_height = estimate.largest
    facts = f"largest source: {largest_width}x{largest_height}, longest {estimate.longest_s:.1f} s"
    if frames == 1 and not estimate.images and max(data.shapes)[0] > 1:
        facts, remedy = "no source is an image, and videos take buckets of more frames", "or add images"
    elif frames > 1 and not estimate.longest_s:
        facts, remedy = "all sources are images", "or add videos"
    elif frames > 1 and frames / data.fps > estimate.longest_s + 0.01:
        facts += f"; it takes {frames / data.fps:.2f} s at {data.fps:g} fps"
        remedy = "give it fewer frames, or raise data.fps"
    elif 0 < data.max_enlarge < max(height / largest_height, width / largest_width):
        remedy = "lower it, or raise data.max_enlarge"
    else:
        facts, remedy = f"{facts}; every clip is nearer to another bucket", "or add sources of its shape and size"
    return f"data.buckets: no clip fills {name} ({facts}). Remove it, {remedy}"


def format_estimate(estimate: PrepEstimate, recipe: Recipe) -> str:
    """A table of the buckets, and a few lines."""
    images = f", {estimate.images:,} images" if estimate.images else ""
    sampled = f" (scaled up from {estimate.probed:,} of {estimate.files:,} files)"
    lines = [
        f"{estimate.rows:,} rows of {estimate.sources:,} sources: {estimate.clips:,} clips from "
        f"{hours(estimate.video_s / 3600)} of video{images}{sampled if estimate.probed < estimate.files else ''}",
        "",
        f"{'bucket':<16}{'clips':>10}{'held out':>10}{'hours':>10}{'tokens/clip':>13}{'tokens':>16}{'latents':>10}"
        f"{'steps/epoch':>13}",
        *(_table_row(bucket.name, [bucket], f"{bucket.tokens:,}") for bucket in estimate.buckets),
    ]
    if len(estimate.buckets) > 1:
        lines.append(_table_row("all", estimate.buckets, ""))
    if estimate.dropped:
        lines += ["", "dropped (rows, reason, an example)"]
        lines += [f"{drop.rows:>8,}  {drop.reason:<16}{drop.example}" for drop in estimate.dropped]
    unknown = ["damaged frames", *filters_needing_pixels(recipe.selection)]
    lines += ["", f"not known from headers: {', '.join(unknown)}"]
    if estimate.steps:
        lines += _epoch_lines(estimate, recipe)
    train = {bucket.name: bucket.clips - bucket.held_out for bucket in estimate.buckets}
    lines += [f"WARNING: {warning}" for warning in small_bucket_warnings(train, recipe.train.batch_size)]
    return "\n".join([*lines, *_disk_lines(estimate, recipe.data.output), *_work_lines(estimate)])


def _table_row(name: str, buckets: Sequence[BucketEstimate], tokens: str) -> str:
    seconds, total = sum(b.clips * b.seconds for b in buckets), sum(b.clips * b.tokens for b in buckets)
    return (
        f"{name:<16}{sum(b.clips for b in buckets):>10,}{sum(b.held_out for b in buckets):>10,}{seconds / 3600:>10.2f}"
        f"{tokens:>13}{total:>16,}{in_bytes(sum(b.clips * b.clip_bytes for b in buckets)):>10}"
        f"{sum(b.steps for b in buckets):>13,}"
    )


def _epoch_lines(estimate: PrepEstimate, recipe: Recipe) -> list[str]:
    """Epochs of train.steps; with data.image_ratio images and videos have epochs of their own."""
    images = sum(bucket.steps for bucket in estimate.buckets if bucket_size(bucket.name)[0] == 1)
    train, ratio = recipe.train, recipe.data.image_ratio
    kinds = [("", estimate.steps, 1.0)]
    if ratio is not None:
        kinds = [(" of videos", estimate.steps - images, 1 - ratio), (" of images", images, ratio)]
    lines: list[str] = []
    for kind, steps, share in kinds:
        epochs, taken = share * train.steps / max(1, steps), "" if share == 1 else f"{share:.3g} of "
        lines.append(
            f"training: {steps:,} steps per epoch{kind} at train.batch_size {train.batch_size}; {taken}train.steps "
            f"{train.steps:,} is {epochs:,.{1 if epochs < 100 else 0}f} epochs"
        )
    return lines


def _disk_lines(estimate: PrepEstimate, output: str) -> list[str]:
    """Bytes of the shards, and a warning if the disk is too small."""
    total = estimate.latent_bytes + estimate.text_bytes
    parts = f"latents {in_bytes(estimate.latent_bytes)}, text {in_bytes(estimate.text_bytes)}"
    line = f"disk: {in_bytes(total)} in {output} ({parts})"
    if estimate.stored_bytes:
        line += f", of which {in_bytes(estimate.stored_bytes)} exist"
    if estimate.free_bytes is None:
        return [line]
    lacking = total - estimate.stored_bytes - estimate.free_bytes
    warning = [f"WARNING: that disk lacks {in_bytes(lacking)}; set data.output to a larger one"] if lacking > 0 else []
    return [f"{line}; {in_bytes(estimate.free_bytes)} free", *warning]


def _work_lines(estimate: PrepEstimate) -> list[str]:
    """Hours, and the seconds that they are computed from."""
    measured = estimate.measured
    if measured is None:
        return ["work: not measured" + (": no clip could be encoded" if estimate.clips else "")]
    decode, vae, text = estimate.hours(measured)
    has_gpu = measured.device != "cpu"
    line = (
        f"work, {measured.clips} clips measured: opening {measured.open_s:.2g} s a source and decoding "
        f"{measured.decode_s:.2g} s a clip on one core; VAE {measured.vae_s:.2g} s a million pixels and "
        f"text {measured.text_s:.2g} s a caption on {measured.device if has_gpu else 'one core'}"
    )
    if has_gpu:
        return [
            line,
            f"      {hours(vae + text)} of a GPU (VAE {hours(vae)}, text {hours(text)}) and {hours(decode)} of a core "
            f"for decoding: {decode / max(1e-9, vae + text):.2g} cores for every GPU keep it busy",
        ]
    total, cpus = decode + vae + text, usable_cores()
    return [
        line,
        f"      {hours(total)} of a core: decoding {hours(decode)}, VAE {hours(vae)}, text {hours(text)}; "
        f"{hours(total / cpus)} on this machine's {cpus} cores",
    ]


def filters_needing_pixels(selection: SelectionConfig) -> tuple[str, ...]:
    """The active filters that need decoded frames or whole files."""
    keys = ("black", "frozen", "min_motion", "max_motion", "min_sharpness", "scene_cuts", "duplicates")
    on = [key for key in keys if getattr(selection, key)]
    return tuple(f"selection.{key}" for key in [*on, *["near_duplicates"] * (selection.near_duplicates is not None)])


def hours(count: float) -> str:
    """Hours as `1.2 h`; less than one as minutes or seconds."""
    if count >= 1:
        return f"{count:,.1f} h"
    return f"{count * 60:.1f} min" if count * 60 >= 1 else f"{count * 3600:.2g} s"
