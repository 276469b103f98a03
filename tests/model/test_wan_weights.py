"""Wan's weights there and back, with diffusers' class on the other side."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from sora_train.model import ModelConfig, build, preset
from sora_train.model.convert import (
    check_fit,
    config_from_diffusers,
    from_diffusers,
    load_diffusers,
    save_shards,
    to_diffusers,
)
from sora_train.model.flops import parameter_count
from sora_train.train.initial import check_initial, load_initial
from tests.model.wan_reference import opened, reference

WEIGHTS = "diffusion_pytorch_model.safetensors"
RELEASED: dict[str, dict[str, Any]] = {
    "wan2.1_t2v_1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "wan2.1_t2v_14b": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    "wan2.2_ti2v_5b": {
        "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48
    },
}  # fmt: skip
"""The configs of the released transformers where they differ from the class's defaults."""


def settings_of(model: WanTransformer3DModel) -> dict:
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


@pytest.mark.parametrize("name", RELEASED)
def test_presets_are_the_released_models(name):
    with torch.device("meta"):
        theirs = WanTransformer3DModel(**RELEASED[name])
    config = preset(name)
    assert parameter_count(config) == sum(p.numel() for p in theirs.parameters())
    settings = dict(theirs.config) | {"_class_name": "WanTransformer3DModel"}
    assert config_from_diffusers(settings) == replace(config, preset="")


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
def test_weights_come_back_exactly_from_a_round_trip(tmp_path, kind):
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer")
    to_diffusers(from_diffusers(tmp_path / "pipeline"), tmp_path / "b")
    again = opened(tmp_path / "b")
    assert {**again.config, "patch_size": (1, 2, 2)}.items() >= settings_of(theirs).items()
    assert again.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


def test_sharded_weights_are_read_and_written(tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    to_diffusers(from_diffusers(tmp_path / "theirs"), tmp_path / "ours")
    weights = load_file(tmp_path / "ours" / WEIGHTS)
    (tmp_path / "ours" / WEIGHTS).unlink()
    save_shards(weights, tmp_path / "ours", most=100_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    again = opened(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.state_dict().items())


def test_released_bfloat16_weights_load_into_a_float32_model(tmp_path):
    theirs = reference().bfloat16()
    theirs.save_pretrained(tmp_path)
    model = build(config_from_diffusers(json.loads((tmp_path / "config.json").read_text())))
    load_diffusers(model, tmp_path)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.patch_out.weight, theirs.proj_out.weight.float())


def test_missing_and_unexpected_tensors_are_named_in_one_error(tmp_path):
    reference().save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    del weights["blocks.1.attn1.norm_q.weight"]
    save_file(weights | {"blocks.0.attn2.add_k_proj.weight": torch.zeros(1)}, tmp_path / WEIGHTS)
    says = "lacks 1 tensor: blocks.1.attn1.norm_q.weight; it has 1 tensor that the model does not have: blocks.0.attn2"
    with pytest.raises(ValueError, match=says):
        from_diffusers(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    reference().save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS) | {"proj_out.bias": torch.full((64,), torch.nan)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="proj_out.bias has values that are not finite"):
        from_diffusers(tmp_path)


def test_a_pipeline_without_its_transformer_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"transformer/config.json is missing"):
        from_diffusers(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    reference().save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS) | {"proj_out.bias": torch.zeros(3)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"proj_out.bias \[3\] instead of \[64\]"):
        from_diffusers(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"in_channels": 36}, "in_channels is 36 and out_channels is 16: the model takes a condition"),
        ({"image_dim": 1280}, "image_dim is 1280; only None, of a text-to-video Wan"),
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ({"patch_size": [2, 2, 2]}, r"patch_size is \[2, 2, 2\]"),
        ({"freq_dim": 128}, "freq_dim is 128"),
    ],
)
def test_a_wan_of_another_kind_is_refused_by_its_setting(tmp_path, change, says):
    settings = dict(reference().config) | {"_class_name": "WanTransformer3DModel"}
    with pytest.raises(ValueError, match=says):
        config_from_diffusers(settings | change)
    with pytest.raises(ValueError, match="num_layers is not given, which a WanTransformer3DModel has"):
        config_from_diffusers({key: value for key, value in settings.items() if key != "num_layers"})


def test_a_pipeline_of_two_experts_is_refused(tmp_path):
    for part in ("transformer", "transformer_2"):
        reference().save_pretrained(tmp_path / part)
    with pytest.raises(ValueError, match="two experts"):
        from_diffusers(tmp_path)
    from_diffusers(tmp_path / "transformer_2")


def test_a_recipe_that_the_weights_do_not_fit_is_told_every_key(tmp_path):
    reference().save_pretrained(tmp_path)
    fitting = from_diffusers(tmp_path).config
    check_fit(replace(fitting, init_from="elsewhere"), tmp_path)
    with pytest.raises(ValueError, match="model.family is 'latte', there it is 'wan'$"):
        check_fit(ModelConfig(), tmp_path)
    with pytest.raises(ValueError, match="model.depth is 4, there it is 2; model.feed_forward is 288, there it is 100"):
        check_fit(replace(fitting, depth=4, feed_forward=0), tmp_path)


def test_a_feed_forward_width_of_four_times_the_width_fits_in_either_form(tmp_path):
    config = ModelConfig(family="wan", width=48, heads=2, depth=1, text_width=12)
    to_diffusers(build(config), tmp_path)
    check_fit(config, tmp_path)
    check_fit(replace(config, feed_forward=192), tmp_path)


@pytest.mark.parametrize("place", ["", "transformer"])
def test_a_run_starts_from_a_pipeline_or_its_transformer(tmp_path, place):
    reference().save_pretrained(tmp_path / "transformer")
    expected = from_diffusers(tmp_path)
    check_initial(expected.config, tmp_path / place)
    model = build(expected.config)
    load_initial(model, tmp_path / place)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
