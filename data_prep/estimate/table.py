"""`sora prep RECIPE --plan`: formats an estimate, and refuses what would make prep or training fail."""

from __future__ import annotations

from collections.abc import Container, Sequence

from data_prep.estimate.estimate import BucketEstimate, PrepEstimate, estimate_prep
from data_prep.reasons import BAD_SOURCE_REASONS, FILTERED, QUARANTINED
from sora_train.data.config import DataConfig
from sora_train.errors import RecipeError, UserError
from sora_train.plan.steps import small_bucket_warnings, step_table
from sora_train.recipe import Recipe
from sora_train.storage import in_bytes
from sora_train.terminal import print_result


def show_plan(recipe: Recipe) -> None:
    """Prints the estimate; no cluster is started. Raises UserError if prep or training could only fail."""
    found = estimate_prep(recipe)
    print_result(format_estimate(found, recipe))
    check_estimate(found, recipe.data)


def check_estimate(estimate: PrepEstimate, data: DataConfig) -> None:
    """Raises UserError or RecipeError, with the remedy, if prep or training could only fail."""
    if estimate.bad_sources > data.max_bad_fraction * estimate.sources:
        raise UserError(
            f"{estimate.bad_sources} of {estimate.sources} sources can't be read, more than data.max_bad_fraction "
            f"{data.max_bad_fraction:g} allows: {_examples(estimate, BAD_SOURCE_REASONS)}. Repair or remove them, "
            "check data.root, or raise data.max_bad_fraction",
            code="media",
        )
    if not estimate.clips:
        raise UserError(
            f"no clip in {estimate.rows} rows: {_examples(estimate, {*QUARANTINED, *FILTERED})}. Check data.root, "
            "data.buckets and selection",
            code="media",
        )
    if empty := [bucket for bucket in estimate.buckets if not bucket.clips]:
        names = ", ".join(f"{bucket.name} ({bucket.seconds:.2f} s at {data.fps:g} fps)" for bucket in empty)
        raise RecipeError(
            f"data.buckets: no clip fills {names}; the longest opened source lasts {estimate.longest_s:.1f} s. Remove "
            "it, give it fewer frames or pixels, raise data.max_enlarge if it is set, or add sources of its shape; "
            "images fill only 1x…"
        )
    if not sum(bucket.steps for bucket in estimate.buckets):
        raise RecipeError(
            f"data.holdout_fraction {data.holdout_fraction:g} holds out all {estimate.clips} clips. Lower it, or add "
            "sources"
        )


def _examples(estimate: PrepEstimate, reasons: Container[str]) -> str:
    some = [(reason, *found) for reason, found in estimate.dropped.items() if reason in reasons]
    return "; ".join(f"{count} {reason} ({example})" for reason, count, example in some[:3])


def format_estimate(estimate: PrepEstimate, recipe: Recipe) -> str:
    """A table of the buckets, and a few lines."""
    sampled = f" (scaled up from {estimate.probed:,} of {estimate.files:,} files to process)"
    lines = [
        f"{estimate.rows:,} rows of {estimate.sources:,} sources: {estimate.clips:,} clips, {estimate.encoded:,} of "
        f"them encoded already, {estimate.clips - estimate.encoded:,} to encode"
        f"{sampled if estimate.probed < estimate.files else ''}",
        "",
        f"{'bucket':<16}{'clips':>10}{'encoded':>10}{'held out':>10}{'hours':>10}{'tokens/clip':>13}{'latents':>10}"
        f"{'steps/epoch':>13}",
        *(_table_row(bucket.name, [bucket], f"{bucket.tokens:,}") for bucket in estimate.buckets),
    ]
    if len(estimate.buckets) > 1:
        lines.append(_table_row("all", estimate.buckets, ""))
    if estimate.dropped:
        lines += ["", "dropped (rows, reason, an example)"]
        lines += [f"{rows:>8,}  {reason:<16}{example}" for reason, (rows, example) in estimate.dropped.items()]
    lines += ["", "not known from headers: damaged frames, holes, scene cuts, duplicates, filters of pixels"]
    if (steps := sum(bucket.steps for bucket in estimate.buckets)) and recipe.data.image_ratio is None:
        lines.append(f"training: {steps:,} steps per epoch; train.steps is {recipe.train.steps / steps:,.1f} epochs")
    if estimate.cut_share:
        lines.append(
            f"WARNING: {estimate.cut_share:.2g} of the captions have more than codec.max_tokens "
            f"{recipe.codec.max_tokens} tokens, and their end is cut off"
        )
    train = {bucket.name: bucket.clips - bucket.held_out for bucket in estimate.buckets}
    sizes = {bucket.name: bucket.sizes for bucket in estimate.buckets}
    if table := step_table(recipe, sizes, recipe.cluster.most):
        lines += ["", *table]
    lines += [f"WARNING: {warning}" for warning in small_bucket_warnings(recipe, train, sizes)]
    return "\n".join([*lines, *_disk_lines(estimate, recipe.data.output), *_work_lines(estimate)])


def _table_row(name: str, buckets: Sequence[BucketEstimate], tokens: str) -> str:
    clips, encoded, held, steps = (
        f"{sum(getattr(bucket, key) for bucket in buckets):,}" for key in ("clips", "encoded", "held_out", "steps")
    )
    hours, size = sum(b.clips * b.seconds for b in buckets) / 3600, sum(b.clips * b.clip_bytes for b in buckets)
    return f"{name:<16}{clips:>10}{encoded:>10}{held:>10}{hours:>10.2f}{tokens:>13}{in_bytes(size):>10}{steps:>13}"


def _disk_lines(estimate: PrepEstimate, output: str) -> list[str]:
    """Bytes of the shards, and a warning if the disk is too small."""
    total, free = estimate.latent_bytes + estimate.text_bytes, estimate.free_bytes
    parts = f"latents {in_bytes(estimate.latent_bytes)}, text {in_bytes(estimate.text_bytes)}"
    line = f"disk: {in_bytes(total)} in {output} ({parts}), of which {in_bytes(estimate.stored_bytes)} exist"
    if free is None:
        return [line]
    lacking = total - estimate.stored_bytes - free
    warning = [f"WARNING: that disk lacks {in_bytes(lacking)}; set data.output to a larger one"] if lacking > 0 else []
    return [f"{line}; {in_bytes(free)} free", *warning]


def _work_lines(estimate: PrepEstimate) -> list[str]:
    """Hours, and the seconds that they are computed from."""
    measured = estimate.measured
    if measured is None:
        return ["work: not measured" + (": no clip could be encoded" if estimate.todo else "")]
    decode, vae, text = map(in_hours, estimate.hours(measured))
    device = "one core" if measured.device == "cpu" else measured.device
    return [
        f"work, {measured.clips} clips measured: opening {measured.open_s:.2g} s a source and decoding "
        f"{measured.decode_s:.2g} s a clip on one core; VAE {measured.vae_s:.2g} s a million pixels and text "
        f"{measured.text_s:.2g} s a caption on {device}",
        f"      decoding {decode} of one core; VAE {vae} and text {text} of {device}",
    ]


def in_hours(count: float) -> str:
    """Hours as `1.2 h`; less than one as minutes or seconds."""
    if count >= 1:
        return f"{count:,.1f} h"
    return f"{count * 60:.1f} min" if count * 60 >= 1 else f"{count * 3600:.2g} s"
