"""Recipes: what a file and flags become, and what is said about a wrong one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sora_train.errors import RecipeError
from sora_train.flags import parse_flags
from sora_train.options import SampleOptions
from sora_train.recipe import Recipe, load_recipe, save_recipe
from sora_train.settings import SYNONYMS, build, keys, suggest

JOBS = sorted((Path(__file__).parents[1] / "jobs").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str, overrides: dict[str, object] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_shipped_job_loads(path: Path) -> None:
    load_recipe(path)


def test_a_written_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, "name: x\ntrain: {learning_rate: 1e-5}\nvalidation: {prompts: ['yes', 'é: #1']}\n"),
        {"tracking.wandb": "off", "model.pooled_text": True, "cluster.gpu": "no"},
    )
    save_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_a_preset_lies_under_the_keys_that_are_given(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {preset: XL, depth: 4}")
    model = load_recipe(path, {"model.attention": "joint", "model.heads": "18"}).model
    assert (model.width, model.depth, model.heads, model.attention) == (1152, 4, 18, "joint")
    model = load_recipe(write(tmp_path, "name: x"), {"model.preset": "latte_t2v", "model.learned_variance": "no"}).model
    assert (model.depth, model.sample_size, model.learned_variance) == (56, 64, False)
    with_flags, _ = parse_flags(["--model.preset", "L", "--model.attention", "joint"], Recipe)
    model = build(Recipe, {}, with_flags, "flags").model
    assert (model.preset, model.width, model.depth, model.attention) == ("L", 1024, 24, "joint")
    shaped = write(tmp_path, "model: {width: 64, depth: 2, heads: 2, pooled_text: true}")
    model = load_recipe(shaped, {"model.preset": "B", "model.depth": "4"}).model
    assert (model.width, model.depth, model.heads, model.pooled_text) == (768, 4, 12, True)
    assert "model.preset is 'M'; choices: " in refusal(tmp_path, "model: {preset: M}")
    assert "model.preset is ['S']; " in refusal(tmp_path, "model: {preset: [S]}")


def test_a_written_key_that_wan_ignores_is_refused_even_at_its_default(tmp_path: Path) -> None:
    said = refusal(tmp_path, "model: {preset: wan2.1_t2v_1.3b, attention: factorised, sample_size: 32}")
    assert said.endswith(
        "model.family wan does not take model.attention 'factorised', model.sample_size 32. Leave out these keys"
    )
    wan = load_recipe(write(tmp_path, "model: {preset: wan2.1_t2v_1.3b}"))
    save_recipe(wan, tmp_path / "saved.yaml")  # with every key
    assert load_recipe(tmp_path / "saved.yaml") == wan


@pytest.mark.parametrize("name", ["", "S", "B", "L", "XL", "XL_heads64", "XL_heads128", "latte_t2v"])
def test_a_written_recipe_holds_what_its_preset_stood_for(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(write(tmp_path, f"model: {{preset: '{name}', norm_eps: 1e-5}}\ndiffusion: {{kind: ddpm}}"), {})
    save_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert f"width: {recipe.model.width}\n" in (tmp_path / "again.yaml").read_text()
    assert recipe.model.norm_eps == 1e-5


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "# nothing\n")) == Recipe()


def test_a_number_that_yaml_reads_as_a_string_is_a_number(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "train: {learning_rate: 1e-4}")).train.learning_rate == 1e-4


def test_off_and_no_are_words_not_truth_values(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "tracking: {wandb: off}\ncluster: {gpu: no}\nmodel: {pooled_text: true}"))
    assert (recipe.tracking.wandb, recipe.cluster.gpu, recipe.model.pooled_text) == ("off", "no", True)


def test_overrides_lie_over_the_file_and_leave_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {steps: 7, batch_size: 4}\nvalidation: {resources: {CPU: 2}}")
    recipe = load_recipe(path, {"train.steps": "40", "validation.resources.GPU": "1", "data.fps": "7.5"})
    assert (recipe.train.steps, recipe.train.batch_size, recipe.data.fps) == (40, 4, 7.5)
    assert recipe.validation.resources == {"CPU": 2.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {stpes: 7}", "train.stpes is no known key; did you mean train.steps?"),
        ("model: {widht: 7}", "model.widht is no known key; did you mean model.width?"),
        ("diffusion: {kin: flow}", "diffusion.kin is no known key; did you mean diffusion.kind?"),
        ("loras: {rank: 4}", "loras is no known key; did you mean lora?"),
        ("batch_size: 7", "batch_size is no known key; did you mean train.batch_size?"),
        ("nonsense: 7", "known are name, data, selection, prep, codec"),
        ("train: {zero_stage: 4}", "train.zero_stage is 4; choices: 0, 1, 2 or 3"),
        ("train: {steps: many}", "train.steps is 'many'; it should be a valid integer"),
        ("train: {steps: 5, profile: [9, 2]}", "train.profile begins at step 9 and train.steps is 5"),
        ("train: {steps: -3}", "train.steps is -3; it should be greater than 0"),
        ("train: {steps: 1:30}", "train.steps is '1:30'; it should be a valid integer"),
        ("data: {stride_s: 1e-9}", "data.stride_s is 1e-09; it must be at least 0.001, or 0"),
        ("validation: {resources: {GPU: -1}}", "validation.resources.GPU is -1; it should be greater than or equal"),
        ("train: 3", "train is 3; it is a section"),
        ("model: 3", "model is 3; it is a section"),
        ("train: [steps]", "train is ['steps']; it is a section"),
        ("name: a/b", "name 'a/b' can't be a run's folder"),
        (f"name: {'a' * 201}", "can't be a run's folder; use up to 200 letters"),
        ("model: {attention: full}", "choices: 'factorised' or 'joint'"),
        ("model: {width: 30, heads: 4}", "model.width 30 is not a multiple of model.heads 4"),
        ("train: {profile: [5]}", "train.profile.1 is [5]; a value is missing"),
        ("validation: {prompts: a}", "validation.prompts is 'a'; it takes a list, such as [a]"),
        ("- train", "holds a list; a recipe is a mapping"),
        ("just words", "holds a str"),
        ("train: {steps: 1", "can't be read as YAML"),
        ("train: {steps: 1}\ntrain: {steps: 2}", "the key train stands twice"),
        ("name: !!python/object/apply:os.getcwd []", "can't be read as YAML"),
        ("name: 2026-02-31", "can't be read as YAML"),
        ("? [a, b]\n: c", "can't be read as YAML"),
        ("[" * 5000, "can't be read as YAML"),
        ("3: 4", "3 is no known key"),
    ],
)
def test_a_wrong_recipe_is_told_which_key_and_what_fits(tmp_path: Path, text: str, says: str) -> None:
    message = refusal(tmp_path, text)
    assert says in message
    assert str(tmp_path / "recipe.yaml") in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "validation: {every: 250, prompts: [a]}\ntrain: {checkpoint_every: 100}",
            "validation.every 250 is no multiple of train.checkpoint_every 100, and only checkpoints are validated; "
            "use 200 or 300, or 0",
        ),
        ("validation: {sampler: ddim}", "validation.sampler ddim does not fit diffusion.kind flow; use euler, heun"),
        ("validation: {guidance_interval: [900, 100]}", "validation.guidance_interval is [900, 100]; it must rise"),
        ("validation: {guidance_rescale: 2}", "validation.guidance_rescale is 2; it should be less than or equal to 1"),
        ("lora: {rank: 8}", "lora.rank is 8 and model.init_from is empty; adapters are trained on weights that exist"),
        (
            "lora: {rank: 8}\ntrain: {precision: fp8}",
            "train.precision fp8 is for training all weights, and lora.rank is 8",
        ),
        ("lora: {alpha: 8}", "lora.rank is 0, which trains all weights, and lora.alpha would have no effect"),
        ("lora: {targets: [to_q, to_q], rank: 4}", "lora.targets is ['to_q', 'to_q']; name at least one layer"),
        ("conditioning: {probability: 2}", "conditioning.probability is 2.0; it must be within 0 to 1"),
        (
            "conditioning: {probability: 1}\nvalidation: {guidance_without: text_and_frames}",
            "conditioning.probability is 1; use text, or a probability between 0 and 1",
        ),
        ("validation: {guidance_without: text_and_frames}", "and conditioning.probability is 0; use text"),
        ("validation: {every: 500}", "validation.prompts is empty but validation.every is not 0"),
        ("cluster: {workers: 20}", "cluster.workers 20 is more than train.batch_size 16"),
        (
            "cluster: {workers: 66, sequence_parallel: 2}\ntrain: {batch_size: 32}",
            "cluster.workers 66 is more than train.batch_size 32 times cluster.sequence_parallel 2, so some would "
            "never see a clip; use at most 64 workers",
        ),
        ("cluster: {workers: 7, sequence_parallel: 4}", "cluster.workers 7 is not a multiple of cluster.sequence_pa"),
        ("cluster: {workers: 3, sequence_parallel: 4}", "the workers that share a clip; use 4 workers"),
        ("cluster: {workers: [2, 5], sequence_parallel: 2}", "groups need a fixed number of workers, such as 2"),
        (
            "cluster: {workers: 4, sequence_parallel: 4}\nmodel: {attention: joint, heads: 6, width: 384}",
            "cluster.sequence_parallel 4 does not divide model.heads 6, which the workers of a group share in "
            "attention; use 2",
        ),
        ("train: {betas: [0.9, 1.0]}", "train.betas are (0.9, 1.0)"),
        ("model: {learned_variance: true}", "with diffusion.kind flow there is no variance to learn; use"),
        ("diffusion: {prediction: v}", "diffusion.prediction v is read only if diffusion.kind is ddpm"),
        ("data: {image_ratio: 0.2}", "data.image_ratio 0.2 needs buckets of videos and of images (one frame); there"),
        ("validation: {images: [a.png]}", "validation.images are given, but conditioning.probability is 0: the model"),
        (
            "validation: {images: [a.png, b.png], prompts: [a, b, c]}\nconditioning: {probability: 0.5}",
            "validation.images names 2 images for 3 prompts; name one for all, or one for each prompt",
        ),
        ("data: {image_ratio: 0, frames: 1}", "data.image_ratio 0 needs buckets of videos; there is only 1x256x256"),
    ],
)
def test_keys_that_contradict_each_other_are_refused_with_a_remedy(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(tmp_path, text)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    assert len(refusal(tmp_path, "nmae: x\ntrain: {steps: 0, zero_stage: 9}").splitlines()) == 3


def test_a_flag_is_named_as_a_flag(tmp_path: Path) -> None:
    assert refusal(tmp_path, "", {"train.steps": "0"}).startswith("--train.steps is '0'")


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe at .*missing\.yaml"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(RecipeError, match="can't read the recipe"):
        load_recipe(tmp_path)
    (tmp_path / "video.mp4").write_bytes(bytes(range(256)))
    with pytest.raises(RecipeError, match="no text file"):
        load_recipe(tmp_path / "video.mp4")


def test_flags_take_dashes_underscores_and_equals_signs() -> None:
    words = ["--train.batch-size", "4", "r.yaml", "--train.micro_batch_size=2", "--train.seed", "-1"]
    overrides, rest = parse_flags(words, Recipe)
    assert overrides == {"train.batch_size": "4", "train.micro_batch_size": "2", "train.seed": "-1"}
    assert rest == ["r.yaml"]


def test_a_near_miss_is_named_by_meaning_or_not_at_all() -> None:
    known = [key for key, _ in keys(Recipe)]
    for key, meant in {
        "train.lr": "train.learning_rate",
        "lr": "train.learning_rate",
        "train.prompts": "validation.prompts",
        "train.batch": "train.batch_size or train.micro_batch_size",
        "train.rate": "train.learning_rate",
        "num_frames": "data.frames",
        "model.hidden_size": "model.width",
        "train.batchsize": "train.batch_size",
    }.items():
        assert suggest(key, known) == f"did you mean {meant}?"
    for key in ("model.lora_rank", "train.fsdp", "data.num_shards"):
        assert suggest(key, known).startswith(f"known are {key.partition('.')[0]}.")
    assert {name for names in SYNONYMS.values() for name in names} - {"out"} <= set(known)


def test_a_text_that_begins_with_dashes_is_no_flag() -> None:
    words = ["runs/x", "--prompt", "--a dog", "-- and a cat", "--steps", "3", "--prompt=--fox"]
    assert parse_flags(words, SampleOptions) == (
        {"prompt": ["--a dog", "-- and a cat", "--fox"], "steps": "3"},
        ["runs/x"],
    )
    overrides, _ = parse_flags(["--validation.prompts", "--a dog", "--validation.negative", "--no blur"], Recipe)
    assert overrides == {"validation.prompts": ["--a dog"], "validation.negative": "--no blur"}


def test_a_list_takes_words_up_to_the_next_flag_and_a_truth_value_needs_none() -> None:
    words = ["--validation.prompts", "a b", "c", "--model.pooled_text", "r.yaml", "--validation.prompts", "d"]
    overrides, rest = parse_flags(words, Recipe)
    assert overrides == {"validation.prompts": ["a b", "c", "d"], "model.pooled_text": "true"}
    assert rest == ["r.yaml"]


def test_workers_are_a_number_or_the_fewest_and_the_most(tmp_path: Path) -> None:
    words = ["--cluster.workers", "2", "4", "r.yaml"]
    overrides, rest = parse_flags(words, Recipe)
    recipe = load_recipe(write(tmp_path, "cluster: {workers: 3}"), overrides)
    assert (recipe.cluster.fewest, recipe.cluster.most, rest) == (2, 4, ["r.yaml"])
    save_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe
    overrides, rest = parse_flags(["--cluster.workers", "2", "r.yaml"], Recipe)
    assert (load_recipe(write(tmp_path, ""), overrides).cluster.workers, rest) == (2, ["r.yaml"])


@pytest.mark.parametrize("words", [["--train.stpes", "4"], ["--train", "4"], ["--"], ["--train.steps"]])
def test_a_flag_without_key_or_value_is_refused(words: list[str]) -> None:
    with pytest.raises(RecipeError):
        parse_flags(words, Recipe)


@given(steps=st.integers(1, 10**9), rate=st.floats(1e-12, 1.0))
def test_words_of_a_command_line_keep_their_value(steps: int, rate: float) -> None:
    words = [f"--train.steps={steps}", "--train.learning-rate", repr(rate)]
    recipe = build(Recipe, {}, parse_flags(words, Recipe)[0], "flags")
    assert (recipe.train.steps, recipe.train.learning_rate) == (steps, rate)


def test_a_choice_of_numbers_takes_the_word_of_a_command_line() -> None:
    overrides, _ = parse_flags(["--train.zero_stage", "3", "--train.precision", "bf16"], Recipe)
    train = build(Recipe, {}, overrides, "flags").train
    assert (train.zero_stage, train.precision) == (3, "bf16")


WHOLE = [key for key, hint in keys(Recipe) if hint is int or ("int" in str(hint) and "Literal" not in str(hint))]


@pytest.mark.parametrize("key", WHOLE)
def test_a_whole_number_that_torch_can_not_take_is_refused_at_once(tmp_path: Path, key: str) -> None:
    for number in (10**20, 2**31 if not key.endswith("seed") else 2**63):
        assert key in refusal(tmp_path, "", {key: str(number)})


@pytest.mark.parametrize("key", [key for key in WHOLE if key.endswith("seed")])
def test_a_negative_seed_which_numpy_can_not_take_is_refused_at_once(tmp_path: Path, key: str) -> None:
    assert f"{key} is '-1'; it should be greater than or equal to 0" in refusal(tmp_path, "", {key: "-1"})


def test_a_seed_that_is_taken_seeds_torch_and_numpy(tmp_path: Path) -> None:
    keys = {"train.seed": str(2**63 - 1), "validation.seed": str(2**63 - 1)}
    recipe = load_recipe(write(tmp_path, ""), keys)
    for seed in (recipe.train.seed, recipe.validation.seed):
        torch.Generator().manual_seed(seed)
        np.random.default_rng(seed)
    with pytest.raises(RecipeError, match=r"recipe.yaml: train.seed is 9{20}; it must be at most 9223372036854775807"):
        load_recipe(write(tmp_path, "train: {seed: 99999999999999999999}"))


def test_every_key_has_a_sentence() -> None:
    schema = Recipe.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    missing = [
        f"{section['title']}.{key}"
        for section in sections
        for key, value in section["properties"].items()
        if "$ref" not in value and not value.get("description")
    ]
    assert not missing
    assert len(dict(keys(Recipe))) == sum("$ref" not in v for s in sections for v in s["properties"].values())


def test_recipes_need_no_ray() -> None:
    program = "import sys, sora_train.recipe, sora_train.cli; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_whole_number_with_a_leading_zero_is_decimal(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("train: {steps: 010, seed: 1_000}")
    train = load_recipe(tmp_path / "r.yaml").train
    assert (train.steps, train.seed) == (10, 1000)


def test_renamed_keys_work_and_say_their_new_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "r.yaml"
    path.write_text("model: {text_in: every}\ntrain: {guard_patience: 7}\ncluster: {resize_s: 9}")
    recipe = load_recipe(path)
    assert (recipe.model.cross_attention_in, recipe.train.guard_max_consecutive) == ("every", 7)
    assert recipe.cluster.elastic_poll_s == 9
    assert "text_in is now cross_attention_in, guard_patience is now" in capsys.readouterr().err
    flags, _ = parse_flags(["--model.frame-positions", "input", "--model.temporal_positions=input"], Recipe)
    assert flags == {"model.temporal_positions": "input"}
    assert capsys.readouterr().err == (
        "warning: --model.frame_positions is now --model.temporal_positions. Use the new name; version 0.2 will refuse "
        "the old one\n"
    )
