"""How tokens learn their place: sinusoids that are added, rotations that leave them as they are."""

from dataclasses import replace

import pytest
import torch

from sora_train.model import Latte, ModelConfig
from sora_train.model.embed import apply_rope, frame_positions, rope_freqs

SMALL = ModelConfig(width=32, depth=4, heads=4, text_width=12, sample_size=8)
ROTARY = replace(SMALL, positions="rotary")


def grid(f: int, h: int, w: int) -> torch.Tensor:
    return torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32) for side in (f, h, w))).T


def scores(q: torch.Tensor, k: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    rope = rope_freqs(places, q.shape[-1])
    return apply_rope(q, rope) @ apply_rope(k, rope).transpose(-1, -2)


@pytest.mark.parametrize("head", [6, 16, 64, 72])
def test_scores_of_rotated_heads_depend_on_distances_alone(head):
    torch.manual_seed(0)
    places = grid(3, 2, 4)
    q, k = torch.randn(2, 2, 24, head).unbind()
    here = scores(q, k, places)
    moved = scores(q, k, places + torch.tensor([[5.0], [11.0], [2.0]]))
    torch.testing.assert_close(moved, here, rtol=1e-4, atol=1e-4)
    for axis in range(3):  # and on every axis they do depend
        assert not torch.allclose(scores(q, k, places * (1 + torch.eye(3)[axis][:, None])), here, atol=0.1)


def test_rope_is_a_complex_product_that_keeps_lengths():
    torch.manual_seed(0)
    x, place = torch.randn(5, 8), torch.tensor([0.0, 1.0, 2.0, 7.0, 0.5])
    y = apply_rope(x, rope_freqs(place[None], 8))
    angle = place[:, None] * 10000.0 ** (-torch.arange(4) / 4)  # RoFormer, equation 15
    expected = torch.complex(*x.chunk(2, dim=1)) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(torch.complex(*y.chunk(2, dim=1)), expected)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    assert torch.equal(y[0], x[0])


@pytest.mark.parametrize("attention", ["factorised", "joint"])
def test_with_rotary_positions_outputs_ignore_where_a_clip_begins(attention, monkeypatch):
    torch.manual_seed(0)
    model = Latte(replace(ROTARY, attention=attention))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, text = torch.randn(1, 3, 4, 8, 8), torch.randn(1, 5, 12)

    def outputs() -> torch.Tensor:
        with torch.no_grad():
            return model(x, torch.tensor([500.0]), text, torch.ones(1, 5, dtype=torch.bool))

    here = outputs()
    monkeypatch.setattr("sora_train.model.latte.rope_freqs", lambda places, k: rope_freqs(places + 9, k))
    torch.testing.assert_close(outputs(), here, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change", [{}, {"positions": "rotary"}, {"temporal_positions": "rotary"}, {"sample_frames": 4}]
)
@pytest.mark.parametrize("attention", ["factorised", "joint"])
def test_another_length_and_shape_than_a_model_was_made_for_runs(change, attention):
    model = Latte(replace(SMALL, attention=attention, **change))
    for f, h, w in ((1, 8, 8), (7, 12, 6), (33, 4, 2)):
        x = torch.randn(1, f, 4, h, w)
        y = model(x, torch.tensor([500.0]), torch.randn(1, 5, 12), torch.ones(1, 5, dtype=torch.bool))
        assert y.shape == x.shape


def test_clips_of_any_length_span_sample_frames():
    cpu = torch.device("cpu")
    assert frame_positions(4, 0, cpu).tolist() == frame_positions(4, 4, cpu).tolist() == [0, 1, 2, 3]
    assert frame_positions(8, 4, cpu).tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert frame_positions(2, 4, cpu).tolist() == [0, 2]


@pytest.mark.parametrize(("width", "heads"), [(32, 8), (28, 4), (20, 4)])
def test_heads_too_narrow_or_odd_to_turn_are_refused_with_their_width(width, heads):
    with pytest.raises(ValueError, match=f"{width // heads} a head"):
        replace(ROTARY, width=width, heads=heads)
