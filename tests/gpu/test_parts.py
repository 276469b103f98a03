"""The GPU check's parts: on a GPU where there is one, and on the CPU, so that each was run before."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.check import NAMES, check, tabulate
from tests.gpu.parts import PARTS

QUICK = ("memory", "plan")
"""Parts that other tests on the CPU do not cover."""


def test_every_part_is_named():
    assert tuple(PARTS) == NAMES


def holds(part: str, device: str) -> None:
    row = check(part, device, 280)
    assert row.holds, row.figures
    assert row.figures in tabulate([row])


@pytest.mark.gpu
@pytest.mark.parametrize("part", NAMES)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_part_holds_on_a_gpu(part: str):
    holds(part, "cuda")


@pytest.mark.parametrize(
    "part",
    [part if part in QUICK else pytest.param(part, marks=[pytest.mark.slow, *[pytest.mark.ray] * (part == "road")])
     for part in NAMES],
)  # fmt: skip
def test_a_part_holds_on_a_cpu(part: str):
    holds(part, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_says_so_and_fails():
    command = [sys.executable, "-m", "tests.gpu.check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr == "make check-gpu needs a CUDA GPU and this machine has none\n"
