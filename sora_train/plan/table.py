"""The text of `sora preflight --plan RECIPE`. Needs no cluster, and no shards; uses the shards' manifest if any."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field, PositiveFloat

from sora_train.data.config import undividable_shapes
from sora_train.errors import RecipeError, UserError
from sora_train.latent_shape import latent_shape
from sora_train.lora.flops import training_flops
from sora_train.manifest import Manifest
from sora_train.plan.activations import Sizes, activations
from sora_train.plan.estimate import Estimate, estimate, largest_micro_batch
from sora_train.plan.forecast import GPUS_PER_NODE
from sora_train.plan.forecast_table import format_forecast
from sora_train.plan.measured import Figure
from sora_train.plan.states import checkpoint_bytes, host_memory, parameter_counts
from sora_train.plan.steps import configs_of, mean_step_flops, step_table, vae_factors
from sora_train.recipe import Recipe
from sora_train.schema import bucket_name
from sora_train.storage import in_bytes
from sora_train.terminal import print_result
from sora_train.train.config import TrainConfig
from sora_train.train.hardware import PEAKS, peak_of
from sora_train.train.loop import accumulation

WORKERS = (1, 2, 4, 8, 16, 32, 64)
MODES = ("none", "selective", "full")
WIDTH = 15
EIGHTY_GB = ("A100", "A800", "H100", "H100 PCIe", "H800")


@dataclass(frozen=True)
class PlanOptions:
    """The GPU that the plan is for."""

    gpu: str = "H100"
    """GPU, such as `A100` or `H100`, whose data sheet gives the FLOP/s."""
    memory: PositiveFloat | None = None
    """Usable memory of a GPU in 10⁹ bytes: 80 for cards sold as 80 GB, which have 85, of which CUDA, NCCL and
    fragmentation take the rest. Required for other GPUs."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.35
    """Share of the GPU's FLOP/s that training is assumed to reach."""
    mtbf: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Mean hours between failures of all GPUs together. By a published rate if not given."""


def plan_inputs(recipe: Recipe) -> tuple[dict[str, Sizes], list[int], str]:
    """Sizes of a clip with the longest caption by bucket, clips of each (equal if unknown), and the source of both.

    From the recipe's shards if they exist with its shapes, else from its VAE if available, else as for most VAEs.
    """
    names = [bucket_name(*shape) for shape in recipe.data.shapes]
    try:
        manifest = Manifest.load(recipe.data.output)
    except UserError:
        manifest = None
    if manifest is not None and set(names) <= manifest.buckets.keys():
        factors, tokens = (manifest.vae.factor, manifest.vae.time_factor), manifest.text.max_tokens
        clips, source = [manifest.buckets[name] for name in names], f"the shards in {recipe.data.output}"
    else:
        factors, source = vae_factors(recipe)
        tokens, clips = recipe.codec.max_tokens, [1] * len(names)
    if wrong := undividable_shapes(recipe.data, *factors, recipe.model.patch):
        raise RecipeError("\n".join(wrong))
    shapes = [latent_shape(recipe.model.in_channels, *factors, *shape) for shape in recipe.data.shapes]
    if why := recipe.conditioning.leaves_nothing(max(f for f, *_ in shapes)):
        raise RecipeError(why)
    timed, shared = recipe.conditioning.frame_times, recipe.cluster.sequence_parallel
    sizes = {name: Sizes(1, f, h, w, tokens, timed, shared) for name, (f, _, h, w) in zip(names, shapes, strict=True)}
    return sizes, clips, source


def show_plan(recipe: Recipe, options: PlanOptions) -> None:
    """Prints the plan. UserError if the recipe does not fit the GPU."""
    print_result(format_plan(recipe, options))
    need, memory = largest_bucket(recipe, plan_inputs(recipe)[0])[-1].total, usable_memory(options)
    if need > int(memory * 1e9):
        takes = f"it takes {in_bytes(need)}, and {memory:g} GB are usable"
        raise UserError(f"the recipe does not fit: {takes}. The plan has remedies", code="memory")


def format_plan(recipe: Recipe, options: PlanOptions) -> str:
    """The whole text."""
    memory, (buckets, clips, source) = usable_memory(options), plan_inputs(recipe)
    name, sizes, own = largest_bucket(recipe, buckets)
    train, world, room = recipe.train, recipe.cluster.fewest, int(memory * 1e9)
    planned_step = Figure(step_seconds(recipe, buckets, clips, options), f"planned, at {options.mfu:.0%} MFU")
    lines = [
        f"{recipe.name}: {describe_parameters(recipe)}, {train.precision}, "
        f"ZeRO {train.zero_stage}, {counted(world, 'worker')}"
        + (f" in groups of {sizes.shared} that share clips" if sizes.shared > 1 else "")
        + f", micro-batches of {counted(sizes.b, 'clip')}, "
        f"activation_checkpointing {train.activation_checkpointing}, offload {train.offload}",
        f"clips of {name}: latents {sizes.f}x{sizes.h}x{sizes.w}, {sizes.tokens(recipe.model) // sizes.b:,} tokens, "
        f"captions of up to {sizes.l} tokens (from {source})",
        "",
        *grid(recipe, sizes, room, memory),
        "",
        *breakdown(recipe, own, sizes),
        "",
        verdict(recipe, own, sizes, room, memory),
        *cost(recipe, buckets, clips, options),
        *step_table(recipe, buckets, recipe.cluster.most),
        "",
        *format_forecast(recipe, planned_step, options.mtbf),
    ]
    return "\n".join(lines)


def describe_parameters(recipe: Recipe) -> str:
    """How many parameters there are, and with adapters how many of them are trained."""
    counts, lora = parameter_counts(recipe.model, recipe.lora), recipe.lora
    every, trained = sum(counts.every), sum(counts.trained)
    share = f", of which LoRA of rank {lora.rank} trains {trained / 1e6:,.4g} M ({trained / every:.2%})"
    return f"{every / 1e6:,.4g} M parameters{share if lora.rank else ''}"


def usable_memory(options: PlanOptions) -> float:
    """Usable memory of the GPU in 10⁹ bytes. RecipeError if it must be given and is not."""
    if options.memory is None and options.gpu not in EIGHTY_GB:
        raise RecipeError(
            f"--gpu {options.gpu} needs --memory, its usable memory in 10⁹ bytes, such as 22 for a card of 24 GB. The "
            f"default of 80 holds for {', '.join(EIGHTY_GB)}"
        )
    return options.memory or 80.0


def largest_bucket(recipe: Recipe, buckets: dict[str, Sizes]) -> tuple[str, Sizes, Estimate]:
    """The bucket whose micro-batches take the most memory, the sizes of one, and the memory.

    With `train.balance` that is the costliest one, whose micro-batch is the recipe's.
    """
    world, found = recipe.cluster.fewest, list[tuple[str, Sizes, Estimate]]()
    configs = configs_of(recipe, buckets, world)
    fewest = min(own.batch_size for own in configs.values())
    for name, own in configs.items():
        if own.batch_size == fewest:
            sizes = replace(buckets[name], b=own.micro_batch_size)
            found.append((name, sizes, estimate(recipe.model, own, sizes, world, recipe.lora)))
    return max(found, key=lambda each: each[2].backward)


def grid(recipe: Recipe, sizes: Sizes, room: int, memory: float) -> list[str]:
    """Memory and largest micro-batch by ZeRO stage and number of workers; the recipe's own is in brackets."""
    train, own = recipe.train, recipe.cluster.fewest
    columns = sorted({own, recipe.cluster.most, *worker_counts(train, sizes)})
    lines = [
        f"GB per GPU with micro-batches of {counted(sizes.b, 'clip')} / largest micro-batch in "
        f"{memory:g} GB (the recipe's own in brackets)",
        f"{'workers':<9}" + "".join(f"{n:>{WIDTH}}" for n in columns),
    ]
    for stage in range(4):
        changed, cells = at_stage(train, stage), []
        for world in columns:
            total = estimate(recipe.model, changed, sizes, world, recipe.lora).total
            most = largest_micro_batch(recipe.model, changed, sizes, world, room, recipe.lora)
            cell = f"{total / 1e9:.3g} / {most or 'none'}"
            cells.append(f"[{cell}]" if (stage, world) == (train.zero_stage, own) else f"{cell} ")
        lines.append(f"ZeRO {stage:<4}" + "".join(f"{cell:>{WIDTH}}" for cell in cells))
    return lines


