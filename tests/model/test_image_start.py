"""Video models that start from an image model: PixArt-alpha, with diffusers' class as the second implementation."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

from sora_train.model.convert import check_fit, config_from_diffusers, from_diffusers, to_diffusers
from sora_train.train.initial import make_model

WEIGHTS = "diffusion_pytorch_model.safetensors"


def image_model(sample_size: int = 8, out_channels: int = 8) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=4,
        out_channels=out_channels,
        num_layers=3,
        cross_attention_dim=96,
        sample_size=sample_size,
        caption_channels=40,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def inputs(f: int = 5, h: int = 8, w: int = 8) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    x, text = torch.randn(2, f, 4, h, w, generator=g), torch.randn(2, 7, 40, generator=g)
    return x, torch.tensor([17.0, 803.0]), text, mask


def settings_of(folder: Path, **changes) -> dict:
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(settings))
    return settings


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    ("size", "out", "h", "w", "name"),
    [(8, 8, 8, 8, "PixArtTransformer2DModel"), (64, 4, 12, 6, "Transformer2DModel")],
)
def test_at_first_each_frame_is_what_the_image_model_makes(tmp_path, size, out, h, w, name, mode):
    theirs, (x, t, text, mask) = image_model(size, out), inputs(h=h, w=w)
    theirs.save_pretrained(tmp_path)
    settings_of(tmp_path, _class_name=name)
    model = from_diffusers(tmp_path).train(mode)
    assert model.config.learned_variance == (out == 8)
    with torch.no_grad():
        video, image = model(x, t, text, mask), model(x[:, :1], t, text, mask)
        extra = {"resolution": None, "aspect_ratio": None}
        frames = [
            theirs(frame, text, t, extra, encoder_attention_mask=mask, return_dict=False)[0] for frame in x.unbind(1)
        ]
    expected = torch.stack(frames, dim=1)
    assert (video - expected).abs().max() / expected.abs().max() < 1e-5
    torch.testing.assert_close(image, video[:, :1], rtol=1e-5, atol=1e-5)


def test_every_parameter_learns_from_the_second_step_on(tmp_path):
    image_model().save_pretrained(tmp_path)
    model, (x, t, text, mask) = from_diffusers(tmp_path), inputs()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(x, t, text, mask).square().mean().backward()
        optimizer.step()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, start[name])]
    with torch.no_grad():
        backwards = model(x.flip(1), t, text, mask).flip(1)  # and frames begin to know their place
    assert not torch.allclose(backwards, model(x, t, text, mask), atol=1e-4)


def test_training_has_the_same_weights_in_shares_of_ranks(tmp_path):
    image_model().save_pretrained(tmp_path)
    torch.manual_seed(4)
    expected, shares = from_diffusers(tmp_path), []
    for rank in range(3):
        torch.manual_seed(4)
        model, weights = make_model(replace(expected.config, init_from=str(tmp_path)), rank, 3, resumed=False)
        shares.append({name: weights.drawn.get(p) for name, p in model.named_parameters()})
    assert 0 < len(weights.read) < len(shares[0])
    for name, tensor in expected.state_dict().items():
        parts = [each[name] for each in shares]
        if name in weights.read:
            parts = [weights.read[name]().flatten()]
        elif parts[0] is None:  # a table, which is not cut
            parts = [model.get_parameter(name).flatten()]
        assert torch.equal(torch.cat(parts), tensor.flatten()), name


def test_a_recipe_that_an_image_model_does_not_fit_is_told_every_key(tmp_path):
    image_model().save_pretrained(tmp_path)
    fitting = config_from_diffusers(settings_of(tmp_path))
    check_fit(replace(fitting, sample_frames=16, init_from=str(tmp_path)), tmp_path)
    for change, says in (
        ({"attention": "joint"}, r"model.attention is 'joint', there it is 'factorised'.*image model"),
        ({"positions": "rotary"}, r"model.positions is 'rotary', there it is 'sinusoid'"),
        ({"temporal_positions": "temporal"}, r"model.temporal_positions is 'temporal'.*stays its image only"),
        ({"width": 48, "heads": 2, "depth": 4}, r"model.width is 48, there it is 96; model.depth .*; model.heads is 2"),
        ({"learned_variance": False}, r"model.learned_variance is False"),
    ):
        with pytest.raises(ValueError, match=says):
            check_fit(replace(fitting, **change), tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sample_size": 128}, "use_additional_conditions is None with sample_size 128"),
        ({"use_additional_conditions": True}, "use_additional_conditions is True"),
        ({"interpolation_scale": 2}, "interpolation_scale is 2; expected 1"),
        ({"_class_name": "DiTTransformer2DModel"}, "_class_name is 'DiTTransformer2DModel'"),
        ({"caption_channels": None}, "caption_channels"),
        ({"norm_type": "ada_norm_zero"}, "norm_type is 'ada_norm_zero'"),
    ],
)
def test_an_image_model_of_another_kind_is_refused_by_its_setting(tmp_path, change, says):
    image_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says):
        config_from_diffusers(settings_of(tmp_path, **change))


def test_missing_and_unexpected_tensors_are_counted_and_named(tmp_path):
    image_model().save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS
    weights = load_file(path)
    unread = {"pos_embed.pos_embed": torch.zeros(1, 16, 96), "caption_projection.y_embedding": torch.zeros(120, 40)}
    save_file({**weights, **unread}, path)  # as in released weights
    from_diffusers(tmp_path)
    save_file({**weights, **{f"adapter.{i}": torch.zeros(1) for i in range(9)}}, path)
    with pytest.raises(ValueError, match=r"9 tensors that the model does not have: adapter.0, .* adapter.4, …"):
        from_diffusers(tmp_path)
    save_file({name: t for name, t in weights.items() if not name.startswith("adaln_single.linear.")}, path)
    with pytest.raises(ValueError, match=r"lacks 2 tensors: adaln_single.linear.weight, adaln_single.linear.bias$"):
        from_diffusers(tmp_path)


def test_diffusers_cannot_express_a_model_that_began_from_images(tmp_path):
    image_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model.temporal_positions is 'rotary'"):
        to_diffusers(from_diffusers(tmp_path), tmp_path / "out")
