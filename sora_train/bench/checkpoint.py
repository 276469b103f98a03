"""`sora bench checkpoint`: for how long a checkpoint stops training, when it is whole on disk, and what a resume takes.

The engine, averaged weights and checkpoints of training itself (`sora_train/train`), in one plain process: no Ray.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from sora_train.bench.core import Row, Table, fs_type, say, seconds, spread
from sora_train.bench.model import Options as ModelOptions
from sora_train.bench.model import cases, title
from sora_train.bench.options import Common, parse, refuse
from sora_train.bench.output import finish
from sora_train.bench.variant import Case, inputs
from sora_train.errors import RecipeError
from sora_train.model import Latte
from sora_train.train import checkpoint
from sora_train.train.checkpoint import State
from sora_train.train.config import TrainConfig
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine
from sora_train.train.run_dir import Home

ABOUT = (
    "Trains a model of a named shape on noise with DeepSpeed in one process, and makes checkpoints as `sora train` "
    "does: copied while training stands still, written while it goes on. In turns: a step alone, one with a checkpoint "
    "being written. Needs no Ray.\n\nFor instance: sora bench checkpoint --presets S --tmp /shared/disk"
)


@dataclass(frozen=True)
class Options(Common):
    """What to checkpoint, and where."""

    presets: tuple[str, ...] = ("S",)
    """Shapes of the model: S, B, L, XL, latte_t2v, or tiny, which only shows that all works."""
    shape: str = "16x256x256"
    """Frames, height and width of clips in pixels, of which a step takes `--batch`."""
    batch: int = 1
    """Clips of a step."""
    text_tokens: int = 120
    """Tokens that captions are padded to."""
    zero_stage: Literal["0", "1", "2", "3"] = "1"
    """DeepSpeed's ZeRO stage."""
    rounds: int = 5
    """Checkpoints that are made; medians count."""
    device: str = ""
    """`cpu` or `cuda`; if not given the GPU, where there is one."""
    threads: int = 0
    """Threads on the CPU; 0 is one for every core."""
    tmp: str = ""
    """Folder to write checkpoints into, on the disk that is to be measured; the system's temporary one if not given."""


def bench(options: Options) -> list[Table]:
    """A row for each preset. RecipeError for flags that make no sense."""
    if not options.rounds:
        raise RecipeError("--rounds is 0; it takes 1 or more")
    asked = ModelOptions(
        presets=options.presets, shapes=(options.shape,), batch=options.batch, text_tokens=options.text_tokens,
        device=options.device, threads=options.threads,
    )  # fmt: skip
    rows: list[Row] = []
    for case in list(cases(asked)):
        say(title(case))
        with tempfile.TemporaryDirectory(dir=options.tmp or None) as folder:
            rows.append(measure(case, options, Path(folder)))
            where = fs_type(folder)
    notes = [
        f"written to {where}; stall: seconds that training stands still, and over those of a step; whole: until every "
        "byte is on disk; resume: to read it back with its checksums, and to make the engine; beside: a step while a "
        "checkpoint is being written, over one without",
    ]
    return [Table("checkpoint", rows, notes)]


def measure(case: Case, options: Options, folder: Path) -> Row:
    """In turns a step, and a checkpoint with steps beside it until it is whole; then a resume from the last."""
    torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = TrainConfig(
        batch_size=case.batch, micro_batch_size=case.batch, zero_stage=int(options.zero_stage),  # pyright: ignore
        precision="bf16" if case.dtype == "bf16" else "fp32",
    )  # fmt: skip
    x, t, text, mask = (tensor.to(device) for tensor in inputs(case))

    def made() -> tuple[Engine, Ema]:
        torch.manual_seed(0)
        engine = Engine(Latte(case.model), config, accumulation=1, device=device)
        return engine, Ema(engine, config.ema_decay)

    def step(engine: Engine, ema: Ema) -> None:
        engine.backward(engine(x, t, text, mask).square().mean())
        engine.step(1e-5, lambda norm: "")
        ema.update(0)

    engine, ema = made()
    home = Home(folder)
    step(engine, ema)
    state = State()
    found: dict[str, list[float]] = {name: [] for name in ("step_s", "stall_s", "whole_s", "beside")}
    for turn in range(options.rounds + 1):  # the first warms up
        alone = seconds(lambda: step(engine, ema))
        state = replace(state, step=turn)
        stall = seconds(lambda: home.keep(partial(checkpoint.snapshot, engine, ema, state)))  # noqa: B023
        beside: list[float] = []

        def wait() -> None:
            while home.writing is not None and not home.writing.done():
                beside.append(seconds(lambda: step(engine, ema)))  # noqa: B023
            home.settle()

        whole = stall + seconds(wait)
        if turn:
            for name, value in (("step_s", alone), ("stall_s", stall), ("whole_s", whole)):
                found[name].append(value)
            if len(beside) > 1:  # the last one may have been alone for most of its time
                found["beside"].append(statistics.median(beside[:-1]) / alone)
    newest = folder / "checkpoints" / checkpoint.name_of(state.step)
    size = sum(path.stat().st_size for path in newest.iterdir())
    resume: list[float] = []
    make: list[float] = []
    for _ in range(min(options.rounds, 3)):
        fresh: list[tuple[Engine, Ema]] = []
        make.append(seconds(lambda: fresh.append(made())))  # noqa: B023
        resume.append(seconds(lambda: checkpoint.load(newest, *fresh[0])))  # noqa: B023
    home.writer.shutdown()
    return {
        "model": case.preset,
        "shape": options.shape,
        "batch": case.batch,
        "dtype": case.dtype,
        "zero": int(options.zero_stage),
        "gb": size / 1e9,
        "step_s": spread(found["step_s"]),
        "stall_s": spread(found["stall_s"]),
        "stall / step": statistics.median(found["stall_s"]) / statistics.median(found["step_s"]),
        "whole_s": spread(found["whole_s"]),
        "beside": spread(found["beside"]) if found["beside"] else None,
        "resume_s": spread(resume),
        "engine_s": spread(make),
    }


def main(words: Sequence[str], prog: str = "sora bench checkpoint") -> int:
    """The command; returns the exit status."""
    options, rest = parse(Options, words, prog, ABOUT)
    refuse(rest, prog)
    return finish(bench(options), options, ["checkpoint", *words])
