"""Checkpoints of many parts: a rank opens its share of the files, and what it loads is exact to the bit.

The ranks are threads with the closed form of ZeRO's layout; test_resume.py compares with DeepSpeed's in few processes.
"""

from pathlib import Path

import pytest
import torch

from sora_train.train import checkpoint
from tests.drills.simulated import counted_opens, load_in_threads, random_weights, write_part

SHAPES = {f"blocks.{i}.weight": torch.Size((37, 13)) for i in range(6)} | {
    "a": torch.Size((3,)),
    "b": torch.Size((70,)),
}
WHOLE = random_weights(SHAPES)


def write(folder: Path, stage: int, world: int) -> Path:
    for rank in range(world):
        write_part(folder, WHOLE, SHAPES, stage, rank, world)
    return folder


@pytest.fixture(scope="module")
def of_64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("many") / "step_00000007", 1, 64)


def parts_read(opened: dict[str, list[str]]) -> list[list[str]]:
    """The parts that each rank opened."""
    return [[name for name in names if name.startswith("part_")] for who, names in opened.items() if "rank" in who]


def test_a_rank_of_the_same_world_size_opens_its_own_part_alone(of_64: Path):
    opened = parts_read(load_in_threads(of_64, WHOLE, SHAPES, 1, 64))
    assert sorted(opened) == [[checkpoint.part_name(rank, 64)] for rank in range(64)]


@pytest.mark.parametrize("world", [1, 5, 16])
def test_fewer_ranks_read_each_part_once(of_64: Path, world: int):
    opened = parts_read(load_in_threads(of_64, WHOLE, SHAPES, 1, world))
    assert max(map(len, opened)) == -(-64 // world)
    assert sorted(name for names in opened for name in names) == [checkpoint.part_name(rank, 64) for rank in range(64)]


@pytest.mark.parametrize(("written", "read"), [(0, 1), (0, 3), (1, 0), (1, 3), (3, 0), (3, 1), (3, 3), (0, 0)])
def test_more_ranks_at_any_stage_open_at_most_one_part_each(tmp_path: Path, written: int, read: int):
    opened = parts_read(load_in_threads(write(tmp_path, written, 6), WHOLE, SHAPES, read, 16))
    assert max(map(len, opened)) == 1


def test_a_complete_checkpoint_is_opened_once_however_often_it_is_asked_for(tmp_path: Path):
    folder = write(tmp_path / "step_00000007", 1, 32)
    with counted_opens() as first:
        assert checkpoint.read_state(folder)
    with counted_opens() as again:
        assert checkpoint.complete_checkpoints(tmp_path) == [(7, folder)]
        assert not checkpoint.is_unfinished(folder)
    assert sum(map(len, first.values())) == 33
    assert not again
    part = folder / checkpoint.part_name(3, 32)
    part.write_bytes(part.read_bytes()[:-1])
    assert checkpoint.check_complete(folder) == f"its {part.name} is cut short or damaged"


def test_a_part_of_another_attempt_is_noticed_by_who_reads_it(tmp_path: Path):
    folder = write(tmp_path, 1, 4)
    about = checkpoint.read_state(folder)
    assert about is not None
    with pytest.raises(checkpoint.UserError, match="part_00001_of_00004.*of another attempt"):
        list(checkpoint.read_parts(folder, about | {"token": "another"}, [1], checkpoint.KINDS))
