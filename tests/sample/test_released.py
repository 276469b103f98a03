"""`sora sample` of a released pipeline folder: what its diffusers class makes, and a plain word for what is missing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    WanImageToVideoPipeline,
)
from PIL import Image
from transformers import T5EncoderModel
from wan_models import make_wan_pipeline, open_wan_pipeline

from data_prep.given import read_given
from sora_train.codec import BUILTIN
from sora_train.codec.text import load_tokenizer
from sora_train.errors import UserError
from sora_train.export import export
from sora_train.options import SampleOptions
from sora_train.sample import generate, generate_each, load_run, sample_prompts
from sora_train.sample.condition import encode_given
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


@pytest.fixture(scope="module")
def latte(tmp_path_factory) -> Path:
    """A random `LattePipeline` of the released one's classes and scheduler, saved by diffusers."""
    torch.manual_seed(0)
    folder, halvings = tmp_path_factory.mktemp("latte"), 4
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * halvings,
        up_block_types=("UpDecoderBlock2D",) * halvings,
        block_out_channels=(8,) * halvings,
        layers_per_block=1,
        norm_num_groups=4,
    )
    transformer = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate",
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=64, video_length=16,
    )  # fmt: skip
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    LattePipeline(
        tokenizer=load_tokenizer(BUILTIN / "text"),  # pyright: ignore[reportArgumentType]
        text_encoder=T5EncoderModel.from_pretrained(BUILTIN / "text"),
        vae=vae,
        transformer=transformer,
        scheduler=DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),  # pyright: ignore[reportArgumentType]
    ).save_pretrained(folder)
    return folder


def test_videos_are_those_of_latte_pipeline(latte):
    run, pipe = load_run(latte, "cpu"), LattePipeline.from_pretrained(latte)
    pipe.set_progress_bar_config(disable=True)
    assert (run.manifest.frames, run.manifest.height, run.manifest.width, run.fps) == (16, 64, 64, 8.0)
    validation, codec = run.recipe.validation, run.recipe.codec
    assert (validation.sampler, validation.steps, validation.guidance) == ("ddim", 50, 7.5)
    assert (codec.caption_cleaning, codec.null_prompt, codec.max_tokens) == ("lower", "padded", 120)
    prompt, how = "A Cat and a dog ", validation.model_copy(update={"steps": 10})
    ours = generate(run, [prompt], [3], how)[0]
    noise = torch.randn(sample_shape(run), generator=torch.Generator().manual_seed(3))
    ask = {"height": 64, "width": 64, "num_inference_steps": 10, "output_type": "np"}
    theirs = pipe(prompt, latents=noise[None].transpose(1, 2), **ask).frames[0]
    assert ours.std() > 5
    assert np.abs(theirs * 255 - ours).max() < 1


def test_the_command_writes_its_videos(pipelines, tmp_path):
    ask = {"frames": 5, "height": 32, "width": 48, "steps": 1, "format": ("mp4",), "out": str(tmp_path)}
    (file,) = sample_prompts(pipelines["2.1"], SampleOptions(prompt=("a cat",), **ask))
    assert read_mp4(file).shape == (5, 32, 48, 3)
    assert not (pipelines["2.1"] / "samples").exists()


def test_wan_2_2_begins_with_an_image_as_its_pipeline_and_2_1_refuses_it(pipelines, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "first.png")
    ask = {
        "frames": 5,
        "height": 32,
        "width": 64,
        "steps": 3,
        "format": ("png",),
        "image": (str(tmp_path / "first.png"),),
    }
    ask = SampleOptions(prompt=("a cat",), out=str(tmp_path / "out"), **ask)
    with pytest.raises(UserError, match=r"--image: .* lacks expand_timesteps, so it is a text-to-video model"):
        sample_prompts(pipelines["2.1"], ask, read_given)
    sample_prompts(pipelines["2.2"], ask, read_given)
    (file,) = (tmp_path / "out").glob("given-*.png")
    np.testing.assert_array_equal(np.asarray(Image.open(file)), picture)
    named = copied(pipelines["2.2"], tmp_path / "named", _class_name="WanImageToVideoPipeline")
    run, base = load_run(named, "cpu"), open_wan_pipeline(pipelines["2.2"])
    pipe = WanImageToVideoPipeline(**base.components, expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    text, null = base.encode_prompt(
        "a cat", max_sequence_length=512
    )  # the other class can't clean a prompt without ftfy
    how, shape = run.recipe.validation.model_copy(update={"steps": 6}), (5, 32, 64)
    noise = torch.randn(sample_shape(run, shape), generator=torch.Generator().manual_seed(3))
    size = {"num_frames": 5, "height": 32, "width": 64, "num_inference_steps": 6}
    size |= {"prompt_embeds": text, "negative_prompt_embeds": null, "latents": noise[None].transpose(1, 2)}
    theirs = pipe(Image.open(file), **size).frames[0]
    latents = encode_given(run, picture[None])
    (ours,) = generate_each(run, ["a cat"], [3], how, shape=shape, given=[latents])
    assert np.abs(theirs * 255 - ours).max() < 1
    assert np.abs(theirs * 255 - generate(run, ["a cat"], [3], how, shape)[0]).max() > 10


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
    assert "is a WanImageToVideoPipeline; `sora sample` reads a WanPipeline, a LattePipeline, or" in said(image)
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
    assert said(two / "transformer").endswith(f"is one network of a pipeline; name its parent folder: {two}")
    alone = Path(shutil.copytree(two / "transformer", tmp_path / "alone" / "weights"))
    assert "is one network of a pipeline; name a folder with its VAE" in said(alone)
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


def test_steps_that_the_pipeline_spaces_otherwise_are_reported(latte, tmp_path, caplog):
    load_run(latte, "cpu")
    assert not caplog.messages
    leading = copied(latte, tmp_path / "leading")
    DDIMScheduler(clip_sample=False).save_pretrained(leading / "scheduler")
    load_run(leading, "cpu")
    (message,) = caplog.messages
    assert message.startswith("the pipeline's scheduler spaces its steps as `leading`, and sampler ddim as `trailing`")
