"""What ranks do with an engine alone, without the loop. `ranks.py` calls them: act(model, out, train, resume)."""

import contextlib
import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from sora_train.lora.config import LoraConfig
from sora_train.model import ModelConfig, Transformer, build
from sora_train.plan.activations import use_fused_norms
from sora_train.train import checkpoint
from sora_train.train.adapted import adapt
from sora_train.train.config import TrainConfig
from sora_train.train.deepspeed_config import deepspeed_config
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine
from sora_train.train.initial import make_model
from sora_train.train.load_checkpoint import load_checkpoint
from sora_train.train.placement import Weights, place
from sora_train.train.state import State


def opened(model: ModelConfig, settings: dict, resume: str | None) -> tuple[Engine, Ema, State]:
    """An engine that has the state of a checkpoint, if there is one. With `lora` among the settings, of adapters."""
    lora = LoraConfig(**settings.get("lora", {}))
    config = TrainConfig(**{key: value for key, value in settings.items() if key != "lora"})
    torch.manual_seed(config.seed)
    made = build(model)
    if lora.rank:
        for p in made.parameters():  # an output layer of zeros would give adapters no gradient
            p.data.add_(0.05 * torch.randn_like(p))
        adapt(made, lora, half=config.precision == "bf16")
    engine = Engine(made, config, accumulation=2, device=torch.device("cpu"))
    ema = Ema(engine, config.ema_decay)
    return engine, ema, State() if resume is None else load_checkpoint(Path(resume), engine, ema)


def write_again(model: ModelConfig, out: Path, settings: dict, resume: str) -> None:
    """A checkpoint, read and written again as it is."""
    checkpoint.snapshot(*opened(model, settings, resume)).write(out)


def convert(model: ModelConfig, out: Path, settings: dict, resume: str) -> None:
    """DeepSpeed's own checkpoint, and what its own script makes of it, of what was read from a checkpoint of ours."""
    engine, _, _ = opened(model, settings, resume)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # the engine's way in comes first

    engine.inner.save_checkpoint(str(out), tag="theirs")
    if engine.rank == 0:
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(out), tag="theirs")
        save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, out / "theirs.safetensors")


def step_without_gradient(model: ModelConfig, out: Path, settings: dict, resume: str | None) -> None:
    """Checkpoints `before` and `after` a step whose every gradient is zero."""
    engine, ema, state = opened(model, settings, resume)
    checkpoint.snapshot(engine, ema, state).write(out / "before")
    learn(engine, seed=0, scale=0.0)
    engine.step(settings["learning_rate"], lambda norm: "")
    checkpoint.snapshot(engine, ema, state).write(out / "after")


def refuse_a_step(model: ModelConfig, out: Path, settings: dict, resume: str | None) -> None:
    """Checkpoints `before` and `refused`, around a step that a judge refused; `then`, after one more that was taken;
    and `alone`, of an engine that never saw the first.
    """
    for seen in (True, False):
        engine, ema, state = opened(model, settings, resume)
        if seen:
            checkpoint.snapshot(engine, ema, state).write(out / "before")
            learn(engine, seed=1)
            _, why = engine.step(settings["learning_rate"], lambda norm: "too large" if norm > 0 else "")
            assert why == "too large"
            checkpoint.snapshot(engine, ema, state).write(out / "refused")
        learn(engine, seed=2)
        assert not engine.step(settings["learning_rate"], lambda norm: "")[1]
        checkpoint.snapshot(engine, ema, state).write(out / ("then" if seen else "alone"))


def learn(engine: Engine, seed: int, scale: float = 1.0) -> None:
    """The two micro-batches of a step, of noise, which differs between the ranks."""
    for micro, (x, text) in enumerate(noise(engine.model.config, seed, engine.rank)):
        y = engine(x, torch.tensor([500.0]), text, torch.ones(1, 3, dtype=torch.bool))
        engine.backward(scale * (y - x).square().mean(), last=micro == 1)


