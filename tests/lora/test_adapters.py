"""Adapters next to peft's own on diffusers' models, and merged into the base."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
from diffusers import LatteTransformer3DModel
from torch import Tensor, nn

from sora_train.lora.adapters import (
    adapter_state,
    add_adapters,
    load_adapter_state,
    merge,
    split_projections,
    trained_parameters,
)
from sora_train.lora.config import LoraConfig
from sora_train.model import ModelConfig, Transformer
from sora_train.model.convert import to_diffusers
from sora_train.model.convert_latte import latte_names
from sora_train.model.convert_wan import wan_names
from tests.model.awake import nudged
from tests.model.wan_reference import opened, run_reference

MODELS = {
    "wan": ModelConfig(family="wan", width=48, depth=2, heads=4, text_width=24, feed_forward=72),
    "latte": ModelConfig(width=48, depth=4, heads=4, text_width=24, sample_size=8),
    "joint": ModelConfig(width=48, depth=2, heads=4, text_width=24, sample_size=8, attention="joint"),
}
ALL = ("to_q", "to_k", "to_v", "to_out", "ff")
LORA = LoraConfig(rank=4, alpha=6, targets=ALL)
THEIRS = {"to_out": "to_out.0", "ff": r"net.0.proj|net.2"}
"""Layers of diffusers' blocks by target, where they have another name."""


def adapted(model: Transformer, lora: LoraConfig = LORA) -> Transformer:
    """A copy with adapters that change its output."""
    model = deepcopy(model)
    add_adapters(model, lora)
    load_adapter_state(model, {name: 0.1 * torch.randn_like(p) for name, p in adapter_state(model).items()})
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 3, 4, 8, 8, generator=g), torch.randn(2, 5, 24, generator=g)
    return x, torch.tensor([17.0, 803.0]), text, torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_split_projections_and_new_adapters_change_no_output(name: str):
    model = nudged(MODELS[name])
    split = deepcopy(model)
    split_projections(split)
    with_adapters = deepcopy(model)
    add_adapters(with_adapters, LORA)
    expected = model(*inputs())
    for other in (split, with_adapters):
        torch.testing.assert_close(other(*inputs()), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("targets", [ALL, ("to_k", "ff"), ("to_out",)])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_merged_model_equals_base_and_adapters(name: str, targets: tuple):
    model = nudged(MODELS[name])
    lora = LORA.model_copy(update={"targets": targets})
    with_adapters = adapted(model, lora)
    expected, before = with_adapters(*inputs()), model(*inputs())
    assert (expected - before).abs().max() > 1e-2
    merged = deepcopy(model)
    merge(merged, adapter_state(with_adapters), lora.scale)
    assert (merged(*inputs()) - expected).abs().max() < 1e-6 * expected.abs().max()
    merge(merged, adapter_state(with_adapters), lora.scale, weight=-1.0)
    torch.testing.assert_close(merged(*inputs()), before, rtol=1e-5, atol=1e-6)


def names(config: ModelConfig) -> dict[str, str]:
    """diffusers' name of every module of the blocks with separate query, key and value."""
    pairs = wan_names(config.depth) if config.family == "wan" else latte_names(config.depth)
    return dict(separate(pairs))


def separate(pairs: Iterator[tuple[str, tuple[str, ...]]]) -> Iterator[tuple[str, str]]:
    for ours, theirs in pairs:
        letters = ours.rpartition(".")[2]
        yield from (
            [(ours, theirs[0])]
            if len(theirs) == 1
            else [(f"{ours}.{letter}", name) for letter, name in zip(letters, theirs, strict=True)]
        )


def diffusers_model(model: Transformer, folder: Path) -> nn.Module:
    to_diffusers(model, folder, frames=3)
    return opened(folder) if model.config.family == "wan" else LatteTransformer3DModel.from_pretrained(folder)


@pytest.mark.parametrize("targets", [ALL, ("to_q", "to_k", "to_v", "to_out")])
@pytest.mark.parametrize("name", ["wan", "latte"])
def test_outputs_and_gradients_are_those_of_peft_on_diffusers_model(tmp_path, name: str, targets: tuple):
    model = nudged(MODELS[name])
    lora = LORA.model_copy(update={"targets": targets})
    ours, theirs = adapted(model, lora), diffusers_model(model, tmp_path)
    layers = [part for target in targets for part in THEIRS.get(target, target).split("|")]
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, target_modules=layers), theirs)
    renamed = names(model.config)
    values = {}
    for key, tensor in adapter_state(ours).items():
        module, _, matrix = key.rpartition(".lora_")
        values[f"{renamed[module]}.lora_{matrix[0]}.default.weight"] = tensor
    held = {key: p for key, p in theirs.named_parameters() if ".lora_" in key}
    assert values.keys() == held.keys()
    with torch.no_grad():
        for key, p in held.items():
            p.copy_(values[key])
    x, t, text, mask = inputs()
    if name == "wan":
        expected = run_reference(theirs, x, t, text, mask)
    else:
        expected = theirs(x.transpose(1, 2), t, text, None, return_dict=False)[0].transpose(1, 2)
    found = ours(x, t, text, mask)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    expected.square().mean().backward()
    found.square().mean().backward()
    gradients = {key: p.grad for key, p in trained_parameters(ours)}
    largest = max(p.grad.abs().max() for p in held.values())
    for key, gradient in gradients.items():
        module, _, matrix = key.rpartition(".lora_")
        wanted = held[f"{renamed[module]}.lora_{matrix[0]}.default.weight"].grad
        assert wanted.abs().max() > 0
        assert (gradient - wanted).abs().max() < 1e-4 * max(wanted.abs().max(), 1e-2 * largest), key


def test_only_adapters_have_gradients():
    model = adapted(nudged(MODELS["wan"]))
    model(*inputs()).square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {
        name for name, p in model.named_parameters() if ".lora_" not in name
    }
    assert dict(trained_parameters(model)).keys() == adapter_state(model).keys()
    assert all(p.dtype == torch.float32 for p in adapter_state(model).values())


def test_adapters_of_a_half_precision_base_start_as_those_of_a_float32_one():
    models = [nudged(MODELS["latte"]), nudged(MODELS["latte"]).bfloat16()]
    for model in models:
        torch.manual_seed(3)
        add_adapters(model, LORA)
    one, two = map(adapter_state, models)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(bool(matrix.any()) is name.endswith("lora_A.weight") for name, matrix in one.items())


def test_adapters_that_do_not_fit_are_one_message():
    model = nudged(MODELS["wan"])
    state = adapter_state(adapted(model))
    first = "blocks.0.attention.qkv.q.lora_A.weight"
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"A and B are \[4, 47\] and \[48, 4\], the weight is \[48, 48\]"):
        merge(model, state | {first: torch.zeros(4, 47)}, 1.0)
    with pytest.raises(ValueError, match="no layer blocks.9.attention.out"):
        merge(model, {"blocks.9.attention.out.lora_A.weight": torch.zeros(4, 48)}, 1.0)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with pytest.raises(ValueError, match="the file lacks blocks.0.attention.qkv.q.lora_A.weight"):
        load_adapter_state(adapted(model), {name: p for name, p in state.items() if name != first})
    with pytest.raises(ValueError, match=r"is \[3, 48\], the model has \[4, 48\]"):
        load_adapter_state(adapted(model), state | {first: torch.zeros(3, 48)})
