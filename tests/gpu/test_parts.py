"""The GPU check's parts: on a GPU where there is one, and on the CPU, so that each was run before."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.check import ALONE, LIMITS_S, OPTIONAL, check, new_page, page
from tests.gpu.parts import PARTS

QUICK = ("memory", "plan")
"""Parts that other tests on the CPU do not cover."""


RAY = ("road", "train", "real")


def test_every_part_has_a_limit():
    assert list(PARTS) == list(LIMITS_S)
    assert set(LIMITS_S) > ALONE > OPTIONAL


def test_a_page_is_named_after_the_device_and_replaces_none():
    first = new_page("NVIDIA H100 80GB HBM3")
    assert first.name.startswith("gpu_h100_80gb_hbm3_20")
    assert not first.exists()


def holds(part: str, device: str) -> None:
    row = check(part, device, 280)
    assert row.holds, row.figures
    written = page([row], device)
    assert row.figures.replace("|", "\\|") in written
    assert row.tables in written


@pytest.mark.gpu
@pytest.mark.parametrize("part", [name for name in LIMITS_S if name not in OPTIONAL])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_part_holds_on_a_gpu(part: str):
    holds(part, "cuda")


@pytest.mark.parametrize(
    "part",
    [part if part in QUICK else pytest.param(part, marks=[pytest.mark.slow, *[pytest.mark.ray] * (part in RAY)])
     for part in LIMITS_S if part != "real"],
)  # fmt: skip
def test_a_part_holds_on_a_cpu(part: str):
    holds(part, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_says_so_and_fails():
    command = [sys.executable, "-m", "tests.gpu.check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr == "make check-gpu needs a CUDA GPU and this machine has none\n"
