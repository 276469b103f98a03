"""`sora sample`: files of prompts, names that never cover another video, sizes, formats, and what is refused."""

import json

import pytest
from PIL import Image

from sora_train import cli
from sora_train.errors import RecipeError, UserError
from sora_train.model import ModelConfig
from sora_train.options import SampleOptions
from sora_train.sample import generate, load_run, sample_prompts
from sora_train.sample.command import read_prompts
from sora_train.video import read_mp4

MODEL = ModelConfig(width=32, depth=2, heads=2, text_width=64, sample_size=8)


@pytest.fixture(scope="module")
def folder(run_of):
    return run_of(MODEL)


def made(folder, *prompts, **more) -> list[str]:
    ask = SampleOptions(prompt=prompts, **{"steps": 1, "format": ("mp4",), **more})
    return [file.name for file in sample_prompts(folder, ask)]


def test_a_file_replaces_only_what_was_made_of_the_same(folder, tmp_path):
    out = {"out": str(tmp_path)}
    assert made(folder, "a red circle", **out) == ["a-red-circle-seed0.mp4"]
    first = (tmp_path / "a-red-circle-seed0.mp4").read_bytes()
    assert made(folder, "a red circle", **out) == ["a-red-circle-seed0.mp4"]
    assert (tmp_path / "a-red-circle-seed0.mp4").read_bytes() == first
    assert made(folder, "a red circle", guidance=7.0, **out) == ["a-red-circle-seed0-2.mp4"]
    assert made(folder, "A red circle!", "a red circle", **out) == [
        "a-red-circle-seed0-3.mp4",
        "a-red-circle-seed0.mp4",
    ]
    assert made(folder, "a red circle", weights="raw", **out) == ["a-red-circle-seed0-4.mp4"]
    assert made(folder, "a red circle", format=("gif", "png", "gif"), **out) == [
        "a-red-circle-seed0.gif",
        "a-red-circle-seed0.png",
    ]
    assert (tmp_path / "a-red-circle-seed0.mp4").read_bytes() == first
    entries = {entry["file"]: entry for entry in json.loads((tmp_path / "samples.json").read_text())["samples"]}
    assert {path.name for path in tmp_path.iterdir()} == {*entries, "samples.json"}
    assert entries["a-red-circle-seed0-2.mp4"]["guidance"] == 7.0
    assert entries["a-red-circle-seed0-3.mp4"]["prompt"] == "A red circle!"
    assert entries["a-red-circle-seed0-4.mp4"]["weights"] == "raw"
    assert entries["a-red-circle-seed0.gif"]["sampler"] == "ddim"
    (tmp_path / "samples.json").write_text("{")  # nobody knows any more what made them
    assert made(folder, "a red circle", **out) == ["a-red-circle-seed0-5.mp4"]


def test_a_file_of_prompts_has_one_on_each_line(folder, tmp_path):
    listed = tmp_path / "prompts.txt"
    listed.write_bytes("\ufeffein roter Kreis\r\n\n  a cat \u2028 here \n猫\nein roter Kreis\n".encode())
    assert read_prompts(listed) == ["ein roter Kreis", "a cat \u2028 here", "猫", "ein roter Kreis"]
    assert len(made(folder, "猫", prompts=str(listed), seed=(0, 1, 1), out=str(tmp_path / "out"))) == 3 * 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "can't be read .No such file"),
        (b"\n \n", "has no prompt"),
        (b"good\n\xff\xfe", "is not UTF-8 text in line 2 .byte 0xff.; save it as UTF-8"),
        (b"video_file_name,prompt\na.mp4,a dog\n", "is a table; write the prompts alone to a text file"),
        (b'prompt;"video_file_name"\nx;a.mp4\n', "is a table; write the prompts alone"),
        (b'{"prompt": "a dog"}\n', "is a table; write the prompts alone"),
    ],
)
def test_a_file_of_prompts_that_is_none_is_refused(content, says, folder, tmp_path):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(RecipeError, match=f"--prompts .*prompts.txt {says}"):
        made(folder, prompts=str(tmp_path / "prompts.txt"))


def test_another_size_is_made_with_a_warning_and_one_that_does_not_divide_is_refused(folder, tmp_path, capsys):
    (name,) = made(folder, "a", frames=5, height=64, width=32, out=str(tmp_path))
    assert "was not trained at 5x64x32 (frames x height x width), only at 3x32x48" in capsys.readouterr().err
    assert read_mp4(tmp_path / name).shape == (5, 64, 32, 3)
    made(folder, "a", out=str(tmp_path))
    assert capsys.readouterr().err == ""
    with pytest.raises(RecipeError, match=r"width 40 does not divide by 16 \(VAE 8 x model.patch 2\); use 32 or 48"):
        made(folder, "a", width=40)
    with pytest.raises(RecipeError, match="height 8 does not divide by 16 .*; use 16$"):
        made(folder, "a", height=8)


@pytest.mark.parametrize("frames", [10**11, 10**17])  # no memory anywhere, and no number of bytes
def test_a_video_that_memory_does_not_hold_is_refused(frames, folder):
    with pytest.raises(UserError, match=f"out of memory on cpu with 1 of {frames} x 32 x 48 .*--frames"):
        generate(load_run(folder), ["a"], [0], shape=(frames, 32, 48))


@pytest.mark.parametrize("words", [{"prompt": "a \udcff"}, {"prompt": "a", "negative": "b \udcff"}])
def test_a_prompt_that_is_no_text_is_refused(words, folder, tmp_path):
    with pytest.raises(RecipeError, match=r"the prompt '. .udcff' has bytes that are no UTF-8"):
        made(folder, words["prompt"], negative=words.get("negative"), out=str(tmp_path))


def test_a_png_shows_frames_side_by_side(folder, tmp_path):
    (name,) = made(folder, "a red circle", format=("png",), out=str(tmp_path))
    with Image.open(tmp_path / name) as picture:
        assert picture.width > 3 * 96 * 48 / 32


def test_the_command_line_says_what_is_wrong_in_one_message(folder, tmp_path, capsys):
    one = ["sample", str(folder), "--prompt", "a"]
    for words, says in [
        (one[:2], "--prompt is missing"),
        ([*one, "--sampler", "heun"], "heun does not fit diffusion.kind ddpm; use ddim"),
        ([*one, "--sampler", "best"], "choices: 'auto', 'ddim'"),
        ([*one, "--guidance_interval", "0.5", "0.1"], "--guidance_interval is"),
        ([*one, "--format", "avi"], "'avi'; choices: 'mp4', 'gif' or 'png'"),
        (["export", str(folder)], "takes RUN OUT and flags, but got"),
    ]:
        assert cli.main(words) in (cli.EXIT_FAILED, cli.EXIT_RECIPE)
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
    out = tmp_path / "out"
    assert cli.main(["export", str(folder), str(out), "--weights-only"]) == 0
    assert cli.main(["sample", str(out), "--prompt", "a", "--steps", "1", "--format", "png"]) == 0
    assert (out / "samples" / "prompts" / "a-seed0.png").is_file()