def noise(model: ModelConfig, seed: int, rank: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Latents and text of a step's two micro-batches."""
    for micro in range(2):
        draw = torch.Generator().manual_seed(100 * seed + 10 * micro + rank)
        x = torch.randn(1, 2, model.in_channels, 4, 4, generator=draw)
        yield x, torch.randn(1, 3, model.text_width, generator=draw)


def reduce(model: ModelConfig, out: Path, settings: dict, resume: str | None) -> None:
    """A checkpoint after one step whose first moments are the gradient (betas 0), and `exact`, the float64 mean over
    the ranks of what a plain bfloat16 model computes.
    """
    config = TrainConfig(**settings)
    torch.manual_seed(config.seed)
    made = build(model)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn_like(p))
    weights = {name: tensor.bfloat16() for name, tensor in made.state_dict().items()}
    engine = Engine(made, config, accumulation=2, device=torch.device("cpu"))
    ema = Ema(engine, config.ema_decay)
    learn(engine, seed=1)
    engine.step(config.learning_rate, lambda norm: "")
    checkpoint.snapshot(engine, ema, State()).write(out)
    plain = build(model).bfloat16()  # after the engine: at stage 3 that changes torch's linear function
    plain.load_state_dict(weights)
    scale = 1 / engine.world if engine.stage == 2 else 1.0  # there the ranks' gradients are of a share of the loss
    exact = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in plain.named_parameters()}
    for x, text in noise(model, 1, engine.rank):
        plain.zero_grad()
        mask = torch.ones(1, 3, dtype=torch.bool)
        y = plain(x.bfloat16(), torch.tensor([500.0]), text.bfloat16(), mask).float()
        ((y - x).square().mean() * scale).backward()
        for name, p in plain.named_parameters():
            exact[name] += p.grad.double()
    for tensor in exact.values():
        dist.all_reduce(tensor)
        tensor /= engine.world * scale
    if engine.rank == 0:
        save_file(exact, out / "exact.safetensors")


def tell(model: ModelConfig, out: Path, settings: dict, resume: str | None) -> None:
    """What the engine came to know of raw keys."""
    engine, _, _ = opened(model, settings, resume)
    inner = engine.inner
    told: dict[str, Any] = {
        "reduce_bucket_size": inner.zero_reduce_bucket_size(),
        "overlap_comm": inner.zero_overlap_comm(),
        "reduce_scatter": inner.zero_reduce_scatter(),
        "wall_clock_breakdown": inner.wall_clock_breakdown(),
        "steps_per_print": inner.steps_per_print(),
        "sub_group_size": inner.zero_sub_group_size(),
        "param_persistence_threshold": inner.zero_param_persistence_threshold(),
        "sub_groups": len(getattr(inner.optimizer, "fp32_partitioned_groups_flat", ())),
        "stage": inner.zero_optimization_stage(),
        "loaded_inductor": "torch._inductor.compile_fx" in sys.modules,
    }
    if engine.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "told.json").write_text(json.dumps(told))


def weigh(model: ModelConfig, out: Path, settings: dict, resume: str | None) -> None:
    """Bytes that DeepSpeed holds after a step of two micro-batches, and the most that another's backward passes take.

    AdamW itself is left out. Of some tries the least counts: gloo's threads free what they sent a moment later than a
    GPU's stream would, on a busy machine much later.
    """
    engine, ema, _ = opened(model, settings, resume)
    use_fused_norms(engine.model)

    def storages(tensors: Any) -> dict[int, int]:
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    b, shape, text = settings["micro_batch_size"], (4, model.in_channels, 8, 8), (7, model.text_width)

    def backward(last: bool) -> None:
        x, words = torch.randn(b, *shape), torch.randn(b, *text).half()
        y = engine(x, torch.full((b,), 500.0), words, torch.ones(b, text[0], dtype=torch.bool))
        engine.backward((y - x).square().mean(), last=last)

    for last in (False, True):
        backward(last)
    engine.step(1e-4, lambda norm: "")
    parameters = storages(p.data for p in engine.model.parameters())
    if engine.stage == 3:
        parameters |= storages(p.ds_tensor for p in engine.model.parameters())
        masters = storages(engine.inner.optimizer.fp32_partitioned_groups_flat)
    else:
        masters = storages(p for group in engine.adam.param_groups for p in group["params"])
    moments = storages(state[key] for state in engine.adam.state.values() for key in ("exp_avg", "exp_avg_sq"))
    tries = []
    for _ in range(4):
        first, left = most(partial(backward, False))
        second, _ = most(partial(backward, True))
        tries.append(max(first, left + second))
        engine.step(1e-4, lambda norm: "")
    told = {
        "parameters": sum(parameters.values()),
        "masters": sum(count for place, count in masters.items() if place not in parameters),
        "moments": sum(moments.values()),
        "ema": sum(storages(ema.shadow.values()).values()),
        "most": min(tries),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"weighed_{engine.rank}.json").write_text(json.dumps(told))


