"""The micro-batches of a run's steps, read and collated ahead of the loop by one thread."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from sora_train.data.collate import MicroBatch, collate
from sora_train.data.order import Plan, batch, share
from sora_train.data.shards import ShardSet
from sora_train.diffusion import Objective


def micro_batches(
    shards: ShardSet,
    plan: Plan,
    objective: Objective,
    step: int,
    *,
    rank: int = 0,
    world: int = 1,
    micro_batch_size: int,
    caption_dropout: float,
) -> list[MicroBatch]:
    """What one rank takes at a step; on every rank equally many micro-batches, of equal size. A pure function."""
    taken = batch(plan, step)
    result: list[MicroBatch] = []
    for rows in share(taken, rank, world, micro_batch_size, plan.batch_size):
        real = [row for row in rows if row is not None]
        padding = len(rows) - len(real)
        clips = shards.read(taken.bucket, real + (real or list(taken.rows))[:1] * padding)
        result.append(
            collate(
                clips,
                padding,
                manifest=shards.manifest,
                objective=objective,
                seed=plan.seed,
                step=step,
                caption_dropout=caption_dropout,
            )
        )
    return result


def batches(
    shards: ShardSet,
    plan: Plan,
    objective: Objective,
    steps: Iterable[int],
    *,
    rank: int = 0,
    world: int = 1,
    micro_batch_size: int,
    caption_dropout: float,
    ahead: int = 2,
) -> Generator[tuple[int, list[MicroBatch]], None, None]:
    """(step, its micro-batches) for each of `steps`, up to `ahead` steps made before they are asked for.

    An error of the thread is raised here, at the step it belongs to. The time spent in `next` is the wait for data.
    """

    def make(step: int) -> tuple[int, list[MicroBatch]]:
        return step, micro_batches(
            shards,
            plan,
            objective,
            step,
            rank=rank,
            world=world,
            micro_batch_size=micro_batch_size,
            caption_dropout=caption_dropout,
        )

    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
    pending: deque[Future[tuple[int, list[MicroBatch]]]] = deque()
    try:
        for step in steps:
            pending.append(pool.submit(make, step))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
