"""The bare loop of `sora bench train` does the arithmetic of the engine."""

from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sora_train.bench.train import bare_loop
from sora_train.data.loader import micro_batches
from sora_train.data.shards import ShardSet
from sora_train.diffusion import make_objective
from sora_train.model import Latte, ModelConfig
from sora_train.recipe import Recipe
from sora_train.train.engine import Engine

STEPS = 3


@pytest.mark.parametrize("stage", [0, 2])
def test_the_bare_loop_in_bf16_learns_what_the_engine_does(stage: int, tiny_shards: Path):
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    changes = {"precision": "bf16", "zero_stage": stage, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2}
    shape = ModelConfig(width=16, depth=2, heads=2, text_width=64, sample_size=4)
    recipe = Recipe().model_copy(update={"model": shape, "train": Recipe().train.model_copy(update=changes)})
    shards, objective = ShardSet(str(tiny_shards)), make_objective(recipe.diffusion, False)
    plan = shards.sample_order(4, 0)
    data = [micro_batches(shards, plan, objective, k, micro_batch_size=2, caption_dropout=0.0) for k in range(STEPS)]

    def made() -> Latte:
        torch.manual_seed(0)
        return Latte(replace(shape))

    plain, begun = made(), made()
    bare_loop(plain, recipe, cycle(data))(STEPS)
    engine = Engine(made(), recipe.train, accumulation=2, device=torch.device("cpu"))
    for micros in data:
        for count, micro in enumerate(micros, 1):
            losses = objective.loss(engine, micro.latents, micro.noise, micro.t, micro.text, micro.text_mask)
            engine.backward((losses * micro.weight).sum() / 4, last=count == len(micros))
        engine.step(1e-2, lambda norm: "")
    pairs = [*zip(plain.parameters(), engine.model.parameters(), begun.parameters(), strict=True)]
    assert all(a.dtype == b.dtype for a, b, _ in pairs)
    apart = sum(float((a.float() - b.float()).square().sum()) for a, b, _ in pairs)
    moved = sum(float((a.float() - c.float()).square().sum()) for a, _, c in pairs)
    assert moved > 0.1
    assert apart < 1e-3 * moved
