"""A run of Wan leaves as a `WanPipeline`: diffusers makes of it what we make of it, and it comes back bit for bit."""

import importlib.util
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file
from wan_models import SHIFT, make_wan_pipeline, open_wan_pipeline

from data_prep.given import read_given
from sora_train.data.collate import pad_text
from sora_train.diffusion import DiffusionConfig, Sampling, sample
from sora_train.errors import UserError
from sora_train.export import export
from sora_train.model.convert import config_from_diffusers
from sora_train.options import SampleOptions
from sora_train.sample import embed, generate, generate_each, load_run, sample_prompts
from sora_train.sample.condition import encode_given
from sora_train.sample.generate import sample_shape

PROMPT, NEGATIVE = "a  RED circle &amp; a dog", "blurry"
WIDTH = {"2.1": 48, "2.2": 64}
VALIDATION = {"sampler": "unipc", "negative": NEGATIVE}


@pytest.fixture(scope="module")
def run_of_wan(run_of, tmp_path_factory):
    """run_of_wan(kind, diffusion, ...): a run of a tiny Wan with the networks of a tiny pipeline."""

    def make(kind: str, diffusion: DiffusionConfig | None = None, **more) -> Path:
        base = make_wan_pipeline(tmp_path_factory.mktemp("base"), kind)
        config = json.loads((base / "transformer" / "config.json").read_text())
        flow = diffusion or DiffusionConfig(shift=SHIFT[kind])
        codec = {"vae": str(base), "text": str(base), "caption_cleaning": "wan", "max_tokens": 512}
        model, width = config_from_diffusers(config), WIDTH[kind]
        return run_of(model, flow, frames=5, width=width, **({"validation": VALIDATION} | codec | more))

    return make


@pytest.fixture(scope="module", params=["2.1", "2.2"])
def exported(request, run_of_wan, tmp_path_factory) -> tuple[Path, Path]:
    """A run, and what it was exported to, moved since."""
    folder, out = run_of_wan(request.param), tmp_path_factory.mktemp("out")
    export(folder, out / "before")
    (out / "before").rename(out / "after")
    return folder, out / "after"


def bits(run) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in run.model.state_dict().items()}


def test_latents_of_wan_pipeline_equal_ours(exported):
    run, pipe = load_run(exported[0], "cpu"), open_wan_pipeline(exported[1])
    pipe.set_progress_bar_config(disable=True)
    shape = sample_shape(run)
    height, width = (side * run.manifest.vae.factor for side in shape[2:])
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    text, mask = pad_text(embed(run, [PROMPT, "a cat"]))
    for steps, guidance, negative in ((1, 5.0, ""), (4, 1.0, ""), (9, 5.0, NEGATIVE)):
        null, null_mask = pad_text([run.text_encoder.encode_null(negative, run.recipe.codec.null_prompt)])
        how = Sampling(sampler="unipc", steps=steps, guidance=guidance)
        ours = sample(run.predict, run.objective, noise, text, mask, null, null_mask, how)
        theirs = pipe(
            [PROMPT, "a cat"],
            negative_prompt=negative,
            num_frames=5,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise.transpose(1, 2),
            output_type="latent",
        ).frames.transpose(1, 2)
        assert ours.shape == noise.shape
        assert 0.5 < ours.std() < 20
        assert (ours - theirs).abs().max() < 1e-4 * max(1, ours.std())


def test_the_folder_has_what_diffusers_itself_writes(exported, tmp_path):
    folder, out = exported
    kind = "2.2" if load_run(folder, "cpu").manifest.vae.factor == 16 else "2.1"
    theirs = make_wan_pipeline(tmp_path / "theirs", kind)
    index, expected = (json.loads((place / "model_index.json").read_text()) for place in (out, theirs))
    known = {"tokenizer": ["transformers", "PreTrainedTokenizerFast"]}  # both versions of transformers have this one
    assert index == expected | known
    ours, scheduler = (UniPCMultistepScheduler.from_pretrained(place / "scheduler") for place in (out, theirs))
    assert dict(ours.config) == dict(scheduler.config)
    for part in ("transformer", "vae", "text_encoder"):
        mine, other = (load_file(next((place / part).glob("*.safetensors"))) for place in (out, theirs))
        assert {name: tensor.shape for name, tensor in mine.items()} == {n: t.shape for n, t in other.items()}
    ours, transformer = (WanTransformer3DModel.load_config(place / "transformer") for place in (out, theirs))
    assert {key: transformer.get(key, value) for key, value in ours.items()} == {**ours}


