"""Alternation, statistics, records and flags of `sora bench`."""

import json
import subprocess
from pathlib import Path

import pytest

from sora_train import cli
from sora_train.bench import command
from sora_train.bench.case import size_of
from sora_train.bench.core import Table, finish, interleave, markdown, provenance, spread
from sora_train.bench.model import Options, cases
from sora_train.errors import RecipeError, UserError, error_line
from sora_train.flags import parse_flags
from sora_train.settings import build


def test_variants_alternate_and_warm_up_rounds_do_not_count() -> None:
    called: list[str] = []

    def call(name: str) -> int:
        called.append(name)
        return len(called)

    results, errors = interleave({name: lambda name=name: call(name) for name in "AB"}, rounds=3, warm_up=2)
    assert "".join(called) == "AB" * 5
    assert results == {"A": [5, 7, 9], "B": [6, 8, 10]}
    assert not errors


def test_a_variant_that_fails_is_named_and_the_others_continue() -> None:
    called: list[int] = []

    def fails() -> int:
        called.append(0)
        raise RuntimeError("no\ncompiler")

    results, errors = interleave({"A": lambda: 1, "B": fails}, rounds=4)
    assert results == {"A": [1] * 4}
    assert errors == {"B": "RuntimeError: no compiler"}
    assert len(called) == 1


def test_a_spread_is_median_minimum_and_maximum() -> None:
    assert spread([5.0, 1.0, 100.0]) == {"median": 5.0, "low": 1.0, "high": 100.0, "n": 3}
    assert spread([4.0, 1.0]) == {"median": 2.5, "low": 1.0, "high": 4.0, "n": 2}


def test_a_record_has_command_commit_versions_hardware_and_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table("model", [{"contender": "ours", "step_s": spread([2.0, 1.0])}], ["a note"], ["ours: broke"])
    out = tmp_path / "deep/bench.jsonl"
    assert finish([table], ["model", "--rounds", "2"], out) == 1
    assert finish([Table("model", table.rows)], ["model"], out) == 0
    first, second = map(json.loads, out.read_text().splitlines())
    assert {name: first[name] for name in ("what", "rows", "notes", "failed")} == vars(table)
    assert first["command"] == "sora bench model --rounds 2"
    assert second["failed"] == []
    assert first["versions"]["torch"]
    assert first["hardware"]["cores"] >= 1
    assert first["date"] <= second["date"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert not head.stdout or head.stdout.startswith(first["commit"].removesuffix("-dirty"))
    assert "`sora bench model --rounds 2`, commit" in capsys.readouterr().out


def test_markdown_tables_line_up_and_omit_columns_without_values() -> None:
    text = markdown(Table("x", [{"a": "one", "b": spread([1.0, 2.0, 9.0]), "mfu": None}, {"a": "twenty", "b": 1234.5}]))
    lines = text.splitlines()[2:]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert [cell.strip() for cell in lines[0].split("|")] == ["", "a", "b", ""]
    assert "2 (1 – 9)" in lines[2]
    assert "1,234" in lines[3]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "what to measure is missing; choices: model, attention, data"),
        (["speed"], "speed is not a bench"),
        (["model", "--rounds", "-3"], "--rounds is '-3'; it should be greater than 0"),
        (["model", "--shapes", "16x250x256"], "height 250 does not divide by 16"),
        (["model", "--shapes", "256"], "256 is not a shape"),
        (["model", "--presets", "M"], "--presets.0 is 'M'; choices: 'S', 'B'"),
        (["model", "--attention", "both"], "is 'both'; choices: 'factorised' or 'joint'"),
        (["model", "--speed", "9"], "--speed is no known key"),
        (["model", "--device", "tpu"], "--device tpu is not available"),
        (["data", "a", "b"], "takes one SHARDS, got a b"),
        (["data"], "takes one SHARDS, got none: sora bench data runs/quickstart/shards"),
        (["train"], "takes one RECIPE, got none: sora bench train jobs/quickstart.yaml"),
        (["train", "jobs/quickstart.yaml", "--steps", "2"], "--steps is '2'; it should be greater than or equal to 8"),
        (["validate", "jobs/quickstart.yaml", "--every", "300"], "--steps 400 is less than twice --every 300"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "x.jsonl")] if words and words[0] in command.BENCHES else []
    assert cli.main(["bench", *words, *out]) == cli.EXIT_RECIPE
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.count("\n") == 1
    assert not said.out


@pytest.mark.parametrize("name", command.BENCHES)
def test_every_bench_explains_its_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", name, "--help"]) == 0
    assert "--out TEXT File to append the results to" in " ".join(capsys.readouterr().out.split())
    assert name in command.usage()


def test_every_combination_of_the_flags_is_a_case() -> None:
    words = "--presets S tiny --attention factorised joint --shapes 16x256x256 1x64x32 --dtypes fp32 bf16 "
    flags, _ = parse_flags(f"{words} --checkpointing none full --device cpu".split(), Options)
    found = list(cases(build(Options, {}, flags, "flags")))
    assert len(set(found)) == len(found) == 32
    assert size_of("1x64x32") == (1, 64, 32)
    assert {case.latents for case in found} == {(16, 32, 32), (1, 8, 4)}


def test_an_unwritable_output_is_an_error_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "x.jsonl"):
        with pytest.raises(UserError, match="--out") as caught:
            command.run(["model", "--rounds", "1000000", "--out", str(out)])
        assert caught.value.code == "not_writable"


def test_an_error_is_one_short_line() -> None:
    assert error_line(ValueError("a\n  b" + "c" * 999)) == "ValueError: a b" + "c" * 285
    assert json.dumps(provenance([]))
    with pytest.raises(RecipeError):
        command.run(["nothing"])
