"""A run's folder becomes videos: the same seed the same video, and a plain word where something is missing."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sora_train.diffusion import Sampling
from sora_train.errors import UserError
from sora_train.manifest import Manifest
from sora_train.options import SampleOptions
from sora_train.recipe import Recipe, save_recipe
from sora_train.sample import embed, find_checkpoint, generate, load_run, sample_prompts, sample_to_folder
from sora_train.video import read_mp4


@pytest.fixture(scope="module")
def made_run(make_run):
    return make_run()


@pytest.fixture(scope="module")
def run(made_run):
    return load_run(made_run)


def test_videos_have_the_shape_of_the_clips_and_steps_and_guidance_default_to_validation(run):
    calls = []
    videos = generate(
        run, ["a red circle", "a blue square"], [0, 1], progress=lambda done, of: calls.append((done, of))
    )
    assert videos.shape == (2, 3, 16, 32, 3)
    assert videos.dtype == np.uint8
    assert calls == [(1, 2), (2, 2)]
    assert np.array_equal(
        videos, generate(run, ["a red circle", "a blue square"], [0, 1], Sampling(steps=2, guidance=3.0))
    )


def test_a_clip_depends_on_its_prompt_and_seed_and_not_on_its_neighbours(run):
    alone = generate(run, ["a red circle"], [7])[0].astype(int)
    among = generate(run, ["a blue square moving up", "a red circle", "a red circle"], [7, 7, 8]).astype(int)
    assert np.abs(alone - among[1]).max() <= 1  # batches of other sizes may sum in another order
    assert np.abs(alone - among[0]).mean() > 1
    assert np.abs(alone - among[2]).mean() > 1


def test_samples_of_a_bf16_recipe_are_made_in_bf16_and_near_those_in_float32(made_run, run, tmp_path):
    shutil.copytree(made_run, tmp_path / "run")
    recipe = tmp_path / "run/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("precision: fp32\n  reduce", "precision: bf16\n  reduce"))
    half = load_run(tmp_path / "run")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    given = (
        torch.randn(1, 3, 4, 8, 16),
        torch.tensor([500.0]),
        torch.randn(1, 5, 64),
        torch.ones(1, 5, dtype=torch.bool),
    )
    exact, found = run.predict(*given), half.predict(*given)
    assert found.dtype == torch.float32  # so a sampler adds up in float32
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.02
    videos = [generate(each, ["a red circle"], [0]).astype(int) for each in (run, half)]
    assert 0 < np.abs(videos[0] - videos[1]).mean() < 4  # of 255


def test_a_negative_prompt_takes_the_place_of_the_empty_one(run):
    def with_negative(prompt: str) -> Sampling:
        return run.recipe.validation.model_copy(update={"negative": prompt})

    plain = generate(run, ["a red circle"], [0])
    assert np.array_equal(plain, generate(run, ["a red circle"], [0], with_negative("")))
    assert not np.array_equal(plain, generate(run, ["a red circle"], [0], with_negative("a white square")))


def test_samples_in_a_folder_are_named_listed_and_shown(run, tmp_path):
    prompts = ["a red circle", "../\n猫"]
    files = sample_to_folder(run, prompts, None, tmp_path / "out", seeds=(0, 5))
    assert [file.name[:4] for file in files] == ["000-", "001-", "002-", "003-"]
    assert files[0].name == "000-a-red-circle.mp4"
    assert all(file.parent == tmp_path / "out" for file in files)
    about = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert [(entry["prompt"], entry["seed"]) for entry in about["samples"]] == [(p, s) for p in prompts for s in (0, 5)]
    assert about["checkpoint"] == "step_00000020"
    Image.open(tmp_path / "out" / "sheet.png").verify()
    direct = generate(run, ["a red circle"], [5])[0].astype(int)
    assert np.abs(read_mp4(files[1]).astype(int) - direct).mean() < 30  # tiny frames of noise suffer in H.264


def test_embeddings_made_before_spare_the_text_encoder(made_run, run, tmp_path):
    fresh = load_run(made_run)
    null = run.text_encoder.encode_null("", "eos")
    files = sample_to_folder(fresh, ["a red circle"], embed(run, ["a red circle"]), tmp_path, negative=null)
    assert "text_encoder" not in vars(fresh)
    assert files[0].read_bytes() == sample_to_folder(run, ["a red circle"], None, tmp_path / "b")[0].read_bytes()


def test_a_long_prompt_is_cut_and_what_is_lost_is_said(run, capsys):
    embed(run, ["a red circle moving left"])
    assert capsys.readouterr().err == ""
    assert len(embed(run, ["a red circle moving left " + "a blue square " * 8 + "moving up"])[0]) == 20
    warning = capsys.readouterr().err
    assert "codec.max_tokens 20" in warning
    assert "moving up" in warning
    assert "red circle" not in warning


def test_sampling_prompts_writes_mp4_and_gif_beside_the_run(made_run, capsys):
    written = sample_prompts(made_run, SampleOptions(prompt=("a blue square moving up",), seed=(3,)))
    folder = made_run / "samples" / "prompts"
    assert written == [folder / "a-blue-square-moving-up-seed3.mp4", folder / "a-blue-square-moving-up-seed3.gif"]
    assert all(str(file) in capsys.readouterr().out or file.stat().st_size for file in written)
    assert read_mp4(written[0]).shape == (3, 16, 32, 3)
    sample_prompts(made_run, SampleOptions(prompt=("Ein Kreis\nganz rot",)))
    listed = json.loads((folder / "samples.json").read_text())["samples"]
    assert [entry["prompt"] for entry in listed] == ["a blue square moving up"] * 2 + ["Ein Kreis\nganz rot"] * 2


def test_the_newest_checkpoint_whose_weights_are_whole_is_used_and_those_passed_over_are_named(
    made_run, tmp_path, capsys
):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: x\n")
    content = (made_run / "checkpoints" / "step_00000020" / "ema.safetensors").read_bytes()
    for step, part in ((9, content), (10, content), (100, content[:-8]), (200, b"")):
        place = folder / "checkpoints" / f"step_{step:08d}"
        place.mkdir(parents=True)
        (place / "ema.safetensors").write_bytes(part)
    assert find_checkpoint(folder) == (folder, folder / "checkpoints" / "step_00000010")
    said = capsys.readouterr().err
    assert said.index("step_00000200 is unfinished or damaged") < said.index("step_00000100 is unfinished or damaged")
    assert find_checkpoint(folder / "checkpoints" / "step_00000009")[1].name == "step_00000009"
    with pytest.raises(UserError, match="cut short"):
        find_checkpoint(folder / "checkpoints" / "step_00000100")


def test_what_cannot_be_sampled_is_refused_with_what_to_do(made_run, run, tmp_path):
    with pytest.raises(UserError, match=r"no run at .*nowhere.*sora train"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"runs there: .*tiny"):
        load_run(made_run.parent / "tinny")
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        load_run(tmp_path)
    save_recipe(Recipe(), tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="give a prompt"):
        sample_prompts(made_run, SampleOptions())
    with pytest.raises(UserError, match="out of range"):
        sample_prompts(made_run, SampleOptions(prompt=("a",), seed=(-1,)))
    for folder in (made_run, tmp_path / "nowhere"):  # before anything is loaded
        with pytest.raises(UserError, match=r"can't be written: .*--out"):
            sample_prompts(folder, SampleOptions(prompt=("a",), out=str(tmp_path / "recipe.yaml" / "inside")))
    with pytest.raises(UserError, match=r"/proc can't be written: .*--out"):
        sample_prompts(made_run, SampleOptions(prompt=("a",), out="/proc"))
    with pytest.raises(UserError, match="--guidance_interval is .9.0, 1.0.; it must rise"):
        sample_prompts(made_run, SampleOptions(prompt=("a",), guidance_interval=(9, 1)))


def test_weights_and_codecs_of_another_run_are_refused(made_run, tmp_path):
    place = tmp_path / "step_00000001"
    place.mkdir()
    (place / "ema.safetensors").write_bytes(
        (made_run / "checkpoints" / "step_00000020" / "ema.safetensors").read_bytes()
    )
    manifest = Manifest.load(str(made_run))
    other = manifest.model_copy(update={"text": manifest.text.model_copy(update={"hash": "0" * 64})})
    other.save(str(place))
    model = dataclasses.asdict(load_run(made_run).recipe.model)
    recipe = Recipe.model_validate({"model": model, "codec": {"max_tokens": 20}})
    save_recipe(recipe, place / "recipe.yaml")
    with pytest.raises(UserError, match=r"codec\.text 'builtin' is not what"):
        embed(load_run(place), ["a"])
    save_recipe(Recipe.model_validate({"model": {**model, "depth": 4}}), place / "recipe.yaml")
    with pytest.raises(UserError, match="does not fit the model"):
        load_run(place)


def test_sampling_needs_neither_ray_nor_deepspeed():
    code = "import sys, sora_train.sample; assert not {'ray', 'deepspeed'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_sample_that_is_not_finite_is_an_error_and_no_black_video(made_run, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(made_run, broken)
    file = broken / "checkpoints/step_00000020/ema.safetensors"
    weights = load_file(file)
    weights["patch_out.bias"][0] = float("nan")
    save_file(weights, file)
    with pytest.raises(UserError, match=r"sample of 'a red circle' from .* is not finite; its weights are not"):
        sample_prompts(broken, SampleOptions(prompt=("a red circle",), format=("png",)))
    assert not list((broken / "samples/prompts").glob("*.png"))


def test_of_several_shapes_samples_take_the_commonest_and_say_so(made_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(made_run, folder)
    buckets = {"3x32x32": 2, "3x16x16": 5, "1x16x32": 9, "3x64x64": 0}
    manifest = Manifest.load(str(folder)).model_copy(update={"buckets": buckets, "height": 32, "width": 32})
    manifest.save(str(folder))  # as a version of before saved it, with the largest shape
    (file,) = sample_prompts(folder, SampleOptions(prompt=("a",), format=("mp4",)))
    assert read_mp4(file).shape == (3, 16, 16, 3)
    assert "1 of 3x16x16 (the commonest of 3x32x32, 3x16x16, 1x16x32; --frames" in capsys.readouterr().out
