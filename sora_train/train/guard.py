"""The guard: skips bad steps, and rolls back after several in a row.

It decides by numbers that are the same on all ranks, so all ranks decide alike. Resuming from before the trouble and
skipping the batches around it follows PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist

from sora_train.data.order import SampleOrder, batch, batch_number
from sora_train.data.shards import ShardSet
from sora_train.errors import UserError
from sora_train.train import checkpoint
from sora_train.train.config import TrainConfig
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine
from sora_train.train.load_checkpoint import load_checkpoint
from sora_train.train.run_dir import RunDir
from sora_train.train.state import State, with_clips

HISTORY = 100
"""How many gradient norms of good steps are kept."""
MIN_HISTORY = 20
"""With fewer norms, only steps that are not finite are skipped."""
MAX_IDS = 20
"""Clips of a batch that its event names; a batch of images may have thousands."""
MAX_SKIP_BEFORE = 100
"""Most batches before the first bad one that a rollback skips too."""


def skip_reason(norm: float, *, loss: float, recent: Sequence[float], spike: float) -> str:
    """Why a step must be skipped, or an empty string.

    `norm` is the global gradient norm before clipping, `recent` those of the last good steps. A norm above `spike`
    times the largest of them is a reason.
    """
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    if not math.isfinite(norm):
        return f"its gradient norm is {norm}"
    if spike and len(recent) >= MIN_HISTORY and norm > spike * max(recent):
        return f"its gradient norm {norm:.4g} is far beyond the last {len(recent)}, of at most {max(recent):.4g}"
    return ""


def add_norm(recent: tuple[float, ...], norm: float) -> tuple[float, ...]:
    """The recent norms after one more good step."""
    return (*recent, norm)[-HISTORY:]


def batches_to_skip(first: int, streak: Sequence[int], skipped: Sequence[int]) -> tuple[int, ...]:
    """All batches to skip, sorted, when a run rolls back to where batch `first` is next.

    Those skipped so far, the bad ones (`streak`), and up to `MAX_SKIP_BEFORE` before these.
    """
    begin = max(first, streak[0] - MAX_SKIP_BEFORE)
    return tuple(sorted({*skipped, *range(begin, streak[-1] + 1)}))


def rollback(
    state: State, config: TrainConfig, run_dir: RunDir, shards: ShardSet, order: SampleOrder, engine: Engine, ema: Ema
) -> State:
    """Loads the last good checkpoint and returns its state, with the batches around the bad steps skipped.

    Without a checkpoint the run continues from where it is, since skipped steps changed nothing. Collective. Raises
    UserError after `guard_max_rollbacks` rollbacks.
    """
    first_bad = state.step - len(state.streak)
    if state.rollbacks >= config.guard_max_rollbacks:
        run_dir.wait()
        raise UserError(
            f"at step {state.step} {len(state.streak)} steps in a row had to be skipped, after {state.rollbacks} "
            "rollbacks; events.jsonl of the run names some clips. Lower train.learning_rate, look at those clips with "
            "`sora inspect`, or raise train.guard_max_rollbacks",
            code="diverged",
        )
    folder = run_dir.newest_checkpoint(first_bad)
    if folder is not None and folder.name == checkpoint.name_of(state.back_at):
        folder = run_dir.newest_checkpoint(state.back_at - 1) or folder  # that one led to bad steps before
    back = state if folder is None else load_checkpoint(folder, engine, ema)
    skipped = tuple(sorted({*state.skipped, *back.skipped}))
    if back.clips not in ("", state.clips):  # saved before `--new-data`: a new order begins, which repeats no batch
        skipped, back = back.skipped, with_clips(back, state.clips, order.epoch(state.streak[-1]))
    elif folder is not None:
        skipped = batches_to_skip(batch_number(back.step, skipped), state.streak, skipped)
    if dist.get_rank() == 0:
        to = "no checkpoint is there yet: goes on with what comes next" if folder is None else f"back to {folder.name}"
        run_dir.log_event_later("rollback", state.step, lambda: [f"{len(state.streak)} bad steps in a row; {to}"])
        newly_skipped = sorted(set(skipped) - set(state.skipped))
        run_dir.log_event_later("left_out", back.step, lambda: describe_batches(shards, order, newly_skipped))
        run_dir.truncate(back.step)
    at = state.back_at if folder is None else back.step
    return replace(back, skipped=skipped, streak=(), rollbacks=state.rollbacks + 1, back_at=at)


def describe_batches(shards: ShardSet, order: SampleOrder, numbers: Sequence[int], before: str = "") -> list[str]:
    """A line for each batch with its first sample ids. Reads each row group once for all of them."""
    taken = [batch(order, number) for number in numbers]
    shown = [replace(one, rows=one.rows[:MAX_IDS]) for one in taken]
    ids: dict[tuple[str, int], str] = {}
    for bucket in {one.bucket for one in taken}:
        rows = sorted({row for one in shown if one.bucket == bucket for row in one.rows})
        ids |= {(bucket, row): name for row, name in zip(rows, shards.sample_ids(bucket, rows), strict=True)}
    return [
        f"{before}batch {number}: {' '.join(ids[one.bucket, row] for row in one.rows)}"
        + (f" and {len(whole.rows) - MAX_IDS} more" if len(whole.rows) > MAX_IDS else "")
        for number, whole, one in zip(numbers, taken, shown, strict=True)
    ]
