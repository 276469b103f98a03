"""`sora bench train`: a step of `sora train` compared with a bare torch loop, and by number of workers.

The recipe's shards must exist. The bare loop has four batches in memory; `sora train` adds DeepSpeed, averaged weights,
reading, the guard, metrics, logs and Ray. Both take turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from sora_train.bench.core import BenchOptions, Row, Table, log, spread
from sora_train.bench.runs import train
from sora_train.data.collate import MicroBatch, padded_lengths
from sora_train.data.loader import micro_batches
from sora_train.data.shards import ShardSet
from sora_train.diffusion import make_objective
from sora_train.model import Transformer, build
from sora_train.recipe import Recipe
from sora_train.train.activation_checkpointing import apply_activation_checkpointing
from sora_train.train.balance import shard_configs
from sora_train.train.compile import compile_blocks, is_wanted
from sora_train.train.engine import decay_groups
from sora_train.train.fp8 import use_fp8
from sora_train.train.hardware import seconds
from sora_train.train.skipped_blocks import add_zero_gradients

KEYS = ("step_s", "samples_per_s", "data_wait_share", "mfu")


class Options(BenchOptions):
    """The flags."""

    steps: int = Field(default=40, ge=8)
    """Steps of each `sora train`, the first quarter of which does not count."""
    rounds: PositiveInt = 2
    """Times that `sora train` is started with one worker."""
    workers: tuple[PositiveInt, ...] = (1, 2)
    """Numbers of workers; each takes cluster.cpus_per_worker cores."""


def bench(options: Options, recipe: Recipe) -> list[Table]:
    """A row for the bare loop, and one for each number of workers. UserError if the recipe can't be trained."""
    torch.set_num_threads(recipe.cluster.cpus_per_worker)
    run, alone = make_bare(recipe), max(options.steps // 4, 1)
    run(alone)  # a warm-up
    bare: list[float] = []
    runs: dict[int, list[dict[str, list[float]]]] = {}
    for workers in [1] * options.rounds + sorted({*options.workers} - {1}):
        if workers == 1:
            log("the bare loop")
            bare += [seconds(lambda: run(1)) for _ in range(alone)]
        log(f"sora train, {workers} workers")
        runs.setdefault(workers, []).append(time_run(recipe, options.steps, workers))
    rows: list[Row] = [
        {"what": "bare torch", "step_s": spread(bare), "clips_per_s": recipe.train.batch_size / statistics.median(bare)}
    ]
    for workers, each in runs.items():
        values = {key: [value for one in each for value in one[key]] for key in (*KEYS, "first_step_s")}
        step = statistics.median(values["step_s"])
        rows.append(
            {
                "what": f"sora train, {workers} worker{'s' if workers > 1 else ''}",
                "step_s": spread(values["step_s"]),
                "clips_per_s": statistics.median(values["samples_per_s"]),
                "of bare": step / statistics.median(bare),
                "of bare, at best": min(values["step_s"]) / min(bare),
                "data_wait": statistics.fmean(values["data_wait_share"]),
                "mfu": statistics.median(values["mfu"]) if values["mfu"] else None,
                "first_step_s": spread(values["first_step_s"]),
            }
        )
    config = recipe.train
    note = (
        f"workers of {recipe.cluster.cpus_per_worker} threads, batch {config.batch_size} in micro-batches of "
        f"{config.micro_batch_size}, ZeRO {config.zero_stage}, {config.precision}; the same batch for any number of "
        "workers; at best: minimum over minimum; first_step: from the command to the first step"
    )
    return [Table("train", rows, [note])]


def time_run(recipe: Recipe, steps: int, workers: int) -> dict[str, list[float]]:
    """One `sora train`: the metrics of its steps without the first quarter, and its start. UserError if it fails."""
    counts: dict[str, object] = {
        "cluster.workers": workers,
        "train.steps": steps,
        "train.checkpoint_every": steps,
        "validation.every": 0,
    }
    lines, first = train(recipe, counts)
    values = {key: [line[key] for line in lines[steps // 4 :] if line[key] is not None] for key in KEYS}
    return {**values, "first_step_s": [first]}


def make_bare(recipe: Recipe) -> Callable[[int], None]:
    """The bare loop on four batches of the recipe's shards; returns the function that does so many steps."""
    config, data = recipe.train, recipe.data
    device = torch.device("cuda" if torch.cuda.is_available() and recipe.cluster.gpu != "no" else "cpu")
    shards = ShardSet(data.output, data.holdout_fraction, "train")
    timed = recipe.conditioning.frame_times
    own = shard_configs(config, recipe.model, recipe.lora, shards, frame_times=timed, world=1)
    order = shards.sample_order({name: it.batch_size for name, it in own.items()}, config.seed, data.image_ratio)
    objective = make_objective(recipe.diffusion, recipe.model.learned_variance, recipe.conditioning)
    sizes = {name: it.micro_batch_size for name, it in own.items()}
    held = [
        micro_batches(shards, order, objective, number, micro_batch_size=sizes, caption_dropout=config.caption_dropout)
        for number in range(4)
    ]
    torch.manual_seed(config.seed)
    model = build(recipe.model)
    if config.precision == "fp8":
        use_fp8(model, device)
    add_zero_gradients(model)
    apply_activation_checkpointing(model, config.activation_checkpointing)
    if is_wanted(config.compile, device):
        compile_blocks(model, len(shards.rows) * len(padded_lengths(shards.manifest.text.max_tokens)))
    return bare_loop(model.to(device), recipe, cycle(held))


def bare_loop(model: Transformer, recipe: Recipe, data: Iterable[Sequence[MicroBatch]]) -> Callable[[int], None]:
    """The engine's arithmetic in plain torch; returns the function that does so many steps.

    In bf16, stage 0 uses autocast. The other stages compute with bfloat16 weights, accumulate gradients in float32 and
    let AdamW update float32 master weights.
    """
    config, device, batches = recipe.train, model.patch_in.weight.device, iter(data)
    objective = make_objective(recipe.diffusion, recipe.model.learned_variance, recipe.conditioning)
    half = config.half
    masters: list[Tensor] = list(model.parameters())
    groups = decay_groups(model, config.weight_decay)
    copied = half and config.zero_stage > 0
    if copied:
        model.bfloat16()  # before the copy: DeepSpeed's masters also start from the bfloat16 weights
        float32 = {p: p.detach().float().requires_grad_() for p in masters}
        groups = [{**group, "params": [float32[p] for p in group["params"]]} for group in groups]
        masters = list(float32.values())
    weights: list[Tensor] = list(model.parameters())
    adam = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)

    def predict(x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        if copied:
            return model(x.bfloat16(), t, text.bfloat16(), text_mask).float()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return model(x, t, text.float(), text_mask).float()

    def accumulate() -> None:
        """Adds the gradients of a micro-batch to those of the masters."""
        for master, weight in zip(masters, weights, strict=True):
            if weight.grad is not None:
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None

    def run(steps: int) -> None:
        for _ in range(steps):
            step = next(batches)
            clips = sum(int(micro.weight.sum()) for micro in step)
            for micro in step:
                micro = micro.to(device)
                texts = micro.text, micro.text_mask
                losses = objective.loss(predict, micro.latents, micro.noise, micro.t, *texts, micro.given)
                ((losses * micro.weight).sum() / clips).backward()
                if copied:
                    accumulate()
            if config.gradient_clip:
                torch.nn.utils.clip_grad_norm_(masters, config.gradient_clip)
            adam.step()
            adam.zero_grad(set_to_none=True)
            if copied:
                with torch.no_grad():
                    torch._foreach_copy_(weights, masters)

    return run
