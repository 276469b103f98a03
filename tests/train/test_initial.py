"""Initial weights that a model can't load are refused by the headers of their files, before anything starts."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sora_train.errors import UserError
from sora_train.launch.init_from import check_initial_weights
from sora_train.model import ModelConfig, build
from sora_train.model.convert import WEIGHTS, save_shards, to_diffusers
from sora_train.recipe import Recipe, save_recipe
from sora_train.train.initial import check_initial, load_initial, make_model
from sora_train.train.weights import save_weights
from sora_train.weight_headers import WeightsError

LATTE = ModelConfig(width=16, depth=2, heads=2, text_width=8, sample_size=4)
WAN = ModelConfig(family="wan", width=16, depth=2, heads=2, in_channels=16, text_width=8, feed_forward=24)


def write(kind: str, folder: Path) -> ModelConfig:
    """Weights of a small model in a folder: of diffusers' class, in one file or shards, or a checkpoint of ours."""
    config = LATTE if kind == "latte" else WAN
    torch.manual_seed(0)
    model = build(config)
    if kind == "checkpoint":
        folder.mkdir()
        save_weights(folder / "ema.safetensors", model.state_dict())
        save_recipe(Recipe.model_validate({"model": asdict(config)}), folder / "recipe.yaml")
        return config
    to_diffusers(model, folder)
    if kind == "shards":
        weights = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        save_shards(weights, folder, most=4000)
    return config


def change(folder: Path, ending: str, to: Tensor | None) -> str:
    """Replaces or removes the first tensor whose name has this ending, in whatever file; returns its name."""
    for file in sorted(folder.glob("*.safetensors")):
        weights = load_file(file)
        for name in sorted(weights):
            if name.endswith(ending):
                rest = {key: tensor for key, tensor in weights.items() if key != name}
                save_file(rest | ({name: to} if to is not None else {}), file)
                return name
    raise AssertionError(f"no tensor ends with {ending}")


@pytest.mark.parametrize("kind", ["latte", "wan", "shards", "checkpoint"])
def test_tensors_that_do_not_fit_are_named_by_headers_alone(kind: str, tmp_path: Path):
    config = write(kind, tmp_path / "w")
    check_initial(config, tmp_path / "w")
    load_initial(build(config), tmp_path / "w")
    table = "blocks.1.table" if kind == "checkpoint" else "blocks.1.scale_shift_table"
    cases = {
        "lacks 1 tensor: ": (".bias", None),
        r"of another shape: {} \[6, 3\] instead of \[(1, )?6, 16\]": (
            table if kind != "latte" else "transformer_blocks.0.scale_shift_table",
            torch.zeros(6, 3),
        ),
        "that are not in F64, F32, F16, BF16: {} F8_E4M3": (
            "fc1.bias" if kind == "checkpoint" else ".0.proj.bias",
            torch.zeros(64 if kind == "latte" else 24, dtype=torch.float8_e4m3fn),
        ),
    }
    for number, (says, (ending, tensor)) in enumerate(cases.items()):
        write(kind, tmp_path / str(number))
        name = change(tmp_path / str(number), ending, tensor)
        with pytest.raises(WeightsError, match=says.format(name)):
            check_initial(config, tmp_path / str(number))
        with pytest.raises(UserError, match="model.init_from: training can't start from"):
            load_initial(build(config), tmp_path / str(number))


def test_a_transposed_matrix_is_refused_though_its_size_fits(tmp_path: Path):
    write("wan", tmp_path)
    name = change(tmp_path, "ffn.net.2.weight", torch.zeros(24, 16))
    with pytest.raises(WeightsError, match=rf"{name} \[24, 16\] instead of \[16, 24\]"):
        check_initial(WAN, tmp_path)


@pytest.mark.parametrize("kind", ["wan", "shards", "checkpoint"])
def test_a_file_that_is_cut_short_or_gone_is_named_with_a_remedy(kind: str, tmp_path: Path):
    config = write(kind, tmp_path / "w")
    recipe = Recipe().model_copy(update={"model": replace(config, init_from=str(tmp_path / "w"))})
    check_initial_weights(recipe)
    file = sorted((tmp_path / "w").glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-10])
    remedy = "Use another checkpoint" if kind == "checkpoint" else "Fetch the weights again"
    with pytest.raises(UserError, match=rf"{file.name} is cut short or not a safetensors file.*\. {remedy}"):
        check_initial_weights(recipe)
    file.unlink()
    with pytest.raises(UserError, match="training can't start from .* is missing"):
        check_initial_weights(recipe)


@pytest.mark.parametrize("kind", ["latte", "wan", "checkpoint"])
def test_a_model_is_made_on_its_device_with_the_weights_alone(kind: str, tmp_path: Path):
    config = replace(write(kind, tmp_path / "w"), init_from=str(tmp_path / "w"))
    expected = build(config)
    load_initial(expected, tmp_path / "w")
    made = make_model(config, torch.device("cpu"), resumed=False).state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.state_dict().items())
    # The meta device stands for a GPU: nothing of the model is in the memory of the CPU.
    there = make_model(config, torch.device("meta"), resumed=False)
    assert all(parameter.is_meta for parameter in there.parameters())
    gone = replace(config, init_from=str(tmp_path / "gone"))  # a resumed run does not need them
    zeros = make_model(gone, torch.device("cpu"), resumed=True)
    assert not any(parameter.any() for parameter in zeros.parameters())
    with pytest.raises(UserError, match="config.json is missing"):
        make_model(gone, torch.device("cpu"), resumed=False)


def test_random_weights_are_those_of_the_seed_on_the_cpu():
    made = []
    for device in ("cpu", "meta"):
        torch.manual_seed(3)
        made.append(make_model(WAN, torch.device(device), resumed=False).state_dict())
    assert all(torch.equal(made[1][name], tensor) for name, tensor in made[0].items())
