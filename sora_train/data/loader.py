"""The micro-batches of a run's batches, read and collated ahead of the loop by one thread."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sora_train.data.collate import MicroBatch, collate
from sora_train.data.order import Plan, batch, share
from sora_train.data.shards import ShardSet
from sora_train.diffusion import Objective


def micro_batches(
    shards: ShardSet,
    plan: Plan,
    objective: Objective,
    number: int,
    *,
    rank: int = 0,
    world: int = 1,
    micro_batch_size: int,
    caption_dropout: float,
    null_prompt: str = "eos",
) -> list[MicroBatch]:
    """What one rank takes of a batch of the run; on every rank equally many micro-batches, of equal size.

    A pure function: what chance adds to a clip hangs on the batch's number, whichever step takes it. Raises UserError
    where a shard can't be read.
    """
    taken = batch(plan, number)
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
                step=number,
                caption_dropout=caption_dropout,
                null_prompt=null_prompt,
            )
        )
    return result


def batches(
    shards: ShardSet,
    plan: Plan,
    objective: Objective,
    numbers: Iterable[int],
    *,
    rank: int = 0,
    world: int = 1,
    micro_batch_size: int,
    caption_dropout: float,
    null_prompt: str = "eos",
    ahead: int = 2,
    device: torch.device | None = None,
) -> Generator[tuple[int, list[MicroBatch]], None, None]:
    """(number, its micro-batches) for each of the batches `numbers`, up to `ahead` made before they are asked for, in
    pinned memory where `device` is a GPU.

    An error of the thread is raised here, at the batch it belongs to. The time spent in `next` is the wait for data.
    `close()` returns at once: what is not begun is given up, and the thread ends with the batch that it has in hand.
    """

    def make(number: int) -> tuple[int, list[MicroBatch]]:
        made = micro_batches(
            shards,
            plan,
            objective,
            number,
            rank=rank,
            world=world,
            micro_batch_size=micro_batch_size,
            caption_dropout=caption_dropout,
            null_prompt=null_prompt,
        )
        if device is None or device.type != "cuda":
            return number, made
        with torch.cuda.device(device):  # a thread begins at GPU 0, which would get a context of every process
            return number, [micro.pinned() for micro in made]

    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
    pending: deque[Future[tuple[int, list[MicroBatch]]]] = deque()
    try:
        for number in numbers:
            pending.append(pool.submit(make, number))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
