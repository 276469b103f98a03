"""Images skip the temporal blocks, which get gradients of zero."""

from dataclasses import replace

import pytest
import torch

from sora_train.model import ModelConfig, Transformer
from sora_train.train.skipped_blocks import add_zero_gradients
from tests.model.awake import awake

SMALL = ModelConfig(width=32, depth=4, heads=4, text_width=12, sample_size=8)
VARIANTS = [
    SMALL,
    replace(SMALL, cross_attention_in="every", temporal_positions="input", pooled_text=True),
    replace(SMALL, positions="rotary"),
    replace(SMALL, temporal_positions="rotary"),
]


def prepared(config: ModelConfig) -> Transformer:
    model = awake(config)
    add_zero_gradients(model)
    return model


def image() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    mask = torch.ones(2, 5, dtype=torch.bool)
    return torch.randn(2, 1, 4, 8, 8), torch.tensor([3.0, 900.0]), torch.randn(2, 5, 12), mask


@pytest.mark.parametrize("config", VARIANTS)
def test_images_give_temporal_blocks_gradients_of_exactly_zero(config):
    model, (x, t, text, mask) = prepared(config), image()
    model(x, t, text, mask).square().mean().backward()
    assert all(p.grad is not None and not p.grad.any() for i in (1, 3) for p in model.blocks[i].parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.blocks[2].parameters())


def test_images_come_out_in_training_as_they_do_in_sampling():
    model, (x, t, text, mask) = prepared(SMALL), image()
    trained = model.train()(x, t, text, mask)
    with torch.no_grad():
        assert torch.equal(model.eval()(x, t, text, mask), trained)


def test_infinite_latents_of_an_image_reach_no_temporal_block():
    model, (x, t, text, mask) = prepared(SMALL), image()
    x[0] = torch.inf
    assert model(x, t, text, mask)[1].isfinite().all()
