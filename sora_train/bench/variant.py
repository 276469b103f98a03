"""One contender of `sora bench model`, and what it is measured on."""

from __future__ import annotations

import gc
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sora_train.bench.core import seconds
from sora_train.model.config import PRESETS, ModelConfig

TINY: dict[str, Any] = {"depth": 2, "width": 32, "heads": 2, "patch": 2, "text_width": 16, "sample_size": 8}
"""A preset for looking whether it all works."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Whose = Literal["ours", "diffusers"]


@dataclass(frozen=True)
class Case:
    """What contenders are measured on."""

    preset: str
    attention: str
    shape: tuple[int, int, int]
    """Frames, height and width in pixels; latents are an eighth of the sides."""
    dtype: str
    checkpointing: str
    batch: int
    text_tokens: int
    device: str
    threads: int
    steps: int = 1
    """Steps of a turn."""

    @property
    def model(self) -> ModelConfig:
        keys: dict[str, Any] = TINY if self.preset == "tiny" else {"preset": self.preset, **PRESETS[self.preset]}
        config = ModelConfig(**keys)
        # diffusers interpolates positions from sample_size, so that a model for other sizes than the shape will do
        return replace(config, attention=self.attention)  # pyright: ignore[reportArgumentType]

    @property
    def latents(self) -> tuple[int, int, int]:
        """Latent frames, height, width."""
        frames, height, width = self.shape
        return frames, height // 8, width // 8


@dataclass(frozen=True)
class Contender:
    """Whose model, and whether torch compiles it. `weights` is a folder in diffusers' format; empty: from a seed."""

    case: Case
    whose: Whose
    compiled: bool
    weights: str = ""

    @property
    def name(self) -> str:
        return f"{self.whose}, compiled" if self.compiled else self.whose


class Trainee:
    """A model with AdamW, and one batch that it sees over and over."""

    def __init__(self, contender: Contender) -> None:
        case = contender.case
        torch.set_num_threads(case.threads)
        self.case, self.device, self.dtype = case, torch.device(case.device), DTYPES[case.dtype]
        prepare = (theirs if contender.whose == "diffusers" else ours)(contender)
        exercise(self.device)
        self.before = resident_bytes()
        model, self.run = prepare()
        self.model = model.to(self.device, self.dtype).train()
        self.adam = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.inputs = tuple(x.to(self.device) for x in inputs(case))

    def output(self) -> Any:
        """What the model makes of the batch, float32, `b f o h w`."""
        with torch.no_grad():
            return self.run(self.model, *self.cast()).float().cpu().numpy()

    def cast(self) -> tuple[Tensor, ...]:
        x, t, text, mask = self.inputs
        return x.to(self.dtype), t, text.to(self.dtype), mask

    def turn(self) -> dict[str, float]:
        """Seconds of forward, backward and optimizer, means over the steps of a turn."""
        case = self.case
        if self.device.type == "cuda":
            self.step()  # takes back the memory that the turn before gave to the others
        sums: dict[str, float] = {}
        for _ in range(case.steps):
            for name, took in self.step().items():
                sums[name] = sums.get(name, 0.0) + took / case.steps
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {**sums, "step_s": sum(sums.values())}

    def step(self) -> dict[str, float]:
        kept: list[Tensor] = []

        def forward() -> None:
            kept.append(self.run(self.model, *self.cast()).float().square().mean())

        def update() -> None:
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)

        took = {"forward_s": seconds(forward), "backward_s": seconds(lambda: kept[0].backward())}
        return took | {"optimizer_s": seconds(update)}

    def memory(self) -> dict[str, float]:
        """Most bytes at a time, in 10⁹, weights and moments among them: on a GPU as torch counts what tensors take. On
        the CPU `memory_gb` counts the same by torch's profiler, and `rss_gb` is by how much the process grew.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step()
            return {"memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9}
        grown = peak_resident_bytes() - self.before
        gc.collect()
        states = [value for state in self.adam.state.values() for value in state.values()]
        held = sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers(), *states))
        return {"memory_gb": (held + allocated(self.step)) / 1e9, "rss_gb": grown / 1e9}


def exercise(device: torch.device) -> None:
    """Has torch load and start what any model needs, so that it does not count as a contender's memory."""
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True, device=device)
    layer(torch.zeros(1, 4, 16, device=device)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


def allocated(act: Callable[[], object]) -> int:
    """Most bytes that a call holds at a time of what it allocates on the CPU."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell of itself on stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        act()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]  # pyright: ignore
    sizes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))  # pyright: ignore
    return max(accumulate(sizes), default=0)


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents `b f c h w`, times, text `b l e` and its mask: captions are from a quarter to all of the tokens long."""
    g = torch.Generator().manual_seed(1)
    (f, h, w), config, b, l = case.latents, case.model, case.batch, case.text_tokens  # noqa: E741
    x = torch.randn(b, f, config.in_channels, h, w, generator=g)
    text = torch.randn(b, l, config.text_width, generator=g)
    lengths = torch.linspace(max(l / 4, 1), l, b + 2)[1:-1].long()
    t = 1000 * torch.rand(b, generator=g)
    return x, t, text, torch.arange(l) < lengths[:, None]


def seeded(case: Case) -> nn.Module:
    """Our model with random weights, none of which is zero: zeros would hide differences."""
    from sora_train.model import Latte

    torch.manual_seed(0)
    model = Latte(case.model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def ours(contender: Contender) -> Callable[[], tuple[nn.Module, Callable[..., Tensor]]]:
    """Imports what is needed, and gives what makes the model and how it is called."""
    from sora_train.model import Latte
    from sora_train.model.convert import from_diffusers

    def make() -> tuple[nn.Module, Callable[..., Tensor]]:
        case = contender.case
        model = from_diffusers(contender.weights) if contender.weights else seeded(case)
        assert isinstance(model, Latte)
        model.checkpoint(case.checkpointing)  # pyright: ignore[reportArgumentType]
        if contender.compiled:
            model.compile_blocks(2)  # with and without gradients
        return model, lambda model, x, t, text, mask: model(x, t, text, mask)

    return make


def theirs(contender: Contender) -> Callable[[], tuple[nn.Module, Callable[..., Tensor]]]:
    """The same for diffusers' class, whose axes are `b c f h w`, and whose mask is a bias for every frame."""
    from diffusers import LatteTransformer3DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()

    def call(model: Any, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        bias = torch.where(mask, 0.0, -10000.0).to(text.dtype)[:, None].repeat_interleave(x.shape[1], dim=0)
        return model(x.transpose(1, 2), t, text, bias, return_dict=False)[0].transpose(1, 2)

    def make() -> tuple[nn.Module, Callable[..., Tensor]]:
        model = LatteTransformer3DModel.from_pretrained(contender.weights, low_cpu_mem_usage=False)
        if contender.case.checkpointing == "full":
            model.enable_gradient_checkpointing()
        return model, partial(torch.compile(call, dynamic=False)) if contender.compiled else call

    return make


def resident_bytes() -> int:
    """This process's memory now; 0 where Linux does not tell."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most it ever had. Not `ru_maxrss`: that begins with what the parent had when it started this process."""
    return _status("VmHWM")


def _status(name: str) -> int:
    if not sys.platform.startswith("linux"):
        return 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def relative(a: Any, b: Any) -> float:
    """Largest difference of two arrays over the largest value; infinite where one is not finite."""
    largest = float(abs(b).max())
    found = float(abs(a - b).max()) / largest if largest else math.inf
    return found if math.isfinite(found) else math.inf
