"""A plan for people, and what is wrong with it."""

from __future__ import annotations

from data_prep.estimate.estimate import BucketPlan, Dropped, Plan
from data_prep.reasons import BAD_SOURCE_REASONS
from data_prep.workers import available_cpus
from sora_train.data.config import DataConfig, small_buckets
from sora_train.errors import RecipeError, UserError
from sora_train.schema import bucket_name, bucket_size
from sora_train.storage import in_bytes


def empty_buckets(asked: tuple[tuple[int, int, int], ...], counts: dict[str, int]) -> list[str]:
    """Names of the buckets that were asked for and hold no clip."""
    return [name for name in (bucket_name(*shape) for shape in asked) if not counts.get(name)]


def judge(plan: Plan, data: DataConfig) -> None:
    """Raises UserError or RecipeError, with the remedy, where prep or training on such shards could only fail."""

    def three(dropped: list[Dropped]) -> str:
        return "; ".join(f"{drop.rows} {drop.reason} ({drop.example})" for drop in dropped[:3])

    commonest = three(list(plan.dropped))
    if plan.undecodable > data.max_bad_fraction * plan.sources:
        bad = three([drop for drop in plan.dropped if drop.reason in BAD_SOURCE_REASONS])
        raise UserError(
            f"{plan.undecodable} of {plan.sources} sources can't be read, more than data.max_bad_fraction "
            f"{data.max_bad_fraction:g} allows: {bad}; mend or remove them, check data.root, or raise "
            "data.max_bad_fraction"
        )
    if not plan.clips:
        raise UserError(f"no clip in {plan.rows} rows: {commonest}; check data.root, data.buckets and selection")
    empty = empty_buckets(data.shapes, {bucket.name: bucket.clips for bucket in plan.buckets})
    if empty:
        raise RecipeError("\n".join(why_empty(name, plan, data) for name in empty))
    if not plan.steps:
        raise RecipeError(
            f"data.holdout_fraction {data.holdout_fraction:g} holds out all {plan.clips} clips; lower it, or add "
            "sources"
        )


def why_empty(name: str, plan: Plan, data: DataConfig) -> str:
    """`data.buckets: no clip fills 49x480x832 (…); remove it, …`."""
    frames, height, width = bucket_size(name)
    largest_width, largest_height = (int(number) for number in plan.largest.split("x"))
    facts = f"largest source: {plan.largest}, longest {plan.longest_s:.1f} s"
    if frames == 1 and not plan.stills and max(data.shapes)[0] > 1:
        facts, remedy = "no source is a picture, and videos take buckets of more frames", "or add pictures"
    elif frames > 1 and not plan.longest_s:
        facts, remedy = "all sources are pictures", "or add videos"
    elif frames > 1 and frames / data.fps > plan.longest_s + 0.01:
        facts += f"; it takes {frames / data.fps:.2f} s at {data.fps:g} fps"
        remedy = "give it fewer frames, or raise data.fps"
    elif 0 < data.max_enlarge < max(height / largest_height, width / largest_width):
        remedy = "lower it, or raise data.max_enlarge"
    else:
        facts, remedy = f"{facts}; every clip is nearer to another bucket", "or add sources of its shape and size"
    return f"data.buckets: no clip fills {name} ({facts}); remove it, {remedy}"


def format_plan(plan: Plan) -> str:
    """The plan as a table and a few lines."""
    pictures = f", {plan.stills} pictures" if plan.stills else ""
    lines = [
        f"{plan.rows:,} rows of {plan.sources:,} sources: {plan.clips:,} clips from "
        f"{hours(plan.video_s / 3600)} of video{pictures}",
        "",
        f"{'bucket':<16}{'clips':>10}{'held out':>10}{'hours':>10}{'tokens/clip':>13}{'tokens':>16}{'latents':>10}"
        f"{'steps/epoch':>13}",
        *map(row_of, plan.buckets),
    ]
    if len(plan.buckets) > 1:
        lines.append(
            f"{'all':<16}{plan.clips:>10,}{sum(b.held_out for b in plan.buckets):>10,}"
            f"{sum(b.clips * b.seconds for b in plan.buckets) / 3600:>10.2f}{'':>13}"
            f"{sum(b.clips * b.tokens for b in plan.buckets):>16,}{in_bytes(plan.latent_bytes):>10}{plan.steps:>13,}"
        )
    if plan.dropped:
        lines += ["", "left out (rows, reason, an example)"]
        lines += [f"{drop.rows:>8,}  {drop.reason:<16}{drop.example}" for drop in plan.dropped]
    lines += ["", f"not known from headers: damaged frames{''.join(f', {key}' for key in plan.unknown)}"]
    if plan.steps:
        lines += training(plan)
    left = {bucket.name: bucket.clips - bucket.held_out for bucket in plan.buckets}
    lines += [f"WARNING: {said}" for said in small_buckets(left, plan.batch_size)]
    return "\n".join([*lines, *disk(plan), *work(plan)])


