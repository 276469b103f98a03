"""The guard: what it refuses, and that a refused step and a rollback leave no trace but the one they should.

The runs are made once, by one group of two ranks, on copies of the shards in which some clips are poisoned. Which
batches hold those is computed here from the order of samples.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sora_train.data.order import SampleOrder, batch
from sora_train.data.shards import ShardSet
from sora_train.train import checkpoint
from sora_train.train.guard import (
    HISTORY,
    MAX_SKIP_BEFORE,
    MIN_HISTORY,
    add_norm,
    batches_to_skip,
    describe_batches,
    skip_reason,
)

SETTINGS = {
    "batch_size": 4,
    "micro_batch_size": 2,
    "log_every": 1,
    "checkpoint_every": 1,
    "ema_decay": 0.5,
    "guard_max_consecutive": 3,
    "log_samples": True,
}
KINDS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
NAN_STEPS = 8
STRETCH = (7, 8, 9)  # the batches in a row that are bad
STRETCH_STEPS = 14

norms = st.floats(0, 1e6)


@given(st.lists(norms, max_size=HISTORY), st.floats(1, 100), norms)
def test_a_finite_norm_is_skipped_only_above_spike_times_the_last(recent, spike, norm):
    far = len(recent) >= MIN_HISTORY and norm > spike * max(recent)
    assert bool(skip_reason(norm, loss=1.0, recent=recent, spike=spike)) == far
    assert not skip_reason(norm, loss=1.0, recent=recent, spike=0.0)


@given(st.sampled_from([math.nan, math.inf, -math.inf]), norms, st.floats(0, 100))
def test_values_that_are_not_finite_are_skipped_without_history(bad: float, good: float, spike: float):
    assert skip_reason(bad, loss=good, recent=(), spike=spike) == f"its gradient norm is {bad}"
    assert skip_reason(good, loss=bad, recent=(), spike=spike) == f"its loss is {bad}"


@given(st.lists(norms, max_size=3 * HISTORY))
def test_the_history_holds_the_last_norms(seen: list[float]):
    recent: tuple[float, ...] = ()
    for norm in seen:
        recent = add_norm(recent, norm)
    assert recent == tuple(seen[-HISTORY:])


@given(st.integers(0, 500), st.integers(0, 300), st.integers(1, 10), st.sets(st.integers(0, 900)))
def test_a_rollback_skips_the_bad_batches_and_some_before_them(first: int, good: int, bad: int, skipped: set[int]):
    streak = range(first + good, first + good + bad)
    result = batches_to_skip(first, streak, tuple(skipped))
    assert list(result) == sorted(set(result))
    assert set(result) - skipped <= set(range(first, streak[-1] + 1))
    assert set(result) >= skipped | set(streak) | set(range(max(first, streak[0] - MAX_SKIP_BEFORE), streak[0]))
    assert len(set(result) - skipped) <= bad + MAX_SKIP_BEFORE


def test_the_event_of_a_large_batch_names_twenty_clips_and_counts_the_rest(tiny_shards: Path):
    shards = ShardSet(str(tiny_shards))
    order = shards.sample_order(21, 0)
    (line,) = describe_batches(shards, order, [3], "bad; ")
    assert line == f"bad; batch 3: {' '.join(ids(order, 3)[:20])} and 1 more"


def bad_batches(order: SampleOrder, rows: Sequence[int], count: int) -> list[int]:
    return [k for k in range(count) if set(rows) & set(batch(order, k).rows)]


def stretch_rows(order: SampleOrder) -> list[int]:
    """A row of each of the batches of the stretch, such that no three others in a row hold one of them."""
    for rows in product(*(batch(order, k).rows for k in STRETCH)):
        bad = bad_batches(order, rows, STRETCH_STEPS + 6)
        if [k for k in bad if {k, k + 1, k + 2} <= set(bad)] == [STRETCH[0]]:
            return list(rows)
    raise AssertionError("no such rows: choose another stretch")


@pytest.fixture(scope="module")
def order(tiny_shards: Path) -> SampleOrder:
    return ShardSet(str(tiny_shards)).sample_order(SETTINGS["batch_size"], 0)


@pytest.fixture(scope="module")
def runs(start, order: SampleOrder, poisoned, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs by name."""
    root = tmp_path_factory.mktemp("guard")
    nan = poisoned(tiny_shards, root / "nan", batch(order, NAN_STEPS - 1).rows[:1], math.nan)
    huge = poisoned(tiny_shards, root / "huge", batch(order, 26).rows[:1], 1e3)
    bad = poisoned(tiny_shards, root / "bad", stretch_rows(order), math.nan)
    worst = poisoned(tiny_shards, root / "worst", range(21), math.nan)

    def task(out: str, shards: Path, steps: int, resume: Path | None = None, **changes) -> dict:
        settings = SETTINGS | {"steps": steps} | changes
        return {"out": str(root / out), "shards": str(shards), "train": settings, "resume": resume and str(resume)}

    def stretch(out: str, steps: int = STRETCH_STEPS, resume: Path | None = None, **changes) -> dict:
        return task(out, bad, steps, resume, **{"checkpoint_every": 2} | changes)

    nans = [task(f"{kind}{stage}", nan, NAN_STEPS, zero_stage=stage, precision=kind) for stage, kind in KINDS]
    before = root / "spike_before/checkpoints/step_00000024"
    tasks = [
        *nans[:6],
        task("spike_before", tiny_shards, 24, checkpoint_every=24),
        task("spike", huge, 30, before),
        task("spike_taken", huge, 30, before, guard_spike=0.0),
        stretch("stretch"),
        stretch("killed", resume=root / "stretch/checkpoints/step_00000006"),
        stretch("killed_later", resume=root / "stretch/checkpoints/step_00000008"),
        stretch("amid", 9),
        stretch("amid", resume=root / "amid/checkpoints/step_00000009"),
        stretch("no_checkpoint", checkpoint_every=100),
        stretch("wanted", 12, checkpoint_every=6) | {"noticed": 10},
        stretch("bad_end", 10, checkpoint_every=100),
        task("gave_up", tiny_shards, 6),
        task("gave_up", worst, 20, root / "gave_up/checkpoints/step_00000006", guard_max_rollbacks=1)
        | {"refused": True},
        *nans[6:],  # stage 3 last: it leaves its own linear function in torch
        stretch("fatal", guard_max_rollbacks=0),
    ]
    # One that was killed right after its rollback finds the checkpoint that the rollback went to.
    (root / "killed/checkpoints").mkdir(parents=True)
    (root / "killed/checkpoints/step_00000006").symlink_to(root / "stretch/checkpoints/step_00000006")
    codes, output = start(2, tiny_shards, tasks)()
    assert (root / "fatal").exists(), "\n".join(output)
    assert all(codes), codes
    assert all("UserError: at step 10 3 steps in a row" in text for text in output), "\n".join(output)
    return root


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def events(run: Path, kind: str) -> dict[int, str]:
    """Reasons of one kind of event, by the batch that they name, or else by the step."""
    found = [event for event in lines(run / "events.jsonl") if event["event"] == kind]
    batches = [re.search(r"batch (\d+):", event["reason"]) for event in found]
    return {int(k[1]) if k else event["step"]: event["reason"] for k, event in zip(batches, found, strict=True)}


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in lines(run / "metrics.jsonl")}


