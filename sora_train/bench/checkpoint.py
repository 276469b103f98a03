"""`sora bench checkpoint`: how long a checkpoint blocks training, and how long writing and resuming take.

Uses training's engine, averaged weights and checkpoints in one plain process, without Ray.
"""

from __future__ import annotations

import statistics
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from sora_train.bench.core import Flags, Row, Table, finish, log, seconds, spread
from sora_train.bench.variant import Case, add_case_flags, check_device, inputs, size_of
from sora_train.model import Latte
from sora_train.train import checkpoint
from sora_train.train.config import TrainConfig
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine
from sora_train.train.run_dir import RunDir
from sora_train.train.state import State

ABOUT = """Trains a model on noise with DeepSpeed in one process and makes checkpoints as `sora train` does: training
waits for the copy, and continues while it is written. Example: sora bench checkpoint --presets S --tmp /shared/disk"""
NOTE = """stall: seconds that training waits; whole: until every byte is on disk; resume: reading it back with its
checksums; engine: making the engine; beside: a step while it is written, divided by one without"""


def bench(options: Namespace) -> Table:
    """One row for each preset."""
    check_device(options)
    torch.set_num_threads(options.threads)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows: list[Row] = []
    for preset in options.presets:
        case = Case(
            preset, "factorised", size_of(options.shape), "fp32" if options.device == "cpu" else "bf16", "none",
            options.batch, options.text_tokens, options.device, options.threads,
        )  # fmt: skip
        log(str(case))
        with tempfile.TemporaryDirectory(dir=options.tmp or None) as folder:
            rows.append(measure(case, options, Path(folder)))
    return Table("checkpoint", rows, [f"written to {options.tmp or tempfile.gettempdir()}", NOTE.replace("\n", " ")])


def measure(case: Case, options: Namespace, folder: Path) -> Row:
    """In turns a step alone, and a checkpoint with steps until it is written; then resumes from the last."""
    device = torch.device(case.device)
    config = TrainConfig(
        batch_size=case.batch, micro_batch_size=case.batch, zero_stage=int(options.zero_stage),  # pyright: ignore
        precision="bf16" if case.dtype == "bf16" else "fp32",
    )  # fmt: skip
    x, t, text, mask = (tensor.to(device) for tensor in inputs(case))

    def make() -> tuple[Engine, Ema]:
        torch.manual_seed(0)
        engine = Engine(Latte(case.model), config, accumulation=1, device=device)
        return engine, Ema(engine, config.ema_decay)

    engine, ema = make()

    def step() -> None:
        engine.backward(engine(x, t, text, mask).square().mean())
        engine.step(1e-5, lambda norm: "")
        ema.update(0)

    step()
    run_dir, state = RunDir(folder), State()
    found: dict[str, list[float]] = {"step_s": [], "stall_s": [], "whole_s": [], "beside": []}
    for turn in range(options.rounds + 1):  # the first is a warm-up
        alone, state = seconds(step), replace(state, step=turn)
        stall = seconds(lambda: run_dir.save_async(partial(checkpoint.snapshot, engine, ema, state)))  # noqa: B023
        beside: list[float] = []

        def wait() -> None:
            while run_dir.writing is not None and not run_dir.writing.done():
                beside.append(seconds(step))  # noqa: B023
            run_dir.wait()

        whole = stall + seconds(wait)
        if turn:
            for name, value in (("step_s", alone), ("stall_s", stall), ("whole_s", whole)):
                found[name].append(value)
            if len(beside) > 1:  # the last one may have run mostly after the writing
                found["beside"].append(statistics.median(beside[:-1]) / alone)
    newest = folder / "checkpoints" / checkpoint.name_of(state.step)
    size = sum(path.stat().st_size for path in newest.iterdir())
    loads: list[float] = []
    makes: list[float] = []
    for _ in range(min(options.rounds, 3)):
        fresh: list[tuple[Engine, Ema]] = []
        makes.append(seconds(lambda: fresh.append(make())))  # noqa: B023
        loads.append(seconds(lambda: checkpoint.load(newest, *fresh[0])))  # noqa: B023
    run_dir.writer.shutdown()
    return {
        "model": case.preset, "shape": options.shape, "batch": case.batch, "dtype": case.dtype,
        "zero": int(options.zero_stage), "gb": size / 1e9, "step_s": spread(found["step_s"]),
        "stall_s": spread(found["stall_s"]),
        "stall / step": statistics.median(found["stall_s"]) / statistics.median(found["step_s"]),
        "whole_s": spread(found["whole_s"]), "beside": spread(found["beside"]) if found["beside"] else None,
        "resume_s": spread(loads), "engine_s": spread(makes),
    }  # fmt: skip


def main(words: Sequence[str], prog: str = "sora bench checkpoint") -> int:
    """The command; returns the exit status."""
    flags = Flags(prog, ABOUT)
    add_case_flags(flags)
    flags.flag("shape", "16x256x256", "frames, height and width of clips in pixels")
    flags.flag("zero_stage", "1", "DeepSpeed's ZeRO stage", choices=["0", "1", "2", "3"])
    flags.flag("tmp", "", "folder on the disk to measure; empty: the system's temporary folder")
    options = flags.parse(words)
    return finish([bench(options)], ["checkpoint", *words], options.out)