def most(act: Callable[[], object]) -> tuple[int, int]:
    """The highest sum of the bytes that were allocated and not freed, and the last."""
    from torch.profiler import profile

    with profile(profile_memory=True) as seen:
        act()
        time.sleep(0.05)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    sums = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return max(sums), sums[-1]


def begin(model: ModelConfig, out: Path, settings: dict, resume: str | None) -> None:
    """An engine's initial weights, those of `model.init_from` or random ones, how often each rank read one, and the
    most bytes that each needed: as they were drawn, and until DeepSpeed's engine was made (at stage 3).
    """
    config, world, reads = TrainConfig(**settings), dist.get_world_size(), [0]
    parts, cpu = world if config.zero_stage == 3 else 1, torch.device("cpu")

    def made() -> tuple[Transformer, Weights]:
        torch.manual_seed(config.seed)
        made, weights = make_model(model, dist.get_rank(), parts, resumed=False)
        return made, replace(weights, read={name: partial(counted, read) for name, read in weights.read.items()})

    def counted(read: Callable[[], torch.Tensor]) -> torch.Tensor:
        reads[0] += 1
        return read()

    def placed() -> None:
        place(*made(), cpu, half=config.half, zero3=deepspeed_config(config, accumulation=1, world=world))

    network, weights = made()
    engine = Engine(network, config, accumulation=1, device=cpu, weights=weights)
    masters = {name: (part.offset, part.master.detach()) for name, part in engine.slices().items() if part.owned}
    whole, figures = engine.gather_to_rank0(masters), {"reads": reads[0]}
    if engine.stage == 3:
        gc.disable()  # it would free models of before
        figures["drawn"] = most(made)[0]
        figures["placed"] = min(most(placed)[0] for _ in range(3))  # gloo's threads free late, see `weigh`
        gc.enable()
    out.mkdir(parents=True, exist_ok=True)
    (out / f"figures_{engine.rank}.json").write_text(json.dumps(figures))
    if engine.rank == 0:
        save_file(whole, out / "weights.safetensors")


def leave_the_base(model: ModelConfig, out: Path, settings: dict, resume: str | None) -> None:
    """Hashes of the frozen weights and of the adapters, before and after three steps, and their dtypes."""
    engine, _, _ = opened(model, settings, resume)

    def hashes() -> list[str]:
        frozen, trained = hashlib.sha256(), hashlib.sha256()
        for name, p in engine.model.named_parameters():
            with whole(p, engine.stage):
                (trained if p.requires_grad else frozen).update(
                    name.encode() + p.detach().view(torch.uint8).numpy().tobytes()
                )
        return [frozen.hexdigest(), trained.hexdigest()]

    before = hashes()
    for seed in range(3):
        learn(engine, seed)
        assert not engine.step(settings["learning_rate"], lambda norm: "")[1]
    after = hashes()
    frozen = [p for p in engine.model.parameters() if not p.requires_grad]
    told = {"before": before, "after": after, "dtypes": sorted({str(p.dtype) for p in frozen})}
    told["gradients"] = [
        name for name, p in engine.model.named_parameters() if not p.requires_grad and p.grad is not None
    ]
    if engine.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "told.json").write_text(json.dumps(told))


def whole(p: torch.nn.Parameter, stage: int) -> Any:
    """A context in which a parameter is whole, at ZeRO 3 too."""
    if stage < 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([p])
