"""What a step of adapters costs, against torch's own counter."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sora_train.lora.config import LoraConfig
from sora_train.lora.flops import training_flops
from sora_train.model import ModelConfig, build, preset
from sora_train.model.flops import forward_flops
from sora_train.train.adapted import adapt

SMALL = ModelConfig(width=32, depth=4, heads=4, text_width=12, sample_size=8)
CHANGES = {
    "factorised": {},
    "joint": {"attention": "joint", "depth": 3, "pooled_text": True},
    "every": {"learned_variance": True, "cross_attention_in": "every"},
    "wan": {"family": "wan", "sample_size": 32, "depth": 3, "feed_forward": 72},
}
TARGETS = [("to_q", "to_k", "to_v", "to_out"), ("to_q", "to_v"), ("to_out", "ff")]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", CHANGES)
def test_flops_of_adapters_are_those_that_torch_counts(name: str, targets: tuple):
    config, lora = replace(SMALL, **CHANGES[name]), LoraConfig(rank=4, targets=targets)
    model = build(config)
    adapt(model, lora, half=False)
    x, text, mask = torch.randn(1, 5, 4, 8, 12), torch.randn(1, 7, 12), torch.ones(1, 7, dtype=torch.bool)
    # The plain kernel is two matmuls, which the counter knows; it does not know the CPU's fused one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, torch.tensor([500.0]), text, mask).sum().backward()
    assert training_flops(config, lora, 5, 8, 12, 7) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_training_all_weights_is_three_forward_passes():
    assert training_flops(SMALL, LoraConfig(), 5, 8, 12, 7) == 3 * forward_flops(SMALL, 5, 8, 12, 7)
    assert training_flops(SMALL, LoraConfig(), 5, 8, 12, 7, recompute=True) == 4 * forward_flops(SMALL, 5, 8, 12, 7)


def test_adapters_of_wan_cost_between_two_and_three_forward_passes():
    lora = LoraConfig(rank=16)
    for name, shape in (("wan2.1_t2v_1.3b", (1, 60, 104)), ("wan2.1_t2v_1.3b", (21, 60, 104))):
        ratio = training_flops(preset(name), lora, *shape, 512) / forward_flops(preset(name), *shape, 512)
        assert 1.9 < ratio < 3
