"""The command line: its exit codes, and that the person's own mistakes show no traceback."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sora_train import cli
from sora_train.commands import COMMANDS
from sora_train.errors import RecipeError, Stopped, UserError
from sora_train.log import log
from sora_train.recipe import Recipe
from sora_train.settings import keys


def sora(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sora_train.cli", *words], capture_output=True, text=True, check=False, timeout=120
    )


def test_sora_alone_lists_every_verb_and_an_example() -> None:
    for words in ((), ("--help",)):
        done = sora(*words)
        assert done.returncode == 0
        assert all(f"\n  {verb} " in done.stdout for verb in COMMANDS)
        assert "sora train jobs/quickstart.yaml" in done.stdout


def test_help_is_quick_because_it_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys; from sora_train import cli; cli.main(['--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray')))"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_help_of_a_verb_needs_no_recipe(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([verb, "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: sora {verb}" in said
    assert " ".join(COMMANDS[verb].does.split()[:4]) in said


def test_the_help_of_a_recipe_shows_what_it_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("train: {steps: 1234}")
    with pytest.raises(SystemExit):
        cli.main(["train", str(tmp_path / "r.yaml"), "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--train.steps INT" in said
    assert "(default: 1234)" in said
    assert "Optimizer steps of the whole run." in said


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        ("download", ["--to "]),
        ("prep", ["--plan "]),
        ("preflight", ["--plan ", "--gpu ", "--memory ", "--mfu ", "--mtbf "]),
        ("train", ["--fresh ", "--overwrite ", "--new_data ", "--no_preflight "]),
    ],
)
def test_flags_without_a_key_stand_in_the_help(
    tmp_path: Path, verb: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text("codec: {text: some/encoder}")
    with pytest.raises(SystemExit):
        cli.main([verb, str(tmp_path / "r.yaml"), "--help"])
    said = capsys.readouterr().out.partition("options")[2]  # the table; the sentences above it name them too
    assert all(f" {flag}" in said for flag in flags)
    assert "some/encoder" in said


def test_the_help_of_prep_shows_what_prep_reads(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["prep", "--help"])
    said = capsys.readouterr().out
    assert all(key in said for key in ("--data.fps", "--selection.black", "--prep.vae_batch", "--cluster.address"))
    assert not any(key in said for key in ("--train.learning_rate", "--model.width", "--validation.", "--diffusion."))


def test_every_key_that_a_verb_shows_is_a_key() -> None:
    known = [key for key, _ in keys(Recipe)]
    for command in COMMANDS.values():
        assert all(any(f"{key}.".startswith(f"{name}.") for key in known) for name in command.reads)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dance"], "the commands are download, prep, inspect, preflight, train"),
        (["train"], "RECIPE is missing: sora train jobs/quickstart.yaml"),
        (["train", "a.yaml", "b.yaml"], "takes one RECIPE"),
        (["train", "RECIPE", "--train.stpes", "3"], "--train.stpes is no known key; did you mean train.steps?"),
        (["train", "RECIPE", "--train.steps", "few"], "--train.steps is 'few'"),
        (["train", "RECIPE", "--train.profile", "5"], "several values, one after the other: --train.profile 5"),
        (["train", "RECIPE", "--train.profile", "[5]"], "it takes several values"),
        (["train", "RECIPE", "--train.profile", "[20, 0]"], "--train.profile.1 is '0'; it should be greater than 0"),
        (["train", "RECIPE", "--train.zero-stage", "5"], "--train.zero_stage is '5'; choices: 0, 1, 2 or 3"),
        (["prep", "RECIPE", "--data.width", "30"], "data.width 30 does not divide by 16"),
        (["prep", "no/such.yaml"], "no recipe at no/such.yaml"),
        (["sample", "runs/x"], "--prompt is missing"),
        (["sample", "runs/x", "--prompt", "a", "--steps", "0"], "--steps is '0'; it should be greater than 0"),
        (["sample", "runs/x", "--prompt", "a", "--frames", str(10**20)], "it should be less than or equal to 65536"),
        (["sample", "runs/x", "--prompts", "no/such.txt"], "--prompts no/such.txt can't be read (No such file"),
        (["train", "RECIPE", "--train.lr", "1e-3"], "--train.lr is no known key; did you mean train.learning_rate?"),
        (["train", "RECIPE", "--frehs"], "--frehs is no known key; did you mean fresh?"),
        (["prep", "RECIPE", "--fresh"], "--fresh is no known key; known are"),
        (["sample", "runs/x", "--cfg", "7"], "--cfg is no known key; did you mean guidance?"),
        (["sample", "runs/x", "--prompt", "--steps", "3"], "--prompt is missing"),
        (["sample", "runs/x", "--steps", "--prompt", "a"], "--steps needs a value: --steps=VALUE, if it begins with"),
        (["preflight", "RECIPE", "--gpu", "A100"], "--gpu goes with --plan"),
        (["download", "RECIPE"], "--to is missing"),
        (["inspect", "shards", "--jsno"], "--jsno is no known key; did you mean json?"),
        (["demo", "jobs/quickstart.yaml"], "takes only flags"),
        (["train", "RECIPE", "--overwrite"], "--overwrite goes with --fresh"),
        (
            ["train", "RECIPE", "--cluster.workers", "2", "3", "4"],
            "such as 4, or the fewest and the most, such as [2, 4]",
        ),
        (
            ["train", "RECIPE", "--cluster.workers", "4", "2"],
            "cluster.workers are 4 at least and 2 at most; use [2, 4]",
        ),
        (["train", "RECIPE", "--cluster.workers", "2", "17"], "cluster.workers 17 is more than train.batch_size 16"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing is
    (tmp_path / "r.yaml").write_text("name: x")
    words = [str(tmp_path / "r.yaml") if word == "RECIPE" else word for word in words]
    assert cli.main(words) == cli.EXIT_RECIPE
    said = capsys.readouterr()
    assert not said.out
    assert says in said.err
    assert said.err.startswith(f"sora {words[0]}: ")
    assert said.err.count("\n") == 1


def test_a_mistake_shows_no_traceback_in_a_real_process(tmp_path: Path) -> None:
    done = sora("inspect", str(tmp_path / "no_shards"))
    assert done.returncode == cli.EXIT_FAILED
    assert "Traceback" not in done.stderr
    assert "no_shards" in done.stderr


def test_exit_codes_tell_failures_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class WorkerError(UserError):
        cause = UserError("the file is gone", code="paths")

        def __init__(self) -> None:  # as Ray's own
            self.args = ("Traceback …",)

    for error, code, says in [
        (UserError("no disk", code="not_writable"), 1, "sora train: no disk (error code: not_writable)\n"),
        (RecipeError("no key"), 2, "sora train: no key\n"),
        (WorkerError(), 1, "sora train: the file is gone (error code: paths)\n"),
        (KeyboardInterrupt(), 130, "The same command continues from what is done"),
        (Stopped("stopped at step 3 after SIGTERM"), 75, "sora train: stopped at step 3 after SIGTERM\n"),
    ]:

        def fail(verb: str, words: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(cli, "run", fail)
        assert cli.main(["train", "x"]) == code
        assert says in capsys.readouterr().err


def test_quiet_leaves_results_and_warnings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "run", lambda *_: (log.info("progress"), print("result"), log.warning("careful")))
    assert cli.main(["inspect", "--quiet", "shards"]) == 0
    assert capsys.readouterr() == ("result\n", "warning: careful\n")
    assert cli.main(["inspect", "shards"]) == 0
    assert capsys.readouterr().out == "progress\nresult\n"
