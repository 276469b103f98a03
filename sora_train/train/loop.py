"""The training loop: a plain function of a process group, without Ray.

Read it from top to bottom: fetch, forward and backward, step, average; and once in a while something else.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from sora_train.data.loader import batches
from sora_train.data.order import Plan, batch
from sora_train.data.shards import ShardSet
from sora_train.diffusion import DiffusionConfig, make_objective
from sora_train.model import Latte, ModelConfig
from sora_train.model.convert import from_diffusers
from sora_train.train import checkpoint
from sora_train.train.config import TrainConfig
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine

HEARTBEAT_S = 10.0  # a record at least this often, if a step is not longer

Log = Callable[[dict], None]
"""Takes a metrics record. Called on rank 0 alone."""
Keep = Callable[[int, Callable[[Path], None]], None]
"""Takes a step and what writes this rank's part of a checkpoint into a folder. Called on every rank."""


def train(
    config: TrainConfig,
    model_config: ModelConfig,
    diffusion: DiffusionConfig,
    shards: ShardSet,
    *,
    device: torch.device,
    log: Log,
    keep: Keep,
    resume: Path | None = None,
) -> None:
    """Trains from step 0, or from the checkpoint in `resume`, to `config.steps`.

    Works on the process group that is there, and starts one for this process alone where there is none.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(config.seed)  # the same initial weights on every rank
    model = Latte(model_config)
    if model_config.init_from and resume is None:
        model.load_state_dict(from_diffusers(model_config.init_from).state_dict())
    objective = make_objective(diffusion)
    engine = Engine(model, config, accumulation=accumulation(config, world), device=device)
    ema = Ema(engine, config.ema_decay)
    state = checkpoint.State(step=0, samples_seen=0)
    if resume is not None:
        state = checkpoint.load(resume, engine, ema)

    plan: Plan = shards.plan(config.batch_size, config.seed)
    data = batches(
        shards,
        plan,
        objective,
        range(state.step, config.steps),
        rank=rank,
        world=world,
        micro_batch_size=config.micro_batch_size,
        caption_dropout=config.caption_dropout,
    )
    seen = state.samples_seen
    waited, logged_step, logged_seen, logged_at = 0.0, state.step, seen, time.perf_counter()
    for step in range(state.step, config.steps):
        # fetch
        asked_at = time.perf_counter()
        _, micro_batches = next(data)
        waited += time.perf_counter() - asked_at
        global_batch = batch(plan, step)
        clips = len(global_batch.rows)

        # forward and backward: DeepSpeed averages over the ranks, so world / clips makes it the mean over all clips
        total, norm, rate = torch.zeros((), device=device), None, learning_rate(config, step)
        for micro in micro_batches:
            micro = micro.to(device)
            losses = objective.loss(engine, micro.latents, micro.noise, micro.t, micro.text, micro.text_mask)
            weighted = (losses * micro.weight).sum()
            engine.backward(weighted * (world / clips))
            norm = engine.step(rate)  # the last one updates the weights
            total += weighted.detach()
        ema.update(step)
        dist.all_reduce(total)  # every step, since only rank 0 knows when a line is due
        done, seen = step + 1, seen + clips

        # once in a while: a line of the log
        now = time.perf_counter()
        due = done % config.log_every == 0 or done == config.steps or now - logged_at > HEARTBEAT_S
        if rank == 0 and due:
            loss = total.item() / clips  # .item() waits for the device
            now = time.perf_counter()
            per_s = (seen - logged_seen) / (now - logged_at)
            f, _, h, w = micro_batches[0].latents.shape[1:]
            log(
                {
                    "step": done,
                    "samples_seen": seen,
                    "epoch": global_batch.epoch,
                    "loss": loss,
                    "lr": rate,
                    "grad_norm": norm,
                    "step_s": (now - logged_at) / (done - logged_step),
                    "samples_per_s": per_s,
                    "tokens_per_s": per_s * f * h * w / model_config.patch**2,
                    "data_wait_share": waited / (now - logged_at),
                }
            )
            waited, logged_step, logged_seen, logged_at = 0.0, done, seen, now

        # once in a while: a checkpoint
        if done % config.checkpoint_every == 0 or done == config.steps:
            here = checkpoint.State(done, seen)
            keep(done, lambda folder, here=here: checkpoint.save(folder, engine, ema, here))


def accumulation(config: TrainConfig, world: int) -> int:
    """Micro-batches of a step on each rank; the last may hold padding."""
    return -(-config.batch_size // (world * config.micro_batch_size))


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate at a step counted from 0: a linear rise over the warm-up, then constant, or a cosine to a hundredth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    return config.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
