"""Compares the clips a run was trained on, by the ranks' records, with those it should have been.

A rank writes a line for each step it has done (`train.log_samples`). Lines of steps that a resume or a rollback undid
stay in the files: of several attempts at a step the last holds, and in an attempt a rank's last line for it.
"""

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from sora_train.data.order import SampleOrder, batch, batch_number
from sora_train.data.shards import ShardSet
from sora_train.recipe import load_recipe
from sora_train.train.checkpoint import complete_checkpoints, read_state
from tests.drills.commands import lines


@dataclass(frozen=True)
class Account:
    """Counts over a finished run's final history."""

    lost: int
    """Clips of an epoch that were neither trained on nor named in `events.jsonl`."""
    repeated: int
    """Clips that were trained on more than once per epoch, or although named as skipped."""
    named: int
    """Clips that `events.jsonl` names as skipped."""
    again: int
    """Steps that were done and then repeated."""
    unseen: int
    """Clips that `state.json` counts but no rank recorded."""


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(run / "metrics.jsonl") if "validation" not in line}


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in lines(run / "events.jsonl") if event["event"] == kind]


def difference(run: Path, unbroken: Path, until: int | None = None) -> float:
    """The largest relative difference of a step's loss to the undisturbed run; infinite if steps are missing."""
    ours, theirs = losses(run), losses(unbroken)
    steps = [step for step in theirs if until is None or step <= until]
    if missing := [step for step in steps if step not in ours]:
        print(f"    {len(missing)} steps are not in metrics.jsonl: {missing}", flush=True)
        return math.inf
    return max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in steps)


def account(run: Path, shards: Path) -> Account:
    """Counts clips by epoch: each training clip of `shards` must occur once, except those named as skipped."""
    recipe = load_recipe(run / "recipe.yaml")
    train, clips = recipe.train, ShardSet(str(shards), recipe.data.holdout_fraction, "train")
    order, ids = clips.sample_order(train.batch_size, train.seed), ids_of(clips)
    state = read_state(complete_checkpoints(run / "checkpoints")[-1][1])
    assert state is not None
    assert state["step"] == train.steps, f"{run} stands at step {state['step']} of {train.steps}"
    batches = batch_number(train.steps - 1, state["skipped"]) + 1  # that the run went through, left out ones too

    by_rank = [lines(path) for path in sorted((run / "trained").glob("rank_*.jsonl"))]
    last = dict(sorted((line["step"], line["attempt"]) for said in by_rank for line in said))  # attempt at each step
    trained: dict[int, Counter] = defaultdict(Counter)
    for said in by_rank:
        for line in {line["step"]: line for line in said if line["attempt"] == last[line["step"]]}.values():
            trained[order.epoch(line["batch"])].update(line["sample_ids"])
    again = len(by_rank[0]) - len(last)  # rank 0 is there at any world size

    named: dict[int, set[str]] = defaultdict(set)
    for event in events(run, "skipped") + events(run, "left_out"):
        found = re.search(r"batch (\d+): (.+)", event["reason"])
        assert found is not None, f"no clips are named: {event}"
        named[order.epoch(int(found[1]))].update(found[2].split())

    lost = repeated = 0
    for epoch, wanted in by_epoch(order, batches, clips, ids).items():
        wanted = wanted - Counter(named[epoch])
        lost += (wanted - trained[epoch]).total()
        repeated += (trained[epoch] - wanted).total()
    unseen = state["samples_seen"] - sum(counts.total() for counts in trained.values())
    return Account(lost, repeated, sum(map(len, named.values())), again, unseen)


def ids_of(clips: ShardSet) -> list[str]:
    return [name for bucket, rows in clips.rows.items() for name in clips.sample_ids(bucket, range(rows))]


def by_epoch(order: SampleOrder, batches: int, clips: ShardSet, ids: list[str]) -> dict[int, Counter]:
    """Clips that these batches must hold: each once per full epoch, in the last epoch by the order of samples."""
    whole_epochs, rest = divmod(batches, order.steps_per_epoch)
    wanted = {epoch: Counter(ids) for epoch in range(whole_epochs)}
    for number in range(batches - rest, batches):
        taken = batch(order, number)
        wanted.setdefault(whole_epochs, Counter()).update(clips.sample_ids(taken.bucket, taken.rows))
    return wanted
