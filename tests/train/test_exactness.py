"""What exact means (docs/design.md, section 6): cutting the work otherwise changes nothing but the order of sums.

The runs are made once, by groups of processes; the tests read what these left on disk, with no code of the engine.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sora_train.model import Latte, ModelConfig
from sora_train.model.convert import from_diffusers, to_diffusers

HERE = Path(__file__).parent
SETTINGS = {
    "steps": 7,  # an epoch of 21 clips ends with a batch of one in step 6
    "batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 1e-4,
    "log_every": 1,
    "checkpoint_every": 1,
    "ema_decay": 0.5,
}


def start(world: int, shards: Path, store: Path, tasks: list[dict]) -> list[subprocess.Popen]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py"), str(rank), str(world), str(store), str(shards), json.dumps(tasks)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


@pytest.fixture(scope="module")
def runs(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs by name: `1x4`, `4x1`, `zero0` to `zero3` on two ranks, and resumed ones."""
    root = tmp_path_factory.mktemp("runs")

    def task(out: str, resume: str | None = None, **changes) -> dict:
        return {
            "out": str(root / out),
            "train": SETTINGS | changes,
            "resume": resume and str(root / resume / "step_00000003"),
        }

    two = [task(f"zero{stage}", zero_stage=stage) for stage in (0, 1, 2)]
    two += [task("zero0_again", "zero0", zero_stage=0), task("zero2_again", "zero2", zero_stage=2)]
    two += [task("bf16", zero_stage=2, precision="bf16", steps=3)]
    two += [task("no_ema", zero_stage=2, ema_decay=0.0, steps=2)]
    two += [task("no_clip", zero_stage=0, gradient_clip=0.0, steps=2)]
    # Stage 3 last: it leaves its own linear function in torch, which sums the gradients of biases in another order.
    two += [task("zero3", zero_stage=3), task("zero3_again", "zero3", zero_stage=3)]
    two += [task("zero1_to_3", "zero1", zero_stage=3)]
    one = [task("1x4", micro_batch_size=4), task("4x1", micro_batch_size=1), task("zero2_clip", gradient_clip=0.1)]
    processes = start(2, tiny_shards, root / "store2", two) + start(1, tiny_shards, root / "store1", one)
    output = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(output)
    one = [task("two_to_one", "zero3", zero_stage=1), task("zero0_clip", zero_stage=0, gradient_clip=0.1)]
    torch.manual_seed(5)
    to_diffusers(Latte(ModelConfig(width=16, depth=2, heads=2, text_width=64, sample_size=4)), root / "start")
    one += [task("started", steps=1, learning_rate=1e-12) | {"init_from": str(root / "start")}]
    (process,) = start(1, tiny_shards, root / "store3", one)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    return root


