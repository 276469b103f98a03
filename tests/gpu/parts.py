"""The parts of the GPU check. Each takes a device and an empty folder, raises AssertionError, and returns its figures.

Each also runs on a CPU, where `test_parts.py` runs it, at a smaller size: so what a GPU runs was run before.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from sora_train.codec.text import load_text_encoder
from sora_train.codec.vae import load_vae
from sora_train.errors import UserError
from sora_train.model import Latte
from sora_train.plan.activations import Sizes
from sora_train.plan.estimate import estimate
from sora_train.train.config import TrainConfig
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine
from sora_train.train.fp8 import LEAST_CAPABILITY
from sora_train.train.metrics import Events
from tests.gpu.numerics import numerics
from tests.gpu.setting import apart, join, make_shards, only, run, size_of
from tests.gpu.speed import attention, sampled, table, trained
from tests.gpu.whole import gpu_tests, prepared, real_clips, road

Part = Callable[[torch.device, Path], str]


def zero_stages(device: torch.device, out: Path) -> str:
    """bf16 at ZeRO 0 to 3 on one rank: losses are finite and near those of float32."""
    join(device)
    shards = make_shards(out / "shards", size_of(device))

    def losses(name: str, **settings: object) -> list[float]:
        return [line["loss"] for line in run(device, shards, out / name, steps=6, **settings)]

    exact, still = losses("fp32", zero_stage=1), losses("still", zero_stage=1, learning_rate=1e-12)
    learned, worst = furthest(still, exact), 0.0
    for stage in range(4):
        found = losses(f"stage {stage}", zero_stage=stage, precision="bf16")
        assert all(map(math.isfinite, found)), f"stage {stage}: {found}"
        worst = max(worst, furthest(found, exact))
    assert worst < min(0.02, learned / 2), (
        f"losses in bf16 are {worst:.1e} from float32's; learning moves them {learned:.1e}"
    )
    return f"stages 0 to 3 in bf16: losses within {worst:.1e} of float32's, which learning moves by {learned:.1e}"


def fp8(device: torch.device, out: Path) -> str:
    """`train.precision: fp8` at ZeRO 1 and 3: losses near those of bf16. Hopper's own products, or emulated ones."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has no FP8"
    join(device)
    shards = make_shards(out / "shards", size_of(device))

    def losses(precision: str, stage: int) -> list[float]:
        lines = run(device, shards, out / f"{precision}_{stage}", steps=6, precision=precision, zero_stage=stage)
        return [line["loss"] for line in lines]

    exact = losses("bf16", 1)
    found = {stage: losses("fp8", stage) for stage in (1, 3)}
    assert all(math.isfinite(loss) for each in found.values() for loss in each), found
    worst = max(furthest(each, exact) for each in found.values())
    assert 0 < worst < 0.02, f"losses in fp8 are {worst:.1e} from bf16's: {found}, {exact}"
    return f"stages 1 and 3: losses within {worst:.1e} of bf16's"


def furthest(found: list[float], exact: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a / b - 1) for a, b in zip(found, exact, strict=True))


