"""Each bench on something tiny: it measures what it says, beside what it says. No times are judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sora_train.bench import checkpoint, data, readers, validate
from sora_train.bench.model import main as bench_model
from sora_train.bench.recipes import Training
from sora_train.bench.shards import make_shards
from sora_train.bench.variant import Case, Contender, Trainee, inputs, relative, seeded, theirs
from sora_train.data.shards import ShardSet
from sora_train.errors import UserError

BARE = {"torch", "numpy", "einops", "safetensors", "jaxtyping"}
OF_TORCH = {"typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec",
            "setuptools", "torchgen", "functorch", "wadler_lindig", "_distutils_hack", "pkg_resources"}  # fmt: skip
TINY = ("--presets", "tiny", "--shapes", "4x32x32", "--rounds", "2", "--batch", "2", "--text_tokens", "7",
        "--threads", "1")  # fmt: skip
BLOCK = """
import sys, sysconfig
from importlib.machinery import PathFinder
class OnlyThese(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        found = super().find_spec(name, path, target)
        installed = found and found.origin and found.origin.startswith(sysconfig.get_paths()["purelib"])
        return None if path is None and installed and name not in {allowed} else found
sys.meta_path[sys.meta_path.index(PathFinder)] = OnlyThese
"""


def case(checkpointing: str = "none", attention: str = "factorised") -> Case:
    return Case("tiny", attention, (4, 32, 32), "fp32", checkpointing, 2, 7, "cpu", 1)


def run_model(folder: Path, *flags: str, path: Path | None = None) -> tuple[dict, str]:
    """What `python -m sora_train.bench.model` recorded, and what it printed."""
    here = os.pathsep.join(map(str, [*([path] if path else []), Path(__file__).parents[2]]))
    done = subprocess.run(
        [sys.executable, "-m", "sora_train.bench.model", *TINY, *flags, "--out", str(folder / "b.jsonl")],
        env={**os.environ, "PYTHONPATH": here}, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "b.jsonl").read_text()), done.stdout


def test_the_model_is_measured_where_nothing_but_torch_einops_safetensors_and_jaxtyping_is(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(allowed=sorted(BARE | OF_TORCH)))
    for name, code in (("diffusers", 1), ("pydantic", 1), ("pyarrow", 1), ("einops", 0)):
        bare = {**os.environ, "PYTHONPATH": str(tmp_path)}
        there = subprocess.run([sys.executable, "-c", f"import {name}"], env=bare, capture_output=True, check=False)
        assert there.returncode == code, f"the block itself does not work for {name}"
    record, said = run_model(tmp_path, path=tmp_path)
    assert [row["contender"] for row in record["rows"]] == ["ours"]
    assert "diffusers is not installed" in said


def test_the_model_is_measured_beside_diffusers_whose_outputs_are_the_same(tmp_path: Path) -> None:
    record, said = run_model(tmp_path)
    ours, diffusers = record["rows"]
    assert (ours["contender"], diffusers["contender"]) == ("ours", "diffusers")
    assert 0 < ours["difference"] < 1e-5
    assert ours["step_s"]["n"] == diffusers["step_s"]["n"] == 2
    assert ours["memory_gb"] > 0
    assert ours["mfu"] is None
    assert not record["failed"]
    assert "| ours " in said


def test_other_weights_would_be_noticed() -> None:
    model = seeded(case())
    with torch.no_grad():
        right = model(*inputs(case())).numpy()
        next(model.parameters()).mul_(1.5)
        wrong = model(*inputs(case())).numpy()
    assert relative(right, right) == 0
    assert relative(wrong, right) > 1e-3


@pytest.mark.parametrize("attention", ["factorised", "joint"])
def test_checkpointing_changes_memory_and_not_the_output(attention: str) -> None:
    plain, full = (Trainee(Contender(case(how, attention), "ours", False)) for how in ("none", "full"))
    assert relative(full.output(), plain.output()) == 0
    for trainee in (plain, full):
        trainee.turn()
    assert full.memory()["memory_gb"] < plain.memory()["memory_gb"]


def test_a_turn_is_a_whole_training_step() -> None:
    trainee = Trainee(Contender(case(), "ours", False))
    before = [p.detach().clone() for p in trainee.model.parameters()]
    took = trainee.turn()
    assert took["step_s"] == sum(took[name] for name in ("forward_s", "backward_s", "optimizer_s"))
    assert all(not torch.equal(a, b) for a, b in zip(before, trainee.model.parameters(), strict=True))
    assert callable(theirs(Contender(case(), "diffusers", False)))


def test_every_reader_reads_every_clip(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "shards", 70, (2, 32, 32), text_width=8, text_tokens=6)
    assert ShardSet(folder).rows == {"2x32x32": 70}
    assert [read(folder, 8) for read in (readers.ours, readers.loader, readers.pyarrow)] == [70, 70, 70]
    assert readers.raw(folder, 8) == 0
    assert readers.can_forget()
    assert 0 <= readers.forget(folder) <= 1


@pytest.mark.slow
def test_readers_are_held_against_raw_reads_warm_and_cold_and_the_order_is_drawn(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "shards", 40, (2, 32, 32), text_width=8, text_tokens=6)
    found, order = data.bench(data.Options(rounds=2, batch=8, tmp=str(tmp_path)), folder)
    assert {row["from"] for row in found.rows} == {"warm", "cold"}
    assert {row["reader"] for row in found.rows} >= {"raw", "ours: reader", "ours: loader", "pyarrow"}
    assert all(row["of raw"]["median"] == 1 for row in found.rows if row["reader"] == "raw")
    assert not found.failed
    assert order.rows[0]["rows"] == "1,000,000,000"
    assert order.rows[0]["memory_kb"] < 1000


def test_a_reader_that_loses_clips_is_void(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_shards(tmp_path / "shards", 40, (2, 32, 32), text_width=8, text_tokens=6)
    monkeypatch.setattr(readers, "pyarrow", lambda folder, batch_size: 39)
    found, *_ = data.bench(data.Options(rounds=1, batch=8, order_rows=0), folder)
    assert "pyarrow" not in {row["reader"] for row in found.rows}
    assert "warm: pyarrow read 39 of 40 clips, so its times are void" in found.failed


def test_a_checkpoint_is_timed_from_the_stall_until_it_is_whole_and_read_back(tmp_path: Path) -> None:
    program = (
        "import sys; from sora_train.bench.checkpoint import main; "
        "sys.modules['ray'] = None; "
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ["--presets", "tiny", "--shape", "4x32x32", "--text_tokens", "7", "--rounds", "2", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "--out", str(tmp_path / "b.jsonl"), "--tmp", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "b.jsonl").read_text())["rows"]
    parameters = sum(p.numel() for p in seeded(case()).parameters())
    assert 5 * 4 * parameters < 1e9 * row["gb"] < 1.3 * 5 * 4 * parameters  # weights, two moments, average twice
    assert row["stall_s"]["median"] <= row["whole_s"]["median"]
    assert row["resume_s"]["n"] == 2
    assert not list(tmp_path.glob("tmp*"))
    assert checkpoint.Options().presets == ("S",)


def test_steps_are_counted_by_training_and_not_by_the_validation_of_an_earlier_step(tmp_path: Path) -> None:
    lines = [{"step": 1, "step_s": 0.1}, {"step": 9, "step_s": 0.1}, {"step": 4, "holdout_loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    training = Training(process, tmp_path, tmp_path / "log", 0.0, {})
    assert validate.steps_done(training)[1] == 9
    assert not validate.validates(process.pid)
    assert validate.count(training, validate.Options()) == {True: [], False: []}


def test_what_could_not_be_kept_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    cut, good = tmp_path / "cut.jsonl", {"what": "model", "rows": [], "command": "sora bench model"}
    cut.write_text(f'{json.dumps(good)}\n{{"what": "mod')
    nowhere = tmp_path / "no" / "such"
    for flags, said in (
        (["--out", str(cut)], "line 2, is no record"),
        (["--out", str(tmp_path)], "with --out"),
        (["--out", str(tmp_path / "b.jsonl"), "--report", str(nowhere / "p.html")], "with --report"),
        (["--out", str(tmp_path / "b.jsonl"), "--markdown", str(nowhere / "m.md")], "with --markdown"),
    ):
        with pytest.raises(UserError, match=said):
            bench_model(["--presets", "L", "--rounds", "1000", *flags])
    assert cut.read_text().endswith("mod")
    assert not (tmp_path / "b.jsonl").exists()
