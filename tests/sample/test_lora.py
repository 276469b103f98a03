"""`sora sample --lora` of a released pipeline: weights multiply, files add up, and what was added is recorded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from wan_models import make_wan_pipeline

from sora_train.cli import main
from sora_train.errors import RecipeError
from sora_train.lora.files import DIFFUSERS_FILE, write_lora
from sora_train.sample import load_run
from sora_train.sample.lora import LoraFile, parse_lora
from tests.lora.test_files import adapter_of


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> tuple[Path, Path]:
    """A released pipeline, and a folder of adapters for it."""
    base, out = make_wan_pipeline(tmp_path_factory.mktemp("base"), "2.1"), tmp_path_factory.mktemp("adapters")
    config = load_run(base, "cpu").recipe.model
    write_lora(out, adapter_of(config, scale=1.5), config, "tiny")
    return base, out


def test_weights_multiply_and_files_add_up(wan):
    base, out = wan
    plain, once = (load_run(base, "cpu", lora=lora).model.state_dict() for lora in ((), parse_lora([str(out)])))
    words = [f"{out}:0.7", f"{out / DIFFUSERS_FILE}:-1.5", f"{out / 'tiny_comfyui.safetensors'}"]
    several = load_run(base, "cpu", lora=parse_lora(words)).model.state_dict()
    for name, tensor in several.items():
        torch.testing.assert_close(tensor - plain[name], 0.2 * (once[name] - plain[name]), rtol=1e-4, atol=1e-6)


def test_the_command_lists_what_made_each_file(wan, tmp_path, capsys):
    base, out = wan
    size = [
        "--frames",
        "5",
        "--height",
        "32",
        "--width",
        "48",
        "--steps",
        "1",
        "--format",
        "mp4",
        "--out",
        str(tmp_path),
    ]
    for word in (str(out), f"{out}:0.5", f"{out}:0.5"):
        assert main(["sample", str(base), "--prompt", "a cat", *size, "--lora", word]) == 0
    listing = json.loads((tmp_path / "samples.json").read_text())["samples"]
    assert [(entry["file"], [file["weight"] for file in entry["lora"]]) for entry in listing] == [
        ("a-cat-seed0.mp4", [1.0]),
        ("a-cat-seed0-2.mp4", [0.5]),
    ]
    assert listing[0]["lora"][0]["file"] == str(out / DIFFUSERS_FILE)
    assert "adapters of 20 layers, rank 3, weight 0.5" in capsys.readouterr().out
    assert main(["sample", str(base), "--prompt", "a cat", *size, "--lora", str(tmp_path / "none.safetensors")]) == 1
    assert "none.safetensors does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["nan", "inf", "'abc'", "''"])
def test_a_weight_must_be_a_finite_number(word, wan):
    with pytest.raises(RecipeError, match=f"the weight is {word}"):
        parse_lora([f"{wan[1]}:{word.strip(chr(39))}"])


def test_a_colon_in_a_files_name_is_no_weight(wan, tmp_path):
    file = tmp_path / "style:2"
    shutil.copyfile(wan[1] / DIFFUSERS_FILE, file)
    assert parse_lora([str(file)]) == (LoraFile(file, 1.0),)
    assert parse_lora([f"{file}:2"]) == (LoraFile(file, 2.0),)
