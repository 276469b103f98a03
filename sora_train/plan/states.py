"""Model states of one rank under ZeRO: parameters, gradients, AdamW's float32 masters and moments, EMA.

ZeRO's arithmetic (Rajbhandari et al. 2020, arXiv 1910.02054, section 5) and what DeepSpeed 0.19 adds: padding to equal
parts, small parameters that stage 3 does not partition, and communication buckets of the size in its settings, however
small the model.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from sora_train.lora.adapters import add_adapters, trained_parameters
from sora_train.lora.config import NO_LORA, LoraConfig
from sora_train.lora.int8 import quantise_base
from sora_train.model import ModelConfig, Transformer, build
from sora_train.plan.activations import FLOAT, HALF
from sora_train.train.config import TrainConfig
from sora_train.train.deepspeed_config import deepspeed_config
from sora_train.train.engine import decay_groups
from sora_train.train.loop import accumulation

DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
}
"""DeepSpeed's defaults, in elements."""
ALLREDUCE = 500_000_000
"""Elements that DeepSpeed reduces at once if it has no bucket: stage 0, and stage 1 in bf16."""


@dataclass(frozen=True)
class States:
    """Bytes of the rank that holds most: on its device, except what offload moves to `host`."""

    parameters: int
    masters: int
    """Float32 copies that AdamW updates; none at stage 0, whose parameters are float32."""
    moments: int
    ema: int
    gradients: int
    """After the last micro-batch of a step."""
    lasting: int
    """Those of them that are allocated all the time."""
    bucket: int
    """Communication buckets of gradients."""
    copies: int
    """Copies of gradients during the reduction; at stage 3 also the gradients of one block."""
    gathered: int
    """Stage 3: gathered and prefetched parameters."""
    update: int
    """Temporary memory of AdamW's step."""
    host: dict[str, int] = field(default_factory=dict)
    """What is in CPU memory instead, by the names above."""

    @property
    def held(self) -> int:
        """What is always on the device."""
        return self.parameters + self.masters + self.moments + self.ema


@dataclass(frozen=True)
class Counts:
    """Elements of parameters, in the model's order."""

    frozen: tuple[int, ...]
    """Of those without a gradient, the base of adapters, except int8 ones."""
    int8: tuple[int, ...]
    """Of the base's int8 weights."""
    trained: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    """The trained ones by AdamW's groups."""

    @property
    def every(self) -> tuple[int, ...]:
        return (*self.frozen, *self.int8, *self.trained)


def planned_model(model: ModelConfig, lora: LoraConfig) -> Transformer:
    """The model that training would make, without memory for its weights."""
    with torch.device("meta"):
        made = build(model)
        if lora.rank:
            add_adapters(made, lora)
        if lora.base_precision == "int8":
            quantise_base(made)
    return made


@lru_cache(maxsize=16)
def parameter_counts(model: ModelConfig, lora: LoraConfig = NO_LORA) -> Counts:
    """The parameters of a model, without allocating them."""
    made = planned_model(model, lora)
    groups = [group["params"] for group in decay_groups(made, 0.0)]
    frozen = [p for p in made.parameters() if not p.requires_grad]
    return Counts(
        frozen=tuple(p.numel() for p in frozen if p.is_floating_point()),
        int8=tuple(p.numel() for p in frozen if not p.is_floating_point()),
        trained=tuple(p.numel() for _, p in trained_parameters(made)),
        groups=tuple(tuple(p.numel() for p in group) for group in groups),
    )


@lru_cache(maxsize=16)
def block_elements(model: ModelConfig, lora: LoraConfig = NO_LORA) -> int:
    """Elements with a gradient of the block that has most."""
    blocks = planned_model(replace(model, depth=2), lora).blocks
    return max(sum(p.numel() for _, p in trained_parameters(block)) for block in blocks)


def checkpoint_bytes(model: ModelConfig, lora: LoraConfig = NO_LORA) -> int:
    """Bytes of a checkpoint, at any stage and number of ranks: float32 weights, two moments, EMA, and the EMA model."""
    return 5 * FLOAT * sum(parameter_counts(model, lora).trained)


def host_memory(
    model: ModelConfig, train: TrainConfig, world: int, lora: LoraConfig = NO_LORA
) -> tuple[dict[str, int], int]:
    """Bytes of CPU memory: of each rank by what they are, and the averaged weights on rank 0, at a checkpoint.

    Without row groups of shards, and the processes themselves. Random weights are drawn there before the first step;
    below stage 3 rank 0 has all of them, in the place of the averaged ones.
    """
    held, counts = states(model, train, world, lora), parameter_counts(model, lora)
    copy = 4 * (held.ema + held.host.get("ema", 0))  # weights, two moments, EMA
    more = drawn_bytes(model, world if train.zero_stage == 3 else 0) - copy - sum(held.host.values())
    begins = {} if model.init_from else {"random weights at the start": max(0, more)}
    return {**held.host, "a checkpoint's copy": copy, **begins}, FLOAT * sum(counts.trained)


