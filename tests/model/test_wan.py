"""Our Wan next to diffusers' `WanTransformer3DModel`, a second implementation, with the same random weights."""

from dataclasses import replace

import pytest
import torch

from sora_train.model import ModelConfig, build, preset
from sora_train.model.convert import from_diffusers, to_diffusers
from tests.model.awake import nudged
from tests.model.wan_reference import inputs, opened, reference, run_reference

SHAPES = [(3, 8, 12, (7, 3)), (1, 4, 4, (512,)), (5, 6, 4, (1, 40))]
SMALL = ModelConfig(family="wan", width=48, heads=2, depth=1, in_channels=4, text_width=12)


def times(kind: str, b: int, f: int) -> torch.Tensor:
    """One of each clip (2.1), or one of each frame, the first of which is given (2.2)."""
    if kind == "2.1":
        return torch.tensor([17.0, 803.0])[:b]
    t = 1000 * torch.rand(b, f, generator=torch.Generator().manual_seed(2))
    t[:, 0] = 0
    return t


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
@pytest.mark.parametrize(("f", "h", "w", "lengths"), SHAPES)
@torch.no_grad()
def test_outputs_equal_diffusers(tmp_path, kind, f, h, w, lengths):
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path)
    x, text, mask = inputs(kind, f, h, w, lengths)
    t = times(kind, len(x), f)
    expected = run_reference(theirs, x, t, text, mask)
    assert relative(from_diffusers(tmp_path)(x, t, text, mask), expected) < 1e-5


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
def test_gradients_equal_diffusers(tmp_path, kind):
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path / "start")
    ours = from_diffusers(tmp_path / "start")
    x, text, mask = inputs(kind, *SHAPES[0][:3])
    t = times(kind, 2, 3)
    run_reference(theirs, x, t, text, mask).square().mean().backward()
    ours(x, t, text, mask).square().mean().backward()
    with torch.no_grad():  # as weights, so that the conversion gives them diffusers' names
        for p in ours.parameters():
            p.copy_(p.grad)
    to_diffusers(ours, tmp_path / "gradients")
    found = opened(tmp_path / "gradients").state_dict()
    largest = max(p.grad.abs().max() for p in theirs.parameters())
    for name, p in theirs.named_parameters():
        assert (found[name] - p.grad).abs().max() < 1e-4 * max(p.grad.abs().max(), 1e-3 * largest), name


@torch.no_grad()
def test_a_time_of_each_frame_equals_one_of_the_clip_where_all_are_alike():
    model = nudged(SMALL, 0.1)
    x, text, mask = torch.randn(2, 3, 4, 8, 6), torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool)
    t = torch.tensor([100.0, 900.0])
    torch.testing.assert_close(model(x, t[:, None].expand(2, 3), text, mask), model(x, t, text, mask))
    changed = t[:, None].repeat(1, 3)
    changed[0, 1] = 0
    assert not torch.allclose(model(x, changed, text, mask)[0], model(x, t, text, mask)[0], atol=1e-3)


@torch.no_grad()
def test_a_given_frame_reaches_the_other_frames():
    model = nudged(SMALL, 0.1)
    x, text, mask = torch.randn(2, 3, 4, 8, 6), torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool)
    times = torch.tensor([[0.0, 500.0, 500.0]]).expand(2, 3)
    other = torch.cat([x[:, :1] + 1, x[:, 1:]], dim=1)
    moved = model(other, times, text, mask)[:, 1:] - model(x, times, text, mask)[:, 1:]
    assert moved.flatten(2).abs().amax(dim=2).min() > 1e-4


@torch.no_grad()
def test_padding_to_any_length_gives_the_same():
    model = nudged(SMALL, 0.1)
    x, t, text = torch.randn(1, 2, 4, 4, 4), torch.tensor([300.0]), torch.randn(1, 9, 12)
    mask = torch.arange(9)[None] < 4
    y = model(x, t, text, mask)
    torch.testing.assert_close(model(x, t, text[:, :4], mask[:, :4]), y)
    torch.testing.assert_close(model(x, t, torch.where(mask[..., None], text, 5.0), mask), y)


@torch.no_grad()
def test_bf16_computes_modulation_and_norms_in_float32(tmp_path):
    """Weights are exact in bfloat16, so only the arithmetic differs; diffusers keeps some modules in float32."""
    theirs = reference("2.1").bfloat16().float()
    theirs.save_pretrained(tmp_path)
    x, text, mask = (each.bfloat16().float() if each.is_floating_point() else each for each in inputs("2.1", 3, 8, 8))
    t = torch.tensor([17.0, 803.0])
    exact = run_reference(theirs, x, t, text, mask)
    half = opened(tmp_path)
    for name, p in half.named_parameters():
        if not any(kept in name for kept in half._keep_in_fp32_modules):
            p.data = p.bfloat16()
    expected = run_reference(half, x.bfloat16(), t, text.bfloat16(), mask).float()
    y = from_diffusers(tmp_path).bfloat16()(x.bfloat16(), t, text.bfloat16(), mask)
    assert y.dtype == torch.bfloat16
    assert relative(y.float(), exact) < 1.5 * relative(expected, exact)


def test_a_new_model_predicts_zero_and_every_parameter_learns_in_the_second_step():
    torch.manual_seed(0)
    model = build(SMALL)
    x, text, mask = torch.randn(1, 2, 4, 4, 4), torch.randn(1, 5, 12), torch.ones(1, 5, dtype=torch.bool)
    assert not model(x, torch.tensor([500.0]), text, mask).any()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x, torch.tensor([500.0]), text, mask) - x).square().mean().backward()
        optimizer.step()
    assert not [name for name, p in model.named_parameters() if not p.grad.any()]


def test_query_key_and_value_start_as_maps_of_their_own():
    torch.manual_seed(0)
    d = 192
    block = build(replace(SMALL, width=d, heads=8)).blocks[0]
    for weight in (*block.attention.qkv.weight.chunk(3), *block.text_attention.kv.weight.chunk(2)):
        assert weight.abs().max().item() == pytest.approx((6 / (2 * d)) ** 0.5, rel=0.01)  # Xavier's bound


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attention": "joint", "pooled_text": True}, "take model.attention .joint., model.pooled_text True"),
        ({"learned_variance": True}, "model.learned_variance True"),
        ({"sample_size": 64}, "model.sample_size 64"),
        ({"family": "latte", "feed_forward": 64}, "model.family latte does not take model.feed_forward 64"),
        ({"heads": 12}, "4 a head"),
        ({"feed_forward": -1}, "model.feed_forward is -1; it must be 0 or more"),
    ],
)  # fmt: skip
def test_keys_of_the_other_family_are_refused_together(change, says):
    with pytest.raises(ValueError, match=says):
        replace(SMALL, **{"depth": 2, **change})


def test_latents_and_captions_that_do_not_fit_are_refused():
    model = build(SMALL)
    x, t, mask = torch.zeros(1, 1, 4, 4, 4), torch.tensor([1.0]), torch.ones(1, 600, dtype=torch.bool)
    with pytest.raises(ValueError, match="captions have 600 tokens; Wan takes at most 512"):
        model(x, t, torch.zeros(1, 600, 12), mask)
    with pytest.raises(ValueError, match="3 x 4 do not divide into patches of 2 x 2"):
        model(x[..., :3, :], t, torch.zeros(1, 2, 12), mask[:, :2])


def test_wan_has_neither_skipped_blocks_nor_a_text_mask():
    config = preset("wan2.1_t2v_1.3b")
    assert not config.factorised
    assert (config.text_tokens, ModelConfig().text_tokens) == (512, 0)
