"""Training of adapters is as exact as training of all weights, and leaves the base alone."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import ranks
import torch
from reading import KINDS, at_step, checkpoint_at, distance, losses, parts
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sora_train.lora.adapters import adapter_state, add_adapters
from sora_train.lora.config import LoraConfig
from sora_train.model import build
from sora_train.model.convert import from_diffusers, to_diffusers
from sora_train.train.frozen_base import base_hash, check_base

LAST, HELD = 6, 3
SETTINGS = {
    "steps": LAST,
    "batch_size": 4,
    "micro_batch_size": 1,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "log_every": 1,
    "checkpoint_every": HELD,
    "ema_decay": 0.5,
}
LORA = {"rank": 3, "alpha": 6, "targets": ["to_q", "to_k", "to_v", "to_out", "ff"]}
ADAPTERS = LoraConfig(**LORA)
MODES = ("none", "selective", "full", "selective")
"""Activation checkpointing by ZeRO stage, of runs with a base in 8 bits. Those that go on from them have none."""


@pytest.fixture(scope="module")
def bases(alive: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of weights by kind of model, none of which is zero."""
    torch.manual_seed(6)
    model = build(ranks.replace(ranks.MODEL, **ranks.WAN))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("alive_wan")
    to_diffusers(model, folder)
    return {"latte": alive, "wan": str(folder)}


