"""What exact means (docs/exactness.md): cutting the work otherwise changes nothing but the order of sums.

The runs are made once, by groups of processes; the tests read what these left on disk.
"""

from pathlib import Path

import pytest
import ranks
import torch
from reading import at_step, checkpoint_at, distance, losses, parts, records, without_key_biases
from safetensors.torch import load_file

from sora_train.model.convert import from_diffusers

LAST = 10
SETTINGS = {
    "steps": LAST,  # an epoch of 21 clips ends with a batch of one in step 6
    "batch_size": 4,
    "micro_batch_size": 1,
    "learning_rate": 1e-4,
    "log_every": 1,
    "checkpoint_every": LAST,
    "ema_decay": 0.5,
}
MODELS = {"joint": {"attention": "joint", "pooled_text": True}, "wan": ranks.WAN}
GIVEN = {"probability": 0.5}


@pytest.fixture(scope="module")
def runs(start, alive: str, tiny_shards: Path, write_noise_shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs by name: KIND_WORLDxMICRO_zeroSTAGE, with a kind of MODELS, `factorised`, `given` or `balanced`;
    others.
    """
    root = tmp_path_factory.mktemp("runs")
    mixed = write_noise_shards(tmp_path_factory.mktemp("mixed"), [1 + i % 4 for i in range(40)], 64, images=28)

    def task(out: str, **changes) -> dict:
        return {"out": str(root / out), "train": SETTINGS | changes, "init_from": alive}

    def cut(world: int, stage: int, micro: int = 1, kind: str = "factorised", **changes) -> dict:
        made = task(f"{kind}_{world}x{micro}_zero{stage}", zero_stage=stage, micro_batch_size=micro, **changes)
        made |= {"model": MODELS[kind], "init_from": ""} if kind in MODELS else {}
        made |= {"shards": str(mixed)} if kind == "balanced" else {}
        return made | ({"conditioning": GIVEN} if kind == "given" else {})

    def balanced(world: int, stage: int, micro: int = 1, **changes) -> dict:
        return cut(world, stage, micro, "balanced", balance=1, **changes)

    # Stage 3 last: it leaves its own linear function in torch, which sums the gradients of biases in another order.
    four = [*(cut(4, stage) for stage in range(4)), cut(4, 3, kind="joint"), cut(4, 3, kind="given")]
    two = [cut(2, stage, checkpoint_every=1) for stage in (0, 1, 2)]
    two += [cut(2, 0, kind="joint"), cut(2, 2, kind="joint"), cut(2, 1, micro=2), cut(2, 1, kind="given")]
    two += [task("bf16", zero_stage=2, precision="bf16", steps=3)]
    two += [task("no_ema", zero_stage=2, ema_decay=0.0, steps=2)]
    two += [task("no_clip", zero_stage=0, gradient_clip=0.0, steps=2)]
    two += [cut(2, stage, kind="wan") for stage in range(3)]
    two += [balanced(2, 0), balanced(2, 1), balanced(2, 2, offload="optimizer"), balanced(2, 2, micro=3)]
    two += [cut(2, 3, checkpoint_every=1), cut(2, 3, kind="wan"), balanced(2, 3)]
    one = [cut(1, 0, micro, kind) for micro in (1, 4) for kind in ("factorised", "given", *MODELS)] + [cut(1, 2)]
    one += [balanced(1, 0, 4), balanced(1, 2), {**balanced(1, 0, 4, log_every=5), "out": str(root / "rarely")}]
    one += [task("zero0_clip", zero_stage=0, gradient_clip=0.1), task("zero2_clip", zero_stage=2, gradient_clip=0.1)]
    one += [task("started", steps=1, learning_rate=1e-12)]
    for end in [start(1, tiny_shards, one), start(2, tiny_shards, two), start(4, tiny_shards, four)]:
        codes, output = end()
        assert not any(codes), "\n".join(output)
    return root


def apart(run: Path, other: Path) -> float:
    """Relative distance of the last weights, key biases left out."""
    return distance(*(without_key_biases(at_step(folder, LAST)) for folder in (run, other)))


def agree(run: Path, other: Path) -> None:
    assert apart(run, other) < 1e-6
    assert losses(run) == pytest.approx(losses(other), rel=1e-6)


@pytest.mark.parametrize("name", ["factorised_1x1_zero0", "factorised_1x1_zero2", "factorised_2x2_zero1"])
def test_many_micro_batches_equal_one_large_one(runs: Path, name: str):
    agree(runs / name, runs / "factorised_1x4_zero0")


@pytest.mark.parametrize("name", ["1x1_zero0", "2x1_zero0", "2x1_zero2", "4x1_zero3"])
def test_joint_attention_with_pooled_text_is_cut_as_exactly(runs: Path, name: str):
    agree(runs / f"joint_{name}", runs / "joint_1x4_zero0")


@pytest.mark.parametrize("name", ["1x1_zero0", "2x1_zero1", "4x1_zero3"])
def test_given_frames_are_drawn_and_learned_alike_however_it_is_cut(runs: Path, name: str):
    agree(runs / f"given_{name}", runs / "given_1x4_zero0")
    first, without = losses(runs / f"given_{name}")[1], losses(runs / "factorised_1x4_zero0")[1]
    assert abs(first - without) > 1e-3


@pytest.mark.parametrize("name", ["1x1_zero0", *(f"2x1_zero{stage}" for stage in range(4))])
def test_wan_is_cut_as_exactly(runs: Path, name: str):
    agree(runs / f"wan_{name}", runs / "wan_1x4_zero0")


@pytest.mark.parametrize("name", ["1x1_zero2", *(f"2x1_zero{stage}" for stage in range(4)), "2x3_zero2"])
def test_balanced_steps_are_cut_as_exactly(runs: Path, name: str):
    """ZeRO 2 with micro-batches of one has its optimizer offloaded. Images take more clips and more micro-batches."""
    run, one = runs / f"balanced_{name}", runs / "balanced_1x4_zero0"
    agree(run, one)
    seen = [record["samples_seen"] for record in records(run)]
    assert seen == [record["samples_seen"] for record in records(one)]
    assert {after - before for before, after in zip([0, *seen], seen, strict=False)} >= {4, 9}


def test_records_name_the_bucket_and_the_mean_loss_of_each(runs: Path):
    """The means are over the clips of the steps since the last record."""
    steps, seen = records(runs / "balanced_1x4_zero0"), 0
    for record in steps:
        record["clips"], seen = record["samples_seen"] - seen, record["samples_seen"]
        assert record[f"loss_{record['bucket']}"] == pytest.approx(record["loss"])
    buckets = {record["bucket"] for record in steps}
    assert len(buckets) == 2
    for last, since in zip(records(runs / "rarely"), (steps[:5], steps[5:]), strict=True):
        assert (last["bucket"], last["loss"]) == (since[-1]["bucket"], since[-1]["loss"])
        for bucket in buckets:
            own = [record for record in since if record["bucket"] == bucket]
            mean = sum(record["loss"] * record["clips"] for record in own) / sum(record["clips"] for record in own)
            assert last[f"loss_{bucket}"] == pytest.approx(mean)
    alone = records(runs / "factorised_1x4_zero0")[0]
    assert f"loss_{alone['bucket']}" not in alone  # of the only bucket


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("world", [2, 4])
def test_every_zero_stage_on_two_and_four_ranks_equals_one_rank(runs: Path, world: int, stage: int):
    run, one = runs / f"factorised_{world}x1_zero{stage}", runs / "factorised_1x4_zero0"
    agree(run, one)
    told = [[record[key] for record in records(run)] for key in ("grad_norm", "samples_seen", "epoch", "lr")]
    expected = [[record[key] for record in records(one)] for key in ("grad_norm", "samples_seen", "epoch", "lr")]
    for figures, wanted in zip(told, expected, strict=True):
        assert figures == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("stage", range(4))
def test_the_ema_is_a_dense_one_in_float64_to_float32_precision(runs: Path, alive: str, stage: int):
    run = runs / f"factorised_2x1_zero{stage}"
    dense = {name: p.double().flatten() for name, p in from_diffusers(alive).state_dict().items()}
    for step in range(LAST):
        decay = min(SETTINGS["ema_decay"], (1 + step) / (10 + step))
        weights = at_step(run, step + 1)
        dense = {name: decay * old + (1 - decay) * weights[name].double() for name, old in dense.items()}
    saved = load_file(checkpoint_at(run, LAST) / "ema.safetensors")
    for name, expected in dense.items():
        torch.testing.assert_close(saved[name].flatten().double(), expected, rtol=5e-7, atol=1e-7)


def test_without_decay_the_ema_is_the_weights(runs: Path):
    folder = checkpoint_at(runs / "no_ema", 2)
    averaged = {name: tensor.flatten() for name, tensor in load_file(folder / "ema.safetensors").items()}
    assert distance(averaged, parts(folder)) == 0


def test_bf16_keeps_float32_masters_and_stays_near_float32(runs: Path):
    assert losses(runs / "bf16")[3] == pytest.approx(losses(runs / "factorised_1x4_zero0")[3], rel=0.02)
    weights = at_step(runs / "bf16", 3)
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert any((w != w.bfloat16().float()).any() for w in weights.values())


def test_stage_0_clips_gradients_as_deepspeed_does_elsewhere(runs: Path):
    assert apart(runs / "zero0_clip", runs / "zero2_clip") < 1e-6
    norms = [records(runs / name)[0]["grad_norm"] for name in ("zero0_clip", "zero2_clip", "no_clip")]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    assert norms[0] > 0.1


def test_a_run_begins_with_the_weights_it_is_to_start_from(runs: Path, alive: str):
    wanted = {name: tensor.flatten() for name, tensor in from_diffusers(alive).state_dict().items()}
    assert distance(at_step(runs / "started", 1), wanted) < 1e-9
