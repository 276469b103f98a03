"""Activations of the plan against real forward passes, counted by torch."""

import gc
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import profile

from sora_train.lora.config import NO_LORA, LoraConfig
from sora_train.model import ModelConfig, Transformer, build, preset
from sora_train.plan.activations import Sizes, activations, trace, use_fused_norms
from sora_train.train.activation_checkpointing import apply_activation_checkpointing
from sora_train.train.adapted import adapt
from sora_train.train.config import TrainConfig

SMALL = ModelConfig(width=64, depth=4, heads=4, text_width=48, sample_size=8)
MODELS = {
    "factorised": SMALL,
    "text in every block": replace(SMALL, cross_attention_in="every", temporal_positions="rotary", pooled_text=True),
    "joint": replace(SMALL, attention="joint", depth=3, learned_variance=True),
    "joint, turned": replace(SMALL, attention="joint", positions="rotary", depth=2),
    "wan": ModelConfig(family="wan", width=64, depth=3, heads=4, text_width=48, feed_forward=144),
    "wide": replace(SMALL, width=192, depth=2, text_width=512),
}
CLIPS = [Sizes(2, 4, 8, 8, 7), Sizes(3, 1, 16, 8, 3), Sizes(1, 6, 4, 8, 60), Sizes(2, 4, 8, 8, 7, frame_times=True)]
WAYS = [(1, "fp32"), (2, "bf16"), (0, "bf16")]


def forward(model: Transformer, train: TrainConfig, sizes: Sizes) -> torch.Tensor:
    """One pass in training's number formats: autocast at stage 0, else all in one."""
    autocast = train.zero_stage == 0 and train.precision == "bf16"
    dtype = next(model.parameters()).dtype
    x = torch.randn(sizes.b, sizes.f, model.config.in_channels, sizes.h, sizes.w, dtype=dtype)
    text = torch.randn(sizes.b, sizes.l, model.config.text_width, dtype=dtype)
    mask = torch.ones(sizes.b, sizes.l, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(x, torch.full((sizes.b, sizes.f) if sizes.frame_times else (sizes.b,), 500.0), text, mask)


def built(config: ModelConfig, train: TrainConfig, lora: LoraConfig = NO_LORA) -> Transformer:
    torch.manual_seed(0)
    model = build(config)
    if lora.rank:
        adapt(model, lora, half=train.precision == "bf16")
    use_fused_norms(model)
    apply_activation_checkpointing(model, train.activation_checkpointing)
    return model.bfloat16() if train.precision == "bf16" and train.zero_stage else model


@pytest.mark.parametrize(("stage", "precision"), WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_the_plan_counts_the_tensors_that_autograd_saves(name: str, stage: int, precision: str):
    train = TrainConfig(zero_stage=stage, precision=precision)
    model = built(MODELS[name], train)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for sizes in CLIPS:
        saved: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor, saved: dict[int, torch.Tensor] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no storage takes another's place
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            forward(model, train, sizes)
        counted = sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in parameters)
        assert activations(MODELS[name], train, sizes).total == pytest.approx(counted, rel=0.01), sizes


@pytest.mark.parametrize(("mode", "way"), [*product(("none", "selective", "full"), WAYS)])
@pytest.mark.parametrize("name", ["factorised", "text in every block", "joint", "wan"])
def test_the_plan_counts_what_a_forward_pass_leaves(name: str, mode: str, way: tuple[int, str]):
    train = TrainConfig(zero_stage=way[0], precision=way[1], activation_checkpointing=mode)
    model = built(MODELS[name], train)
    for sizes in (CLIPS[0], CLIPS[-1]):
        gc.collect()  # or what earlier tests left would be freed within the profile
        with profile(profile_memory=True) as seen:
            y = forward(model, train, sizes)
        left = sum(event.self_cpu_memory_usage for event in seen.key_averages()) - y.untyped_storage().nbytes()
        del y  # or what it holds would be freed within the next profile
        assert activations(MODELS[name], train, sizes).total == pytest.approx(left, rel=0.01)


@pytest.mark.parametrize(("mode", "way"), [*product(("none", "selective", "full"), WAYS)])
@pytest.mark.parametrize("name", ["factorised", "joint", "wan"])
def test_the_plan_counts_what_adapters_on_a_frozen_base_leave(name: str, mode: str, way: tuple[int, str]):
    train = TrainConfig(zero_stage=way[0], precision=way[1], activation_checkpointing=mode)
    lora = LoraConfig(rank=4, targets=("to_q", "to_v", "ff"))
    model, sizes = built(MODELS[name], train, lora), CLIPS[0]
    gc.collect()
    with profile(profile_memory=True) as seen:
        y = forward(model, train, sizes)
    left = sum(event.self_cpu_memory_usage for event in seen.key_averages()) - y.untyped_storage().nbytes()
    assert activations(MODELS[name], train, sizes, lora).total == pytest.approx(left, rel=0.01)


@pytest.mark.parametrize(("mode", "stage"), [("none", 0), ("selective", 2), ("full", 0)])
def test_the_plan_extrapolates_from_few_blocks_and_clips(mode: str, stage: int):
    """The plan traces four blocks with one clip and with two; here all of it is traced."""
    model, sizes = replace(SMALL, depth=8), Sizes(5, 4, 8, 8, 7)
    train = TrainConfig(zero_stage=stage, precision="bf16", activation_checkpointing=mode)
    whole = trace(model, mode, True, stage == 0, sizes)
    assert activations(model, train, sizes).total == pytest.approx(sum(whole), rel=1e-3)


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize(
    ("model", "clip"),
    [
        (preset("latte_t2v"), Sizes(1, 16, 64, 64, 120)),
        (replace(preset("XL"), attention="joint"), Sizes(1, 16, 32, 32, 120)),
        (preset("wan2.1_t2v_1.3b"), Sizes(1, 21, 60, 104, 512)),
    ],
)
def test_ranks_that_share_a_clip_share_its_activations(model: ModelConfig, clip: Sizes, mode: str):
    train = TrainConfig(zero_stage=2, precision="bf16", activation_checkpointing=mode)
    whole, *shares = (activations(model, train, replace(clip, shared=n)).total for n in (1, 2, 4))
    assert [n * share for n, share in zip((2, 4), shares, strict=True)] == pytest.approx([whole, whole], rel=0.06)
