"""Our Latte beside diffusers' `LatteTransformer3DModel`, a second implementation, with the same random weights."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import LatteTransformer3DModel
from safetensors.torch import load_file, save_file

from sora_train.model import Latte, ModelConfig
from sora_train.model.convert import (
    check_fit,
    check_weights,
    config_from_diffusers,
    from_diffusers,
    to_diffusers,
)

HEADS, HEAD_WIDTH, TEXT_WIDTH = 4, 24, 40


def reference(
    video_length: int = 16, sample_size: int = 8, out_channels: int = 8, bias: bool = True
) -> LatteTransformer3DModel:
    """A small model of the released configuration, every weight random (its own zeros would hide mistakes)."""
    torch.manual_seed(0)
    model = LatteTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=4,
        out_channels=out_channels,
        num_layers=3,
        cross_attention_dim=HEADS * HEAD_WIDTH,
        attention_bias=bias,
        sample_size=sample_size,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_WIDTH,
        video_length=video_length,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model.eval()


def inputs(f: int, h: int = 8, w: int = 8, tokens: int = 7) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, f, 4, h, w, generator=g)
    text = torch.randn(2, tokens, TEXT_WIDTH, generator=g)
    return x, torch.tensor([17.0, 803.0]), text, torch.ones(2, tokens, dtype=torch.bool)


@torch.no_grad()
def both(model: LatteTransformer3DModel, folder, x, t, text, mask, **options) -> tuple[torch.Tensor, torch.Tensor]:
    model.save_pretrained(folder)
    bias = None if mask.all() else torch.where(mask, 0.0, -10000.0)[:, None].repeat_interleave(x.shape[1], dim=0)
    theirs = model(x.transpose(1, 2), t, text, bias, return_dict=False, **options)[0].transpose(1, 2)
    return from_diffusers(folder)(x, t, text, mask), theirs


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(
    ("frames", "size", "out_channels", "bias"), [(16, 8, 8, True), (5, 8, 4, True), (16, 128, 8, False)]
)
def test_outputs_equal_diffusers_for_the_frames_it_was_built_for(tmp_path, frames, size, out_channels, bias):
    model = reference(frames, size, out_channels, bias)
    assert relative(*both(model, tmp_path, *inputs(frames))) < 1e-5


def test_other_shapes_interpolate_positions_as_diffusers_does(tmp_path):
    assert relative(*both(reference(), tmp_path, *inputs(16, h=12, w=6))) < 1e-5


def test_one_frame_equals_diffusers_without_temporal_attention(tmp_path):
    ours, theirs = both(reference(), tmp_path, *inputs(1), enable_temporal_attentions=False)
    assert relative(ours, theirs) < 1e-5


def test_a_masked_caption_equals_diffusers_and_a_caption_cut_short(tmp_path):
    x, t, text, mask = inputs(16)
    mask[0, 4:] = False
    ours, theirs = both(reference(), tmp_path, x, t, text, mask)
    assert relative(ours, theirs) < 1e-5
    with torch.no_grad():
        cut = from_diffusers(tmp_path)(x[:1], t[:1], text[:1, :4], mask[:1, :4])
    assert relative(ours[:1], cut) < 1e-5


def test_weights_come_back_exactly_from_a_round_trip(tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path / "a")
    to_diffusers(from_diffusers(tmp_path / "a"), tmp_path / "b", frames=16)
    again = LatteTransformer3DModel.from_pretrained(tmp_path / "b").state_dict()
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.state_dict().items())


def test_missing_or_unexpected_tensors_and_settings_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    model = reference()
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({**weights, "proj_in.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="proj_in.weight"):
        from_diffusers(tmp_path)
    save_file({name: t for name, t in weights.items() if name != "proj_out.bias"}, path)
    with pytest.raises(ValueError, match="proj_out.bias"):
        from_diffusers(tmp_path)
    (tmp_path / "config.json").write_text(model.to_json_string().replace("gelu-approximate", "geglu"))
    with pytest.raises(ValueError, match="activation_fn"):
        from_diffusers(tmp_path)
    with pytest.raises(FileNotFoundError, match="config.json"):
        from_diffusers(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change", [{"attention": "joint"}, {"positions": "rotary"}, {"temporal_positions": "rotary"}, {"sample_frames": 8}]
)
def test_a_setting_that_diffusers_cannot_express_is_named(tmp_path, change):
    model = Latte(replace(ModelConfig(width=32, depth=2, heads=2, text_width=8), **change))
    with pytest.raises(ValueError, match=f"model.{next(iter(change))} is"):
        to_diffusers(model, tmp_path)


def test_positions_scaled_for_the_frames_of_a_clip_are_diffusers_own(tmp_path):
    reference().save_pretrained(tmp_path)
    model = from_diffusers(tmp_path)
    scaled = Latte(replace(model.config, sample_frames=16))
    scaled.load_state_dict(model.state_dict())
    x, t, text, mask = inputs(16)
    with torch.no_grad():
        assert torch.equal(scaled(x, t, text, mask), model(x, t, text, mask))
        assert not torch.allclose(scaled(x[:, :8], t, text, mask), model(x[:, :8], t, text, mask), atol=1e-3)
    to_diffusers(scaled, tmp_path / "out", frames=16)


def test_weights_of_the_authors_own_class_open_alike(tmp_path):
    reference().save_pretrained(tmp_path)
    expected = from_diffusers(tmp_path).state_dict()
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"_class_name": "LatteT2V", "norm_num_groups": 32}))
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    buffers = {"caption_projection.y_embedding": torch.zeros(120, TEXT_WIDTH), "temp_pos_embed": torch.zeros(1, 16, 96)}
    save_file(load_file(file) | buffers, file)
    check_fit(config_from_diffusers(settings), tmp_path)
    model = from_diffusers(tmp_path)
    check_weights(model, tmp_path)
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