def test_the_lines_of_the_model_card_make_what_sora_sample_makes(exported, monkeypatch):
    folder, out = exported
    card = (out / "README.md").read_text()
    assert "UniPC with `flow_shift`" in card
    assert "tags: [wan]" in card
    lines = card.split("```python\n")[1].split("\n```\n")[0]
    lines = lines.replace('export_to_video(frames, "sample.mp4", fps=8)', "")
    lines = lines.replace("generator=torch.Generator().manual_seed(0),", "latents=noise, output_type='np',")
    if importlib.util.find_spec("accelerate") is None:  # see open_wan_pipeline
        lines = lines.replace('WanPipeline.from_pretrained(".")', "open_wan_pipeline(folder)")
    run = load_run(folder, "cpu")
    noise = torch.randn(sample_shape(run), generator=torch.Generator().manual_seed(0))[None].transpose(1, 2)
    monkeypatch.chdir(out)
    exec(lines, there := {"noise": noise, "folder": out, "open_wan_pipeline": open_wan_pipeline})
    ours = generate(run, run.recipe.validation.prompts, [0])[0].astype(float)
    assert np.abs(there["frames"] * 255 - ours).mean() < 0.6


@pytest.fixture(scope="module", params=["2.1", "2.2"])
def exported_with_image(request, run_of_wan, tmp_path_factory) -> tuple[Path, Path]:
    """A run that was trained to continue an image, and its export."""
    folder = run_of_wan(request.param, conditioning={"frames": 1, "probability": 0.5})
    return folder, export(folder, tmp_path_factory.mktemp("out") / "model")


