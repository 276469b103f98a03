"""What a model costs, against torch's own counter, diffusers' model, and the paper's table."""

from dataclasses import replace

import pytest
import torch
from diffusers import LatteTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sora_train.model import Latte, ModelConfig, build, preset
from sora_train.model.config import PRESETS
from sora_train.model.flops import forward_flops, parameter_count

LATTE = [name for name in PRESETS if PRESETS[name]["family"] == "latte"]
SMALL = ModelConfig(width=32, depth=4, heads=4, text_width=12, sample_size=8)


@pytest.mark.parametrize("frame_times", [False, True])
@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attention": "joint", "depth": 3, "pooled_text": True},
        {"positions": "rotary"},
        {"positions": "rotary", "attention": "joint"},
        {"learned_variance": True, "cross_attention_in": "every"},
        {"family": "wan", "sample_size": 32, "depth": 3, "feed_forward": 72},
    ],
)
def test_flops_are_those_that_torch_counts(change, frames, frame_times):
    config = replace(SMALL, **change)
    model = build(config).eval()
    x, text, mask = torch.randn(1, frames, 4, 8, 12), torch.randn(1, 7, 12), torch.ones(1, 7, dtype=torch.bool)
    # The plain kernel is two matmuls, which the counter knows; it does not know the CPU's fused one.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, torch.full((1, frames) if frame_times else (1,), 500.0), text, mask)
    found = forward_flops(config, frames, 8, 12, 7, frame_times)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.003)


@pytest.mark.parametrize("attention", ["factorised", "joint"])
@pytest.mark.parametrize("name", LATTE)
def test_each_preset_is_a_model_in_either_form(name, attention):
    config = replace(preset(name), attention=attention)
    assert {key: getattr(config, key) for key in PRESETS[name]} == PRESETS[name]
    with torch.device("meta"):
        assert parameter_count(config) == sum(p.numel() for p in Latte(config).parameters())


@pytest.mark.parametrize("name", LATTE)
def test_presets_have_as_many_parameters_as_diffusers_models(name):
    config = preset(name)
    with torch.device("meta"):
        model = LatteTransformer3DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.width // config.heads,
            in_channels=4,
            out_channels=config.out_channels,
            num_layers=config.depth // 2,
            cross_attention_dim=config.width,
            attention_bias=True,
            sample_size=config.sample_size,
            patch_size=2,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=4096,
        )
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "millions"), [("S", 32.48), ("B", 129.54), ("L", 456.81), ("XL", 673.68)])
def test_presets_are_the_papers_models_but_for_text_and_adaln_single(name, millions):
    config = replace(preset(name), learned_variance=True)
    with torch.device("meta"):
        model = Latte(config)
    sizes = {key: p.numel() for key, p in model.named_parameters()}
    d, ours = config.width, ("text", "table", "time_to_blocks")
    backbone = sum(size for key, size in sizes.items() if not any(word in key for word in ours))
    theirs = (6 * config.depth + 2) * (d * d + d)  # DiT's: every block and the output a modulation of its own
    assert (backbone + theirs) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(("name", "head"), [("XL_heads64", 64), ("XL_heads128", 128)])
def test_other_heads_have_the_parameters_and_flops_of_xl(name, head):
    config = preset(name)
    assert config.width // config.heads == head
    assert parameter_count(config) == parameter_count(preset("XL"))
    assert forward_flops(config, 16, 32, 32, 120) == forward_flops(preset("XL"), 16, 32, 32, 120)
