"""`sora sample --image` and `--video`: the samples begin with the given frames, and depend on them."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from data_prep.given import read_given
from data_prep.schemas import DECODED
from data_prep.stages import EncodeVideo
from sora_train import cli
from sora_train.errors import UserError
from sora_train.model import ModelConfig
from sora_train.options import SampleOptions
from sora_train.sample import generate_each, load_run, sample_prompts
from sora_train.sample.condition import encode_given
from sora_train.sample.generate import sample_shape
from sora_train.video import psnr, read_mp4, write_mp4

JOINT = ModelConfig(width=16, depth=2, heads=2, text_width=64, sample_size=8, attention="joint")
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def run_folder(make_run) -> Path:
    return make_run(JOINT, 0.4, conditioning={"frames": 1, "probability": 0.5})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    """Three images of 3 x 64 pixels more than the samples' shape."""
    folder = tmp_path_factory.mktemp("images")
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 8, 3), np.uint8)
    for i, picture in enumerate(coarse.repeat(16, 1).repeat(16, 2)):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(3)]


def sampled(folder: Path, out: Path, **ask) -> list[dict]:
    """The entries of samples.json after `sora sample`, of mp4 files alone."""
    asked = {"prompt": (PROMPT,), "format": ("mp4",), "out": str(out), **ask}
    sample_prompts(folder, SampleOptions(**asked), read_given)
    return json.loads((out / "samples.json").read_text())["samples"]


def test_a_sample_begins_with_the_image_and_changes_with_it(run_folder, pictures, tmp_path):
    run = load_run(run_folder)
    given = [encode_given(run, read_given([name], "--image", (1, 16, 32), 8.0)[0].frames) for name in pictures[:2]]
    none, first, second, again = generate_each(run, [PROMPT] * 4, [0] * 4, given=[None, *given, given[0]])
    np.testing.assert_array_equal(first, again)
    decoded = run.vae.decode(run.vae.denormalise(given[0])[None])[0, 0].numpy()
    np.testing.assert_array_equal(first[0], decoded)
    for other in (none, second):  # later frames too: the model attends to the given one
        assert np.abs(first[1:].astype(int) - other[1:].astype(int)).mean() > 1
    (entry,) = sampled(run_folder, tmp_path, image=(pictures[0],))
    assert psnr(read_mp4(tmp_path / entry["file"]), first) > 20


def test_latents_of_a_given_image_are_those_of_prep(run_folder, pictures):
    run = load_run(run_folder)
    (given,) = read_given(pictures[:1], "--image", (1, 16, 32), 8.0)
    row = {"row_id": "r", "source": "a", "source_size": 1, "source_version": "", "sample_id": "s", "captions": ["x"]}
    row |= {"start_s": 0.0, "end_s": 0.0, "content_hash": "", "perceptual_hash": "", "asked": [], "bucket": "1x16x32"}
    row |= dict.fromkeys(("reason", "message", "remark", "note"), "") | {"frames": given.frames.tobytes()}
    stage = EncodeVideo(run.recipe.codec.model_copy(update={"precision": "fp32"}), 1, "cpu")
    (made,) = stage(pa.Table.from_pylist([row], DECODED)).to_pylist()
    raw = torch.frombuffer(bytearray(made["latents"]), dtype=torch.float32).reshape(2, 1, 4, 8, 16)[0]
    assert torch.equal(encode_given(run, given.frames), run.vae.normalise(raw))


def test_the_fitted_image_and_the_originals_hash_are_recorded(run_folder, pictures, tmp_path):
    (entry,) = sampled(run_folder, tmp_path, image=(pictures[0],))
    (given,) = read_given(pictures[:1], "--image", (1, 16, 32), 8.0)
    assert entry["given"] == {"file": given.file_name, "sha256": given.sha256, "frames": 1}
    assert len(given.sha256) == 64
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / given.file_name)), given.frames[0])
    same = Path(pictures[0]).rename(tmp_path / "other name\n.png")
    assert [each["file"] for each in sampled(run_folder, tmp_path, image=(str(same),))] == [entry["file"]]
    same.rename(pictures[0])
    files = [each["file"] for each in sampled(run_folder, tmp_path, image=(pictures[1],))]
    files = [each["file"] for each in sampled(run_folder, tmp_path)] and files
    assert files == ["a-red-circle-seed0.mp4", "a-red-circle-seed0-2.mp4"]
    listed = {each["file"]: each.get("given", {}).get("sha256") for each in sampled(run_folder, tmp_path)}
    assert len(set(listed.values())) == 3  # with either image, and without


