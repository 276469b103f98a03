"""Turns, spreads, records and flags of `sora bench`."""

import json
import subprocess
from pathlib import Path

import pytest

from sora_train import cli
from sora_train.bench import command
from sora_train.bench.core import Table, append, interleave, markdown, one_line, provenance, read_records, spread
from sora_train.bench.model import Options, cases, size_of
from sora_train.bench.options import parse
from sora_train.bench.page import write_page
from sora_train.errors import RecipeError, UserError


def test_contenders_take_turns_and_warm_up_rounds_do_not_count() -> None:
    called: list[str] = []

    def act(name: str) -> int:
        called.append(name)
        return len(called)

    found, broken = interleave({name: lambda name=name: act(name) for name in "AB"}, rounds=3, warm_up=2)
    assert "".join(called) == "AB" * 5
    assert found == {"A": [5, 7, 9], "B": [6, 8, 10]}
    assert not broken


def test_a_contender_that_fails_is_named_and_the_others_go_on() -> None:
    called: list[int] = []

    def fails() -> int:
        called.append(0)
        raise RuntimeError("no\ncompiler")

    found, broken = interleave({"A": lambda: 1, "B": fails}, rounds=4)
    assert found == {"A": [1] * 4}
    assert broken == {"B": "RuntimeError: no compiler"}
    assert len(called) == 1


def test_a_spread_is_the_median_between_the_extremes() -> None:
    assert spread([5.0, 1.0, 100.0]) == {"median": 5.0, "low": 1.0, "high": 100.0, "n": 3}
    assert spread([4.0, 1.0]) == {"median": 2.5, "low": 1.0, "high": 4.0, "n": 2}


def test_a_record_says_command_commit_versions_hardware_and_date_and_comes_back(tmp_path: Path) -> None:
    table = Table("model", [{"contender": "ours", "step_s": spread([2.0, 1.0])}], ["a note"], ["ours: broke"])
    about = provenance(["model", "--rounds", "2"])
    append([table], about, tmp_path / "deep/bench.jsonl")
    append([table], about, tmp_path / "deep/bench.jsonl")
    first, second = read_records(tmp_path / "deep/bench.jsonl")
    said = {"what": "model", "rows": table.rows, "notes": ["a note"], "failed": ["ours: broke"]}
    assert first == second == said | about
    assert first["command"] == "sora bench model --rounds 2"
    assert first["versions"]["torch"]
    assert first["hardware"]["cores"] >= 1
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert not head.stdout or head.stdout.startswith(first["commit"].removesuffix("-dirty"))


def test_a_table_is_markdown_that_lines_up_and_leaves_out_what_no_row_has() -> None:
    text = markdown(Table("x", [{"a": "one", "b": spread([1.0, 2.0, 9.0]), "mfu": None}, {"a": "twenty", "b": 1234.5}]))
    lines = text.splitlines()[2:]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert [cell.strip() for cell in lines[0].split("|")] == ["", "a", "b", ""]
    assert "2 (1 – 9)" in lines[2]
    assert "1,234" in lines[3]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "what to measure is missing; choices: model, data"),
        (["speed"], "speed is no bench"),
        (["model", "--rounds", "-3"], "--rounds: '-3' is no whole number"),
        (["model", "--rounds", "0"], "--rounds is 0; it takes 1 or more"),
        (["model", "--shapes", "16x250x256"], "multiples of 16"),
        (["model", "--shapes", "256"], "is no shape"),
        (["model", "--presets", "M"], "--presets M is none; choices: S, B, L, XL, latte_t2v, tiny"),
        (["model", "--attention", "both"], "invalid choice: 'both'"),
        (["model", "--speed", "9"], "--speed 9 is no flag of it"),
        (["model", "--device", "tpu"], "--device tpu is not there"),
        (["data", "a", "b"], "takes one folder of shards and flags, but got a b"),
        (["train"], "takes one RECIPE, got none: sora bench train jobs/quickstart.yaml"),
        (["train", "jobs/quickstart.yaml", "--steps", "2"], "--steps takes 8 or more"),
        (["validate", "jobs/quickstart.yaml", "--every", "300"], "--steps must be two times --every"),
        (["all", "--only", "speed"], "--only speed: choices are model, data"),
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
def test_every_flag_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", name, "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    flags = said.split("show this help message and exit")[1]
    assert "--out" in flags
    assert "a JSON object a line. (default: runs/bench.jsonl)" in flags
    assert name in command.usage()


def test_flags_are_read_by_the_types_of_the_fields() -> None:
    options, rest = parse(Options, ["x", "--presets", "S", "B", "--alone", "--text-tokens", "7", "--train.steps", "4"],
                          "p", "")  # fmt: skip
    assert (options.presets, options.alone, options.text_tokens) == (("S", "B"), True, 7)
    assert rest == ["x", "--train.steps", "4"]


def test_every_combination_is_a_case() -> None:
    options = Options(presets=("S", "tiny"), attention=("factorised", "joint"), shapes=("16x256x256", "1x64x32"),
                      dtypes=("fp32", "bf16"), checkpointing=("none", "full"), device="cpu")  # fmt: skip
    found = list(cases(options))
    assert len(set(found)) == len(found) == 32
    assert size_of("1x64x32") == (1, 64, 32)
    assert {case.latents for case in found} == {(16, 32, 32), (1, 8, 4)}


def test_the_page_shows_the_newest_record_of_each_kind_escapes_it_and_fetches_nothing(tmp_path: Path) -> None:
    about = provenance(["model"])
    for step in (7.0, 5.0):
        rows = [{"contender": "<b>ours</b>", "step_s": spread([step, 9.0, 2.0])}, {"contender": "x", "step_s": 4.0}]
        append([Table("model", rows, ["<i>note</i>"], ["it broke"])], about, tmp_path / "r.jsonl")
    page = write_page(tmp_path / "r.jsonl", tmp_path / "p.html").read_text()
    assert "<svg" in page
    assert "&lt;b&gt;ours&lt;/b&gt;" in page
    assert "&lt;i&gt;note" in page
    assert "<b>ours" not in page
    assert "<script" not in page
    assert "5 (2 – 9)" in page
    assert "7 (2 – 9)" not in page
    assert "failed: it broke" in page


def test_a_file_of_other_things_is_refused_by_its_name(tmp_path: Path) -> None:
    for content in ("{}", "no json", "[1]"):
        (tmp_path / "r.jsonl").write_text(content)
        with pytest.raises(UserError, match="r.jsonl"):
            write_page(tmp_path / "r.jsonl", tmp_path / "p.html")
    with pytest.raises(UserError, match="can't be written"):
        append([], {}, tmp_path / "r.jsonl" / "under a file")


def test_an_error_is_one_short_line() -> None:
    assert one_line(ValueError("a\n  b" + "c" * 999)) == "ValueError: a b" + "c" * 285
    assert json.dumps(provenance([]))
    with pytest.raises(RecipeError):
        command.run(["nothing"])
