"""Peak FLOP/s and memory use of a device, for `mfu` and `memory_gb`, settings of its allocator, and its time."""

import os
import resource
import sys
import time
from collections.abc import Callable

import torch

PEAKS = {
    "A100": (312e12, 19.5e12),
    "A800": (312e12, 19.5e12),
    "A10": (125e12, 31.2e12),
    "A40": (149.7e12, 37.4e12),
    "A6000": (154.8e12, 38.7e12),
    "L4": (121e12, 30.3e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "H800": (989e12, 67e12),
    "H100 NVL": (835e12, 60e12),
    "H200": (989e12, 67e12),
    "H200 NVL": (835e12, 60e12),
    "GH200": (989e12, 67e12),
    "H20": (148e12, 44e12),
    "B200": (2250e12, 75e12),
    "RTX 3090": (71e12, 35.6e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 5090": (209.5e12, 104.8e12),
}
"""Dense FLOP/s of the data sheets: bfloat16 with float32 accumulation, and float32."""
LESS = {"Laptop", "Max", "D", "MIG"}
"""Words that name a smaller device or a part of one: `RTX 4090 Laptop GPU`, `RTX 4090 D`, `… MIG 1g.10gb`."""


def peak_flops(device: torch.device, half: bool) -> float | None:
    """A device's FLOP/s by its data sheet, in bfloat16 (`half`) or float32; None if it is not in the table."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), half)


def peak_of(name: str, half: bool) -> float | None:
    """The same by CUDA's name for it, such as `NVIDIA H100 80GB HBM3`; the longest matching name counts."""
    words = f" {name.replace('-', ' ')} "
    fits = [known for known in PEAKS if f" {known} " in words]
    return PEAKS[max(fits, key=len)][0 if half else 1] if fits and not LESS & set(words.split()) else None


def use_expandable_segments() -> None:
    """Has CUDA's allocator grow its segments, unless the environment configures it. Call it before the first use.

    Micro-batches of several shapes fragment segments of fixed size.
    """
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def memory_gb(device: torch.device) -> float:
    """Peak memory in 10⁹ bytes: of tensors on the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call, including its work on the GPU."""
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Waits for the GPU if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def gpu_seconds(call: Callable[[], object], device: torch.device, calls: int = 20) -> float:
    """Time of one of several calls; on a GPU of its work alone, as if the CPU were always ahead."""
    call()
    call()
    if device.type != "cuda":
        return seconds(lambda: [call() for _ in range(calls)]) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wide = torch.ones(8192, 8192, dtype=torch.bfloat16, device=device)
    for _ in range(20):  # the GPU is busy for 20 ms or more, while the CPU launches the calls
        torch.mm(wide, wide)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    synchronize()
    return begin.elapsed_time(end) / 1e3 / calls
