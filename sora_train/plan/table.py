"""`sora preflight --plan RECIPE`: the plan for people. Needs no cluster and no shards; what shards say is used, if any
are there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field, PositiveFloat

from sora_train.codec.files import find_vae
from sora_train.data.config import small_bucket_warnings
from sora_train.data.shards import ShardSet
from sora_train.errors import RecipeError, UserError
from sora_train.manifest import Manifest, latent_shape
from sora_train.model.flops import forward_flops
from sora_train.plan.activations import Sizes, kept_by_block
from sora_train.plan.estimate import Estimate, estimate, largest_micro_batch, step_flops
from sora_train.plan.states import checkpoint_bytes, counts
from sora_train.recipe import PIXELS_PER_LATENT, Recipe
from sora_train.schema import bucket_name
from sora_train.storage import in_bytes
from sora_train.train.config import TrainConfig
from sora_train.train.hardware import PEAKS, peak_of
from sora_train.train.loop import accumulation

WORKERS = (1, 2, 4, 8, 16, 32, 64)
WIDTH = 15
EIGHTY_GB = ("A100", "A800", "H100", "H100 PCIe", "H800")


@dataclass(frozen=True)
class PlanOptions:
    """What the plan is for, where no cluster says it."""

    gpu: str = "H100"
    """GPU whose data sheet the hours are reckoned from, such as `A100` or `H100`."""
    memory: PositiveFloat | None = None
    """Memory of a GPU in 10⁹ bytes that training may use: 80 for cards sold as 80 GB, which have 85, of which CUDA,
    NCCL and gaps take the rest; for others it must be given."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.35
    """Share of the GPU's FLOP/s that training is assumed to reach."""


@dataclass(frozen=True)
class Facts:
    """The latents and captions that training will meet, and how that is known."""

    buckets: tuple[tuple[str, Sizes], ...]
    """Name and sizes of each, of one clip; captions as long as they may be."""
    clips: tuple[int, ...]
    """How many clips each holds; equal where that is not known."""
    source: str


def facts_of(recipe: Recipe) -> Facts:
    """What the recipe's shards say, where they are there and are of its shapes; else what its VAE says, if it is at
    hand; else what most VAEs do.
    """
    names = [bucket_name(*shape) for shape in recipe.data.shapes]
    try:
        manifest = Manifest.load(recipe.data.output)
    except UserError:
        manifest = None
    if manifest is not None and set(names) <= manifest.buckets.keys():
        shape_of, tokens = manifest.vae.latent_shape, manifest.text.max_tokens
        clips, source = tuple(manifest.buckets[name] for name in names), f"the shards in {recipe.data.output}"
    else:
        shape_of, source = latents_of(recipe)
        tokens, clips = recipe.codec.max_tokens, (1,) * len(names)
    sizes = [shape_of(*shape) for shape in recipe.data.shapes]
    buckets = tuple((name, Sizes(1, f, h, w, tokens)) for name, (f, _, h, w) in zip(names, sizes, strict=True))
    return Facts(buckets, clips, source)


def too_few_clips(recipe: Recipe) -> list[str]:
    """Warnings of buckets that do not fill a batch; none where there are no shards yet."""
    try:
        shards = ShardSet(recipe.data.output, recipe.data.holdout_fraction)
    except UserError:  # training says what is wrong with them
        return []
    return small_bucket_warnings(shards.rows, recipe.train.batch_size)


