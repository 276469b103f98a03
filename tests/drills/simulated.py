"""Ranks of a large run without its processes: closed forms of ZeRO's layout, and a process group of threads.

A rank here has real tensors, the project's own `Snapshot` and reader, and no model, optimizer or GPU.
"""

import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.train import checkpoint
from sora_train.train.checkpoint import KINDS, Snapshot
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine
from sora_train.train.load_checkpoint import load_checkpoint
from sora_train.train.state import State
from sora_train.train.zero_layout import Slice

T = TypeVar("T")
Shapes = dict[str, torch.Size]
Whole = dict[str, Tensor]
"""All elements of each KIND/NAME."""


def ranges(shapes: Shapes, stage: int, rank: int, world: int) -> dict[str, tuple[int, int]]:
    """First element and number of elements that a rank owns of each parameter, as DeepSpeed lays them out."""
    if stage == 0:
        return {name: (0, math.prod(s)) for i, (name, s) in enumerate(shapes.items()) if i % world == rank}
    if stage == 3:
        each = {name: -(-math.prod(shape) // world) for name, shape in shapes.items()}
        cut = {name: (n * rank, min(n, math.prod(shapes[name]) - n * rank)) for name, n in each.items()}
        return {name: (begin, count) for name, (begin, count) in cut.items() if count > 0}
    found, at = {}, 0  # all parameters one after another, cut into equal parts
    each = -(-sum(math.prod(shape) for shape in shapes.values()) // world)
    for name, shape in shapes.items():
        count = math.prod(shape)
        begin, end = max(rank * each, at), min((rank + 1) * each, at + count)
        if begin < end:
            found[name] = begin - at, end - begin
        at += count
    return found


def random_weights(shapes: Shapes) -> Whole:
    """Random elements, with zeros of both signs among them."""
    draw = torch.Generator().manual_seed(0)
    whole = {
        f"{kind}/{name}": torch.randn(math.prod(s), generator=draw) for kind in KINDS for name, s in shapes.items()
    }
    for tensor in whole.values():
        tensor[::7], tensor[::11] = -0.0, 0.0
    return whole


def write_part(folder: Path, whole: Whole, shapes: Shapes, stage: int, rank: int, world: int) -> None:
    """Writes one rank's files of a checkpoint."""
    owned = ranges(shapes, stage, rank, world)
    tensors = {f"{kind}/{n}": whole[f"{kind}/{n}"][b : b + c].clone() for n, (b, c) in owned.items() for kind in KINDS}
    averaged = {name: whole[f"ema/{name}"].view(shape) for name, shape in shapes.items()} if rank == 0 else {}
    offsets = {name: begin for name, (begin, _) in owned.items()}
    Snapshot(State(step=7, updates=7), rank, world, stage, tensors, offsets, averaged, "0123456789abcdef").write(folder)


class Rank(Engine):
    """What checkpoints need of an engine: the slices of one rank, NaN until a checkpoint is loaded."""

    def __init__(self, shapes: Shapes, stage: int, rank: int, world: int) -> None:
        self.shapes, self.stage, self.rank, self.world = shapes, stage, rank, world
        self.device, self.step_set = torch.device("cpu"), -1
        owned = ranges(shapes, stage, rank, world)
        held = {name: (0, math.prod(shape)) for name, shape in shapes.items()} if stage == 0 else owned
        self._slices = {
            name: Slice(begin, name in owned, *(torch.full((count,), math.nan) for _ in range(3)))
            for name, (begin, count) in held.items()
        }

    def set_adam_step(self, step: int) -> None:
        self.step_set = step

    def sync(self) -> None:
        pass

    def wrong(self, ema: Ema, whole: Whole) -> list[str]:
        """KIND/NAME whose elements are not, bit for bit, those of the whole."""
        held = [
            (f"{k}/{n}", p.offset, t) for n, p in self._slices.items() for k, t in checkpoint.rank_tensors(self, ema, n)
        ]
        return [key for key, at, t in held if not torch.equal(bits(t), bits(whole[key][at : at + len(t)]))]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32)


def load_in_threads(folder: Path, whole: Whole, shapes: Shapes, stage: int, world: int) -> dict[str, list[str]]:
    """Loads a checkpoint on so many ranks. Returns the files that each opened; AssertionError if a bit is wrong."""

    def load(rank: int) -> list[str]:
        threading.current_thread().name = f"rank {rank}"
        engine = Rank(shapes, stage, rank, world)
        ema = Ema(engine, 0.9)
        for tensor in ema.shadow.values():
            tensor.fill_(math.nan)
        assert load_checkpoint(folder, engine, ema).step == engine.step_set == 7
        return engine.wrong(ema, whole)

    with counted_opens() as opened:
        assert not [key for wrong in in_threads(world, load) for key in wrong]
    return opened


def in_threads(world: int, act: Callable[[int], T]) -> list[T]:
    """Runs `act(rank)` on all ranks of a process group whose ranks are threads of this process."""
    from torch._C._distributed_c10d import _set_thread_isolation_mode  # type: ignore[attr-defined]
    from torch.testing._internal.distributed import multi_threaded_pg as threads

    results: dict[int, T] = {}
    errors: list[BaseException] = []
    store = dist.HashStore()
    threads._install_threaded_pg()
    _set_thread_isolation_mode(True)

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            results[rank] = act(rank)
        except BaseException as error:
            errors.append(error)
            threads.ProcessLocalGroup.exception_handle(error)
        finally:
            dist.destroy_process_group()

    try:
        started = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    finally:
        threads.ProcessLocalGroup.reset()
        _set_thread_isolation_mode(False)
        threads._uninstall_threaded_pg()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(world)]


@contextmanager
def counted_opens() -> Iterator[dict[str, list[str]]]:
    """Names of the safetensors files that each thread opens, by the thread's name."""
    opened: dict[str, list[str]] = {}
    real = checkpoint.safe_open

    def count(path: Path) -> None:
        if counting[0] and path.suffix == ".safetensors":
            opened.setdefault(threading.current_thread().name, []).append(path.name)

    def counting_open(path: Path, framework: str):  # Rust, which Python's audit does not see
        count(Path(path))
        return real(path, framework)

    counting = [True]
    sys.addaudithook(lambda event, args: count(Path(str(args[0]))) if event == "open" else None)  # stays for good
    checkpoint.safe_open = counting_open
    try:
        yield opened
    finally:
        checkpoint.safe_open, counting[0] = real, False
