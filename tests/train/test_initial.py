"""Initial weights that a model can't load are refused by the headers of their files, before anything starts."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sora_train.errors import UserError
from sora_train.launch.init_from import check_initial_weights
from sora_train.model import ModelConfig, build
from sora_train.model.convert import WEIGHTS, from_diffusers, save_shards, to_diffusers
from sora_train.plan.states import drawn_bytes, parameter_counts
from sora_train.recipe import Recipe, save_recipe
from sora_train.train.config import TrainConfig
from sora_train.train.initial import check_initial, load_initial, make_model
from sora_train.train.placement import DrawnShares, Weights
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
def test_a_model_is_made_without_memory_until_its_weights_are_read(kind: str, tmp_path: Path):
    config = replace(write(kind, tmp_path / "w"), init_from=str(tmp_path / "w"))
    expected = build(config)
    load_initial(expected, tmp_path / "w")
    model, weights = make_model(config, 0, 1, resumed=False)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(torch.equal(weights.read[name](), tensor) for name, tensor in expected.state_dict().items())
    assert not weights.drawn
    gone = replace(config, init_from=str(tmp_path / "gone"))  # a resumed run does not need them
    assert make_model(gone, 0, 1, resumed=True)[1] == Weights()
    with pytest.raises(UserError, match="config.json is missing"):
        make_model(gone, 0, 1, resumed=False)


KINDS = {"factorised": {}, "joint": {"attention": "joint", "pooled_text": True}, "wan": asdict(WAN)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_the_shares_of_random_weights_are_parts_of_those_of_build(kind: str, world: int):
    config = replace(LATTE, **KINDS[kind])
    torch.manual_seed(3)
    expected, after = dict(build(config).named_parameters()), torch.rand(4)
    ranks = []
    for rank in range(world):
        torch.manual_seed(3)
        ranks.append(make_model(config, rank, world, resumed=False))
        assert torch.equal(torch.rand(4), after)  # the generator is where it would be
    named = [dict(model.named_parameters()) for model, _ in ranks]
    for name, parameter in expected.items():
        parts = [weights.drawn.get(own[name]) for own, (_, weights) in zip(named, ranks, strict=True)]
        drawn = [part for part in parts if part is not None]
        assert torch.equal(torch.cat(drawn) if drawn else named[0][name].flatten(), parameter.flatten()), name
        assert all(len(part) <= -(-parameter.numel() // world) for part in drawn)


def test_of_weights_that_deepspeed_broadcasts_only_rank_0_has_any():
    drawn = [make_model(LATTE, rank, 1, resumed=False)[1].drawn for rank in range(2)]
    assert all(len(share) for share in drawn[0].values())
    assert not any(len(share) for share in drawn[1].values())


def test_initial_weights_by_another_operation_are_an_error():
    layer = torch.nn.Linear(2, 2, device="meta")
    with DrawnShares(layer, 0, 1), pytest.raises(NotImplementedError, match="exponential"):
        layer.weight.data.exponential_()


LARGER = replace(ranks.MODEL, width=256, depth=4, heads=4)
STARTS = [(3, "fp32", "random"), (3, "bf16", "random"), (1, "fp32", "random"), (0, "bf16", "random"),
          (3, "bf16", "files"), (2, "bf16", "files")]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of LARGER in diffusers' format."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("files")
    to_diffusers(build(LARGER), folder)
    return folder


@pytest.fixture(scope="module")
def began(start, files: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `WORLD_STAGE_PRECISION_SOURCE`, by the engines that began with random weights or those of `files`."""
    root, damaged, ends = tmp_path_factory.mktemp("began"), tmp_path_factory.mktemp("damaged"), []
    shutil.copytree(files, damaged, dirs_exist_ok=True)
    change(damaged, "proj_out.bias", torch.full((16,), torch.inf))
    for world in (2, 4):

        def task(name: str, init_from: Path | str, stage: int = 3, precision: str = "fp32", world: int = world) -> dict:
            model = {"width": 256, "depth": 4, "heads": 4, "init_from": str(init_from)}
            train = {"zero_stage": stage, "precision": precision, "batch_size": world}
            return {"out": str(root / f"{world}_{name}"), "act": "begin", "model": model, "train": train}

        tasks = [
            task(f"{stage}_{precision}_{source}", files if source == "files" else "", stage, precision)
            for stage, precision, source in STARTS
        ]
        (root / f"{world}_damaged").mkdir()
        ends.append(start(world, tiny_shards, [*tasks, task("damaged", damaged) | {"refused": True}]))
    for end in ends:
        codes, output = end()
        assert not any(codes), "\n".join(output)
    return root


def figures(began: Path, world: int, name: str) -> list[dict]:
    return [json.loads((began / f"{world}_{name}/figures_{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("stage", "precision", "source"), STARTS)
def test_an_engine_begins_with_the_same_weights_at_every_stage(
    began: Path, files: Path, world: int, stage: int, precision: str, source: str
):
    torch.manual_seed(TrainConfig().seed)
    model = from_diffusers(files) if source == "files" else build(LARGER)
    made = load_file(began / f"{world}_{stage}_{precision}_{source}" / "weights.safetensors")
    rounded = stage and precision == "bf16"  # DeepSpeed makes the masters of the bfloat16 weights
    for name, tensor in model.state_dict().items():
        assert torch.equal(made[name], tensor.bfloat16().float() if rounded else tensor), name


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_memory_for_random_weights_is_a_share_and_a_parameter_as_planned(began: Path, world: int, precision: str):
    counts, planned = parameter_counts(LARGER).trained, drawn_bytes(LARGER, world)
    number = 2 if precision == "bf16" else 4
    parted = number * (sum(counts) / world + max(counts))  # on the device, which is the CPU here
    for each in figures(began, world, f"3_{precision}_random"):
        assert each["drawn"] == pytest.approx(planned, rel=0.05)
        assert each["placed"] == pytest.approx(planned - 4 * max(counts) + parted, abs=number * max(counts))


@pytest.mark.parametrize("world", [2, 4])
def test_the_memory_for_weights_of_files_is_a_share_and_a_parameter(began: Path, files: Path, world: int):
    """Of a parameter, rank 0 also has two copies as it is in the file, and whether each number is finite."""
    counts, mapped = parameter_counts(LARGER).trained, (files / WEIGHTS).stat().st_size
    parted, late = 2 * (sum(counts) / world + max(counts)), 2 * max(counts)  # gloo may free one late
    first, *others = (each["placed"] - mapped for each in figures(began, world, "3_bf16_files"))
    assert all(most == pytest.approx(parted, abs=late) for most in others)
    assert first < parted + 9 * max(counts) + late


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("stage", [2, 3])
def test_weights_are_read_once_and_by_one_rank(began: Path, files: Path, world: int, stage: int):
    reads = [each["reads"] for each in figures(began, world, f"{stage}_bf16_files")]
    assert reads == [len(parameter_counts(LARGER).trained), *[0] * (world - 1)]


@pytest.mark.parametrize("world", [2, 4])
def test_damage_that_rank_0_finds_ends_every_rank_with_its_message(began: Path, world: int):
    said = {(began / f"{world}_damaged" / f"refused_{rank}.txt").read_text() for rank in range(world)}
    assert len(said) == 1
    assert "proj_out.bias has values that are not finite" in said.pop()