def latents_of(recipe: Recipe) -> tuple[Callable[[int, int, int], tuple[int, int, int, int]], str]:
    """The shape of latents by frames, height and width of a clip, and where it is known from. Fetches nothing."""
    name = recipe.codec.vae
    try:
        if name == "builtin" or os.path.isdir(name):
            return find_vae(name, recipe.codec.models).latent_shape, f"codec.vae {name}"
    except UserError:
        pass  # training will say what is wrong with it
    channels = recipe.model.in_channels

    def usual(frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        return latent_shape(channels, PIXELS_PER_LATENT, 1, frames, height, width)

    return usual, f"a VAE that shrinks by {PIXELS_PER_LATENT} and keeps frames, since {name} is not at hand"


def format_plan(recipe: Recipe, options: PlanOptions) -> str:
    """The whole page."""
    facts = facts_of(recipe)
    name, sizes = heaviest(recipe, facts)
    memory = memory_of(options)
    train, world, room = recipe.train, recipe.cluster.fewest, int(memory * 1e9)
    sizes = replace(sizes, b=train.micro_batch_size)
    own = estimate(recipe.model, train, sizes, world)
    lines = [
        f"{recipe.name}: {sum(counts(recipe.model)[0]) / 1e6:,.4g} M parameters, {train.precision}, "
        f"ZeRO {train.zero_stage}, {world} workers, {train.micro_batch_size} clips at a time, "
        f"activation_checkpointing {train.activation_checkpointing}, offload {train.offload}",
        f"clips of {name}: latents {sizes.f}x{sizes.h}x{sizes.w}, {sizes.tokens(recipe.model) // sizes.b:,} tokens, "
        f"captions of up to {sizes.l} tokens (from {facts.source})",
        "",
        *grid(recipe, sizes, room, memory),
        "",
        *breakdown(recipe, own, sizes),
        "",
        verdict(recipe, own, sizes, room, memory),
        *cost(recipe, facts, options),
        *(f"WARNING: {said}" for said in too_few_clips(recipe)),
    ]
    return "\n".join(lines)


def memory_of(options: PlanOptions) -> float:
    """Memory that training may use of the GPU, in 10⁹ bytes. RecipeError where nobody says it."""
    if options.memory is None and options.gpu not in EIGHTY_GB:
        raise RecipeError(
            f"--gpu {options.gpu} needs --memory, the 10⁹ bytes that training may use of it, such as 22 of a card of "
            f"24 GB; without it 80 are taken for {', '.join(EIGHTY_GB)}"
        )
    return options.memory or 80.0


def heaviest(recipe: Recipe, facts: Facts) -> tuple[str, Sizes]:
    """The bucket whose clips take most memory."""
    return max(facts.buckets, key=lambda named: estimate(recipe.model, recipe.train, named[1], 1).total)


def grid(recipe: Recipe, sizes: Sizes, room: int, memory: float) -> list[str]:
    """Memory and largest micro-batch by ZeRO stage and number of workers; the recipe's own is in brackets."""
    train, own = recipe.train, recipe.cluster.fewest
    columns = sorted({own, recipe.cluster.most, *(n for n in WORKERS if n <= train.batch_size)})
    lines = [
        f"GB of a GPU with {train.micro_batch_size} clips at a time / most clips at a time in {memory:g} GB "
        "(the recipe's own in brackets)",
        f"{'workers':<9}" + "".join(f"{n:>{WIDTH}}" for n in columns),
    ]
    for stage in range(4):
        cells: list[str] = []
        for world in columns:
            changed = at_stage(train, stage)
            total = estimate(recipe.model, changed, sizes, world).total
            most = largest_micro_batch(recipe.model, changed, sizes, world, room)
            cell = f"{total / 1e9:.3g} / {most or 'none'}"
            cells.append(f"[{cell}]" if (stage, world) == (train.zero_stage, own) else f"{cell} ")
        lines.append(f"ZeRO {stage:<4}" + "".join(f"{cell:>{WIDTH}}" for cell in cells))
    return lines


def at_stage(train: TrainConfig, stage: int) -> TrainConfig:
    """The same at another ZeRO stage; where a stage can't offload, without."""
    least = {"none": 0, "optimizer": 1, "all": 3}[train.offload]
    return train.model_copy(update={"zero_stage": stage, "offload": train.offload if stage >= least else "none"})


def breakdown(recipe: Recipe, own: Estimate, sizes: Sizes) -> list[str]:
    """What the recipe's own memory is made of."""
    held = own.states
    rows = [
        ("parameters", held.parameters, ""),
        ("gradients", held.gradients, ""),
        ("optimizer", held.masters + held.moments, "float32 masters and two moments"),
        ("EMA", held.ema, ""),
        ("activations", own.blocks + own.around, per_block(recipe, sizes, own)),
        ("latents, text", own.batch, f"of {sizes.b} clips, with noise, target and output"),
        ("buffers", own.buffers, "for communication, the update, and gradients of activations, at the largest moment"),
    ]
    lines = [f"{'each of ' + str(recipe.cluster.fewest) + ' GPUs':<16}{'bytes':>10}"]
    lines += [f"{what:<16}{in_bytes(count):>10}  {note}".rstrip() for what, count, note in rows]
    overlap = "  less than the sum: gradients come as activations go"
    added = sum(count for _, count, _ in rows)
    lines.append(f"{'at most':<16}{in_bytes(own.total):>10}{overlap if added > own.total else ''}")
    host = {**held.host, "row groups of shards (train.shard_cache_gb)": int(1e9 * recipe.train.shard_cache_gb)}
    lines.append(f"{'in the CPU':<16}{in_bytes(sum(host.values())):>10}  at most, each worker: {', '.join(host)}")
    return lines


def per_block(recipe: Recipe, sizes: Sizes, own: Estimate) -> str:
    """A block's activations under each kind of checkpointing."""
    modes = ("none", "selective", "full")
    kept = [
        kept_by_block(
            recipe.model, recipe.train.model_copy(update={"activation_checkpointing": mode}), sizes, True, False
        )
        for mode in modes
    ]
    each = ", ".join(f"{mode} {in_bytes(count)}" for mode, count in zip(modes, kept, strict=True))
    return f"{in_bytes(own.around)} around the blocks; a block that reads the caption: {each}"


def verdict(recipe: Recipe, own: Estimate, sizes: Sizes, room: int, memory: float) -> str:
    """Whether the recipe fits, and what would have it fit."""
    if own.total <= room:
        most = largest_micro_batch(recipe.model, recipe.train, sizes, recipe.cluster.fewest, room)
        return f"fits: {in_bytes(own.total)} of {memory:g} GB; train.micro_batch_size up to {most} would"
    remedies = remedies_for(recipe, sizes, room)
    none = "no single key mends that: take ZeRO 3 on more workers with activation_checkpointing full, or a larger GPU"
    return f"does not fit: {in_bytes(own.total)} of {memory:g} GB: {'; or '.join(remedies) or none}"


def remedies_for(recipe: Recipe, sizes: Sizes, room: int) -> list[str]:
    """Single keys that would have the recipe's step take no more than `room` bytes, the mildest first."""
    model, train, world = recipe.model, recipe.train, recipe.cluster.fewest
    found: list[str] = []

    def fits(changed: TrainConfig, workers: int = world) -> bool:
        return estimate(model, changed, sizes, workers).total <= room

    if most := largest_micro_batch(model, train, sizes, world, room):
        found.append(f"lower train.micro_batch_size to {most}")
    modes = ("none", "selective", "full")
    for mode in modes[modes.index(train.activation_checkpointing) + 1 :]:
        if fits(train.model_copy(update={"activation_checkpointing": mode})):
            found.append(f"set train.activation_checkpointing to {mode}")
            break
    for stage in range(train.zero_stage + 1, 4):
        if fits(at_stage(train, stage)):
            found.append(f"raise train.zero_stage to {stage}")
            break
    for workers in (n for n in WORKERS if world < n <= train.batch_size):
        if fits(train, workers):
            found.append(f"raise cluster.workers to {workers}")
            break
    if train.offload == "none" and train.zero_stage and fits(train.model_copy(update={"offload": "optimizer"})):
        found.append("set train.offload to optimizer")
    return found


def cost(recipe: Recipe, facts: Facts, options: PlanOptions) -> list[str]:
    """FLOPs, hours and disk."""
    model, train, world = recipe.model, recipe.train, recipe.cluster.most
    peak = peak_of(options.gpu, train.precision == "bf16")
    if peak is None:
        raise RecipeError(f"--gpu {options.gpu}: its FLOP/s are not known; those of {', '.join(PEAKS)} are")
    weights = [count / max(1, sum(facts.clips)) for count in facts.clips]
    each = [forward_flops(model, s.f, s.h, s.w, s.l) for _, s in facts.buckets]
    sample = 3 * sum(weight * flops for weight, flops in zip(weights, each, strict=True))
    step = sum(
        weight * step_flops(model, train, sizes, world)
        for weight, (_, sizes) in zip(weights, facts.buckets, strict=True)
    )
    hours = train.steps * step / (world * peak * options.mfu) / 3600
    took = accumulation(train, world) * train.micro_batch_size * world
    padding = (
        f"; of {took} places in a step's micro-batches {took - train.batch_size} are padding: let "
        "train.micro_batch_size x workers divide train.batch_size"
        if took > train.batch_size
        else ""
    )
    kept = checkpoint_bytes(model)
    return [
        f"compute: {sample:.3g} FLOPs a clip, forward and backward; {train.steps:,} steps of {train.batch_size} clips "
        f"are {in_hours(hours)} on {world} {options.gpu}, assumed to reach {options.mfu:.0%} of its "
        f"{peak / 1e12:,.0f} TFLOP/s{padding}",
        f"disk: {in_bytes(kept)} a checkpoint; train.keep_checkpoints {train.keep_checkpoints}, and one that is being "
        f"written: {in_bytes(kept * (train.keep_checkpoints + 1))}",
    ]


def in_hours(hours: float) -> str:
    """`1.2 h`, `12 min`, `3 s`."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.2g} min" if hours * 60 >= 1 else f"{hours * 3600:.2g} s"
