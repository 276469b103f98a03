"""What tests of Triton kernels share: the process of Triton's interpreter, a count of calls, a comparison."""

import os
import subprocess
import sys

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ON_GPU, INTERPRETED = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def run_interpreted(file: str, which: str) -> None:
    """Runs the tests of a file in a process of their own, since Triton chooses its interpreter at import."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    # without the checks of shapes, which can't be compiled
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "-m", which]
    command = [sys.executable, "-m", "pytest", *options, file]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


class Calls(TorchDispatchMode):
    """Counts how often one of sora_train's operators ran."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator, self.count = getattr(torch.ops.sora_train, operator).default, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is self.operator
        return func(*args, **(kwargs or {}))


def same(found: list[Tensor], expected: list[Tensor], bound: float) -> bool:
    return all((a - b).abs().max() <= bound * b.abs().max() for a, b in zip(found, expected, strict=True))
