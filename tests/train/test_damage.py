"""Damage: what is broken is named with its remedy, no rank waits for another, and the last good checkpoint stays.

The runs are made once, by groups of two ranks, on copies of a good run that are damaged in one way each.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from sora_train.errors import UserError
from sora_train.train import checkpoint
from sora_train.train.metrics import JsonLines

SETTINGS = {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "log_every": 1, "checkpoint_every": 1}
PARTS = ("part_00000_of_00002.safetensors", "part_00001_of_00002.safetensors")


@pytest.fixture(scope="module")
def good(start, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with as many checkpoints."""
    run = tmp_path_factory.mktemp("damage") / "good"
    codes, output = start(2, tiny_shards, [{"out": str(run), "train": SETTINGS}])()
    assert not any(codes), "\n".join(output)
    return run


@pytest.fixture
def last(good: Path, tmp_path: Path) -> Path:
    """The last checkpoint of a copy of it."""
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run/checkpoints/step_00000003"


def whole_steps(run: Path) -> list[int]:
    return [step for step, _ in checkpoint.complete_checkpoints(run / "checkpoints")]


@pytest.mark.parametrize("name", [*PARTS, "ema.safetensors", "state.json"])
@pytest.mark.parametrize("keep", [None, 0, 100, -1])
def test_a_checkpoint_with_a_file_missing_or_cut_short_is_not_whole(last: Path, name: str, keep: int | None):
    content = (last / name).read_bytes()
    (last / name).unlink()
    if keep is not None:
        (last / name).write_bytes(content[:keep])
    assert whole_steps(last.parents[1]) == [1, 2]


@pytest.mark.parametrize("name", [*PARTS, "ema.safetensors", "state.json"])
def test_a_file_of_another_attempt_does_not_fill_a_gap(last: Path, name: str):
    shutil.copy(last.parent / "step_00000002" / name, last / name)
    assert whole_steps(last.parents[1]) == [1, 2]


def test_what_an_interrupted_write_left_does_no_harm(last: Path):
    for name in (*PARTS, "state.json"):
        (last / f".unfinished-0123-{name}").write_bytes(b"half")
    assert whole_steps(last.parents[1]) == [1, 2, 3]


def test_a_changed_figure_in_state_json_makes_a_checkpoint_not_whole(last: Path):
    text = (last / "state.json").read_text()
    figures = [*re.finditer(r'"(?!format)\w+": \d*(\d),', text)]  # the format's has a message of its own
    assert len(figures) > 5
    for figure in figures:
        other = str((int(figure[1]) + 1) % 10)
        (last / "state.json").write_text(text[: figure.start(1)] + other + text[figure.end(1) :])
        assert whole_steps(last.parents[1]) == [1, 2]
    (last / "state.json").write_text(text)
    assert whole_steps(last.parents[1]) == [1, 2, 3]


def flipped(file: Path, place: int, mask: int = 0x10) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= mask
    file.write_bytes(content)


def within_tensors(run: Path) -> None:
    flipped(run / "checkpoints/step_00000003" / PARTS[1], -1000)


def within_offsets(run: Path) -> None:
    """At which of its parameter's elements a part begins."""
    file = run / "checkpoints/step_00000003" / PARTS[1]
    with safe_open(file, "pt") as opened:
        name, offset = json.loads(opened.metadata()["offsets"]).popitem()
    text = rf"\"{name}\": {offset}".encode()
    flipped(file, file.read_bytes().index(text) + len(text) - 1, mask=1)


REFUSED: dict[str, tuple[Callable[[Path], None], dict, str]] = {
    "tensors": (within_tensors, {}, rf"{PARTS[1]} can't be read .*checksum.* remove .*step_00000003"),
    "offsets": (within_offsets, {}, rf"{PARTS[1]} can't be read .*checksum.* remove .*step_00000003"),
    "wider": (lambda run: None, {"width": 32}, "step_00000003 is of another model: it holds .* this model has "),
    "narrower": (lambda run: None, {"width": 8}, "step_00000003 is of another model: it holds .* this model has "),
    "deeper": (lambda run: None, {"depth": 4}, "of another model: it holds 0 numbers of blocks.2"),
    "not_whole": (lambda run: (run / "checkpoints/step_00000003/state.json").unlink(), {}, "no complete checkpoint"),
}
"""Damage of the last checkpoint by name: what does it, the model that it is loaded into, and what is said."""


@pytest.fixture(scope="module")
def damaged_shards(tiny_shards: Path, good: Path) -> Path:
    """Shards written as data_prep does, a byte of the last clip flipped."""
    folder = good.parent / "flipped"
    shutil.copytree(tiny_shards, folder)
    (file,) = folder.glob("bucket=*/part.parquet")
    table = pq.ParquetFile(file).read()
    pq.write_table(table, file, row_group_size=8, compression="none", use_dictionary=False, write_page_checksum=True)
    flipped(file, file.read_bytes().index(table["latents"][20].as_py()) + 10)
    return folder