@pytest.fixture
def first_frame(exported_with_image, tmp_path) -> Image.Image:
    """An image as `sora sample --image` leaves it in its folder."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 99, 3), np.uint8)).save(tmp_path / "first.png")
    image, out = (str(tmp_path / "first.png"),), str(tmp_path / "samples")
    asked = SampleOptions(prompt=("a cat",), image=image, out=out, steps=1, format=("png",))
    sample_prompts(exported_with_image[1], asked, read_given)
    (file,) = (tmp_path / "samples").glob("given-*.png")
    return Image.open(file)


def test_latents_of_the_image_to_video_pipeline_equal_ours(exported_with_image, first_frame):
    folder, out = exported_with_image
    run, plain = load_run(folder, "cpu"), WanPipeline.from_pretrained(out)
    pipe = WanImageToVideoPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    height, width = run.manifest.height, run.manifest.width
    assert first_frame.size == (width, height)
    given = encode_given(run, np.asarray(first_frame)[None])
    shape = sample_shape(run)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    text, mask = pad_text(embed(run, [PROMPT]))
    found = []
    for steps, guidance, negative in ((1, 5.0, ""), (4, 1.0, ""), (9, 5.0, NEGATIVE)):
        null, null_mask = pad_text([run.text_encoder.encode_null(negative, run.recipe.codec.null_prompt)])
        how = Sampling(sampler="unipc", steps=steps, guidance=guidance)
        ours, free = (
            sample(run.predict, run.objective, noise, text, mask, null, null_mask, how, given=each)
            for each in (given[None], None)
        )
        embeds, null_embeds = plain.encode_prompt(PROMPT, negative, max_sequence_length=512)  # ftfy
        theirs = pipe(
            first_frame,
            prompt_embeds=embeds,
            negative_prompt_embeds=null_embeds,
            num_frames=5,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise.transpose(1, 2),
            output_type="latent",
        ).frames.transpose(1, 2)
        assert (ours - theirs).abs().max() < 1e-4 * max(1, ours.std())
        assert (ours[:, 0] - given[0]).abs().max() < 1e-6
        found.append(float((ours - free)[:, 1:].abs().max()))
    assert max(found) > 1e-2  # the image reaches the other frames


def test_an_export_that_takes_an_image_still_makes_videos_from_text(exported_with_image):
    test_latents_of_wan_pipeline_equal_ours(exported_with_image)
    index = json.loads((exported_with_image[1] / "model_index.json").read_text())
    assert (index["_class_name"], index["expand_timesteps"]) == ("WanPipeline", True)


def test_the_card_of_a_model_that_takes_an_image_makes_what_sora_sample_makes(exported_with_image, monkeypatch):
    folder, out = exported_with_image
    card = (out / "README.md").read_text()
    assert "for text-to-video and image-to-video, made" in card
    assert "tags: [wan, image-to-video]" in card
    assert 'sora sample . --prompt "a short description of a video" --image first.png' in card
    lines = card.split("```python\n")[2].split("\n```\n")[0]
    lines = lines.replace('export_to_video(frames, "sample.mp4", fps=8)', "")
    lines = lines.replace("generator=torch.Generator().manual_seed(0),", "latents=noise, output_type='np',")
    clean = types.SimpleNamespace(fix_text=lambda text: text)  # ftfy, which leaves plain ASCII as it is
    monkeypatch.setattr("diffusers.pipelines.wan.pipeline_wan_i2v.ftfy", clean, raising=False)
    run = load_run(folder, "cpu")
    picture = np.random.default_rng(0).integers(0, 256, (run.manifest.height, run.manifest.width, 3), np.uint8)
    noise = torch.randn(sample_shape(run), generator=torch.Generator().manual_seed(0))
    monkeypatch.chdir(out)
    Image.fromarray(picture).save("first.png")
    exec(lines, there := {"noise": noise[None].transpose(1, 2)})
    (ours,) = generate_each(run, run.recipe.validation.prompts, [0], given=[encode_given(run, picture[None])])
    assert np.abs(there["frames"] * 255 - ours).mean() < 0.6


def test_the_card_says_what_the_image_to_video_pipeline_can_not_do(run_of_wan, tmp_path):
    folder = run_of_wan("2.1", conditioning={"frames": 2, "probability": 1.0})
    card = (export(folder, tmp_path / "out") / "README.md").read_text()
    assert card.count("```python") == 1
    assert "pipeline_tag: image-to-video" in card
    assert "the model was trained with 2: to continue a video, use\n  `sora sample . --video start.mp4" in card
    assert "it makes no videos from text alone" in card


def test_an_export_comes_back_bit_for_bit_and_samples_the_same(exported, tmp_path):
    folder, out = exported
    export(folder, tmp_path / "weights", weights_only=True)
    export(out, tmp_path / "again")
    run, whole, alone, again = (load_run(p, "cpu") for p in (folder, out, tmp_path / "weights", tmp_path / "again"))
    assert bits(whole) == bits(alone) == bits(again) == bits(run)
    ask = (["a red circle", PROMPT], [3, 4], Sampling(steps=2, guidance=2.0, sampler="euler"))
    ours = generate(run, *ask)
    assert np.array_equal(ours, generate(whole, *ask))
    assert np.array_equal(ours, generate(alone, *ask))


@pytest.mark.parametrize(
    ("says", "asked"),
    [
        ("diffusion.kind is ddpm", {"diffusion": DiffusionConfig(kind="ddpm"), "validation": {}}),
        ("the VAE is an AutoencoderKL, ", {"vae": "builtin"}),
        ("codec.null_prompt is padded", {"null_prompt": "padded"}),
    ],
)
def test_what_a_wan_pipeline_cannot_hold_is_refused_with_the_reason(says, asked, run_of_wan, tmp_path):
    folder = run_of_wan("2.1", **asked)
    with pytest.raises(UserError, match=rf"can't become a WanPipeline: {says}.* --weights_only"):
        export(folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_card_says_what_differs_from_sora_sample(run_of_wan, tmp_path):
    diffusion = DiffusionConfig(shift=3.0, shift_tokens=48)
    folder = run_of_wan("2.1", diffusion, validation={}, caption_cleaning="lower", max_tokens=20)
    card = (export(folder, tmp_path / "out") / "README.md").read_text()
    assert "`flow_shift` 3; `sora sample . --sampler unipc` takes the same steps" in card  # 2 x 4 x 6 positions
    assert "depends on the size" in card
    assert "write prompts in lower case" in card
    assert "captions were cut at 20 in training" in card