def state(run: Path, step: int) -> dict:
    return json.loads((run / f"checkpoints/step_{step:08d}/state.json").read_text())


def standing(run: Path, step: int) -> dict:
    """The state without what names the attempt."""
    return {key: value for key, value in state(run, step).items() if key not in ("token", "crc32", "loss")}


def tensors(run: Path, step: int) -> Iterator[tuple[str, torch.Tensor]]:
    """All that a checkpoint holds, by file and key."""
    for path in sorted((run / f"checkpoints/step_{step:08d}").glob("*.safetensors")):
        for key, tensor in load_file(path).items():
            yield f"{path.name} {key}", tensor


def ids(order: SampleOrder, k: int) -> list[str]:
    return [f"{row:04x}" for row in batch(order, k).rows]


@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_a_step_with_a_poisoned_clip_is_skipped_and_named(runs: Path, order: SampleOrder, stage: int, precision: str):
    run = runs / f"{precision}{stage}"
    bad = bad_batches(order, batch(order, NAN_STEPS - 1).rows[:1], NAN_STEPS)
    assert len(bad) == 2
    skipped = [event for event in lines(run / "events.jsonl") if event["event"] == "skipped"]
    wanted = [(k + 1, f"its loss is nan; batch {k}: {' '.join(ids(order, k))}") for k in bad]
    assert [(event["step"], event["reason"]) for event in skipped] == wanted
    assert losses(run).keys() == {k + 1 for k in range(NAN_STEPS)} - {k + 1 for k in bad}
    assert all(math.isfinite(loss) for loss in losses(run).values())
    last = state(run, NAN_STEPS)
    assert last["updates"] == NAN_STEPS - 2
    assert last["samples_seen"] == sum(len(ids(order, k)) for k in range(NAN_STEPS) if k not in bad)
    assert all(torch.isfinite(tensor).all() for _, tensor in tensors(run, NAN_STEPS))


@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_a_skipped_step_leaves_weights_moments_and_ema_bit_for_bit(runs: Path, stage: int, precision: str):
    before, after = (dict(tensors(runs / f"{precision}{stage}", step)) for step in (NAN_STEPS - 1, NAN_STEPS))
    assert {name.split()[1].split("/")[0] for name in before} >= {"weights", "exp_avg", "exp_avg_sq", "ema"}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    earlier = dict(tensors(runs / f"{precision}{stage}", NAN_STEPS - 2))  # as any other step would have changed them
    assert not all(torch.equal(before[name], earlier[name]) for name in before)


def test_all_stages_skip_alike(runs: Path):
    for precision, tolerance in (("fp32", 1e-6), ("bf16", 0.02)):
        for stage in (1, 2, 3):
            assert losses(runs / f"{precision}{stage}") == pytest.approx(losses(runs / f"{precision}0"), rel=tolerance)