def drawn_bytes(model: ModelConfig, world: int) -> int:
    """Bytes of random initial weights: a rank's share among `world` ranks, or none if 0, and the largest parameter."""
    counts = parameter_counts(model).trained
    share = sum(-(-count // world) for count in counts) if world else 0
    return FLOAT * (share + max(counts))


def states(model: ModelConfig, train: TrainConfig, world: int, lora: LoraConfig = NO_LORA) -> States:
    """The model states of each of `world` ranks, by `train`'s ZeRO stage, precision and offload."""
    counts = parameter_counts(model, lora)
    trained, base, int8 = counts.trained, sum(counts.frozen), sum(counts.int8)
    total, settings = sum(trained), zero_settings(train, world)
    reduce_bucket = settings["reduce_bucket_size"]
    half = train.half
    number = HALF if half and train.zero_stage else FLOAT
    frozen = HALF if half else FLOAT
    sent = HALF if train.reduce_dtype == "bf16" else FLOAT
    if train.zero_stage == 0:
        return States(
            parameters=FLOAT * total + frozen * base + int8,
            masters=0,
            moments=2 * FLOAT * total,
            ema=FLOAT * max(sum(trained[rank::world]) for rank in range(world)),
            gradients=FLOAT * total,
            lasting=0,
            bucket=0,
            copies=(FLOAT + cast_bytes(sent, FLOAT)) * min(total, ALLREDUCE) if world > 1 else 0,
            gathered=0,
            update=0,
        )
    if train.zero_stage < 3:
        groups = [sum(group) for group in counts.groups]
        placed = sharded_optimizer(train, world, groups, max(trained), number, settings)
        return replace(placed, parameters=placed.parameters + frozen * base + int8)
    part, base_part, int8_part = (
        sum(-(-count // world) for count in each) for each in (trained, counts.frozen, counts.int8)
    )
    least = settings["stage3_param_persistence_threshold"]
    whole = sum(count for count in (*counts.frozen, *trained) if count <= least)
    int8_whole = sum(count for count in counts.int8 if count <= least)
    parted, int8_parted = total + base - whole, int8 - int8_whole
    live = min(parted + int8_parted, settings["stage3_max_live_parameters"])
    gathered = live + min(live, settings["stage3_prefetch_bucket_size"])
    each = (number * parted + int8_parted) / max(1, parted + int8_parted)
    placed = States(
        parameters=number * (part + base_part + whole) + int8_part + int8_whole,
        masters=FLOAT * part,
        moments=2 * FLOAT * part,
        ema=FLOAT * part,
        gradients=FLOAT * part,
        lasting=FLOAT * part,
        bucket=number * reduce_bucket,
        copies=(number + cast_bytes(sent, number)) * min(total, reduce_bucket) + number * block_elements(model, lora),
        gathered=round(each * gathered),
        update=FLOAT * part,
    )
    return offloaded(placed, train, {"parameters": number * (part + base_part) + int8_part})


def sharded_optimizer(
    train: TrainConfig, world: int, groups: list[int], largest: int, number: int, settings: dict[str, Any]
) -> States:
    """Stages 1 and 2: each of AdamW's groups is one flat tensor, padded to equal parts of even length."""
    aligned = [-(-count // (2 * world)) * 2 * world for count in groups]
    part, total, flat = sum(aligned) // world, sum(groups), sum(aligned)
    reduce_bucket, own_bf16 = settings["reduce_bucket_size"], train.zero_stage == 1 and number == HALF
    reduced = FLOAT if train.zero_stage == 1 else number  # stage 1 reduces float32 sums
    sent = HALF if train.reduce_dtype == "bf16" else FLOAT
    buckets = 2 if settings.get("overlap_comm") else 1
    # sums of a micro-batch before they are added to those of the step; not in bf16 at stage 2
    again = FLOAT * part if number == FLOAT else 0
    copies = (reduced + cast_bytes(sent, reduced)) * min(total, reduce_bucket) + 2 * number * largest
    placed = States(
        parameters=number * flat,
        masters=FLOAT * part,
        moments=2 * FLOAT * part,
        ema=FLOAT * sum(min(count, size // world) for count, size in zip(groups, aligned, strict=True)),
        gradients=FLOAT * (total if train.zero_stage == 1 else part),
        lasting=0,
        bucket=buckets * reduced * reduce_bucket,
        copies=max(copies, again) if train.zero_stage == 1 else copies + again,
        gathered=0,
        update=0 if number == HALF else FLOAT * part,
    )
    if train.offload != "none":
        # stage 1 accumulates on the device; device and host have a buffer of the size of the largest parameter
        at_device = placed.gradients if train.zero_stage == 1 else 0
        placed = offloaded(placed, train, {})
        return replace(placed, gradients=at_device + number * largest, lasting=number * largest)
    if own_bf16:  # BF16_Optimizer: float32 sums of all gradients and the bfloat16 ones, no bucket
        gradients, copies = FLOAT * flat + HALF * total, (FLOAT + cast_bytes(sent, FLOAT)) * min(total, ALLREDUCE)
        return replace(placed, gradients=gradients, lasting=FLOAT * flat, bucket=0, copies=copies)
    return placed


def cast_bytes(sent: int, held: int) -> int:
    """Bytes per number of the copy in `train.reduce_dtype`, made if gradients have another dtype."""
    return sent if sent != held else 0


def offloaded(placed: States, train: TrainConfig, parameters: dict[str, int]) -> States:
    """The same with masters, moments, EMA and gradients in CPU memory; with `all` also the parameters."""
    if train.offload == "none":
        return placed
    moved = {name: getattr(placed, name) for name in ("masters", "moments", "ema", "gradients")}
    left: dict[str, Any] = dict.fromkeys((*moved, "lasting", "update"), 0)
    if train.offload == "all":
        moved |= parameters
        left["parameters"] = placed.parameters - parameters["parameters"]
    return replace(placed, **left, host=moved)


def zero_settings(train: TrainConfig, world: int) -> dict[str, Any]:
    """`zero_optimization` as DeepSpeed gets it."""
    config = deepspeed_config(train, accumulation=accumulation(train, world), world=world)
    return DEFAULTS | config["zero_optimization"]
