"""What the plan makes of its bytes."""

from dataclasses import replace
from itertools import product

import pytest

from sora_train import cli
from sora_train.errors import RecipeError
from sora_train.model import ModelConfig
from sora_train.model.config import preset
from sora_train.plan.activations import Sizes
from sora_train.plan.estimate import MAX_MICRO_BATCH, estimate, largest_micro_batch, step_flops
from sora_train.plan.states import DEFAULTS, host_memory, parameter_counts, states
from sora_train.plan.table import PlanOptions, format_plan, remedies_for
from sora_train.recipe import Recipe
from sora_train.settings import build
from sora_train.train.config import TrainConfig

LATTE = preset("latte_t2v")
CLIP = Sizes(1, 16, 64, 64, 120)
BF16 = TrainConfig(precision="bf16", zero_stage=2, batch_size=64, micro_batch_size=1)
GB80 = 80 * 10**9


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    for stage, room in ((0, GB80), (1, GB80), (2, 10**11), (3, GB80 // 2)):
        train = BF16.model_copy(update={"zero_stage": stage, "activation_checkpointing": "full"})
        most = largest_micro_batch(LATTE, train, CLIP, 8, room)
        assert 0 < most < MAX_MICRO_BATCH
        for b, fits in ((most, True), (most + 1, False)):
            changed = train.model_copy(update={"micro_batch_size": b})
            assert (estimate(LATTE, changed, replace(CLIP, b=b), 8).total <= room) is fits


def test_where_one_clip_is_too_many_none_fits():
    assert largest_micro_batch(LATTE, BF16, CLIP, 8, 10**9) == 0


def test_higher_stages_and_more_workers_take_less_memory():
    """As in the ZeRO paper, with buckets that are small compared with the model."""
    small = {"zero_optimization": {"reduce_bucket_size": 10**6, "stage3_prefetch_bucket_size": 10**6}}

    def held(stage: int, world: int) -> int:
        train = BF16.model_copy(update={"zero_stage": stage, "deepspeed": small})
        found = states(LATTE, train, world)
        return found.held + found.gradients

    for world in (2, 8, 64):
        by_stage = [held(stage, world) for stage in range(4)]
        assert by_stage == sorted(by_stage, reverse=True)
    for stage in range(1, 4):
        assert held(stage, 64) < held(stage, 8) < held(stage, 2)


def test_at_many_workers_the_bytes_are_those_of_the_zero_paper():
    """Its table: with K = 12 and a float32 sum of gradients, 2 + 4 + 12 bytes a parameter; the average adds 4."""
    total, world = sum(parameter_counts(LATTE).trained), 64
    for stage, bytes_each in ((2, 2 + (4 + 12 + 4) / world), (3, (2 + 4 + 12 + 4) / world)):
        found = states(LATTE, BF16.model_copy(update={"zero_stage": stage}), world)
        assert found.held + found.gradients == pytest.approx(bytes_each * total, rel=0.02)


def test_the_defaults_are_those_of_the_installed_deepspeed():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = {field.alias or name: field.default for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert {key: theirs[key] for key in DEFAULTS} == DEFAULTS


def test_what_is_offloaded_is_in_the_host_and_not_on_the_device():
    def held(offload: str) -> tuple[int, int]:
        found = states(LATTE, BF16.model_copy(update={"zero_stage": 3, "offload": offload}), 4)
        return found.held, sum(found.host.values())

    (device, _), (with_optimizer, host), (with_all, more) = map(held, ("none", "optimizer", "all"))
    assert device > with_optimizer > with_all
    assert more - host == with_optimizer - with_all > 0


def test_padding_counts_as_work():
    """Eight workers of 3 clips for a batch of 16: each takes one micro-batch of 3, so 24 are computed."""
    train = TrainConfig(batch_size=16, micro_batch_size=3)
    even = TrainConfig(batch_size=16, micro_batch_size=2)
    assert step_flops(LATTE, train, CLIP, 8) == 1.5 * step_flops(LATTE, even, CLIP, 8)


def large(**changes: object) -> Recipe:
    """The released model on clips of 16 x 512 x 512."""
    settings = {
        "name": "large",
        "data.height": 512,
        "data.width": 512,
        "data.output": "nowhere",
        "codec.vae": "nobody/has-this",
        "model.preset": "latte_t2v",
        "train.precision": "bf16",
        "train.zero_stage": 2,
        "train.batch_size": 64,
        "train.micro_batch_size": 2,
        "cluster.workers": 8,
    }
    return build(Recipe, {}, settings | {key.replace("__", "."): value for key, value in changes.items()}, "test")


def test_each_suggested_change_makes_the_recipe_fit():
    recipe = large()
    sizes = replace(CLIP, b=2)
    page = format_plan(recipe, PlanOptions())
    assert "does not fit: " in page
    assert "[" in page
    remedies = remedies_for(recipe, sizes, GB80)
    assert "lower train.micro_batch_size to 1" in remedies
    for remedy in remedies:
        assert remedy in page
    page_after = format_plan(large(train__micro_batch_size=1), PlanOptions())
    assert "\nfits: " in page_after
    page_after = format_plan(large(train__activation_checkpointing="selective"), PlanOptions())
    assert "\nfits: " in page_after


@pytest.mark.parametrize(("memory", "code", "said"), [("3", 0, ""), ("1", 1, "it takes 2.08 GB, and 1 GB are usable")])
def test_a_recipe_that_does_not_fit_exits_with_1(memory: str, code: int, said: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["preflight", "jobs/quickstart.yaml", "--plan", "--memory", memory]) == code
    out, err = capsys.readouterr()
    assert ("\ndoes not fit: " in out, "(error code: memory)" in err) == (bool(code), bool(code))
    assert said in err


def test_sharing_clips_is_suggested_only_for_a_fixed_number_of_workers():
    fixed, elastic = (remedies_for(large(cluster__workers=n), replace(CLIP, b=2), GB80) for n in (8, [8, 16]))
    assert [remedy for remedy in fixed if remedy not in elastic] == ["set cluster.sequence_parallel to 2"]


def test_the_plan_needs_no_shards_and_takes_what_they_say(tiny_shards):
    assert "keeps frames, since nobody/has-this is not available here" in format_plan(large(), PlanOptions())
    recipe = build(
        Recipe,
        {},
        {
            "data.output": str(tiny_shards),
            "data.frames": 2,
            "data.height": 32,
            "data.width": 32,
            "model.sample_size": 4,
        },
        "test",
    )
    page = format_plan(recipe, PlanOptions())
    assert f"from the shards in {tiny_shards}" in page
    assert "latents 2x4x4" in page
    assert "captions of up to 4 tokens" in page


def test_the_plan_refuses_given_frames_that_leave_nothing_to_learn():
    given = {"conditioning__probability": 0.5, "conditioning__frames": 16}
    with pytest.raises(RecipeError, match="conditioning.frames 16 leaves nothing to learn, .* have 16 latent frames"):
        format_plan(large(**given), PlanOptions())
    assert "16 latent" not in format_plan(large(**given | {"conditioning__frames": 15}), PlanOptions())


def test_one_worker_and_one_clip_are_no_plural():
    page = format_plan(large(cluster__workers=1, train__micro_batch_size=1), PlanOptions())
    assert "1 worker, micro-batches of 1 clip, " in page
    assert "\nthe GPU " in page
    assert "of 1 clips" not in page


def test_fp8_takes_some_more_memory_and_counts_against_bf16s_peak():
    plans = [
        estimate(large().model, large(train__precision=name).train, replace(CLIP, b=2), 8) for name in ("bf16", "fp8")
    ]
    assert plans[0].states == plans[1].states
    assert 1 < plans[1].total / plans[0].total < 1.05
    assert "989 TFLOP/s in bf16" in format_plan(large(train__precision="fp8"), PlanOptions())


def test_a_smaller_card_is_a_flag():
    assert "does not fit" in format_plan(large(train__micro_batch_size=1), PlanOptions(memory=24.0))
    assert "does not fit" in format_plan(large(train__micro_batch_size=1), PlanOptions(gpu="A10", memory=22.0))
    with pytest.raises(RecipeError, match="--gpu A10 needs --memory"):
        format_plan(large(), PlanOptions(gpu="A10"))
    with pytest.raises(RecipeError, match="RTX 4090"):
        format_plan(large(), PlanOptions(gpu="Potato", memory=8.0))


def test_a_model_of_the_smallest_shape_can_be_planned():
    tiny = ModelConfig(width=16, depth=2, heads=2, text_width=64, sample_size=4)
    for stage in range(4):
        assert estimate(tiny, TrainConfig(zero_stage=stage), Sizes(1, 1, 4, 4, 1), 1).total > 0


def test_random_weights_at_the_start_need_no_memory_of_their_own():
    """A rank has its share and one parameter, which together are less than a checkpoint's copy."""
    for stage, world in product(range(4), (1, 8)):
        parts, _ = host_memory(LATTE, BF16.model_copy(update={"zero_stage": stage}), world)
        assert parts["random weights at the start"] == 0
    many = BF16.model_copy(update={"zero_stage": 3})
    parts, _ = host_memory(LATTE, many, 4096)
    assert 0 < parts["random weights at the start"] < 4 * max(parameter_counts(LATTE).trained)
