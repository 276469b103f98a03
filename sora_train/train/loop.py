"""The training loop: a plain function of a process group, without Ray.

Read it from top to bottom: fetch, forward and backward, judge and step, average; and once in a while something else.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.codec.text import padded_lengths
from sora_train.data.collate import MicroBatch
from sora_train.data.loader import batches
from sora_train.data.order import Plan, batch, batch_number
from sora_train.data.shards import ShardSet
from sora_train.diffusion import DiffusionConfig, make_objective
from sora_train.errors import UserError
from sora_train.model import Latte, ModelConfig
from sora_train.model.flops import forward_flops
from sora_train.train import checkpoint, guard
from sora_train.train.activation_checkpointing import apply_activation_checkpointing
from sora_train.train.checkpoint import State, with_clips
from sora_train.train.compile import ShapeLog, compile_blocks
from sora_train.train.config import TrainConfig
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine
from sora_train.train.hardware import memory_gb, peak_flops
from sora_train.train.initial import load_initial
from sora_train.train.metrics import Tally
from sora_train.train.run_dir import Home
from sora_train.train.skipped_blocks import add_zero_gradients

HEARTBEAT_S = 10.0  # a record at least this often, if a step is not longer


def train(
    config: TrainConfig,
    model_config: ModelConfig,
    diffusion: DiffusionConfig,
    shards: ShardSet,
    *,
    device: torch.device,
    home: Home,
    resume: Path | None = None,
    image_ratio: float | None = None,
    null_prompt: str = "eos",
) -> str:
    """Trains from step 0, or from the checkpoint in `resume`, to `config.steps`; returns "" or why it ended before.

    Works on the process group that is there, and starts one for this process alone where there is none. Raises
    UserError for what no repetition mends: damaged shards or checkpoints, a full disk, a guard that gave up.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(config.seed)  # the same initial weights on every rank
    model = Latte(model_config)
    if model_config.init_from and resume is None:
        load_initial(model, Path(model_config.init_from))
    add_zero_gradients(model)
    apply_activation_checkpointing(model, config.activation_checkpointing)
    shapes = len(shards.rows) * len(padded_lengths(shards.manifest.text.max_tokens))
    shape_log = ShapeLog(partial(home.note, "compiling"), shapes)
    if config.compile:
        compile_blocks(model, shapes)
    objective = make_objective(diffusion, model_config.learned_variance)
    engine = Engine(model, config, accumulation=accumulation(config, world), device=device)
    ema = Ema(engine, config.ema_decay)
    clips = [shards.fingerprint if rank == 0 else ""]
    dist.broadcast_object_list(clips, src=0)
    state = with_clips(State() if resume is None else checkpoint.load(resume, engine, ema), clips[0])

    def order() -> Plan:
        """The order of samples, which begins anew where the run went on with new data."""
        whole = shards.plan(config.batch_size, config.seed, image_ratio)
        return replace(whole, origin=state.data_from, epochs=state.data_epoch)

    plan = order()
    peak = peak_flops(device, config.precision == "bf16")

    def feed() -> Generator[tuple[int, list[MicroBatch]], None, None]:
        """The batches from here on."""
        skipped = state.skipped
        numbers = (batch_number(step, skipped) for step in range(state.step, config.steps))
        return batches(
            shards,
            plan,
            objective,
            numbers,
            rank=rank,
            world=world,
            micro_batch_size=config.micro_batch_size,
            caption_dropout=config.caption_dropout,
            null_prompt=null_prompt,
            device=device,
        )

    data, tally, kept = feed(), Tally(), (0.0, 0.0)
    asked = False  # whether a checkpoint is wanted before the next one that is due
    try:
        while state.step < config.steps:
            # fetch
            number, micro_batches = tally.wait(partial(next, data))
            taken, rate = batch(plan, number), learning_rate(config, state.step)
            clips = len(taken.rows)

            # forward and backward: DeepSpeed averages over the ranks, so world / clips makes it the mean over all clips
            sums = torch.zeros(4, 2, dtype=torch.float64, device=device)  # loss and clips by quarter of diffusion time
            tokens = sum(micro.tokens for micro in micro_batches)
            for micro in micro_batches:
                if config.compile and rank == 0:
                    shape_log.see(state.step + 1, taken.bucket, micro.text.shape[1])
                micro = micro.to(device)
                losses = objective.loss(engine, micro.latents, micro.noise, micro.t, micro.text, micro.text_mask)
                engine.backward((losses * micro.weight).sum() * (world / clips))
                sums += by_quarter(objective.told(micro.t), losses.detach(), micro.weight)

            # judge and step: every rank has the same sums and the same norm, so all decide alike
            others = torch.tensor([tokens, *home.wish(state.step + 1)], dtype=torch.float64, device=device)
            figures = torch.cat([sums.flatten(), others])
            dist.all_reduce(figures)
            *parts, tokens, wanted, leave = figures.tolist()  # waits for the device
            asked = asked or wanted > 0
            loss = sum(parts[0::2]) / clips
            judge = partial(guard.verdict, loss=loss, recent=state.norms, spike=config.guard_spike)
            norm, why = engine.step(rate, judge)
            step = state.step + 1
            if why:
                state = replace(state, step=step, streak=(*state.streak, number))
                if rank == 0:
                    home.note_later("skipped", step, partial(named, shards, plan, [number], f"{why}; "))
                if config.log_samples:
                    home.trained(rank, step, number, [])  # it may come again in place of one that was taken
            else:
                ema.update(state.updates)
                state = replace(
                    state,
                    step=step,
                    samples_seen=state.samples_seen + clips,
                    updates=state.updates + 1,
                    streak=(),
                    norms=guard.remembered(state.norms, norm),
                )
                f, _, h, w = micro_batches[0].latents.shape[1:]
                flops = clips * forward_flops(model_config, f, h, w, tokens / clips)
                tally.add(clips, clips * f * h * w // model_config.patch**2, flops, parts[0::2], parts[1::2])
                kept = (kept[0] + loss, kept[1] + 1)
                if config.log_samples:
                    home.trained(
                        rank, step, number, [name for micro in micro_batches for name in micro.sample_ids if name]
                    )

            # once in a while: too many bad steps in a row
            if len(state.streak) >= config.guard_max_consecutive:
                state = go_back(state, config, home, shards, plan, engine, ema)
                if state.step < step:
                    data.close()
                    plan = order()
                    data, tally, kept = feed(), Tally(), (0.0, 0.0)
                    continue

            # once in a while: a line of the log
            due = step % config.log_every == 0 or step == config.steps or tally.seconds > HEARTBEAT_S
            if rank == 0 and due and not why:
                home.log(
                    {
                        "step": step,
                        "samples_seen": state.samples_seen,
                        "epoch": plan.epoch(number),
                        "loss": loss,
                        "lr": rate,
                        "grad_norm": norm,
                        **tally.record(peak and peak * world),
                        "memory_gb": memory_gb(device),
                    }
                )
                tally = Tally()

            # once in a while: a checkpoint; not amid bad steps, since the guard may yet go back behind them
            due = step % config.checkpoint_every == 0 and not state.streak
            if due or asked or leave or step == config.steps:
                state = replace(state, loss=kept[0] / kept[1] if kept[1] else None, epoch=plan.epoch(number))
                home.keep(partial(checkpoint.snapshot, engine, ema, state))
                kept, asked = (0.0, 0.0), False
            if leave:
                break
    finally:
        data.close()
    home.settle()
    return "" if state.step == config.steps else f"asked to leave at step {state.step}"


def go_back(
    state: State, config: TrainConfig, home: Home, shards: ShardSet, plan: Plan, engine: Engine, ema: Ema
) -> State:
    """The guard's last means: the state of the last good checkpoint, with the batches around the bad steps left out.

    Where there is none yet, the run goes on from where it is, since skipped steps changed nothing. Collective. Raises
    UserError when that was done `guard_max_rollbacks` times before.
    """
    first_bad = state.step - len(state.streak)
    if state.rollbacks >= config.guard_max_rollbacks:
        home.settle()
        raise UserError(
            f"at step {state.step} {len(state.streak)} steps in a row had to be skipped, after {state.rollbacks} "
            "rollbacks; events.jsonl of the run names the clips. Lower train.learning_rate, look at those clips with "
            "`sora inspect`, or raise train.guard_max_rollbacks"
        )
    folder = home.newest(first_bad)
    if folder is not None and folder.name == checkpoint.name_of(state.back_at):
        folder = home.newest(state.back_at - 1) or folder  # that one led here before
    back = state if folder is None else checkpoint.load(folder, engine, ema)
    skipped = tuple(sorted({*state.skipped, *back.skipped}))
    if back.clips not in ("", state.clips):  # saved before `--new-data`: a new order begins, and no batch comes again
        skipped, back = back.skipped, with_clips(back, state.clips, plan.epoch(state.streak[-1]))
    elif folder is not None:
        skipped = guard.left_out(batch_number(back.step, skipped), state.streak, skipped)
    if dist.get_rank() == 0:
        to = "no checkpoint is there yet: goes on with what comes next" if folder is None else f"back to {folder.name}"
        home.note_later("rollback", state.step, lambda: f"{len(state.streak)} bad steps in a row; {to}")
        left_out = sorted(set(skipped) - set(state.skipped))
        home.note_later("left_out", back.step, lambda: named(shards, plan, left_out))
        home.cut_back(back.step)
    at = state.back_at if folder is None else back.step
    return replace(back, skipped=skipped, streak=(), rollbacks=state.rollbacks + 1, back_at=at)


def named(shards: ShardSet, plan: Plan, numbers: Sequence[int], before: str = "") -> list[str]:
    """Each of these batches with its sample ids, for people. Reads a row group once for all of them."""
    taken = [batch(plan, number) for number in numbers]
    ids: dict[tuple[str, int], str] = {}
    for bucket in {one.bucket for one in taken}:
        rows = sorted({row for one in taken if one.bucket == bucket for row in one.rows})
        ids |= {(bucket, row): name for row, name in zip(rows, shards.sample_ids(bucket, rows), strict=True)}
    return [
        f"{before}batch {number}: {' '.join(ids[one.bucket, row] for row in one.rows)}"
        for number, one in zip(numbers, taken, strict=True)
    ]


def by_quarter(told: Tensor, losses: Tensor, weight: Tensor) -> Tensor:
    """Sums of losses and of weights by quarter of the diffusion time, 0 to 1000: 4 x 2, float64."""
    quarter = (told / 250).long().clamp(0, 3)
    sums = torch.zeros(4, 2, dtype=torch.float64, device=losses.device)
    return sums.index_add_(0, quarter, torch.stack([losses * weight, weight], dim=1).double())


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
