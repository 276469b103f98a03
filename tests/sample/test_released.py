"""`sora sample` of a released pipeline folder: what its diffusers class makes, and a plain word for what is missing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from wan_models import make_wan_pipeline, open_wan_pipeline

from sora_train.commands import SampleOptions
from sora_train.errors import UserError
from sora_train.export import export
from sora_train.sample import generate, load_run, sample_prompts
from sora_train.sample.generate import sample_shape
from sora_train.video import read_mp4

SIZE = {"2.1": (5, 32, 48), "2.2": (5, 32, 64)}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> dict[str, Path]:
    return {kind: make_wan_pipeline(tmp_path_factory.mktemp("released"), kind) for kind in SIZE}


@pytest.mark.parametrize(
    ("kind", "size", "fps", "shift"), [("2.1", (81, 480, 832), 16, 3.0), ("2.2", (121, 704, 1280), 24, 5.0)]
)
def test_the_settings_are_those_of_the_pipeline(kind, size, fps, shift, pipelines):
    run = load_run(pipelines[kind], "cpu")
    assert (run.manifest.frames, run.manifest.height, run.manifest.width) == size
    assert run.fps == fps
    validation, codec = run.recipe.validation, run.recipe.codec
    assert (validation.sampler, validation.steps, validation.guidance) == ("unipc", 50, 5.0)
    assert (codec.caption_cleaning, codec.null_prompt, codec.max_tokens) == ("wan", "eos", 512)
    assert (run.recipe.diffusion.kind, run.recipe.diffusion.shift) == ("flow", shift)


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
def test_videos_are_those_of_wan_pipeline(kind, pipelines):
    run, pipe = load_run(pipelines[kind], "cpu"), open_wan_pipeline(pipelines[kind])
    pipe.set_progress_bar_config(disable=True)
    frames, height, width = SIZE[kind]
    prompt, how = "A  cat &amp; a dog", run.recipe.validation.model_copy(update={"steps": 6})
    ours = generate(run, [prompt], [3], how, SIZE[kind])[0]
    noise = torch.randn(sample_shape(run, SIZE[kind]), generator=torch.Generator().manual_seed(3))
    size = {"num_frames": frames, "height": height, "width": width, "num_inference_steps": 6}
    theirs = pipe(prompt, latents=noise[None].transpose(1, 2), **size).frames[0]
    assert np.abs(theirs * 255 - ours).max() < 1


def test_the_command_writes_its_videos(pipelines, tmp_path):
    ask = {"frames": 5, "height": 32, "width": 48, "steps": 1, "format": ("mp4",), "out": str(tmp_path)}
    (file,) = sample_prompts(pipelines["2.1"], SampleOptions(prompt=("a cat",), **ask))
    assert read_mp4(file).shape == (5, 32, 48, 3)
    assert not (pipelines["2.1"] / "samples").exists()


def copied(place: Path, to: Path, **index: object) -> Path:
    shutil.copytree(place, to)
    was = json.loads((to / "model_index.json").read_text())
    (to / "model_index.json").write_text(json.dumps(was | index))
    return to


def said(place: Path, weights=None) -> str:
    with pytest.raises(UserError) as caught:
        load_run(place, "cpu", weights)
    return str(caught.value)


def test_what_is_missing_or_unknown_is_named(pipelines, tmp_path):
    lacking = copied(pipelines["2.1"], tmp_path / "lacking")
    shutil.rmtree(lacking / "text_encoder")
    shutil.rmtree(lacking / "scheduler")
    assert "without text encoder (text_encoder/config.json), scheduler (scheduler/scheduler_config.json)" in said(
        lacking
    )
    image = copied(pipelines["2.1"], tmp_path / "image", _class_name="WanImageToVideoPipeline")
    assert "is a WanImageToVideoPipeline; `sora sample` reads a WanPipeline or a LattePipeline" in said(image)
    two = copied(pipelines["2.1"], tmp_path / "two", transformer_2=["diffusers", "WanTransformer3DModel"])
    assert "has two transformers" in said(two)
    assert "leave out --weights" in said(pipelines["2.1"], "raw")
    with pytest.raises(UserError, match="is a released pipeline, not a run: there is nothing to export"):
        export(pipelines["2.1"], tmp_path / "out")
    damaged = copied(pipelines["2.1"], tmp_path / "damaged")
    (damaged / "model_index.json").write_text("{")
    assert "model_index.json can't be read" in said(damaged)
    other = copied(pipelines["2.1"], tmp_path / "other")
    shutil.rmtree(other / "vae")
    shutil.copytree(pipelines["2.2"] / "vae", other / "vae")
    assert "is a VAE of 48 channels, and the transformer takes 16" in said(other)
    (file,) = (two / "transformer").glob("*.safetensors")
    content = file.read_bytes()
    (two / "model_index.json").unlink()  # without it the transformer says what the pipeline is
    load_run(two, "cpu")
    file.write_bytes(content[:-8])
    assert "can't be read" in said(two)


def test_the_scheduler_decides_objective_and_sampler(pipelines, tmp_path):
    euler = copied(pipelines["2.1"], tmp_path / "euler")
    FlowMatchEulerDiscreteScheduler(shift=4.0).save_pretrained(euler / "scheduler")
    run = load_run(euler, "cpu")
    assert (run.recipe.diffusion.shift, run.recipe.validation.sampler) == (4.0, "euler")
    settings = json.loads((pipelines["2.1"] / "scheduler" / "scheduler_config.json").read_text())
    (euler / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings | {"prediction_type": "epsilon"}))
    assert "scheduler is UniPCMultistepScheduler with prediction_type epsilon; Wan needs" in said(euler)
