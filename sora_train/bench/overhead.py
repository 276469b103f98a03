"""One training step in plain torch, and with more and more of what `sora train` adds; without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.bench.core import seconds
from sora_train.data.collate import MicroBatch, padded_lengths
from sora_train.data.loader import batches, micro_batches
from sora_train.data.shards import ShardSet
from sora_train.diffusion import make_objective
from sora_train.model import Latte
from sora_train.recipe import Recipe
from sora_train.train.activation_checkpointing import apply_activation_checkpointing
from sora_train.train.compile import compile_blocks
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine, decay_groups
from sora_train.train.loop import accumulation
from sora_train.train.skipped_blocks import add_zero_gradients

PARTS = ("bare torch", "+ DeepSpeed", "+ averaged weights", "+ reading shards")
"""Each has all those before it."""


class PartialLoop:
    """Training steps with the parts of `PARTS` up to one of them."""

    def __init__(self, recipe: Recipe, part: str, steps: int) -> None:
        self.recipe, self.level, self.steps = recipe, PARTS.index(part), steps
        cuda = torch.cuda.is_available() and self.recipe.cluster.gpu != "no"
        self.device = torch.device("cuda" if cuda else "cpu")
        cache = int(1e9 * self.recipe.train.shard_cache_gb)
        data = self.recipe.data
        self.shards = ShardSet(data.output, data.holdout_fraction, "train", cache_bytes=cache)
        self.run = self.make()

    def turn(self) -> float:
        """Mean seconds of a step."""
        return seconds(lambda: self.run(self.steps)) / self.steps

    def data(self) -> Iterator[list[MicroBatch]]:
        """The micro-batches of each step: four steps held in memory, or read from the shards."""
        recipe, config = self.recipe, self.recipe.train
        order = self.shards.sample_order(config.batch_size, config.seed, recipe.data.image_ratio)
        objective = make_objective(recipe.diffusion, recipe.model.learned_variance)
        how = {"micro_batch_size": config.micro_batch_size, "caption_dropout": config.caption_dropout}
        if "+ reading shards" in PARTS[: self.level + 1]:
            for _, micros in batches(self.shards, order, objective, count(), device=self.device, **how):
                yield micros
        held = [micro_batches(self.shards, order, objective, number, **how) for number in range(4)]
        for number in count():
            yield held[number % 4]

    def make(self) -> Callable[[int], None]:
        """Builds the model and what trains it; returns the function that does so many steps."""
        recipe, config, device = self.recipe, self.recipe.train, self.device
        torch.manual_seed(config.seed)
        model = Latte(recipe.model)
        add_zero_gradients(model)
        apply_activation_checkpointing(model, config.activation_checkpointing)
        if config.compile:
            compile_blocks(model, len(self.shards.rows) * len(padded_lengths(self.shards.manifest.text.max_tokens)))
        data = self.data()
        if not self.level:
            return bare(model.to(device), recipe, data)
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        objective = make_objective(recipe.diffusion, recipe.model.learned_variance)
        engine = Engine(model, config, accumulation=accumulation(config, 1), device=device)
        ema = Ema(engine, config.ema_decay) if self.level > 1 else None

        def run(steps: int) -> None:
            for _ in range(steps):
                for micro in next(data):
                    micro = micro.to(device)
                    losses = objective.loss(engine, micro.latents, micro.noise, micro.t, micro.text, micro.text_mask)
                    engine.backward((losses * micro.weight).sum() / config.batch_size)
                engine.step(config.learning_rate, lambda norm: "")
                if ema is not None:
                    ema.update(1000)

        return run


def bare(model: Latte, recipe: Recipe, data: Iterator[list[MicroBatch]]) -> Callable[[int], None]:
    """The engine's arithmetic in plain torch; returns the function that does so many steps.

    In bf16, stage 0 uses autocast. The other stages compute with bfloat16 weights, accumulate gradients in float32 and
    let AdamW update float32 master weights.
    """
    config, device = recipe.train, model.patch_in.weight.device
    objective = make_objective(recipe.diffusion, recipe.model.learned_variance)
    half = config.precision == "bf16"
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
            return model(x, t, text, text_mask).float()

    def accumulate() -> None:
        """Adds the gradients of a micro-batch to those of the masters."""
        for master, weight in zip(masters, weights, strict=True):
            if weight.grad is not None:
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None

    def run(steps: int) -> None:
        for _ in range(steps):
            for micro in next(data):
                micro = micro.to(device)
                losses = objective.loss(predict, micro.latents, micro.noise, micro.t, micro.text, micro.text_mask)
                ((losses * micro.weight).sum() / config.batch_size).backward()
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