def training(plan: Plan) -> list[str]:
    """How often training takes every clip; with data.image_ratio pictures and videos have epochs of their own."""
    pictures = sum(bucket.steps for bucket in plan.buckets if bucket_size(bucket.name)[0] == 1)
    kinds = [("", plan.steps, 1.0)]
    if plan.image_ratio is not None:
        kinds = [
            (" of videos", plan.steps - pictures, 1 - plan.image_ratio),
            (" of pictures", pictures, plan.image_ratio),
        ]
    lines: list[str] = []
    for kind, steps, ratio in kinds:
        epochs = ratio * plan.train_steps / max(1, steps)
        taken = "" if ratio == 1 else f"{ratio:.3g} of "
        lines.append(
            f"training: {steps:,} steps per epoch{kind} at train.batch_size {plan.batch_size}; {taken}train.steps "
            f"{plan.train_steps:,} is {epochs:,.{1 if epochs < 100 else 0}f} epochs"
        )
    return lines


def row_of(bucket: BucketPlan) -> str:
    """A line of the table."""
    return (
        f"{bucket.name:<16}{bucket.clips:>10,}{bucket.held_out:>10,}{bucket.clips * bucket.seconds / 3600:>10.2f}"
        f"{bucket.tokens:>13,}{bucket.clips * bucket.tokens:>16,}{in_bytes(bucket.clips * bucket.clip_bytes):>10}"
        f"{bucket.steps:>13,}"
    )


def disk(plan: Plan) -> list[str]:
    """What the shards take, and whether there is room."""
    total = plan.latent_bytes + plan.text_bytes
    parts = f"latents {in_bytes(plan.latent_bytes)}, text {in_bytes(plan.text_bytes)} by {plan.tokenized:,} captions"
    line = f"disk: {in_bytes(total)} in {plan.output} ({parts})"
    if plan.held_bytes:
        line += f", of which {in_bytes(plan.held_bytes)} are there"
    if plan.free_bytes is None:
        return [line]
    lacking = total - plan.held_bytes - plan.free_bytes
    warning = [f"WARNING: that disk lacks {in_bytes(lacking)}; set data.output to a larger one"] if lacking > 0 else []
    return [f"{line}; {in_bytes(plan.free_bytes)} free", *warning]


def work(plan: Plan) -> list[str]:
    """Hours, and what they were reckoned from."""
    if plan.work is None:
        return ["work: not measured" + (": no clip could be encoded here, or no GPU became free" if plan.clips else "")]
    took, cost = plan.work.measured, plan.work
    gpu = took.device != "cpu"
    start = f"      before the first clip about {cost.start_s:.0f} s more: Ray starts and the networks are loaded"
    where = f"on {took.device}" if gpu else f"on {took.threads} threads"
    lines = [
        f"work, {took.clips} clips measured: opening {took.open_s:.2g} s a source, decoding {took.decode_s:.2g} s a "
        f"clip (on one core), VAE {took.vae_s:.2g} s a clip, text {took.text_s:.2g} s a caption ({where})"
    ]
    if gpu:
        cores_each = cost.decode / max(1e-9, cost.vae + cost.text)
        return [
            *lines,
            f"      {hours(cost.vae + cost.text)} of a GPU (VAE {hours(cost.vae)}, text {hours(cost.text)}) and "
            f"{hours(cost.decode)} of a core for decoding: {cores_each:.2g} cores for every GPU keep it busy",
            start,
        ]
    total = cost.decode + (cost.vae + cost.text) * took.threads
    return [
        *lines,
        f"      {hours(total)} of a core: decoding {hours(cost.decode)}, VAE {hours(cost.vae * took.threads)}, text "
        f"{hours(cost.text * took.threads)}; {hours(total / available_cpus())} on this machine's {available_cpus()} "
        "cores",
        start,
    ]


def hours(count: float) -> str:
    """Hours as `1.2 h`, less than one as minutes or seconds."""
    if count >= 1:
        return f"{count:,.1f} h"
    return f"{count * 60:.1f} min" if count * 60 >= 1 else f"{count * 3600:.2g} s"
