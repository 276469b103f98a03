"""`sora bench checkpoint`: how long a checkpoint blocks training, and how long writing and resuming take.

Trains a model on noise with DeepSpeed in one plain process and makes checkpoints as `sora train` does: training waits
for the copy, and continues while it is written.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from sora_train.bench.case import Case, CaseOptions, inputs, size_of
from sora_train.bench.core import Row, Table, drop_from_cache, log, spread
from sora_train.model import build
from sora_train.train import checkpoint
from sora_train.train.config import TrainConfig
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine
from sora_train.train.hardware import seconds
from sora_train.train.load_checkpoint import load_checkpoint
from sora_train.train.run_dir import RunDir
from sora_train.train.state import State

NOTE = "stall: seconds that training waits; whole: until all is on disk; resume: reading it from disk with checksums"
"""Under the table."""


class Options(CaseOptions):
    """The flags."""

    shape: str = "16x256x256"
    """Frames, height and width of clips in pixels."""
    tmp: str = ""
    """Folder on the disk to measure; empty: the system's temporary folder."""


def bench(options: Options) -> list[Table]:
    """One row for each preset."""
    torch.set_num_threads(options.threads)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows: list[Row] = []
    for preset in options.presets:
        shape, tokens = size_of(options.shape), options.text_tokens
        case = Case(preset, "factorised", shape, options.dtype, "none", options.batch, tokens, options.device)
        log(str(case))
        with tempfile.TemporaryDirectory(dir=options.tmp or None) as folder:
            rows.append(measure(case, options.rounds, Path(folder)))
    return [Table("checkpoint", rows, [f"written to {options.tmp or tempfile.gettempdir()}", NOTE])]


def measure(case: Case, rounds: int, folder: Path) -> Row:
    """Times a step, the stall, the whole write, and the resume."""
    device = torch.device(case.device)
    precision = "bf16" if case.dtype == "bf16" else "fp32"
    config = TrainConfig(batch_size=case.batch, micro_batch_size=case.batch, precision=precision)
    x, t, text, mask = (tensor.to(device) for tensor in inputs(case))

    def make() -> tuple[Engine, Ema]:
        torch.manual_seed(0)
        engine = Engine(build(case.model), config, accumulation=1, device=device)
        return engine, Ema(engine, config.ema_decay)

    engine, ema = make()

    def step() -> None:
        engine.backward(engine(x, t, text, mask).square().mean(), last=True)
        engine.step(1e-5, lambda norm: "")
        ema.update(0)

    run_dir, newest = RunDir(folder), folder
    times: dict[str, list[float]] = {"step_s": [], "stall_s": [], "whole_s": [], "resume_s": []}
    for turn in range(rounds + 1):  # the first is a warm-up
        alone, state = seconds(step), replace(State(), step=turn)
        stall = seconds(lambda: run_dir.save_async(partial(checkpoint.snapshot, engine, ema, state)))  # noqa: B023
        whole = stall + seconds(run_dir.wait)
        newest = folder / "checkpoints" / checkpoint.name_of(turn)
        fresh = make()
        drop_from_cache(newest.iterdir())
        resume = seconds(lambda: load_checkpoint(newest, *fresh))  # noqa: B023
        if turn:
            for name, value in zip(times, (alone, stall, whole, resume), strict=True):
                times[name].append(value)
    run_dir.writer.shutdown()
    size = sum(path.stat().st_size for path in newest.iterdir())
    about = {"model": case.preset, "batch": case.batch, "dtype": case.dtype, "gb": size / 1e9}
    return {**about, **{name: spread(values) for name, values in times.items()}}
