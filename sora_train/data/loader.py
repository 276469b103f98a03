"""The data loader: one thread reads and collates micro-batches ahead of the loop, which copies them to its device."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import torch

from sora_train.data.collate import MicroBatch, collate
from sora_train.data.order import SampleOrder, batch, share
from sora_train.data.shards import ShardSet
from sora_train.diffusion import Objective


def micro_batches(
    shards: ShardSet,
    order: SampleOrder,
    objective: Objective,
    number: int,
    *,
    rank: int = 0,
    world: int = 1,
    micro_batch_size: int | Mapping[str, int],
    caption_dropout: float,
    null_prompt: str = "eos",
) -> list[MicroBatch]:
    """One rank's micro-batches of a batch; all ranks get equally many, of equal size, which buckets may have their own.

    A pure function: everything random depends on the batch's number, not on the step that takes it. Raises UserError
    if a shard can't be read.
    """
    taken = batch(order, number)
    result: list[MicroBatch] = []
    size = micro_batch_size if isinstance(micro_batch_size, int) else micro_batch_size[taken.bucket]
    for rows in share(taken, rank, world, size):
        real = [row for row in rows if row is not None]
        padding = len(rows) - len(real)
        clips = shards.read(taken.bucket, real + (real or list(taken.rows))[:1] * padding)
        result.append(
            collate(
                clips,
                padding,
                manifest=shards.manifest,
                objective=objective,
                seed=order.seed,
                step=number,
                caption_dropout=caption_dropout,
                null_prompt=null_prompt,
            )
        )
    return result


def batches(
    make: Callable[[int], list[MicroBatch]],
    numbers: Iterable[int],
    *,
    ahead: int = 2,
    device: torch.device | None = None,
) -> Generator[tuple[int, list[MicroBatch]], None, None]:
    """Yields (number, make(number)) for each batch of `numbers`, made in a thread up to `ahead` batches in advance.

    They are in pinned memory if `device` is a GPU. An error of the thread is raised at the batch it belongs to. The
    time spent in `next` is the wait for data. `close()` returns at once; the thread ends after its current batch.
    """

    def make_pinned(number: int) -> tuple[int, list[MicroBatch]]:
        made = make(number)
        if device is None or device.type != "cuda":
            return number, made
        with torch.cuda.device(device):  # a thread starts with GPU 0, which would get a context of every process
            return number, [micro.pinned() for micro in made]

    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
    pending: deque[Future[tuple[int, list[MicroBatch]]]] = deque()
    try:
        for number in numbers:
            pending.append(pool.submit(make_pinned, number))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def on_device(micro_batches: Sequence[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """Yields each micro-batch on the device.

    On a GPU each is copied on a stream of its own while the one before computes; two are there at a time.
    """
    if device.type != "cuda":
        yield from (micro.to(device) for micro in micro_batches)
        return
    compute, side = torch.cuda.current_stream(device), side_stream(device)

    def copied(micro: MicroBatch) -> tuple[MicroBatch, torch.cuda.Event]:
        with torch.cuda.stream(side):
            there, arrived = micro.to(device), torch.cuda.Event()
            arrived.record(side)
            return there, arrived

    coming = deque(map(copied, micro_batches[:1]))
    for following in [*micro_batches[1:], None]:
        if following is not None:
            coming.append(copied(following))
        micro, arrived = coming.popleft()
        compute.wait_event(arrived)
        micro.record_stream(compute)
        yield micro


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that copies to a GPU."""
    return torch.cuda.Stream(device)
