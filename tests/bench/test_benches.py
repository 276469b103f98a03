"""Each bench at a tiny size. Its rows are checked, not its times."""

import json
from pathlib import Path

import pytest
import torch

from sora_train import cli
from sora_train.bench import data
from sora_train.bench.case import Case, inputs, relative, seeded
from sora_train.bench.model import TrainingStep, profile, profile_tables
from sora_train.bench.validate import split_steps
from sora_train.plan.measured import BENCH_FILE, bench_rates

TINY = ("--presets", "tiny", "--batch", "2", "--text_tokens", "7", "--rounds", "2", "--threads", "1")


def case(checkpointing: str = "none", attention: str = "factorised") -> Case:
    return Case("tiny", attention, (4, 32, 32), "fp32", checkpointing, 2, 7, "cpu")


@pytest.mark.parametrize(("preset", "shape"), [("tiny", "4x32x32"), ("tiny_wan", "5x32x32")])
def test_our_output_is_that_of_diffusers_on_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], preset: str, shape: str
) -> None:
    words = ["bench", "model", "--presets", preset, *TINY[2:], "--shapes", shape, "--out", str(tmp_path / "b.jsonl")]
    assert cli.main([*words, "--norms", "torch", "kernels"]) == 0
    record, said = json.loads((tmp_path / "b.jsonl").read_text()), capsys.readouterr().out
    diffusers, ours, fused = record["rows"]
    assert (ours["contender"], diffusers["contender"]) == ("ours", "diffusers")
    assert (fused["contender"], fused["difference"]) == ("ours, kernels for norms", ours["difference"])
    assert 0 < ours["difference"] < 1e-5
    assert ours["step_s"]["n"] == diffusers["step_s"]["n"] == 2
    assert ours["mfu"] is None
    assert not record["failed"]
    assert "| ours " in said


def test_every_kind_of_attention_is_measured_and_padded_heads_change_nothing(tmp_path: Path) -> None:
    words = ["bench", "attention", "--presets", "tiny", "tiny_wan", *TINY[2:], "--shapes", "5x32x32"]
    assert cli.main([*words, "--out", str(tmp_path / "b.jsonl")]) == 0
    rows = json.loads((tmp_path / "b.jsonl").read_text())["rows"]
    assert [(row["model"], row["attention"], row["tokens"]) for row in rows[::2]] == [
        ("tiny", "spatial", "4"), ("tiny", "temporal", "5"), ("tiny", "text", "20 to 7"),
        ("tiny_wan", "joint", "8"), ("tiny_wan", "text", "8 to 512"),
    ]  # fmt: skip
    assert [row["contender"] for row in rows] == ["torch", "padded"] * 5
    assert all(row["difference"] < 1e-5 for row in rows)


def test_other_weights_would_be_noticed() -> None:
    model = seeded(case())
    with torch.no_grad():
        right = model(*inputs(case()))
        next(model.parameters()).mul_(1.5)
        wrong = model(*inputs(case()))
    assert relative(right, right) == 0
    assert relative(wrong, right) > 1e-3


@pytest.mark.parametrize("attention", ["factorised", "joint"])
def test_checkpointing_does_not_change_the_output(attention: str) -> None:
    plain, full = (TrainingStep(case(how, attention), False, False) for how in ("none", "full"))
    assert relative(full.output(), plain.output()) == 0


def test_the_parts_of_a_profiled_step_add_up() -> None:
    parts, kernels = profile_tables("tiny", profile(TrainingStep(case(), False, False)))
    shares = {row["part"]: row["share"] for row in parts.rows}
    assert shares.keys() >= {"products", "attention", "pointwise", "optimizer", "gaps"}
    assert 0.95 < sum(shares.values()) < 1.5  # some operations of the backward pass run on another thread
    assert kernels.rows == sorted(kernels.rows, key=lambda row: -row["ms a step"])


def test_a_turn_is_a_whole_training_step() -> None:
    step = TrainingStep(case(), False, False)
    before = [p.detach().clone() for p in step.model.parameters()]
    took = step.turn()
    assert took["step_s"] == sum(took[name] for name in ("forward_s", "backward_s", "optimizer_s"))
    assert all(not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


def test_every_reader_reads_every_clip_warm_and_cold(tiny_shards: Path) -> None:
    assert {name: read(str(tiny_shards), 3) for name, read in data.READERS.items()} == {
        "raw": 0, "ours: reader": 21, "ours: loader": 21,
    }  # fmt: skip
    table = data.bench(data.Options(batch=3, rounds=2), str(tiny_shards))[0]
    assert [(row["from"], row["reader"]) for row in table.rows] == [
        (place, name) for place in ("warm", "cold") for name in data.READERS
    ]
    assert all(row["of raw"]["median"] == 1 for row in table.rows if row["reader"] == "raw")
    assert not table.failed


def test_times_of_a_reader_that_loses_clips_do_not_count(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.READERS, "lossy", lambda folder, batch_size: 20)
    table = data.bench(data.Options(batch=3, rounds=1), str(tiny_shards))[0]
    assert "lossy" not in {row["reader"] for row in table.rows}
    assert "warm: lossy read 20 of 21 clips, so its times don't count" in table.failed


def test_a_checkpoint_is_timed_from_the_stall_to_the_resume(tmp_path: Path) -> None:
    words = [*TINY, "--shape", "4x32x32", "--out", str(tmp_path / BENCH_FILE), "--tmp", str(tmp_path)]
    assert cli.main(["bench", "checkpoint", *words]) == 0
    (row,) = json.loads((tmp_path / BENCH_FILE).read_text())["rows"]
    parameters = sum(p.numel() for p in seeded(case()).parameters())
    assert 5 * 4 * parameters < 1e9 * row["gb"] < 1.3 * 5 * 4 * parameters  # weights, two moments, average twice
    assert row["stall_s"]["median"] <= row["whole_s"]["median"]
    assert row["resume_s"]["n"] == 2
    assert not list(tmp_path.glob("tmp*"))
    rates, source = bench_rates(tmp_path)
    assert rates["copy"] == pytest.approx(1e9 * row["gb"] / row["stall_s"]["median"])
    assert source.startswith("`sora bench checkpoint` on ")


def test_steps_are_split_by_the_validations_that_ran() -> None:
    steps = [{"step": step, "step_s": float(step)} for step in range(1, 61)]
    validations = [{"step": 30, "validation": True, "holdout_loss": 1.0}, {"step": 40, "validation": True}]
    lines = [*steps[:45], validations[0], *steps[45:50], validations[1], *steps[50:]]
    found = split_steps(lines, every=10)
    # those of steps 10, 20 and 50 never ended: dropped, or still running
    assert found == {False: [], True: [float(step) for step in range(21, 61)]}
    found = split_steps([*steps[:45], *validations, *steps[45:]], every=40)
    assert found[True] == [41.0, 42.0, 43.0, 44.0, 45.0]
    assert found[False] == [float(step) for step in (*range(21, 41), *range(46, 61))]