def compiled(device: torch.device, out: Path) -> str:
    """`train.compile` under each kind of checkpointing: few graphs for 32 clips, each of another caption length."""
    join(device)
    size = size_of(device)
    shards = make_shards(out / "shards", size)
    lengths = -(-size.tokens // 32)  # to which text is padded
    said = []
    for kind in ("none", "selective", "full"):
        torch._dynamo.reset()
        counters.clear()
        lines = run(device, shards, out / kind, steps=8, compile="yes", activation_checkpointing=kind, precision="bf16")
        assert all(math.isfinite(line["loss"]) for line in lines), kind
        graphs = counters["stats"]["unique_graphs"]
        assert graphs <= 2 * lengths, f"{kind}: {graphs} graphs for two kinds of blocks and {lengths} text lengths"
        best = min(line["step_s"] for line in lines)
        said.append(f"{kind}: {graphs} graphs, first step {lines[0]['step_s']:.1f} s, best {best:.3f} s")
    return "; ".join(said)


def resumed(device: torch.device, out: Path) -> str:
    """A resume gives the losses of the run that went on. Our kernels are right; attention and norms were chosen."""
    join(device)
    shards = make_shards(out / "shards", size_of(device))
    settings = {"steps": 6, "checkpoint_every": 3, "precision": "bf16"}
    whole = [line["loss"] for line in run(device, shards, out / "whole", **settings)]
    events = [(event["event"], event["reason"]) for event in Events(out / "whole").lines.read()]
    assert "no_kernels" not in dict(events), events
    (out / "rest").mkdir()
    for event in events:  # a resume is in the same folder, and knows the choices
        Events(out / "rest").write(event[0], 0, event[1])
    rest = run(device, shards, out / "rest", out / "whole/checkpoints/step_00000003", **settings)
    chosen = [f"{name}: {reason}" for name, reason in events if name in ("attention", "norms")]
    assert len(chosen) == 2 * (device.type == "cuda"), events
    assert [line["step"] for line in rest] == [4, 5, 6]
    worst = furthest([line["loss"] for line in rest], whole[3:])
    assert worst <= (0.0 if device.type == "cpu" else 1e-3), f"a loss after the resume is {worst:.1e} off"
    return "; ".join([f"losses of steps 4 to 6 within {worst:.1e}", *chosen])


def codecs(device: torch.device, out: Path) -> str:
    """The embedded VAE and text encoder on the device, in float32 and bf16, against the CPU in float32."""
    draw = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 8, 64, 64, 3), dtype=torch.uint8, generator=draw)
    captions = ["a dog", "a red square moving up", "a very long caption " * 5]
    vae, text = load_vae("builtin"), load_text_encoder("builtin")
    latents = vae.encode(frames)[:, 0]
    words, videos = torch.cat(text.encode(captions)), vae.decode(latents)
    said = []
    for dtype, bound in ((torch.float32, 5e-3), (torch.bfloat16, 5e-2)):
        there, other = load_vae("builtin", device, dtype), load_text_encoder("builtin", 120, device, dtype)
        found = there.encode(frames)[:, 0]
        errors = {
            "latents": apart(found, latents),
            "text": apart(torch.cat(other.encode(captions)), words),
            "frames": apart(there.decode(latents), videos),
        }
        for name, error in errors.items():
            assert error < bound, f"{name} in {dtype} differ by {error:.2e}"
        said.append(f"{str(dtype)[6:]}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    return "; ".join(said)


def short_of_memory(device: torch.device, out: Path) -> str:
    """The VAE halves its batch until it fits; training ends with a message that says what to change."""
    join(device)
    frames = torch.arange(64 * 96 * 96 * 3).remainder(251).to(torch.uint8).view(1, 64, 96, 96, 3)
    vae = load_vae("builtin", device)
    expected = vae.encode(frames)
    vae.pixels_at_once["encode"] = 64 * 96 * 96
    with only(device, 2**27):  # the 64 frames take 151 MB in one piece
        found = vae.encode(frames)
    assert vae.remarks, "memory was not short"
    assert apart(found, expected) < 1e-3
    size = size_of(device)
    shards = make_shards(out / "shards", size)
    large = size_of(torch.device("cuda")).model
    with pytest.raises(UserError, match="Lower train.micro_batch_size"), only(device, 2**26):
        run(device, shards, out / "run", model=large, steps=1, batch_size=size.clips, micro_batch_size=size.clips)
    return f"{vae.remarks[-1]}; training names the keys to change"


def planned(device: torch.device, out: Path) -> str:
    """What the plan says a step takes, against what was allocated."""
    join(device)
    size, micro = size_of(device), 4
    config = TrainConfig(batch_size=2 * micro, micro_batch_size=micro, precision="bf16", zero_stage=1,
                         deepspeed={"zero_optimization": {"reduce_bucket_size": 1_000_000}})  # fmt: skip
    plan = estimate(size.model, config, Sizes(micro, size.frames, size.side, size.side, size.tokens), 1).total

    def steps() -> None:
        engine = Engine(Latte(size.model), config, accumulation=2, device=device)
        ema = Ema(engine, config.ema_decay)
        for step in range(2):
            for last in (False, True):
                x = torch.randn(micro, size.frames, 4, size.side, size.side, device=device)
                words = torch.randn(micro, size.tokens, size.model.text_width, device=device).half()
                mask = torch.ones(micro, size.tokens, dtype=torch.bool, device=device)
                y = engine(x, torch.full((micro,), 500.0, device=device), words, mask)
                engine.backward((y - x).square().mean(), last=last)
            engine.step(1e-4, lambda norm: "")
            ema.update(step)

    most = peak(device, steps)
    off = plan / most - 1
    assert abs(off) < (0.1 if device.type == "cuda" else 0.5), f"planned {plan / 1e6:.1f} MB, took {most / 1e6:.1f} MB"
    return f"planned {plan / 1e9:.3f} GB, allocated {most / 1e9:.3f} GB: {off:+.1%}"


def peak(device: torch.device, act: Callable[[], None]) -> int:
    """The most bytes of tensors at once: by CUDA's allocator, or as torch's profiler counts them on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        act()
        return torch.cuda.max_memory_allocated(device)
    with torch.profiler.profile(profile_memory=True) as seen:
        act()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


PARTS: dict[str, Part] = {
    "table": table,
    "train": trained,
    "numerics": numerics,
    "compile": compiled,
    "zero": zero_stages,
    "fp8": fp8,
    "resume": resumed,
    "road": road,
    "plan": planned,
    "memory": short_of_memory,
    "codec": codecs,
    "tests": gpu_tests,
    "attention": attention,
    "prep": prepared,
    "sampling": sampled,
    "real": real_clips,
}
"""In the order in which the check runs them."""