def test_prompts_and_images_pair_up(run_folder, pictures, tmp_path):
    def pairs(name: str, **ask) -> list[tuple[str, str]]:
        entries = sampled(run_folder, tmp_path / name, **ask)
        return [(entry["prompt"], entry["given"]["file"]) for entry in entries]

    files = [each.file_name for each in read_given(pictures, "--image", (1, 16, 32), 8.0)]
    prompts = ("a", "b", "c")
    assert pairs("each", prompt=prompts, image=tuple(pictures)) == list(zip(prompts, files, strict=True))
    assert pairs("one image", prompt=prompts, image=(pictures[0],)) == [(prompt, files[0]) for prompt in prompts]
    assert pairs("one prompt", image=tuple(pictures)) == [(PROMPT, file) for file in files]
    repeated = pairs("repeated", prompt=("a", "a", "a"), image=(pictures[0], pictures[1], pictures[0]))
    assert repeated == [("a", files[0]), ("a", files[1])]
    with pytest.raises(UserError, match="--image names 2 files for 3 prompts. Name one for all, or one for each"):
        sampled(run_folder, tmp_path, prompt=prompts, image=tuple(pictures[:2]))


def test_a_video_gives_as_many_frames_as_the_model_was_trained_with(make_run, pictures, tmp_path, capsys):
    folder = make_run(JOINT, conditioning={"frames": 2, "probability": 1.0})
    frames = np.random.default_rng(1).integers(0, 256, (9, 4, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    write_mp4(tmp_path / "start.mp4", frames, 8, crf=0)
    (entry,) = sampled(folder, tmp_path / "out", video=(str(tmp_path / "start.mp4"),))
    (given,) = read_given([str(tmp_path / "start.mp4")], "--video", (2, 16, 32), 8.0)
    assert entry["given"] == {"file": given.file_name, "sha256": given.sha256, "frames": 2}
    assert Image.open(tmp_path / "out" / given.file_name).size == (64, 16)
    assert "was trained with 2" not in capsys.readouterr().err
    sampled(folder, tmp_path / "out", image=(pictures[0],))
    assert "--image gives 1 latent frame, and the model was trained with 2" in capsys.readouterr().err


def test_what_cannot_begin_with_an_image_is_refused_with_the_reason(run_folder, make_run, pictures, tmp_path, capsys):
    image = (pictures[0],)
    plain = make_run()
    with pytest.raises(UserError, match=r"can't continue given frames: it was trained with conditioning.probability 0"):
        sampled(plain, tmp_path, image=image)
    with pytest.raises(
        UserError, match=r"text_and_frames needs .* was trained with conditioning.probability 0. Use text"
    ):
        sampled(plain, tmp_path, guidance_without="text_and_frames")
    with pytest.raises(UserError, match="--image and --video are two beginnings of one video"):
        sampled(run_folder, tmp_path, image=image, video=image)
    with pytest.raises(UserError, match=r"1 latent frame would be given, and a video of 1 frame has 1: .* 2 frames or"):
        sampled(run_folder, tmp_path, image=image, frames=1)
    capsys.readouterr()
    assert cli.main(["sample", str(run_folder), "--prompt", "a", "--image", str(tmp_path / "nowhere.png")]) == 1
    said = capsys.readouterr().err
    assert said.endswith("nowhere.png: there is no such file (error code: media)\n")
    assert "Traceback" not in said


def test_videos_with_and_without_given_frames_are_made_side_by_side(run_folder):
    run, g = load_run(run_folder, "cpu"), torch.Generator().manual_seed(0)
    (_, c, h, w), prompts = sample_shape(run), ["a", "b", "c", "d", "e"]
    given = [None, *(torch.randn(k, c, h, w, generator=g) for k in (1, 1, 2)), None]
    together = list(generate_each(run, prompts, range(5), given=given))
    for i, prompt in enumerate(prompts):
        (alone,) = generate_each(run, [prompt], [i], given=given[i : i + 1])
        assert np.abs(together[i].astype(int) - alone).max() <= 1
        (plain,) = generate_each(run, [prompt], [i])
        assert (np.abs(together[i].astype(int) - plain).max() <= 1) == (given[i] is None)
    with pytest.raises(ValueError, match="for each prompt"):
        next(generate_each(run, prompts, range(5), given=given[:3]))