def worker_counts(train: TrainConfig, sizes: Sizes) -> list[int]:
    """Numbers of workers to compare: whole groups that share clips, at most one for each clip of a batch."""
    return [n for n in WORKERS if n % sizes.shared == 0 and n // sizes.shared <= train.batch_size]


def at_stage(train: TrainConfig, stage: int) -> TrainConfig:
    """The same at another ZeRO stage, without offload if the stage has none."""
    lowest = {"none": 0, "optimizer": 1, "all": 3}[train.offload]
    return train.model_copy(update={"zero_stage": stage, "offload": train.offload if stage >= lowest else "none"})


def breakdown(recipe: Recipe, own: Estimate, sizes: Sizes) -> list[str]:
    """What the memory of the recipe consists of."""
    held = own.states
    blocks = [max(activations(recipe.model, recipe.train.model_copy(update={"activation_checkpointing": mode}),
                              sizes, recipe.lora).blocks) for mode in MODES]  # fmt: skip
    by_mode = ", ".join(f"{mode} {in_bytes(count)}" for mode, count in zip(MODES, blocks, strict=True))
    rows = [
        ("parameters", held.parameters, "with the frozen base" if recipe.lora.rank else ""),
        ("gradients", held.gradients, ""),
        ("optimizer", held.masters + held.moments, "float32 masters and two moments"),
        ("EMA", held.ema, ""),
        ("activations", own.blocks + own.other, f"{in_bytes(own.other)} outside the blocks; largest block: {by_mode}"),
        ("latents, text", own.batch, f"of {counted(sizes.b, 'clip')}, with noise, target and output"),
        ("buffers", own.buffers, "communication, AdamW's step, and gradients of activations, at the peak"),
    ]
    fewest = recipe.cluster.fewest
    lines = [f"{f'each of {fewest} GPUs' if fewest > 1 else 'the GPU':<16}{'bytes':>10}"]
    lines += [f"{what:<16}{in_bytes(count):>10}  {note}".rstrip() for what, count, note in rows]
    note, added = "", sum(count for _, count, _ in rows)
    if added > own.total:
        note = "  less than the sum: gradients appear as activations are freed"
    lines.append(f"{'at most':<16}{in_bytes(own.total):>10}{note}")
    parts, averaged = host_memory(recipe.model, recipe.train, fewest, recipe.lora)
    parts["row groups of shards (train.shard_cache_gb)"] = int(1e9 * recipe.train.shard_cache_gb)
    each, note = sum(parts.values()), ", ".join(name for name, count in parts.items() if count)
    lines.append(f"{'in CPU memory':<16}{in_bytes(each):>10}  at most, per worker: {note}")
    there = min(fewest, GPUS_PER_NODE)
    node = f"with {counted(there, 'worker')}; {in_bytes(averaged)} are the averaged weights, on rank 0 at a checkpoint"
    lines.append(f"{'of one node':<16}{in_bytes(there * each + averaged):>10}  {node}")
    return lines


def verdict(recipe: Recipe, own: Estimate, sizes: Sizes, room: int, memory: float) -> str:
    """Whether the recipe fits, and which changes would make it fit."""
    if own.total <= room:
        most = largest_micro_batch(recipe.model, recipe.train, sizes, recipe.cluster.fewest, room, recipe.lora)
        return f"fits: {in_bytes(own.total)} of {memory:g} GB; train.micro_batch_size up to {most} would"
    remedies = remedies_for(recipe, sizes, room)
    none = "no single key is enough: use ZeRO 3 on more workers with activation_checkpointing full, or a larger GPU"
    return f"does not fit: {in_bytes(own.total)} of {memory:g} GB: {'; or '.join(remedies) or none}"


def remedies_for(recipe: Recipe, sizes: Sizes, room: int) -> list[str]:
    """Changes of a single key that make the recipe's step fit into `room` bytes, one for each key."""
    model, train, world, lora = recipe.model, recipe.train, recipe.cluster.fewest, recipe.lora
    stages, modes = range(train.zero_stage + 1, 4), MODES[MODES.index(train.activation_checkpointing) + 1 :]
    offload = ["optimizer"] if train.offload == "none" and train.zero_stage else []
    fixed = recipe.cluster.most == world  # an elastic run has no groups
    groups = [n for n in WORKERS if n > sizes.shared and (world % n == 0 or world == 1) and model.shares_clips_by(n)]
    both = "cluster.workers and " if world == 1 else ""
    changes: list[list[tuple[str, dict[str, Any], int, int]]] = [
        [
            (f"set train.activation_checkpointing to {mode}", {"activation_checkpointing": mode}, world, sizes.shared)
            for mode in modes
        ],
        [(f"raise train.zero_stage to {stage}", dict(at_stage(train, stage)), world, sizes.shared) for stage in stages],
        [(f"raise cluster.workers to {n}", {}, n, sizes.shared) for n in worker_counts(train, sizes) if world < n],
        [(f"set train.offload to {where}", {"offload": where}, world, sizes.shared) for where in offload],
        [(f"set {both}cluster.sequence_parallel to {n}", {}, max(world, n), n) for n in groups if fixed],
    ]
    most = largest_micro_batch(model, train, sizes, world, room, lora)
    found = [f"lower train.micro_batch_size to {most}"] if most else []

    def fits(update: dict[str, Any], workers: int, shared: int) -> bool:
        changed = train.model_copy(update=update)
        return estimate(model, changed, replace(sizes, shared=shared), workers, lora).total <= room

    for same_key in changes:  # the mildest that fits
        found += [text for text, update, workers, shared in same_key if fits(update, workers, shared)][:1]
    return found


def step_seconds(recipe: Recipe, buckets: dict[str, Sizes], clips: list[int], options: PlanOptions) -> float:
    """Mean seconds of a step at the assumed MFU. RecipeError for a GPU whose FLOP/s are not known."""
    train, world = recipe.train, recipe.cluster.most
    peak = peak_of(options.gpu, train.half)
    if peak is None:
        raise RecipeError(f"--gpu {options.gpu}: its FLOP/s are not known; those of {', '.join(PEAKS)} are")
    return mean_step_flops(recipe, buckets, clips, world) / (world * peak * options.mfu)


def cost(recipe: Recipe, buckets: dict[str, Sizes], clips: list[int], options: PlanOptions) -> list[str]:
    """FLOPs, hours and disk."""
    model, train, world, lora = recipe.model, recipe.train, recipe.cluster.most, recipe.lora
    hours = train.steps * step_seconds(recipe, buckets, clips, options) / 3600
    weighted = [(count / max(1, sum(clips)), s) for count, s in zip(clips, buckets.values(), strict=True)]
    clip = sum(share * training_flops(model, lora, s.f, s.h, s.w, s.l, s.frame_times) for share, s in weighted)
    groups = world // recipe.cluster.sequence_parallel
    added = accumulation(train, groups) * train.micro_batch_size * groups - train.batch_size
    padding = f"; {added} clips of a step's micro-batches are padding" if added and not train.balance else ""
    again = " (blocks twice forward, as they are recomputed)" if train.activation_checkpointing == "full" else ""
    size, peak = checkpoint_bytes(model, lora), peak_of(options.gpu, train.half) or 0.0
    return [
        f"compute: {clip:.3g} FLOPs per clip, forward and backward{again}; {train.steps:,} steps of "
        f"{counted(train.batch_size, 'clip')}{' or more' * (train.balance > 0)} are {in_hours(hours)} on {world} "
        f"{options.gpu}, assumed to reach {options.mfu:.0%} of its {peak / 1e12:,.0f} TFLOP/s"
        f"{' in bf16' * train.half}{padding}",
        f"disk: {in_bytes(size)} per checkpoint; train.keep_checkpoints {train.keep_checkpoints} and one being "
        f"written: {in_bytes(size * (train.keep_checkpoints + 1))}",
    ]


def counted(count: int, what: str) -> str:
    """`1 clip`, `2 clips`."""
    return f"{count} {what}{'s' * (count != 1)}"


def in_hours(hours: float) -> str:
    """`1.2 h`, `12 min`, `3 s`."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.2g} min" if hours * 60 >= 1 else f"{hours * 3600:.2g} s"
