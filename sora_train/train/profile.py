"""Profiles of training steps (`train.profile`), and the table by part that a trace becomes.

A trace is torch's, in Chrome's JSON format: https://ui.perfetto.dev opens it. The memory snapshot of a GPU is a pickle
that torch writes for its viewer, https://docs.pytorch.org/memory_viz. Nothing here reads it.
"""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from sora_train.errors import UserError
from sora_train.train.run_dir import RunDir

PARTS = {
    "pointwise": r"^triton_(poi|per|red|for)_",  # fused kernels, whose names hold those of products and attention
    "communication": r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_scatter",
    "optimizer": r"adam|multi_tensor|_foreach",
    "attention": r"attention|attn|flash|fmha|softmax",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|wgmma|splitk|conv\d|convolution|mm\b|addmm|linear|triton_tem",
    "copies": r"memcpy|memset|copy|cat\b|CatArray",
}
"""Parts of a step, by the first pattern that is in the name of a kernel or operation. Others are pointwise."""
RULES = [(part, re.compile(pattern, re.IGNORECASE)) for part, pattern in PARTS.items()]
ON_GPU, ON_CPU = ("kernel", "gpu_memcpy", "gpu_memset"), ("cpu_op",)
LISTED = 25
"""How many kernels the text lists."""


@dataclass(frozen=True)
class Kernel:
    """All calls of one GPU kernel, or of one operation on a CPU. Time in inner operations is not its own."""

    name: str
    part: str
    calls: int
    ms: float


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a trace goes. With several GPU streams the parts may add up to more than the total."""

    device: str
    """`GPU` or `CPU`."""
    total_ms: float
    """From the first kernel's start to the last one's end."""
    gaps_ms: float
    """Time within the total in which nothing ran."""
    kernels: tuple[Kernel, ...]
    """The slowest first."""

    def parts(self) -> dict[str, tuple[float, int]]:
        """Milliseconds and calls of each part, the slowest first, then of the gaps."""
        sums: dict[str, tuple[float, int]] = {}
        for kernel in self.kernels:
            ms, calls = sums.get(kernel.part, (0.0, 0))
            sums[kernel.part] = ms + kernel.ms, calls + kernel.calls
        return dict(sorted(sums.items(), key=lambda item: -item[1][0])) | {"gaps": (self.gaps_ms, 0)}

    def text(self, steps: int) -> str:
        """A table of parts and one of the slowest kernels, in milliseconds and calls of a step."""

        def line(name: str, ms: float, calls: int) -> str:
            return f"{ms / steps:10.3f} {ms / self.total_ms:7.1%} {calls / steps:8.1f}  {name}"

        head = f"{'ms a step':>10} {'share':>7} {'calls':>8}  "
        parts = [line(part, *values) for part, values in self.parts().items()]
        kernels = [line(f"{k.part}: {k.name[:150]}", k.ms, k.calls) for k in self.kernels[:LISTED]]
        total = f"{self.total_ms / steps:.3f} ms a step on the {self.device}, mean of {steps}"
        return "\n".join([total, "", head + "part", *parts, "", head + "part: kernel", *kernels, ""])


def breakdown(trace: Path) -> Breakdown:
    """Reads a trace that torch's profiler exported as `.json` or `.json.gz`. UserError if it holds no operations."""
    with gzip.open(trace, "rb") if trace.suffix == ".gz" else trace.open("rb") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    device, found = "GPU", [event for event in events if event.get("cat") in ON_GPU]
    if not found:
        device, found = "CPU", [event for event in events if event.get("cat") in ON_CPU]
    if not found:
        raise UserError(f"{trace} holds no kernels and no operations. Profile at least one step", code="evaluation")
    sums: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for name, us in own_times(found):
        sums[name] = sums[name][0] + us / 1000, sums[name][1] + 1
    kernels = (Kernel(name, part_of(name), calls, ms) for name, (ms, calls) in sums.items())
    spans = sorted((float(event["ts"]), float(event["ts"] + event["dur"])) for event in found)
    total = max(end for _, end in spans) - spans[0][0]
    return Breakdown(device, total / 1000, (total - covered(spans)) / 1000, tuple(sorted(kernels, key=lambda k: -k.ms)))


def part_of(name: str) -> str:
    """The part of a step that a kernel or operation belongs to."""
    return next((part for part, pattern in RULES if pattern.search(name)), "pointwise")


def own_times(events: Iterable[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Name and microseconds of each event, without those of the events within it on the same thread or stream."""
    tracks: dict[tuple[Any, Any], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        tracks[event["pid"], event["tid"]].append(event)
    for track in tracks.values():
        open_: list[list[Any]] = []  # [name, end, own microseconds], the innermost last
        for event in sorted(track, key=lambda event: (event["ts"], -event["dur"])):
            while open_ and open_[-1][1] <= event["ts"]:
                yield open_[-1][0], open_.pop()[2]
            if open_:
                open_[-1][2] -= event["dur"]
            open_.append([event["name"], event["ts"] + event["dur"], event["dur"]])
        yield from ((name, own) for name, _, own in open_)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals that are sorted by their start."""
    length, reached = 0.0, float("-inf")
    for start, end in spans:
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def activities(device: torch.device) -> list[ProfilerActivity]:
    """What to profile on a device."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


class StepProfiler:
    """Profiles `steps` steps from `first` on into the run's folder `profile`, on rank 0. Changes no result.

    On a GPU the step after them is recorded by the allocator, which would slow the traced ones down.
    """

    def __init__(self, first: int, steps: int, run_dir: RunDir, device: torch.device) -> None:
        self.first, self.steps, self.run_dir, self.device = first, steps, run_dir, device
        self.folder = run_dir.run / "profile"
        self.trace: torch.profiler.profile | None = None
        self.recording = False
        self.step = 0

    def begin(self, step: int) -> None:
        """Call it before each step, with the step's number, counted from 1."""
        self.step = step
        if self.trace is not None and step >= self.first + self.steps:
            self._write_trace(self.steps)
            if self.device.type == "cuda":
                torch.cuda.memory._record_memory_history(stacks="python")
                self.recording = True
        elif self.recording:
            self._write_memory()
        if step == self.first:
            self._synchronize()
            self.trace = torch.profiler.profile(activities=activities(self.device))
            self.trace.start()

    def close(self) -> None:
        """Writes what was recorded, if training ends within the profiled steps. Call it after the last step."""
        if self.trace is not None:
            self._write_trace(self.step - self.first + 1)
        if self.recording:
            self._write_memory()

    def _write_trace(self, steps: int) -> None:
        trace, self.trace = self.trace, None
        assert trace is not None
        self._synchronize()
        trace.stop()
        path, table = self.folder / "trace.json.gz", self.folder / "table.txt"
        try:
            self.folder.mkdir(exist_ok=True)
            trace.export_chrome_trace(str(path))
            table.write_text(breakdown(path).text(steps), encoding="utf-8")
            done = str(table)
        except OSError as error:  # training goes on
            done = f"not written: {error}"
        last = self.first + steps - 1
        self.run_dir.events.write("profiled", last, f"steps {self.first} to {last}: {done}")

    def _write_memory(self) -> None:
        self.recording = False
        self._synchronize()
        torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