@pytest.fixture(scope="module")
def runs(start, bases: dict[str, str], tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders by name, of two ranks at stage S; NAME_again goes on from HELD, and AtoB_on1 on one rank at stage B."""
    root = tmp_path_factory.mktemp("runs")

    def task(
        out: str, stage: int, resume: str | None = None, kind: str = "latte", base: str = "auto", **changes
    ) -> dict:
        train = SETTINGS | {"zero_stage": stage} | changes
        lora = LORA | {"base_precision": base}
        made = {"out": str(root / out), "train": train, "init_from": bases[kind], "lora": lora}
        made |= {"model": ranks.WAN} if kind == "wan" else {}
        return made | {"resume": resume and str(checkpoint_at(root / resume, HELD))}

    def act(act: str, name: str, stage: int, kind: str = "latte", base: str = "auto", **changes) -> dict:
        train = SETTINGS | {"zero_stage": stage, "lora": LORA | {"base_precision": base}} | changes
        made = {"out": str(root / name), "train": train, "act": act}
        return made | ({"model": ranks.WAN} if kind == "wan" else {})

    def tasks(stage: int) -> list[dict]:
        made = [task(f"zero{stage}", stage), task(f"zero{stage}_again", stage, f"zero{stage}")]
        made += [task(f"bf16_{stage}", stage, precision="bf16")]
        made += [task(f"bf16_{stage}_again", stage, f"bf16_{stage}", precision="bf16")]
        made += [task(f"{mode}{stage}", stage, activation_checkpointing=mode) for mode in ("selective", "full")]
        made += [task(f"wan{stage}", stage, kind="wan"), act("leave_the_base", f"left{stage}", stage)]
        made += [act("leave_the_base", f"left_wan{stage}", stage, "wan", precision="bf16")]
        made += [task(f"int8_{stage}", stage, base="int8", precision="bf16", activation_checkpointing=MODES[stage])]
        made += [task(f"int8_{stage}_again", stage, f"int8_{stage}", base="int8", precision="bf16")]
        made += [act("leave_the_base", f"left_int8{stage}", stage, "wan", "int8", precision="bf16")]
        return [*made, act("refuse_a_step", f"refused{stage}", stage)]

    for first in (0, 2):
        finished([start(2, tiny_shards, tasks(first) + tasks(first + 1))])
    one = [task("one", 0, micro_batch_size=4), task("wan_one", 0, kind="wan", micro_batch_size=4)]
    other = [task("0to2_on1", 2, "zero0"), task("3to1_on1", 1, "zero3"), task("1to3_on1", 3, "zero1")]
    finished([start(1, tiny_shards, one + other)])
    return root


def finished(ends: list) -> None:
    for end in ends:
        codes, output = end()
        assert not any(codes), "\n".join(output)


def with_signal(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without queries and keys of cross-attention. Nearly all of Wan's text tokens are zeros, so their true gradients
    are nearly zero, and Adam makes steps of mere rounding.
    """
    weak = ("text_attention.q.", "text_attention.kv.k.")
    return {name: tensor for name, tensor in tensors.items() if not any(part in name for part in weak)}


def agree(run: Path, other: Path, *, since: int = 0, within: float = 1e-6) -> None:
    """Losses and all that a checkpoint holds agree, to rounding."""
    assert losses(run) == pytest.approx({s: loss for s, loss in losses(other).items() if s > since}, rel=1e-6)
    for kind in KINDS:
        tensors, expected = at_step(run, LAST, kind), at_step(other, LAST, kind)
        assert distance(with_signal(tensors), with_signal(expected)) < within
        assert distance(tensors, expected) < 1e-4


@pytest.mark.parametrize("stage", range(4))
def test_every_stage_on_two_ranks_equals_one_rank_and_one_micro_batch(runs: Path, stage: int):
    agree(runs / f"zero{stage}", runs / "one")


@pytest.mark.parametrize("stage", range(4))
def test_wan_is_cut_as_exactly_but_for_adapters_without_signal(runs: Path, stage: int):
    """Rounding of those (`with_signal`) reaches the others: 1.5e-6 of their moments."""
    agree(runs / f"wan{stage}", runs / "wan_one", within=5e-6)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", ["zero{}", "bf16_{}", "int8_{}"])
def test_a_resumed_run_goes_on_bit_for_bit(runs: Path, name: str, stage: int):
    unbroken, again = (runs / each.format(stage) for each in (name, f"{name}_again"))
    assert losses(again) == {step: loss for step, loss in losses(unbroken).items() if step > HELD}
    for kind in KINDS:
        assert distance(at_step(again, LAST, kind), at_step(unbroken, LAST, kind)) == 0


@pytest.mark.parametrize(("a", "b"), [(0, 2), (3, 1), (1, 3)])
def test_one_rank_at_another_stage_goes_on_as_two_would_have(runs: Path, a: int, b: int):
    agree(runs / f"{a}to{b}_on1", runs / f"zero{a}", since=HELD)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activations_that_are_computed_again_change_nothing(runs: Path, stage: int, mode: str):
    agree(runs / f"{mode}{stage}", runs / f"zero{stage}")


@pytest.mark.parametrize("stage", range(4))
def test_bf16_and_an_int8_base_stay_near_float32(runs: Path, stage: int):
    assert losses(runs / f"bf16_{stage}") == pytest.approx(losses(runs / "one"), rel=0.02)
    assert losses(runs / f"int8_{stage}") == pytest.approx(losses(runs / "one"), rel=0.02)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(
    ("name", "dtypes"),
    [("left", ["torch.float32"]), ("left_wan", ["torch.bfloat16"]), ("left_int8", ["torch.bfloat16", "torch.int8"])],
)
def test_frozen_weights_never_change(runs: Path, name: str, dtypes: list[str], stage: int):
    told = json.loads((runs / f"{name}{stage}/told.json").read_text())
    (frozen, adapters), (frozen_after, adapters_after) = told["before"], told["after"]
    assert frozen == frozen_after
    assert adapters != adapters_after
    assert told["dtypes"] == dtypes
    assert told["gradients"] == []


@pytest.mark.parametrize("stage", range(4))
def test_a_step_that_the_guard_refuses_leaves_no_trace(runs: Path, stage: int):
    folder = runs / f"refused{stage}"
    for kind in KINDS:
        for made, wanted in (("refused", "before"), ("then", "alone")):
            tensors, expected = parts(folder / made, kind), parts(folder / wanted, kind)
            assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert distance(parts(folder / "then"), parts(folder / "before")) > 0


@pytest.mark.parametrize("stage", range(4))
def test_a_checkpoint_holds_adapters_alone_and_names_its_base(runs: Path, bases: dict[str, str], stage: int):
    model = build(ranks.MODEL)
    add_adapters(model, ADAPTERS)
    wanted = {name: list(tensor.shape) for name, tensor in adapter_state(model).items()}
    folder = checkpoint_at(runs / f"zero{stage}", LAST)
    assert at_step(runs / f"zero{stage}", LAST).keys() == wanted.keys()
    with safe_open(folder / "ema.safetensors", "pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == wanted  # noqa: SIM118
    about = json.loads((folder / "state.json").read_text())
    assert (about["base"], about["base_from"]) == (base_hash(Path(bases["latte"])), bases["latte"])


def test_adapters_start_from_a_file_scaled_to_their_alpha(
    start, runs: Path, bases: dict[str, str], tiny_shards: Path, tmp_path: Path
):
    """With twice the file's alpha and half of B the product is the same; the first loss says so."""
    first = checkpoint_at(runs / "zero0", HELD)
    settings = SETTINGS | {"steps": 1, "batch_size": 16, "micro_batch_size": 16, "zero_stage": 0}
    same, doubled = tmp_path / "same.safetensors", tmp_path / "doubled.safetensors"
    tensors = load_file(first / "ema.safetensors")
    save_file(tensors, same)
    save_file({name: t / 2 if "lora_B" in name else t for name, t in tensors.items()}, doubled)
    tasks = []
    for name, file, alpha in (("same", same, 3), ("doubled", doubled, 6)):
        alphas = {n.replace("lora_A.weight", "alpha"): torch.tensor(float(alpha)) for n in tensors if "lora_A" in n}
        save_file(load_file(file) | alphas, file)
        lora = LORA | {"init_from": str(file)}
        tasks.append({"out": str(tmp_path / name), "train": settings, "init_from": bases["latte"], "lora": lora})
    tasks.append({"out": str(tmp_path / "new"), "train": settings, "init_from": bases["latte"], "lora": LORA})
    finished([start(1, tiny_shards, tasks)])
    found = [losses(tmp_path / name)[1] for name in ("same", "doubled", "new")]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] != pytest.approx(found[2], rel=1e-6)


def test_another_base_is_refused_on_every_rank(
    start, runs: Path, bases: dict[str, str], tiny_shards: Path, tmp_path: Path
):
    model = from_diffusers(bases["latte"])
    with torch.no_grad():
        model.patch_out.bias += 1e-3
    to_diffusers(model, tmp_path / "other")
    task = {"out": str(tmp_path / "run"), "train": SETTINGS, "lora": LORA, "refused": True}
    task |= {"init_from": str(tmp_path / "other"), "resume": str(checkpoint_at(runs / "zero1", HELD))}
    finished([start(2, tiny_shards, [task])])
    for rank in range(2):
        said = (tmp_path / f"run/refused_{rank}.txt").read_text()
        assert "the adapters were trained on other weights: " in said
        for folder in (bases["latte"], str(tmp_path / "other")):
            assert folder in said
            assert base_hash(Path(folder))[:12] in said


def test_an_image_model_is_no_base(tmp_path: Path):
    for name, refused in (("PixArtTransformer2DModel", True), ("LatteTransformer3DModel", False)):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(ValueError, match="it is an image model") if refused else nullcontext():
            check_base(tmp_path)
