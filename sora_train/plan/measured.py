"""Seconds of steps, checkpoints and restarts: from earlier runs, else `sora bench checkpoint`, else assumed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from sora_train.errors import UserError
from sora_train.plan.states import checkpoint_bytes
from sora_train.recipe import Recipe, load_recipe
from sora_train.storage import in_bytes
from sora_train.train.metrics import JsonLines

ASSUMED_RATES = {"copy": 2e9, "write": 1e9, "read": 1e9}
"""Bytes per second: of the copy from a GPU to CPU memory, and of all ranks' files together to and from storage."""
NOTICE_S = 20.0
"""Until Ray notices a lost node. A lost worker is noticed within a second."""
START_S, COMPILE_S = 60.0, 25.0
"""Until workers have started, imported and joined, and until the first step is compiled. Assumed: on one H200, the
first step came 27 s after the command without compiling, and took 23 s with it."""
REPORT_S = 1e-3
"""Of each rank in Ray's barrier at a checkpoint, for which training waits. Measured up to 10,000 ranks on two cores."""
BENCH_FILE = "bench.jsonl"
MOST_RUNS = 20


@dataclass(frozen=True)
class Figure:
    """Seconds, and where they are from."""

    seconds: float
    origin: str


@dataclass(frozen=True)
class Costs:
    """What a checkpoint and a restart cost."""

    step: Figure
    stall: Figure
    write: Figure
    """After the stall, in the background."""
    resume: Figure
    """From the notice of a failure to the next step."""


def costs_of(recipe: Recipe, planned_step_s: Figure) -> Costs:
    """The costs for `cluster.workers`, each from the best source that exists."""
    size, share = checkpoint_bytes(recipe.model, recipe.lora), rank0_share(recipe.cluster.most)
    rates, source = bench_rates(Path(recipe.train.output))

    def by_rate(what: str, count: int | float) -> Figure:
        return Figure(count / rates[what], f"{in_bytes(round(count))} at {rates[what] / 1e9:.2g} GB/s, {source}")

    read, copy, report_s = by_rate("read", 0.8 * size), by_rate("copy", share * size), REPORT_S * recipe.cluster.most
    assumed = Costs(
        step=planned_step_s,
        stall=Figure(copy.seconds + report_s, f"{copy.origin}; Ray's report {report_s:.2g} s"),
        write=by_rate("write", size),
        resume=Figure(
            START_S + COMPILE_S + read.seconds,
            f"start {START_S:.0f} s, compiling {COMPILE_S:.0f} s, assumed; reading {read.origin}",
        ),
    )
    found: dict[str, Figure] = {}
    for run in earlier_runs(recipe):
        found = {name: Figure(value, f"measured in {run}") for name, value in run_seconds(run).items()} | found
    return replace(assumed, **found)


def rank0_share(world: int) -> float:
    """Share of a checkpoint's bytes that rank 0 copies: its part of four, and all averaged weights."""
    return 0.8 / world + 0.2


def earlier_runs(recipe: Recipe) -> list[Path]:
    """Runs in `train.output` that did the same work on as many workers: the recipe's own first, then the newest."""
    output, same = Path(recipe.train.output), []
    with suppress(OSError):
        runs = sorted(output.glob("*/recipe.yaml"), key=lambda path: -path.stat().st_mtime)
        own = [path for path in runs if path.parent.name == recipe.name]
        for path in [*own, *(path for path in runs if path not in own)][:MOST_RUNS]:
            with suppress(UserError):
                if work_of(load_recipe(path)) == work_of(recipe):
                    same.append(path.parent)
    return same


def work_of(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that change the time of a step or the bytes of a checkpoint."""
    sizes, modes = {"batch_size", "micro_batch_size", "balance"}, {"activation_checkpointing", "compile", "offload"}
    return {
        "model": recipe.model_dump()["model"] | {"init_from": ""},
        "lora": recipe.lora.rank,
        "shapes": recipe.data.shapes,
        "train": recipe.train.model_dump(include=sizes | modes | {"zero_stage", "precision"}),
        "cluster": recipe.cluster.model_dump(include={"workers", "sequence_parallel"}),
    }


def run_seconds(run: Path) -> dict[str, float]:
    """What a run's records say of `Costs`; only names for which there are some."""
    metrics, events = list[dict[str, Any]](), list[dict[str, Any]]()
    with suppress(OSError):
        metrics, events = JsonLines(run / "metrics.jsonl").read(), JsonLines(run / "events.jsonl").read()
    steps = [step_s for (step_s,) in values(metrics, "step_s")]
    saved = values(metrics, "checkpoint_stall_s", "checkpoint_s")
    found = {"step": steps, "stall": [stall for stall, _ in saved], "write": [whole - stall for stall, whole in saved]}
    if steps and saved:
        found["resume"] = resume_seconds(events, median(steps), median(whole for _, whole in saved))
    return {name: max(0.0, median(each)) for name, each in found.items() if each}


def values(records: Sequence[dict[str, Any]], *keys: str) -> list[list[float]]:
    """The seconds under these keys, of each record that has all of them."""
    rows: list[list[Any]] = [[record.get(key) for key in keys] for record in records]
    return [[float(value) for value in row] for row in rows if all(is_seconds(value) for value in row)]


def is_seconds(value: object) -> bool:
    """Whether a JSON value is a time that can be calculated with."""
    return isinstance(value, int | float) and 0 < value < inf


def resume_seconds(events: Sequence[dict[str, Any]], step_s: float, checkpoint_s: float) -> list[float]:
    """Seconds from the notice of a lost worker to the next step, of each restart that reached a checkpoint.

    That is the time from the event `worker_lost` to the next `checkpoint`, without the steps between and the writing.
    """
    found: list[float] = []
    lost: datetime | None = None
    step: int | None = None
    for event in events:
        with suppress(KeyError, ValueError, TypeError):
            kind, time = event["event"], datetime.fromisoformat(event["time"])
            if kind == "worker_lost":
                lost, step = time, None
            elif kind in ("stopped", "interrupted", "failed", "driver_lost", "rollback"):
                lost = step = None
            elif kind in ("start", "resume"):
                step = event["step"]
            elif kind == "checkpoint" and lost is not None and step is not None:
                rest = (time - lost).total_seconds() - (event["step"] - step) * step_s - checkpoint_s
                found += [rest] if rest > 0 else []
                lost = step = None
    return found


def bench_rates(folder: Path) -> tuple[dict[str, float], str]:
    """Rates by the newest `sora bench checkpoint` in a folder's bench.jsonl, and their source; else assumed."""
    lines = list[bytes]()
    with suppress(OSError):
        lines = (folder / BENCH_FILE).read_bytes().splitlines()
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError, IndexError, ZeroDivisionError):
            record = json.loads(line)
            if record["what"] != "checkpoint":
                continue
            row = record["rows"][-1]
            stall, whole, resume = (row[name]["median"] for name in ("stall_s", "whole_s", "resume_s"))
            size = 1e9 * row["gb"]
            rates = {"copy": size / stall, "write": size / (whole - stall), "read": 0.8 * size / resume}
            machine = ", ".join(record["hardware"]["gpus"]) or record["hardware"]["cpu"]
            if all(0 < rate < inf for rate in rates.values()):
                return rates, f"`sora bench checkpoint` on {machine}"
    return ASSUMED_RATES, "assumed"
