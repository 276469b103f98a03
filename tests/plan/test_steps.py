"""Steps of unlike buckets in the plan: their clips, time and memory with and without `train.balance`."""

from dataclasses import replace

import pytest
import torch

from sora_train.lora.flops import training_flops
from sora_train.model.sequence import SequenceGroup
from sora_train.plan.activations import Sizes
from sora_train.plan.estimate import estimate
from sora_train.plan.steps import configs_of, idle_ranks, mean_step_flops, small_bucket_warnings, step_table
from sora_train.plan.table import PlanOptions, format_plan, largest_bucket
from sora_train.recipe import Recipe
from sora_train.settings import build

VIDEOS = {
    "16x256x256": Sizes(1, 16, 32, 32, 120),
    "1x256x256": Sizes(1, 1, 32, 32, 120),
    "4x128x128": Sizes(1, 4, 16, 16, 120),
}


def recipe(**changes: object) -> Recipe:
    settings = {
        "data.buckets": [*VIDEOS],
        "data.output": "nowhere",
        "codec.vae": "nobody/has-this",
        "model.preset": "B",
        "train.precision": "bf16",
        "train.batch_size": 64,
        "train.micro_batch_size": 4,
        "train.balance": 1,
        "cluster.workers": 8,
    }
    return build(Recipe, {}, settings | {key.replace("__", "."): value for key, value in changes.items()}, "test")


def cost(found: Recipe, name: str) -> int:
    sizes = VIDEOS[name]
    return training_flops(found.model, found.lora, sizes.f, sizes.h, sizes.w, sizes.l)


def test_balanced_steps_take_equally_long_but_for_padding():
    found = recipe()
    times = {
        name: float(row.split()[4]) for row in step_table(found, VIDEOS, 8) for name in VIDEOS if row.startswith(name)
    }
    assert times.keys() == VIDEOS.keys()
    assert min(times.values()) > 85
    for name, own in configs_of(found, VIDEOS, 8).items():
        assert own.batch_size == 64 * cost(found, "16x256x256") // cost(found, name)


def test_the_table_of_unlike_steps_says_how_unlike_they_are():
    found = recipe(train__balance=0)
    *_, advice = step_table(found, VIDEOS, 8)
    ratio = cost(found, "16x256x256") / cost(found, "1x256x256")
    assert advice.startswith(f"the longest step takes {ratio:,.1f} times as long as the shortest")
    assert step_table(found, {"16x256x256": VIDEOS["16x256x256"]}, 8) == []
    page = format_plan(found, PlanOptions())
    assert advice in page
    assert advice not in format_plan(recipe(), PlanOptions())


@pytest.mark.parametrize(("preset", "mode"), [("B", "none"), ("B", "full"), ("wan2.1_t2v_1.3b", "none")])
def test_no_bucket_takes_more_memory_than_the_costliest(preset: str, mode: str):
    found = recipe(model__preset=preset, train__activation_checkpointing=mode)
    own = configs_of(found, VIDEOS, 8)
    by_name = {
        name: estimate(found.model, own[name], replace(sizes, b=own[name].micro_batch_size), 8).backward
        for name, sizes in VIDEOS.items()
    }
    assert max(by_name.values()) == by_name["16x256x256"]
    assert largest_bucket(found, VIDEOS)[:2] == ("16x256x256", replace(VIDEOS["16x256x256"], b=4))


def test_the_mean_step_counts_the_steps_that_the_clips_fill():
    """Without padding, all steps together have the FLOPs of all clips."""
    even = recipe(train__balance=0, train__micro_batch_size=8)
    clips = [640, 6400, 64]
    total = sum(count * cost(even, name) for count, name in zip(clips, VIDEOS, strict=True))
    assert mean_step_flops(even, VIDEOS, clips, 8) == pytest.approx(total / (sum(clips) / 64))
    balanced = mean_step_flops(recipe(), VIDEOS, clips, 8)
    assert balanced == pytest.approx(64 * cost(even, "16x256x256"), rel=0.1)


@pytest.mark.parametrize(
    ("frames", "shared", "idle"), [(5, 2, 0), (5, 4, 1), (5, 8, 3), (8, 8, 0), (9, 8, 3), (1, 2, 1)]
)
def test_workers_that_get_no_frame_of_a_shared_clip_are_counted(frames: int, shared: int, idle: int):
    """Counted by cutting a tensor as training does."""
    shares = [SequenceGroup(rank, shared).cut(torch.ones(1, frames, 1, 1), 1, frames) for rank in range(shared)]
    assert sum(not share.any() for share in shares) == idle
    found = recipe(cluster__workers=8, cluster__sequence_parallel=shared)
    warned = step_table(found, {"clips": Sizes(1, frames, 16, 16, 120)}, 8)
    assert [f"{idle} of the {shared} workers" in line for line in warned] == [True] * (idle > 0)


def test_workers_that_get_no_place_of_a_shared_clip_are_counted():
    found = recipe(model__attention="joint", cluster__sequence_parallel=4)
    (warning,) = idle_ranks(found, {"small": Sizes(1, 16, 2, 6, 120), "large": Sizes(1, 16, 4, 4, 120)})
    assert "small have 3 places, so 1 of the 4 workers" in warning
    assert "cluster.sequence_parallel 2 none would" in warning  # 8 workers are no groups of 3


def test_a_bucket_with_fewer_clips_than_its_step_is_named():
    found = recipe()
    size = configs_of(found, VIDEOS, 8)["1x256x256"].batch_size
    (warning,) = small_bucket_warnings(found, {"16x256x256": 64, "1x256x256": size - 1, "4x128x128": 0}, VIDEOS)
    assert f"1x256x256 has {size - 1} training clips, fewer than the {size} of a step" in warning
    assert warning.endswith("lower train.batch_size or train.balance")
