"""The training loop: a plain function of a process group, without Ray.

Read it from top to bottom: fetch, forward and backward, check and step, average; then what happens once in a while.
"""

import gc
import math
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Float, Float64
from torch import Tensor

from sora_train.data import loader
from sora_train.data.collate import MicroBatch
from sora_train.data.order import SampleOrder, batch, batch_number
from sora_train.data.shards import ShardSet
from sora_train.diffusion import ConditioningConfig, DiffusionConfig, make_objective
from sora_train.lora.config import NO_LORA, LoraConfig
from sora_train.lora.flops import training_flops
from sora_train.model import ModelConfig
from sora_train.train import checkpoint, guard
from sora_train.train.activation_checkpointing import apply_activation_checkpointing
from sora_train.train.adapted import build_adapted
from sora_train.train.attention import choose_attention, may_try_kernels
from sora_train.train.balance import shard_configs
from sora_train.train.compile import Compilation
from sora_train.train.config import TrainConfig
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine
from sora_train.train.fp8 import use_fp8
from sora_train.train.frozen_base import with_base
from sora_train.train.hardware import memory_gb, peak_flops
from sora_train.train.initial import make_model
from sora_train.train.load_checkpoint import load_checkpoint
from sora_train.train.metrics import Tally
from sora_train.train.norms import choose_norms
from sora_train.train.profile import StepProfiler
from sora_train.train.run_dir import TRYING_FILE, RunDir
from sora_train.train.sequence_parallel import make_sequence_group, share_clips
from sora_train.train.skipped_blocks import add_zero_gradients
from sora_train.train.state import State, with_clips

HEARTBEAT_S = 10.0  # a metrics record at least this often, if a step is not longer
COLLECT_EVERY = 50  # steps between garbage collections; a step leaves less than 0.2 MB for them


