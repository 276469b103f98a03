"""Properties of the model that need no second implementation."""

from dataclasses import replace

import pytest
import torch

from sora_train.model import Latte, ModelConfig
from sora_train.model.embed import from_patches, to_patches
from sora_train.model.layers import MAX_GROUPS, attend
from tests.model.awake import awake

SMALL = ModelConfig(width=32, depth=4, heads=4, text_width=12, sample_size=8)
VARIANTS = [
    SMALL,
    replace(SMALL, cross_attention_in="every", temporal_positions="input", pooled_text=True),
    replace(SMALL, attention="joint", pooled_text=True, depth=3),
    replace(SMALL, positions="rotary"),
    replace(SMALL, positions="rotary", attention="joint", depth=3),
    replace(SMALL, temporal_positions="rotary"),
    replace(SMALL, temporal_positions="rotary", attention="joint", depth=3),
]


def inputs(f: int = 3, l: int = 5) -> tuple[torch.Tensor, ...]:  # noqa: E741
    torch.manual_seed(1)
    return (
        torch.randn(2, f, 4, 8, 8),
        torch.tensor([3.0, 900.0]),
        torch.randn(2, l, 12),
        torch.ones(2, l, dtype=torch.bool),
    )


@pytest.mark.parametrize("config", VARIANTS)
def test_clips_of_a_batch_do_not_see_each_other(config):
    model, (x, t, text, mask) = awake(config), inputs()
    alone = model(x[1:], t[1:], text[1:], mask[1:])
    assert torch.allclose(model(x, t, text, mask)[1:], alone, atol=1e-5)


@pytest.mark.parametrize("config", VARIANTS)
def test_padded_text_with_its_mask_equals_text_cut_to_length(config):
    model, (x, t, text, mask) = awake(config), inputs()
    mask[:, 3:] = False
    assert torch.allclose(model(x, t, text, mask), model(x, t, text[:, :3], mask[:, :3]), atol=1e-5)


@pytest.mark.parametrize("config", VARIANTS)
def test_every_parameter_gets_a_gradient(config):
    model, (x, t, text, mask) = awake(config), inputs()
    model(x, t, text, mask).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("config", VARIANTS)
def test_frames_know_their_place(config):
    model, (x, t, text, mask) = awake(config), inputs()
    backwards = model(x.flip(1), t, text, mask).flip(1)
    assert not torch.allclose(backwards, model(x, t, text, mask), atol=1e-3)


def test_an_untrained_model_predicts_zero():
    assert not Latte(SMALL)(*inputs()).any()


def test_patches_come_back_from_a_round_trip():
    x = torch.randn(2, 3, 4, 6, 8)
    tokens = to_patches(x, 2)
    assert tokens.shape == (2, 3, 12, 16)
    channels_last = tokens.unflatten(-1, (4, 2, 2)).permute(0, 1, 2, 4, 5, 3).flatten(3)
    assert torch.equal(from_patches(channels_last, 2, 3, 4), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"heads": 5}, "heads"), ({"depth": 3}, "even"), ({"width": 0}, "at least 1"), ({"sample_size": 7}, "patch")],
)
def test_a_shape_that_cannot_be_is_refused_with_the_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_latents_that_do_not_divide_into_patches_are_refused():
    x, t, text, mask = inputs()
    with pytest.raises(ValueError, match="7 x 8"):
        Latte(SMALL)(x[..., :7, :], t, text, mask)


def test_more_groups_than_a_cuda_grid_holds_attend_as_few_do():
    count = MAX_GROUPS + 3
    q, k, v = torch.randn(3, count, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    weights = torch.softmax(q.double() @ k.double().transpose(-1, -2) / 2**0.5, dim=-1)
    torch.testing.assert_close(attend(q, k, v).double(), weights @ v.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", VARIANTS)
def test_a_time_of_each_frame_equals_one_of_the_clip_where_all_are_alike(config):
    model, (x, t, text, mask) = awake(config), inputs()
    expected = model(x, t, text, mask)
    torch.testing.assert_close(model(x, t[:, None].expand(2, 3), text, mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", VARIANTS)
def test_without_attention_each_frame_is_denoised_at_its_own_time(config):
    model, (x, _, text, mask) = awake(config), inputs()
    with torch.no_grad():
        for block in model.blocks:
            for attention in (block.attention, block.text_attention):
                for parameter in attention.out.parameters() if attention is not None else ():
                    parameter.zero_()
    times = torch.tensor([[0.0, 300.0, 700.0], [5.0, 5.0, 999.0]])
    found = model(x, times, text, mask)
    for frame in range(3):
        expected = model(x, times[:, frame], text, mask)[:, frame]
        torch.testing.assert_close(found[:, frame], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", VARIANTS)
def test_a_given_frame_reaches_the_other_frames(config):
    model, (x, t, text, mask) = awake(config), inputs()
    times = torch.stack([torch.zeros(2), t, t], dim=1)
    other = torch.cat([x[:, :1] + 1, x[:, 1:]], dim=1)
    moved = model(other, times, text, mask)[:, 1:] - model(x, times, text, mask)[:, 1:]
    assert moved.flatten(2).abs().amax(dim=2).min() > 1e-3
