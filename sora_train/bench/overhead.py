"""One training step, bare and with more and more of what `sora train` puts around it: rungs of a ladder.

Each rung is the one before and one thing more, in a plain process without Ray: a torch loop over micro-batches in
memory; DeepSpeed in place of it; averaged weights; the reader of shards; the whole loop: guard, figures, log.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.codec.text import padded_lengths
from sora_train.data.collate import MicroBatch
from sora_train.data.loader import batches, micro_batches
from sora_train.data.shards import ShardSet
from sora_train.diffusion import make_objective
from sora_train.model import Latte
from sora_train.recipe import Recipe
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine, decay_groups
from sora_train.train.loop import accumulation
from sora_train.train.loop import train as train_loop
from sora_train.train.run_dir import Home

RUNGS = ("bare torch", "+ DeepSpeed", "+ averaged weights", "+ reading shards", "+ guard, figures, log")
NEVER = 10**9


@dataclass(frozen=True)
class Rung:
    """Which rung, of which recipe (as JSON), how many steps make a turn, and a folder for what the loop writes."""

    name: str
    recipe: dict[str, Any]
    steps: int
    folder: str


class Climber:
    """A rung in its process: `turn` is the seconds of a step, as a mean over a turn."""

    def __init__(self, rung: Rung) -> None:
        recipe = Recipe.model_validate(rung.recipe)
        torch.set_num_threads(recipe.cluster.cpus_per_worker)
        cuda = torch.cuda.is_available() and recipe.cluster.gpu != "no"
        self.device = torch.device("cuda" if cuda else "cpu")
        self.folder = Path(rung.folder)
        self.steps, self.recipe, self.height = rung.steps, recipe, RUNGS.index(rung.name)
        if self.height:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        cache = int(1e9 * recipe.train.shard_cache_gb)
        self.shards = ShardSet(recipe.data.output, recipe.data.holdout_fraction, "train", cache_bytes=cache)
        self.act = self.whole() if self.height == 4 else self.part()

    def turn(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        self.act(self.steps)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / self.steps

    def feed(self) -> Generator[list[MicroBatch], None, None]:
        """Micro-batches of step after step: from memory, the same ones, or read from shards."""
        recipe, config = self.recipe, self.recipe.train
        plan = self.shards.plan(config.batch_size, config.seed, recipe.data.image_ratio)
        objective = make_objective(recipe.diffusion, recipe.model.learned_variance)
        how = {"micro_batch_size": config.micro_batch_size, "caption_dropout": config.caption_dropout}
        if self.height < 3:
            held = [micro_batches(self.shards, plan, objective, number, **how) for number in range(4)]
            for number in count():
                yield held[number % 4]
        for _, micros in batches(self.shards, plan, objective, count(), device=self.device, **how):
            yield micros

    def part(self) -> Callable[[int], None]:
        """The rungs below the whole loop."""
        recipe, config, device = self.recipe, self.recipe.train, self.device
        torch.manual_seed(config.seed)
        model = Latte(recipe.model)
        model.checkpoint(config.activation_checkpointing)
        if config.compile:
            model.compile_blocks(len(self.shards.rows) * len(padded_lengths(self.shards.manifest.text.max_tokens)))
        objective = make_objective(recipe.diffusion, recipe.model.learned_variance)
        data = self.feed()
        if not self.height:
            return bare(model.to(device), self.recipe, data)
        engine = Engine(model, config, accumulation=accumulation(config, 1), device=device)
        ema = Ema(engine, config.ema_decay) if self.height > 1 else None

        def climbed(steps: int) -> None:
            for _ in range(steps):
                for micro in next(data):
                    micro = micro.to(device)
                    losses = objective.loss(engine, micro.latents, micro.noise, micro.t, micro.text, micro.text_mask)
                    engine.backward((losses * micro.weight).sum() / config.batch_size)
                engine.step(config.learning_rate, lambda norm: "")
                if ema is not None:
                    ema.update(1000)

        return climbed

    def whole(self) -> Callable[[int], None]:
        """Training's own loop, in a thread, which waits within a step until more steps are asked for."""
        granted: queue.Queue[None] = queue.Queue()
        arrived: queue.Queue[BaseException | None] = queue.Queue()
        config = self.recipe.train.model_copy(update={"steps": NEVER, "checkpoint_every": NEVER, "log_every": 1,
                                                      "schedule": "constant"})  # fmt: skip

        def gate(step: int) -> bool:
            arrived.put(None)
            granted.get()
            return False

        def run() -> None:
            try:
                home = Home(self.folder, notice=gate)
                train_loop(config, self.recipe.model, self.recipe.diffusion, self.shards, device=self.device,
                           home=home, image_ratio=self.recipe.data.image_ratio)  # fmt: skip
            except BaseException as error:
                arrived.put(error)

        threading.Thread(target=run, daemon=True).start()

        def wait() -> None:
            if (error := arrived.get()) is not None:
                raise error

        wait()

        def steps(number: int) -> None:
            for _ in range(number):
                granted.put(None)
                wait()

        return steps


def bare(model: Latte, recipe: Recipe, data: Iterator[list[MicroBatch]]) -> Callable[[int], None]:
    """The same arithmetic as the engine's in plain torch: in bf16, stage 0 computes by autocast, and the other stages
    with bfloat16 weights, of which AdamW changes float32 masters by gradients that are added up in float32.
    """
    config, device = recipe.train, model.patch_in.weight.device
    objective = make_objective(recipe.diffusion, recipe.model.learned_variance)
    half = config.precision == "bf16"
    masters: list[Tensor] = list(model.parameters())
    groups = decay_groups(model, config.weight_decay)
    copied = half and config.zero_stage > 0
    if copied:
        model.bfloat16()  # first: DeepSpeed's masters begin as the bfloat16 weights too
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

    def add_up() -> None:
        """Moves the gradients of a micro-batch into those of the masters."""
        for master, weight in zip(masters, weights, strict=True):
            if weight.grad is not None:
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None

    def steps(number: int) -> None:
        for _ in range(number):
            for micro in next(data):
                micro = micro.to(device)
                losses = objective.loss(predict, micro.latents, micro.noise, micro.t, micro.text, micro.text_mask)
                ((losses * micro.weight).sum() / config.batch_size).backward()
                if copied:
                    add_up()
            if config.gradient_clip:
                torch.nn.utils.clip_grad_norm_(masters, config.gradient_clip)
            adam.step()
            adam.zero_grad(set_to_none=True)
            if copied:
                with torch.no_grad():
                    torch._foreach_copy_(weights, masters)

    return steps