def train(
    config: TrainConfig,
    model_config: ModelConfig,
    diffusion: DiffusionConfig,
    shards: ShardSet,
    *,
    device: torch.device,
    run_dir: RunDir,
    resume: Path | None = None,
    image_ratio: float | None = None,
    null_prompt: str = "eos",
    conditioning: ConditioningConfig | None = None,
    lora: LoraConfig = NO_LORA,
    sequence_parallel: int = 1,
) -> str:
    """Trains from step 0, or from the checkpoint `resume`, to `config.steps`. Returns why it ended early, or "".

    Each `sequence_parallel` consecutive ranks share the tokens of their clips. Uses the process group, or starts one
    for this process alone if there is none. Raises UserError for errors that a restart would repeat: damaged shards or
    checkpoints, a full disk, too many rollbacks.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    group, groups, first_of_group = rank // sequence_parallel, world // sequence_parallel, not rank % sequence_parallel

    torch.manual_seed(config.seed)  # the same initial weights on every rank
    if lora.rank:
        model, weights = build_adapted(model_config, lora, half=config.half, new=resume is None)
    else:
        parts = world if config.zero_stage == 3 else 1
        model, weights = make_model(model_config, rank, parts, resumed=resume is not None)
    if config.precision == "fp8":
        use_fp8(model, device)
    add_zero_gradients(model)
    share_clips(model, make_sequence_group(model_config, sequence_parallel))
    apply_activation_checkpointing(model, config.activation_checkpointing)
    compilation = Compilation(config, model_config, shards, run_dir, device)
    compilation.apply(model)
    objective = make_objective(diffusion, model_config.learned_variance, conditioning)
    by_bucket = shard_configs(
        config, model_config, lora, shards, frame_times=objective.conditioning.frame_times, world=groups,
        shared=sequence_parallel,
    )  # fmt: skip
    if may_try_kernels(run_dir, device):
        choose_attention(by_bucket, model_config, shards, run_dir, device, sequence_parallel)
        choose_norms(model, by_bucket, shards, run_dir, device, compiled=compilation.on, shared=sequence_parallel)
        if rank == 0:
            (run_dir.run / TRYING_FILE).unlink(missing_ok=True)
    most = max(accumulation(own, groups) for own in by_bucket.values())
    engine = Engine(model, config, accumulation=most, device=device, weights=weights)
    del weights  # with its open files
    ema = Ema(engine, config.ema_decay)
    fingerprint = [shards.fingerprint if rank == 0 else ""]
    dist.broadcast_object_list(fingerprint, src=0)
    state = with_clips(State() if resume is None else load_checkpoint(resume, engine, ema), fingerprint[0])
    if lora.rank:
        state = with_base(state, Path(model_config.init_from), device)

    def start_loader() -> tuple[SampleOrder, Generator[tuple[int, list[MicroBatch]], None, None]]:
        """The order of samples and the batches from the current state on."""
        batch_sizes = {name: own.batch_size for name, own in by_bucket.items()}
        order = shards.sample_order(batch_sizes, config.seed, image_ratio)
        order, skipped = replace(order, origin=state.data_from, epochs=state.data_epoch), state.skipped
        numbers = (batch_number(step, skipped) for step in range(state.step, config.steps))
        make = partial(
            loader.micro_batches,
            shards,
            order,
            objective,
            rank=group,
            world=groups,
            micro_batch_size={name: own.micro_batch_size for name, own in by_bucket.items()},
            caption_dropout=config.caption_dropout,
            null_prompt=null_prompt,
        )
        return order, loader.batches(make, numbers, device=device)

    order, data = start_loader()
    peak = peak_flops(device, config.half)
    tally, losses_since_save = Tally(), list[float]()
    save_requested = False
    profiler = StepProfiler(*config.profile, run_dir, device) if config.profile and rank == 0 else None
    gc.collect()
    if not (frozen := gc.get_freeze_count()):
        gc.freeze()  # modules and the engine are no garbage
    gc.disable()  # else each rank collects at another step, and the others wait for it
    try:
        while state.step < config.steps:
            if profiler is not None:
                profiler.begin(state.step + 1)

            # fetch
            number, micro_batches = tally.wait(partial(next, data))
            taken, rate, step = batch(order, number), learning_rate(config, state.step), state.step + 1
            clips = len(taken.rows)

            # forward and backward: DeepSpeed averages over the ranks, so world / clips makes it the mean over all clips
            sums = torch.zeros(4, 2, dtype=torch.float64, device=device)  # loss and clips by quarter of diffusion time
            for count, micro in enumerate(loader.on_device(micro_batches, device), 1):
                compilation.announce(step, taken.bucket, micro.text.shape[1])
                texts = micro.text, micro.text_mask
                losses = objective.loss(engine, micro.latents, micro.noise, micro.t, *texts, micro.given)
                engine.backward((losses * micro.weight).sum() * (world / clips), last=count == len(micro_batches))
                if first_of_group:  # the others have the same clips
                    sums += loss_by_time(objective.model_time(micro.t), losses.detach(), micro.weight)

            # check and step: every rank has the same sums and the same norm, so all decide alike
            tokens = sum(micro.tokens for micro in micro_batches) if first_of_group else 0
            others = torch.tensor([tokens, *run_dir.poll_requests(step)], dtype=torch.float64, device=device)
            reduced = torch.cat([sums.flatten(), others])
            dist.all_reduce(reduced)
            *by_time, tokens, save, stop = reduced.tolist()  # waits for the device
            save_requested = save_requested or save > 0
            loss = sum(by_time[0::2]) / clips
            check = partial(guard.skip_reason, loss=loss, recent=state.norms, spike=config.guard_spike)
            norm, skipped_because = engine.step(rate, check)
            if skipped_because:
                state = replace(state, step=step, streak=(*state.streak, number))
                if rank == 0:
                    describe = partial(guard.describe_batches, shards, order, [number], f"{skipped_because}; ")
                    run_dir.log_event_later("skipped", step, describe)
            else:
                ema.update(state.updates)
                state = replace(
                    state,
                    step=step,
                    samples_seen=state.samples_seen + clips,
                    updates=state.updates + 1,
                    streak=(),
                    norms=guard.add_norm(state.norms, norm),
                )
                f, _, h, w = micro_batches[0].latents.shape[1:]
                sizes = f, h, w, tokens / clips, objective.conditioning.frame_times
                flops = clips * training_flops(model_config, lora, *sizes)
                positions = clips * f * h * w // model_config.patch**2
                tally.add(taken.bucket, clips, positions, flops, by_time[0::2], by_time[1::2])
                losses_since_save.append(loss)
            if config.log_samples:  # none for a skipped step, which may repeat one that was taken
                names = [name for micro in micro_batches for name in micro.sample_ids if name]
                run_dir.log_samples(rank, step, number, names if first_of_group and not skipped_because else [])

            # once in a while: too many bad steps in a row
            if len(state.streak) >= config.guard_max_consecutive:
                state = guard.rollback(state, config, run_dir, shards, order, engine, ema)
                if state.step < step:
                    data.close()
                    order, data = start_loader()
                    tally, losses_since_save = Tally(), []
                    continue

            # once in a while: garbage collection
            if step % COLLECT_EVERY == 0:
                gc.collect()

            # once in a while: a metrics record
            due = step % config.log_every == 0 or step == config.steps or tally.seconds > HEARTBEAT_S
            if rank == 0 and due and not skipped_because:
                run_dir.log_metrics(
                    {
                        "step": step,
                        "samples_seen": state.samples_seen,
                        "epoch": order.epoch(number),
                        "bucket": taken.bucket,
                        "loss": loss,
                        "lr": rate,
                        "grad_norm": norm,
                        **tally.record(peak and peak * world, by_bucket=len(by_bucket) > 1),
                        "memory_gb": memory_gb(device),
                    }
                )
                tally = Tally()

            # once in a while: a checkpoint; not amid bad steps, since the guard may still roll back behind them
            due = step % config.checkpoint_every == 0 and not state.streak
            if due or save_requested or stop or step == config.steps:
                mean = sum(losses_since_save) / len(losses_since_save) if losses_since_save else None
                state = replace(state, loss=mean, epoch=order.epoch(number))
                run_dir.save_async(partial(checkpoint.snapshot, engine, ema, state))
                losses_since_save, save_requested = [], False
            if stop:
                break
    finally:
        gc.enable()
        if not frozen:
            gc.unfreeze()
        data.close()
    if profiler is not None:
        profiler.close()
    run_dir.wait()
    return "" if state.step == config.steps else f"asked to leave at step {state.step}"


def loss_by_time(
    t: Float[Tensor, "b"], losses: Float[Tensor, "b"], weight: Float[Tensor, "b"]
) -> Float64[Tensor, "4 2"]:
    """Sums of losses and of weights by quarter of the diffusion time, 0 to 1000."""
    quarter = (t / 250).long().clamp(0, 3)
    sums = torch.zeros(4, 2, dtype=torch.float64, device=losses.device)
    return sums.index_add_(0, quarter, torch.stack([losses * weight, weight], dim=1).double())


def accumulation(config: TrainConfig, groups: int) -> int:
    """Micro-batches of a step on each rank, or group of ranks that share clips; the last may hold padding."""
    return -(-config.batch_size // (groups * config.micro_batch_size))


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate schedule, steps counted from 0: linear warm-up, then constant or a cosine to a hundredth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
        return config.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
    raise NotImplementedError(f"train.schedule {config.schedule}")
