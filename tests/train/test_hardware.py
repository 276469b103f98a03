"""What is known of devices."""

import pytest
import torch

from sora_train.train.hardware import memory_gb, peak_flops, peak_of


@pytest.mark.parametrize(
    ("name", "half", "full"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835e12, 60e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA H20", 148e12, 44e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA A10G", None, None),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA RTX A6000", 154.8e12, 38.7e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA L40", 181e12, 90.5e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("Tesla T4", None, None),
    ],
)
def test_the_peak_goes_by_the_name_that_cuda_gives(name: str, half: float | None, full: float | None):
    assert (peak_of(name, True), peak_of(name, False)) == (half, full)


def test_a_cpu_has_no_peak_and_holds_what_the_process_does():
    assert peak_flops(torch.device("cpu"), True) is None
    before = memory_gb(torch.device("cpu"))
    held = torch.ones(200_000_000 // 4)  # 0.2 GB
    assert memory_gb(torch.device("cpu")) > 0.2
    assert memory_gb(torch.device("cpu")) >= before
    assert held.numel()
