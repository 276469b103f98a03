"""The recipe in DeepSpeed's words: what is passed on, and what is refused before anything starts."""

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_train.errors import RecipeError
from sora_train.flags import parse_flags
from sora_train.recipe import Recipe, load_recipe, save_recipe
from sora_train.settings import flatten
from sora_train.train.config import TrainConfig
from sora_train.train.deepspeed_config import (
    REFUSED,
    contradictions,
    deep_merge,
    deepspeed_config,
    parse_scalars,
)

FINE = """
train:
  zero_stage: 2
  deepspeed:
    zero_optimization: {overlap_comm: true, reduce_bucket_size: 5e8, offload_optimizer: {pin_memory: false}}
    prescale_gradients: false
    steps_per_print: 10
"""

leaves = st.one_of(st.integers(), st.booleans(), st.text(alphabet="abc", min_size=1))
settings = st.dictionaries(
    st.sampled_from("abcd"),
    st.recursive(leaves, lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3), max_leaves=6),
)


def leaves_of(nested: dict, *path: str) -> dict:
    """{("a", "b"): value} of every leaf."""
    found = {}
    for key, value in nested.items():
        found |= leaves_of(value, *path, key) if isinstance(value, dict) else {(*path, key): value}
    return found


@given(settings, settings)
def test_what_is_laid_over_wins_and_the_rest_stays(below: dict, above: dict):
    laid = leaves_of(deep_merge(below, above))
    assert leaves_of(above).items() <= laid.items()
    assert laid.keys() <= leaves_of(above).keys() | leaves_of(below).keys()
    assert leaves_of(deep_merge(below, {})) == leaves_of(below)


@given(settings)
def test_flatten_gives_every_leaf_its_dotted_key(nested: dict):
    expected = [(".".join(path), value) for path, value in leaves_of(nested).items()]
    assert list(flatten(nested)) == expected


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("5e8", 500_000_000),
        ("true", True),
        ("False", False),
        ("0.9", 0.9),
        ("3", 3),
        ("cpu", "cpu"),
        (7, 7),
        (None, None),
    ],
)
def test_words_that_are_numbers_or_truth_values_become_them(written: object, meant: object):
    assert parse_scalars({"a": [written, {"b": written}]}) == {"a": [meant, {"b": meant}]}
    assert type(parse_scalars(written)) is type(meant)


@pytest.mark.parametrize(
    ("stage", "precision", "offload"), [*product(range(4), ["fp32", "bf16"], ["none", "optimizer", "all"])]
)
def test_every_choice_of_the_recipe_is_in_deepspeeds_words(stage: int, precision: str, offload: str):
    config = TrainConfig(
        zero_stage=stage, precision=precision, offload=offload, micro_batch_size=3, gradient_clip=0.5, batch_size=24
    )
    told = deepspeed_config(config, accumulation=2, world=4)
    zero = told["zero_optimization"]
    assert zero["stage"] == stage
    assert ("offload_optimizer" in zero, "offload_param" in zero) == (offload != "none", offload == "all")
    assert told["bf16"]["enabled"] == (precision == "bf16" and stage > 0)  # stage 0 computes by autocast
    assert told["gradient_clipping"] == (0.5 if stage else 0.0)  # stage 0 is clipped by the engine
    assert told["train_batch_size"] == 3 * 2 * 4
    least = {"none": 0, "optimizer": 1, "all": 3}[offload]
    assert bool(contradictions(config)) == (stage < least)


def test_raw_keys_of_a_recipe_are_laid_over_and_survive_writing_it(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(FINE)
    recipe = load_recipe(tmp_path / "recipe.yaml", {"train.offload": "optimizer"})
    save_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe
    told = deepspeed_config(recipe.train, accumulation=1, world=2)
    assert told["zero_optimization"] == {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "overlap_comm": True,
        "reduce_bucket_size": 500_000_000,
    }
    assert told["prescale_gradients"] is False
    assert told["steps_per_print"] == 10


@pytest.mark.parametrize("key", REFUSED)
def test_a_refused_deepspeed_key_is_named_with_the_reason(key: str):
    raw: dict = {"enabled": 1}
    for part in reversed(["zero_optimization", *key.split(".")]):
        raw = {part: raw}
    (sentence,) = contradictions(TrainConfig(deepspeed=raw))
    assert REFUSED[key] in sentence


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ("{zero_optimisation: {overlap_comm: true}}", "zero_optimisation, which is not passed on"),
        ("{hybrid_engine: {enabled: true}}", "hybrid_engine, which is not passed on"),
        ("{zero_optimization: 3}", "sets zero_optimization to a value, but it is a section"),
        (
            "{zero_optimization: {offload_param: cpu}}",
            "zero_optimization.offload_param to a value, but it is a section",
        ),
        ("{train_batch_size: 8}", "sets train_batch_size, which is not passed on"),
        ("{zero_optimization: {stage: 3}}", "zero_optimization.stage, which is not allowed: train.zero_stage sets it"),
        ("3", "train.deepspeed is 3; it is a section and takes keys of its own"),
    ],
)
def test_a_recipe_with_a_contradiction_is_refused(tmp_path: Path, raw: str, says: str):
    (tmp_path / "recipe.yaml").write_text(f"train: {{deepspeed: {raw}}}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert says in str(caught.value)


def test_offload_without_the_stage_it_needs_is_refused(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("train: {offload: all, zero_stage: 2}")
    with pytest.raises(RecipeError, match="train.offload all needs train.zero_stage 3 or more, it is 2"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_flag_reaches_into_deepspeeds_sections(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(FINE)
    words = ["--train.deepspeed.zero_optimization.overlap_comm=false", "--train.deepspeed.steps_per_print", "7"]
    overrides, rest = parse_flags(words, Recipe)
    recipe = load_recipe(tmp_path / "recipe.yaml", overrides)
    told = deepspeed_config(recipe.train, accumulation=1, world=1)
    assert told["zero_optimization"]["overlap_comm"] is False
    assert told["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert told["steps_per_print"] == 7
    assert rest == []


def test_a_flag_that_is_a_section_says_how_to_go_on():
    with pytest.raises(
        RecipeError, match="--train.deepspeed takes keys of its own, such as --train.deepspeed.KEY VALUE"
    ):
        parse_flags(["--train.deepspeed", "x"], Recipe)