@pytest.fixture(scope="module")
def small_disk(good: Path) -> Iterator[Path | None]:
    """A file system of a megabyte; None where this process may not mount one."""
    folder = good.parent / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def ends(
    start, good: Path, tiny_shards: Path, damaged_shards: Path, small_disk: Path | None
) -> dict[str, tuple[list[int], list[str]]]:
    """Exit codes and outputs of what met damage, by name. The groups run at a time."""
    root = good.parent

    def again(name: str, **rest) -> dict:
        """Goes on from the last checkpoint of a copy of the good run."""
        shutil.copytree(good, root / name)
        resume = str(root / name / "checkpoints/step_00000003")
        return {"out": str(root / name), "train": SETTINGS | {"steps": 9}, "resume": resume, **rest}

    cut = root / "cut"
    shutil.copytree(damaged_shards, cut)
    (file,) = cut.glob("bucket=*/part.parquet")
    file.write_bytes(file.read_bytes()[:-1000])
    refused = [again("cut_run", shards=str(cut), refused=True)]
    for name, (damage, model, _) in REFUSED.items():
        refused.append(again(name, model=model, refused=True))
        damage(root / name)
    (root / "checkpoints_taken").mkdir()
    (root / "checkpoints_taken/checkpoints").write_text("not a folder")
    refused.append(
        {"out": str(root / "checkpoints_taken"), "shards": str(tiny_shards), "train": SETTINGS, "refused": True}
    )
    groups = {
        "flipped": start(2, damaged_shards, [*refused, again("flipped_run")]),
        "one_full": start(2, tiny_shards, [again("one_full", largest=50_000)]),
    }
    if small_disk is not None:
        full = {"out": str(small_disk / "run"), "train": SETTINGS | {"steps": 9}}
        groups["full"] = start(2, tiny_shards, [full])
    return {name: end() for name, end in groups.items()}


def said(ends: dict[str, tuple[list[int], list[str]]], name: str) -> str:
    """What the ranks of a group printed, each of which ended with an error, and of itself: `start` kills what hangs."""
    codes, output = ends[name]
    assert all(code not in (0, -9) for code in codes), codes
    return "\n".join(output)


@pytest.mark.parametrize("name", REFUSED)
def test_a_damaged_checkpoint_is_refused_alike_by_every_rank(ends, good: Path, name: str):
    messages = [(good.parent / name / f"refused_{rank}.txt").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert re.search(REFUSED[name][2], messages[0]), messages[0]
    assert whole_steps(good.parent / name)[:2] == [1, 2]


def test_a_shard_that_was_cut_short_is_named_with_the_remedy(ends, good: Path):
    for rank in range(2):
        message = (good.parent / f"cut_run/refused_{rank}.txt").read_text()
        assert re.search(r"cut/bucket=2x32x32/part.parquet can't be read .* run `sora prep` again", message)
    assert whole_steps(good.parent / "cut_run") == [1, 2, 3]


def test_a_flipped_byte_in_a_shard_ends_every_rank_with_a_hint(ends, good: Path):
    text = said(ends, "flipped")
    assert re.search(r"UserError: .*flipped/bucket=2x32x32/part.parquet can't be read .* run `sora prep` again", text)
    assert whole_steps(good.parent / "flipped_run")[:3] == [1, 2, 3]


def unbroken_by(run: Path) -> None:
    """Every checkpoint that is whole can be read to its end, and nothing half written lies about."""
    assert not list(run.rglob(".*draft"))
    for _, folder in checkpoint.complete_checkpoints(run / "checkpoints"):
        for path in folder.glob("*.safetensors"):
            load_file(path)


def test_a_full_disk_ends_the_run_and_keeps_earlier_checkpoints(ends, small_disk: Path | None):
    if small_disk is None:
        pytest.skip("a tmpfs can't be mounted here")
    text = said(ends, "full")
    assert re.search(r"UserError: .*can't be written.*No space left on device.* Make room there", text), text
    assert whole_steps(small_disk / "run")[:1] == [1]
    unbroken_by(small_disk / "run")


def test_a_disk_that_is_full_for_one_rank_alone_ends_all_of_them(ends, good: Path):
    text = said(ends, "one_full")
    assert re.search(r"UserError: the checkpoint of step 4 can't be written to .*: .* Make room there", text), text
    assert whole_steps(good.parent / "one_full") == [1, 2, 3]
    unbroken_by(good.parent / "one_full")


def test_every_rank_names_a_checkpoint_folder_it_cannot_write(ends, good: Path):
    for rank in range(2):
        message = (good.parent / f"checkpoints_taken/refused_{rank}.txt").read_text()
        assert re.search(r"checkpoints_taken/checkpoints/step_00000001: .* make it writable", message), message


def test_a_line_that_can_not_be_written_says_where_and_what_to_do(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere/metrics.jsonl can't be written: No such file.* Make room there"):
        JsonLines(tmp_path / "nowhere/metrics.jsonl").write({"step": 1})
