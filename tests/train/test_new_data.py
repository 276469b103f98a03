"""Going on with other clips: an epoch of them begins, and whoever is killed after that repeats the unbroken run."""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import KINDS, at_step, checkpoint_at, distance, losses, records

from sora_train import schema
from sora_train.data.order import SampleOrder, batch
from sora_train.data.shards import ShardSet

BATCH, BEFORE, OLD, NEW = 4, 4, 21, 25
EPOCH = -(-NEW // BATCH)
LAST, HELD = BEFORE + 2 * EPOCH, 10
SETTINGS = {
    "batch_size": BATCH,
    "micro_batch_size": 2,
    "learning_rate": 1e-3,
    "log_every": 1,
    "log_samples": True,
    "checkpoint_every": 5,
    "ema_decay": 0.9,
    "zero_stage": 1,
}


@pytest.fixture(scope="module")
def more_shards(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny shards without their first clip, and with five more in a file of its own."""
    folder, random = tmp_path_factory.mktemp("more"), np.random.default_rng(1)
    (folder / "manifest.json").write_bytes((tiny_shards / "manifest.json").read_bytes())
    place = folder / "bucket=2x32x32"
    place.mkdir()
    before = pq.read_table(tiny_shards / "bucket=2x32x32/part.parquet")
    rows = before.slice(1, 5).to_pylist()
    for i, row in enumerate(rows):
        row |= {"sample_id": f"new{i}", "source": f"new{i}.mp4"}
        row["latents"] = random.standard_normal((1, 2, 4, 4, 4)).astype(np.float16).tobytes()
    pq.write_table(before.slice(1), place / "part-a.parquet", row_group_size=8)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.SHARD_SCHEMA), place / "part-b.parquet", row_group_size=8)
    return folder


@pytest.fixture(scope="module")
def order(more_shards: Path) -> SampleOrder:
    """The order of the new clips, from the epoch that begins where the old ones end."""
    return replace(ShardSet(str(more_shards)).sample_order(BATCH, 0), origin=BEFORE, epochs=1)


@pytest.fixture(scope="module")
def bad(order: SampleOrder) -> set[int]:
    """A row of each of the first two batches of new clips. In the next epoch's order no two batches in a row hold one,
    and not the batch of step HELD, so that its checkpoint is made.
    """
    later = replace(order, epochs=2)
    for rows in product(batch(order, BEFORE).rows, batch(order, BEFORE + 1).rows):
        taken = [k for k in range(BEFORE, LAST) if set(rows) & set(batch(later, k).rows)]
        if HELD - 1 not in taken and all(k + 1 not in taken for k in taken):
            return set(rows)
    raise AssertionError("no such rows: choose another seed")


@pytest.fixture(scope="module")
def runs(
    start, alive: str, bad: set[int], poisoned, tiny_shards: Path, more_shards: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """old: BEFORE steps on the old clips; new: on from there on the new ones; again: new, on from HELD; alone: new and
    again on one rank each, from the two ranks' checkpoints; back: new, but its first two batches are bad, so the guard
    goes back to the checkpoint of the old clips; back_again: back, on from HELD.
    """
    root = tmp_path_factory.mktemp("runs")
    worse = poisoned(more_shards, root / "worse", bad, math.nan)
    (root / "back/checkpoints").mkdir(parents=True)
    checkpoint_at(root / "back", BEFORE).symlink_to(checkpoint_at(root / "old", BEFORE))

    def task(out: str, resume: str | None, step: int, steps: int, shards: Path = more_shards, **changes) -> dict:
        from_ = resume and str(checkpoint_at(root / resume, step))
        return {"out": str(root / out), "train": SETTINGS | {"steps": steps} | changes, "resume": from_,
                "init_from": alive, **({"shards": str(shards)} if resume else {})}  # fmt: skip

    two = [
        task("old", None, 0, BEFORE),
        task("new", "old", BEFORE, LAST),
        task("again", "new", HELD, LAST),
        task("back", "old", BEFORE, LAST, worse, guard_max_consecutive=2),
        task("back_again", "back", HELD, LAST, worse, guard_max_consecutive=2),
    ]
    for world, tasks in ((2, two), (1, [task("alone", "old", BEFORE, LAST)])):
        codes, output = start(world, tiny_shards, tasks)()
        assert not any(codes), "\n".join(output)
    return root


def trained(run: Path) -> dict[int, list[str]]:
    """Ids by step, of all ranks."""
    found: dict[int, list[str]] = {}
    for path in sorted((run / "trained").glob("*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault(line["step"], []).extend(line["sample_ids"])
    return found


@pytest.mark.parametrize("name", ["new", "alone"])
def test_every_epoch_after_new_data_takes_every_clip_once(runs: Path, name: str):
    taken = trained(runs / name)
    assert sorted(taken) == list(range(BEFORE + 1, LAST + 1))
    epochs = [Counter(id for step in range(first, first + EPOCH) for id in taken[step])
              for first in (BEFORE + 1, BEFORE + 1 + EPOCH)]  # fmt: skip
    ids = {f"{i:04x}" for i in range(1, OLD)} | {f"new{i}" for i in range(5)}
    assert epochs == [Counter(ids), Counter(ids)]
    assert [record["epoch"] for record in records(runs / name)] == [1] * EPOCH + [2] * EPOCH


def test_a_run_killed_after_new_data_equals_the_unbroken_one(runs: Path):
    assert losses(runs / "again") == {step: loss for step, loss in losses(runs / "new").items() if step > HELD}
    for kind in KINDS:
        assert distance(at_step(runs / "again", LAST, kind), at_step(runs / "new", LAST, kind)) == 0
    assert {step: ids for step, ids in trained(runs / "new").items() if step > HELD} == trained(runs / "again")


def test_new_data_at_another_world_size_is_the_same_training(runs: Path):
    assert {step: sorted(ids) for step, ids in trained(runs / "alone").items()} == {
        step: sorted(ids) for step, ids in trained(runs / "new").items()
    }
    assert list(losses(runs / "alone").values()) == pytest.approx(list(losses(runs / "new").values()), rel=1e-5)


def test_a_checkpoint_says_which_clips_its_order_is_over(runs: Path):
    old, new = (json.loads((checkpoint_at(runs / name, step) / "state.json").read_text())
                for name, step in (("old", BEFORE), ("new", LAST)))  # fmt: skip
    assert (old["data_from"], old["data_epoch"]) == (0, 0)
    assert (new["data_from"], new["data_epoch"], new["epoch"]) == (BEFORE, 1, 2)
    assert old["clips"] != new["clips"]


def test_a_rollback_behind_new_data_begins_an_epoch_of_new_clips(
    runs: Path, order: SampleOrder, bad: set[int], more_shards: Path
):
    events = [json.loads(line) for line in (runs / "back/events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["reason"]) for event in events if event["event"] == "rollback"] == [
        (BEFORE + 2, f"2 bad steps in a row; back to step_{BEFORE:08d}")
    ]
    later, ids = replace(order, epochs=2), ShardSet(str(more_shards)).sample_ids
    taken = {k: batch(later, k) for k in range(BEFORE, LAST)}
    expected = {k + 1: sorted(ids(one.bucket, list(one.rows))) for k, one in taken.items() if not bad & set(one.rows)}
    assert {step: sorted(names) for step, names in trained(runs / "back").items() if names} == expected
    assert losses(runs / "back").keys() == expected.keys()
    state = json.loads((checkpoint_at(runs / "back", LAST) / "state.json").read_text())
    assert (state["data_from"], state["data_epoch"], state["rollbacks"]) == (BEFORE, 2, 1)
    assert state["updates"] == BEFORE + len(expected)


def test_a_run_killed_after_that_equals_the_unbroken_one(runs: Path):
    assert losses(runs / "back_again") == {step: loss for step, loss in losses(runs / "back").items() if step > HELD}
    for kind in KINDS:
        assert distance(at_step(runs / "back_again", LAST, kind), at_step(runs / "back", LAST, kind)) == 0
