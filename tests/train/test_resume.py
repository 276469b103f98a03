"""Resuming: a checkpoint goes on at another number of ranks and another ZeRO stage as if nothing had happened.

Four ranks make unbroken runs; their checkpoints are read by four, two, one and three.
"""

import json
from pathlib import Path

import pytest
import ranks
from reading import KINDS, at_step, checkpoint_at, distance, losses, parts, records, without_key_biases

LAST, HELD = 9, 4
SETTINGS = {
    "steps": LAST,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 3,
    "schedule": "cosine",
    "weight_decay": 0.01,
    "gradient_clip": 0.3,
    "log_every": 1,
    "checkpoint_every": HELD,
    "ema_decay": 0.9,
}
SAME = ["zero0", "zero1", "zero2", "zero3", "bf16_zero1", "bf16_zero3", "wan_zero2", "given_zero1"]
OTHER = {
    2: [(1, 1), (2, 2), (0, 2), (2, 0), (3, 3), (2, 3)],
    1: [(1, 1), (2, 2), (3, 2), (3, 0), (3, 3), (1, 3)],
    3: [(1, 1), (2, 2), (3, 1), (3, 3), (0, 3)],
}
"""Stages written and read, by ranks that read."""


@pytest.fixture(scope="module")
def runs(start, alive: str, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """zeroS: unbroken on four ranks; zeroS_again: the same from HELD on; AtoB_onN: stage A's, on N ranks at stage B."""
    root = tmp_path_factory.mktemp("runs")

    def task(world: int, out: str, stage: int, resume: str | None = None, **changes) -> dict:
        from_ = resume and str(checkpoint_at(root / resume, HELD))
        train = SETTINGS | {"zero_stage": stage, "micro_batch_size": -(-4 // world)} | changes
        made = {"out": str(root / out), "train": train, "resume": from_}
        made |= {"conditioning": {"probability": 0.5}} if out.startswith("given") else {}
        return made | ({"model": ranks.WAN} if out.startswith("wan") else {"init_from": alive})

    def finished(*ends) -> None:
        for end in ends:
            codes, output = end()
            assert not any(codes), "\n".join(output)

    four = []
    for name in sorted(SAME, key=lambda name: name[-1]):  # stage 3 last: it changes what comes after it
        stage, changes = int(name[-1]), {"precision": "bf16"} if "bf16" in name else {}
        four += [task(4, name, stage, **changes), task(4, f"{name}_again", stage, name, **changes)]
    finished(start(4, tiny_shards, four))
    ends = []
    for world, pairs in OTHER.items():
        pairs = sorted(pairs, key=lambda pair: pair[1])
        tasks = [task(world, f"{a}to{b}_on{world}", b, f"zero{a}") for a, b in pairs]
        tasks += [task(world, f"{a}to{b}_on{world}_written", b, f"zero{a}") | {"act": "write_again"} for a, b in pairs]
        tasks.append(task(world, f"wan2to3_on{world}", 3, "wan_zero2"))
        ends.append(start(world, tiny_shards, tasks))
    finished(*ends)
    return root


def carried(folder: Path) -> dict:
    """What `state.json` says of the run, and not of who wrote it."""
    about = json.loads((folder / "state.json").read_text())
    return {key: value for key, value in about.items() if key not in ("world_size", "zero_stage", "token", "crc32")}


@pytest.mark.parametrize("name", SAME)
def test_the_same_ranks_at_the_same_stage_go_on_bit_for_bit(runs: Path, name: str):
    again, unbroken = runs / f"{name}_again", runs / name
    assert losses(again) == {step: loss for step, loss in losses(unbroken).items() if step > HELD}
    for kind in KINDS:
        assert distance(at_step(again, LAST, kind), at_step(unbroken, LAST, kind)) == 0
    assert carried(checkpoint_at(again, LAST)) == carried(checkpoint_at(unbroken, LAST))


PAIRS = [(world, a, b) for world, pairs in OTHER.items() for a, b in pairs]


@pytest.mark.parametrize(("world", "a", "b"), PAIRS)
def test_other_world_sizes_and_stages_repeat_the_unbroken_losses(runs: Path, world: int, a: int, b: int):
    repeats(runs / f"{a}to{b}_on{world}", runs / f"zero{a}")


@pytest.mark.parametrize("world", OTHER)
def test_wan_goes_on_at_other_world_sizes_as_well(runs: Path, world: int):
    repeats(runs / f"wan2to3_on{world}", runs / "wan_zero2")


def repeats(again: Path, unbroken: Path) -> None:
    """Both runs record the same steps from HELD on, and end with the same state but for rounding."""
    expected = [record for record in records(unbroken) if record["step"] > HELD]
    for key in ("step", "samples_seen", "epoch", "lr"):
        assert [record[key] for record in records(again)] == [record[key] for record in expected]
    for key in ("loss", "grad_norm"):
        told = [record[key] for record in records(again)]
        assert told == pytest.approx([record[key] for record in expected], rel=1e-6 if key == "loss" else 1e-5)
    for kind in KINDS:
        two = [without_key_biases(at_step(run, LAST, kind)) for run in (again, unbroken)]
        assert distance(*two) < 1e-6


@pytest.mark.parametrize(("world", "a", "b"), PAIRS)
def test_a_checkpoint_rewritten_elsewhere_is_the_same_to_the_bit(runs: Path, world: int, a: int, b: int):
    written, source = runs / f"{a}to{b}_on{world}_written", checkpoint_at(runs / f"zero{a}", HELD)
    for kind in KINDS:
        assert distance(parts(written, kind), parts(source, kind)) == 0
    assert carried(written) == carried(source)
    assert len(carried(written)["norms"]) == HELD
    assert carried(written)["updates"] == HELD