def parts(folder: Path, kind: str = "weights") -> dict[str, torch.Tensor]:
    """Whole flat tensors of one kind, put together from the ranks' files."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in folder.glob("part_*"):
        with safe_open(path, "pt") as file:
            for name, offset in json.loads(file.metadata()["offsets"]).items():
                pieces.setdefault(name, []).append((offset, file.get_tensor(f"{kind}/{name}")))
    for found in pieces.values():
        found.sort(key=lambda piece: piece[0])
        assert [offset for offset, _ in found] == [sum(len(t) for _, t in found[:i]) for i in range(len(found))]
    return {name: torch.cat([tensor for _, tensor in found]) for name, found in pieces.items()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """‖a - b‖ ÷ ‖b‖ over all parameters."""
    assert a.keys() == b.keys()
    both = [torch.cat([x[name].flatten().double() for name in sorted(a)]) for x in (a, b)]
    return float((both[0] - both[1]).norm() / both[1].norm())


def losses(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


def test_four_micro_batches_of_one_equal_one_of_four(runs: Path):
    assert distance(parts(runs / "4x1/step_00000005"), parts(runs / "1x4/step_00000005")) < 1e-6
    assert losses(runs / "4x1") == pytest.approx(losses(runs / "1x4"), rel=1e-6)


@pytest.mark.parametrize("stage", range(4))
def test_every_zero_stage_on_two_ranks_equals_one_rank(runs: Path, stage: int):
    assert distance(parts(runs / f"zero{stage}/step_00000005"), parts(runs / "1x4/step_00000005")) < 1e-6
    assert losses(runs / f"zero{stage}") == pytest.approx(losses(runs / "1x4"), rel=1e-6)


@pytest.mark.parametrize("stage", range(4))
def test_the_ema_is_a_dense_one_in_float64_to_float32_precision(runs: Path, stage: int):
    torch.manual_seed(0)
    dense = {name: p.detach().double().flatten() for name, p in Latte(ranks_model()).named_parameters()}
    for step in range(SETTINGS["steps"]):
        decay = min(SETTINGS["ema_decay"], (1 + step) / (10 + step))
        weights = parts(runs / f"zero{stage}/step_{step + 1:08d}")
        dense = {name: decay * old + (1 - decay) * weights[name].double() for name, old in dense.items()}
    saved = load_file(runs / f"zero{stage}/step_{SETTINGS['steps']:08d}/ema.safetensors")
    for name, expected in dense.items():
        torch.testing.assert_close(saved[name].flatten().double(), expected, rtol=5e-7, atol=1e-7)


def ranks_model():
    sys.path.insert(0, str(HERE))
    try:
        from ranks import MODEL
    finally:
        sys.path.remove(str(HERE))
    return MODEL


def test_without_decay_the_ema_is_the_weights(runs: Path):
    folder = runs / "no_ema/step_00000002"
    assert distance(load_file(folder / "ema.safetensors"), load_weights_like(folder)) == 0


def load_weights_like(folder: Path) -> dict[str, torch.Tensor]:
    weights, shapes = parts(folder), load_file(folder / "ema.safetensors")
    return {name: weights[name].view_as(shapes[name]) for name in shapes}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_run_repeats_the_losses_of_an_unbroken_one_bit_for_bit(runs: Path, stage: int):
    again, unbroken = losses(runs / f"zero{stage}_again"), losses(runs / f"zero{stage}")
    assert again == {step: loss for step, loss in unbroken.items() if step > 3}
    for kind in ("weights", "exp_avg", "exp_avg_sq", "ema"):
        last = f"step_{SETTINGS['steps']:08d}"
        assert distance(parts(runs / f"zero{stage}_again" / last, kind), parts(runs / f"zero{stage}" / last, kind)) == 0


@pytest.mark.parametrize("name", ["zero1_to_3", "two_to_one"])
def test_a_checkpoint_is_read_at_another_stage_or_world_size(runs: Path, name: str):
    unbroken = losses(runs / "1x4")
    assert losses(runs / name) == pytest.approx({step: loss for step, loss in unbroken.items() if step > 3}, rel=1e-6)
    last = f"step_{SETTINGS['steps']:08d}"
    assert distance(parts(runs / name / last, "ema"), parts(runs / "1x4" / last, "ema")) < 1e-6


def test_bf16_keeps_float32_masters_and_stays_near_float32(runs: Path):
    assert losses(runs / "bf16")[3] == pytest.approx(losses(runs / "1x4")[3], rel=0.02)
    weights = parts(runs / "bf16/step_00000003")
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert any((w != w.bfloat16().float()).any() for w in weights.values())


def test_stage_0_clips_and_measures_the_gradient_as_deepspeed_does_in_the_others(runs: Path):
    assert distance(parts(runs / "zero0_clip/step_00000005"), parts(runs / "zero2_clip/step_00000005")) < 1e-6
    names = ("zero0_clip", "zero2_clip", "no_clip")
    lines = [json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[0]) for name in names]
    norms = [line["grad_norm"] for line in lines]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    assert norms[0] > 0.1


def test_a_run_begins_with_the_weights_it_is_to_start_from(runs: Path):
    wanted = {name: tensor.flatten() for name, tensor in from_diffusers(runs / "start").state_dict().items()}
    assert distance(parts(runs / "started" / "step_00000001"), wanted) < 1e-9
