"""A frozen base in 8 bits is near the original, and the backward pass needs nothing but the 8 bits."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sora_train.lora.adapters import add_adapters
from sora_train.lora.config import LoraConfig
from sora_train.lora.int8 import Int8Linear, quantise_base, quantised
from sora_train.model import ModelConfig, build


def layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(96, 40).requires_grad_(False)
    made.weight[3] = 0  # a row without any scale
    made.weight[5, 7] = 30.0
    return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_is_off_by_half_a_step_of_its_row_at_most(dtype: torch.dtype):
    weight = layer(dtype).weight
    numbers, scale = quantised(weight)
    assert numbers.dtype == torch.int8
    assert scale.dtype == dtype
    assert torch.equal(scale.bfloat16().to(dtype), scale)  # DeepSpeed's cast to bfloat16 changes nothing
    off = (numbers.double() * scale.double() - weight.double()).abs()
    step = weight.double().abs().amax(1, keepdim=True) / 127
    assert (off <= 0.51 * step + 0.004 * weight.double().abs()).all()
    assert not off[3].any()


def test_output_and_gradient_are_those_of_the_widened_weights():
    plain = layer(torch.float64)
    made = Int8Linear(plain)
    widened = copy.deepcopy(plain)
    widened.weight.copy_(made.weight.double() * made.scale)
    x = torch.randn(2, 5, 96, dtype=torch.float64)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = made(found)
    assert torch.equal(y, widened(expected))
    y.square().sum().backward()
    widened(expected).square().sum().backward()
    assert found.grad is not None
    assert expected.grad is not None
    assert torch.allclose(found.grad, expected.grad, rtol=1e-12)
    assert torch.autograd.gradcheck(made, x[:1].clone().requires_grad_())


def test_only_the_8_bits_wait_for_the_backward_pass():
    made, saved = Int8Linear(layer()), list[Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made(torch.randn(4, 96).requires_grad_())
    assert {id(tensor) for tensor in saved} == {id(made.weight), id(made.scale)}


@pytest.mark.parametrize("config", [
    ModelConfig(width=64, depth=2, heads=2, text_width=16, sample_size=8),
    ModelConfig(family="wan", width=64, depth=2, heads=2, text_width=16, feed_forward=128),
])  # fmt: skip
def test_a_models_outputs_are_off_by_less_than_with_bf16(config: ModelConfig):
    torch.manual_seed(0)
    model = build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    add_adapters(model, LoraConfig(rank=4))
    x, t, text = torch.randn(2, 2, config.in_channels, 8, 8), torch.tensor([100.0, 900.0]), torch.randn(2, 7, 16)
    mask = torch.ones(2, 7, dtype=torch.bool)

    def off(changed: nn.Module, dtype: torch.dtype) -> float:
        y = changed.to(dtype)(x.to(dtype), t, text.to(dtype), mask).float()
        return float((y - expected).norm() / expected.norm())

    with torch.no_grad():
        expected = model(x, t, text, mask)
        quantised_model = copy.deepcopy(model)
        quantise_base(quantised_model)
        assert 0 < off(quantised_model, torch.float32) < off(copy.deepcopy(model), torch.bfloat16) < 0.02
    kinds = {type(module) for module in quantised_model.blocks.modules()}
    assert Int8Linear in kinds
    assert nn.Linear in kinds  # the adapters' own
    frozen = [p for p in quantised_model.blocks.parameters() if not p.requires_grad and p.ndim == 2]
    assert {p.dtype for p in frozen if min(p.shape) > 6} == {torch.int8}