def test_a_gradient_spike_is_skipped_unless_the_recipe_allows_it(runs: Path, order: SampleOrder):
    (k,) = (k for k in bad_batches(order, batch(order, 26).rows[:1], 30) if k >= 24)
    reason = events(runs / "spike", "skipped")[k]
    assert "far beyond the last 2" in reason
    assert reason.endswith(" ".join(ids(order, k)))
    assert (state(runs / "spike", 30)["updates"], state(runs / "spike_taken", 30)["updates"]) == (29, 30)
    assert not events(runs / "spike_taken", "skipped")
    taken = {record["step"]: record["grad_norm"] for record in lines(runs / "spike_taken/metrics.jsonl")}
    assert taken[k + 1] > 5 * max(norm for step, norm in taken.items() if step <= k)


@pytest.fixture(scope="module")
def bad(order: SampleOrder) -> list[int]:
    """The bad batches of the run with a stretch of them."""
    return bad_batches(order, stretch_rows(order), STRETCH_STEPS + 6)


def test_several_bad_steps_roll_back_to_the_last_good_checkpoint(runs: Path, order: SampleOrder, bad: list[int]):
    run, gone = runs / "stretch", range(6, 10)  # checkpoint 6 is next at batch 6
    (why,) = events(run, "rollback").values()
    assert why == "3 bad steps in a row; back to step_00000006"
    assert events(run, "left_out") == {k: f"batch {k}: {' '.join(ids(order, k))}" for k in gone}
    taken = [k for k in range(STRETCH_STEPS + len(gone)) if k not in gone]
    good = [step for step, k in enumerate(taken, 1) if k not in bad]
    assert list(losses(run)) == good  # in this order and once each: the metrics were cut back
    last = state(run, STRETCH_STEPS)
    assert (last["step"], last["updates"], last["rollbacks"]) == (STRETCH_STEPS, len(good), 1)
    assert last["skipped"] == list(gone)
    assert events(run, "skipped").keys() == {k for k in bad if k in taken} | set(STRETCH)


def test_every_clip_of_an_epoch_is_trained_once_or_named(runs: Path, order: SampleOrder):
    run, whole = runs / "stretch", {f"{row:04x}": 1 for row in range(21)}
    named = events(run, "skipped").keys() | events(run, "left_out").keys()
    trained: dict[int, list[str]] = {}
    for rank in range(2):
        last = {line["step"]: line for line in lines(run / f"trained/rank_{rank:05d}.jsonl")}
        for line in last.values():
            trained.setdefault(line["batch"], []).extend(line["sample_ids"])
    assert {k for k, clips in trained.items() if clips}.isdisjoint(named)
    for epoch in range(3):
        clips = Counter[str]()
        for k in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            clips.update(ids(order, k) if k in named else trained[k])
        assert clips == whole


@pytest.mark.parametrize("name", ["killed", "killed_later", "amid"])
def test_a_run_killed_around_a_rollback_equals_the_unbroken_one(runs: Path, name: str):
    unbroken, again = losses(runs / "stretch"), losses(runs / name)
    first = {"killed": 6, "killed_later": 8, "amid": 0}[name]
    assert again == {step: loss for step, loss in unbroken.items() if step > first}
    assert standing(runs / name, STRETCH_STEPS) == standing(runs / "stretch", STRETCH_STEPS)
    ends = [dict(tensors(runs / each, STRETCH_STEPS)) for each in ("stretch", name)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_checkpoint_requested_during_a_rollback_is_saved_next(runs: Path):
    assert events(runs / "wanted", "rollback").keys() == {10}
    made = [step for step, _ in checkpoint.complete_checkpoints(runs / "wanted/checkpoints")]
    assert made == [6, 7, 10, 12]  # 7 is the one wanted at 10; as step 10 comes again, it is wanted again


def test_without_a_checkpoint_a_rollback_continues_in_place(runs: Path, bad: list[int]):
    run = runs / "no_checkpoint"
    (why,) = events(run, "rollback").values()
    assert "no checkpoint is there yet" in why
    last = state(run, STRETCH_STEPS)
    assert (last["skipped"], last["rollbacks"]) == ([], 1)
    assert last["updates"] == STRETCH_STEPS - sum(k < STRETCH_STEPS for k in bad)
    assert not events(run, "left_out")


def test_a_run_whose_last_steps_are_bad_still_ends_with_a_checkpoint(runs: Path, bad: list[int]):
    assert state(runs / "bad_end", 10)["updates"] == 10 - sum(k < 10 for k in bad)


def test_too_many_rollbacks_end_every_rank_and_keep_the_checkpoint(runs: Path):
    messages = [(runs / f"gave_up/refused_{rank}.txt").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    for word in ("at step 9 3 steps in a row", "after 1 rollback", "events.jsonl", "train.guard_max_rollbacks"):
        assert word in messages[0]
    for name in ("gave_up", "fatal"):  # that the second's ranks ended with an error, `runs` has seen
        last, _ = checkpoint.complete_checkpoints(runs / name / "checkpoints")[-1]
        assert last == 6
        assert all(torch.isfinite(tensor).all() for _, tensor in tensors(runs / name, last))
