"""`train.balance`: what a step of each bucket takes. That it trains as exactly is in test_exactness.py."""

from fractions import Fraction

import pytest

from sora_train.data.order import Bucket, SampleOrder, batch
from sora_train.lora.config import NO_LORA, LoraConfig
from sora_train.lora.flops import training_flops
from sora_train.model import ModelConfig
from sora_train.model.config import preset
from sora_train.train.balance import bucket_configs
from sora_train.train.config import TrainConfig

WAN = preset("wan2.1_t2v_1.3b")
LATENTS = {"81x480x832": (21, 60, 104), "17x480x832": (5, 60, 104), "1x480x832": (1, 60, 104), "1x256x256": (1, 32, 32)}
CASES = [(WAN, NO_LORA), (WAN, LoraConfig(rank=16)), (preset("XL"), NO_LORA), (preset("latte_t2v"), NO_LORA)]
BALANCED = TrainConfig(balance=1, batch_size=60, micro_batch_size=4)


def configs(model: ModelConfig, train: TrainConfig, lora: LoraConfig = NO_LORA, world: int = 1):
    return bucket_configs(train, model, lora, LATENTS, 120, frame_times=False, world=world)


@pytest.mark.parametrize(("model", "lora"), CASES)
def test_no_step_costs_more_flops_nor_a_clip_less_than_the_costliest(model: ModelConfig, lora: LoraConfig):
    text = model.text_tokens or 120
    cost = {name: training_flops(model, lora, *shape, text) for name, shape in LATENTS.items()}
    steps = {name: own.batch_size * cost[name] for name, own in configs(model, BALANCED, lora).items()}
    assert steps["81x480x832"] == max(steps.values()) == 60 * cost["81x480x832"]
    for name, flops in steps.items():
        assert flops > max(steps.values()) - cost[name]


def test_clips_of_a_step_depend_on_neither_workers_nor_micro_batches():
    wanted = {name: own.batch_size for name, own in configs(WAN, BALANCED).items()}
    assert wanted == {"81x480x832": 60, "17x480x832": 537, "1x480x832": 3650, "1x256x256": 20447}  # never change these
    for world, micro in ((1, 1), (7, 3), (60, 16)):
        train = BALANCED.model_copy(update={"micro_batch_size": micro, "zero_stage": 3})
        assert {name: own.batch_size for name, own in configs(WAN, train, world=world).items()} == wanted


@pytest.mark.parametrize("world", [1, 7, 60])
@pytest.mark.parametrize("micro", [1, 4])
def test_as_few_micro_batches_as_fit_hold_a_ranks_clips(world: int, micro: int):
    train = BALANCED.model_copy(update={"micro_batch_size": micro})
    tokens = {name: f * h * w // 4 for name, (f, h, w) in LATENTS.items()}
    for name, own in configs(WAN, train, world=world).items():
        clips, most = -(-own.batch_size // world), micro * max(tokens.values()) // tokens[name]
        count = -(-clips // own.micro_batch_size)
        assert own.micro_batch_size <= most
        assert count * own.micro_batch_size - clips < count  # padding: less than a clip of each micro-batch


def test_without_balance_every_bucket_has_the_recipes_numbers():
    train = BALANCED.model_copy(update={"balance": 0.0})
    assert all(own == train for own in configs(WAN, train, world=7).values())


def test_in_an_epoch_a_clip_weighs_in_proportion_to_its_cost():
    """A step's loss is the mean over its clips, so each full step of a bucket adds 1 in all, 1 / clips for each."""
    buckets = Bucket("16x", 40, batch_size=4), Bucket("8x", 96, batch_size=8), Bucket("1x", 320, batch_size=80)
    order, weights = SampleOrder(buckets, 4, seed=1), dict[tuple[str, int], Fraction]()
    for k in range(order.steps_per_epoch):
        taken = batch(order, k)
        for row in taken.rows:
            assert (taken.bucket, row) not in weights
            weights[taken.bucket, row] = Fraction(1, len(taken.rows))
    assert len(weights) == 40 + 96 + 320
    assert {(name, weight) for (name, _), weight in weights.items()} == {
        ("16x", Fraction(1, 4)), ("8x", Fraction(1, 8)), ("1x", Fraction(1, 80)),
    }  # fmt: skip
    assert order.steps_per_epoch == sum(weights.values())
