"""Loading a checkpoint: each rank reads its share of the parts, and the ranks exchange what others hold of them.

So a rank opens as many files as there are parts for each rank, at any world size and ZeRO stage, and each byte is read
once. A rank of the same world size and stage reads only its own part.
"""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.errors import UserError
from sora_train.train.checkpoint import KINDS, rank_tensors, read_parts, read_state
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine
from sora_train.train.placement import together
from sora_train.train.state import State
from sora_train.train.zero_layout import bucketed

Tensors = dict[str, tuple[int, Tensor]]
"""A rank's tensors by KIND/NAME, each with the element of NAME at which it begins."""
Pieces = dict[str, list[tuple[int, Tensor]]]
"""What a rank read of a checkpoint, by KIND/NAME: where in NAME each piece begins, and its elements."""


def load_checkpoint(folder: Path, engine: Engine, ema: Ema) -> State:
    """Loads weights, moments and EMA of a checkpoint written at any world size and ZeRO stage. Collective.

    Each part is read by one rank, its share of all parts, and the ranks exchange the elements that others hold. Raises
    UserError on every rank, naming the file, for a checkpoint that is incomplete, damaged, or of another model.
    """
    found = [together(lambda: state_of_complete(folder) if engine.rank == 0 else None, engine.device)]
    dist.broadcast_object_list(found, src=0)
    about: dict[str, Any] = found[0] or {}
    tensors = {
        f"{kind}/{name}": (part.offset, tensor)
        for name, part in engine.slices().items()
        for kind, tensor in rank_tensors(engine, ema, name)
    }
    share = share_of_parts(about["world_size"], engine.rank, engine.world)
    pieces = together(lambda: read_share(folder, about, share, tensors, engine.shapes), engine.device)
    _check_counts(folder, engine, pieces)
    exchange(pieces, tensors, engine.shapes, engine.device)
    known = {field.name for field in fields(State)}
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in about.items() if key in known}
    state = State(**values)
    engine.set_adam_step(state.updates)
    engine.sync()
    return state


def state_of_complete(folder: Path) -> dict[str, Any]:
    """`state.json` of a complete checkpoint. Raises UserError if it is not complete."""
    if (about := read_state(folder)) is None:
        raise UserError(
            f"{folder} is no complete checkpoint. Remove it to resume from the one before", code="checkpoint"
        )
    return about


def share_of_parts(parts: int, rank: int, world: int) -> range:
    """The parts that a rank reads: consecutive ones, spread evenly over the ranks and so over the nodes."""
    return range(-(-rank * parts // world), -(-(rank + 1) * parts // world))


@torch.no_grad()
def read_share(
    folder: Path, about: dict[str, Any], share: range, tensors: Tensors, shapes: dict[str, torch.Size]
) -> Pieces:
    """Reads parts into this rank's tensors, and returns all that was read.

    A piece that this rank holds wholly is returned as a view of its own tensor; others stay in CPU memory.
    """
    pieces: Pieces = {}
    for name, begin, found in read_parts(folder, about, share, KINDS):
        if name not in shapes:
            raise _of_another_model(folder, name, len(found["weights"]), 0)
        for kind, source in found.items():
            key, end = f"{kind}/{name}", begin + len(source)
            offset, target = tensors.get(key, (end, source[:0]))
            first, last = max(begin, offset), min(end, offset + len(target))
            if first < last:
                target[first - offset : last - offset] = source[first - begin : last - begin].to(target)
            if (first, last) == (begin, end):
                source = target[begin - offset : end - offset]
            pieces.setdefault(key, []).append((begin, source))
    return pieces


def _check_counts(folder: Path, engine: Engine, pieces: Pieces) -> None:
    """Raises UserError on every rank if all ranks together read other numbers of elements than the model has."""
    read = [sum(len(source) for _, source in pieces.get(f"weights/{name}", [])) for name in engine.shapes]
    counts = torch.tensor(read, device=engine.device)
    dist.all_reduce(counts)
    for name, count in sorted(zip(engine.shapes, counts.tolist(), strict=True)):
        if count != math.prod(engine.shapes[name]):
            raise _of_another_model(folder, name, count, math.prod(engine.shapes[name]))


def _of_another_model(folder: Path, name: str, there: int, wanted: int) -> UserError:
    return UserError(
        f"{folder} is of another model: it holds {there} numbers of {name}, this model has {wanted}. Give the run the "
        "model it began with, or another name (--name)",
        code="checkpoint",
    )


@torch.no_grad()
def exchange(pieces: Pieces, tensors: Tensors, shapes: dict[str, torch.Size], device: torch.device) -> None:
    """Fills this rank's tensors, where its own pieces do not, with those of other ranks. Collective.

    Each element comes from one rank and the others add zeros, as integers: the bits stay as they are.
    """
    sizes = {f"{kind}/{name}": shape for kind in KINDS for name, shape in shapes.items()}
    lacking = torch.tensor([_lacking(key, pieces, tensors) for key in sizes], device=device)
    dist.all_reduce(lacking)
    wanted = {key: shape for (key, shape), count in zip(sizes.items(), lacking.tolist(), strict=True) if count}
    for keys in bucketed(wanted):
        counts = [math.prod(wanted[key]) for key in keys]
        buffer = torch.zeros(sum(counts), dtype=torch.int32, device=device)
        for key, room in zip(keys, buffer.split(counts), strict=True):
            for begin, source in pieces.get(key, []):
                room[begin : begin + len(source)] = source.view(torch.int32)
        dist.all_reduce(buffer)
        for key, room in zip(keys, buffer.view(torch.float32).split(counts), strict=True):
            if key in tensors:
                offset, target = tensors[key]
                target.copy_(room[offset : offset + len(target)])


def _lacking(key: str, pieces: Pieces, tensors: Tensors) -> int:
    """How many elements of this rank's tensor its own pieces do not have."""
    if key not in tensors:
        return 0
    offset, target = tensors[key]
    end = offset + len(target)
    shared = (min(end, begin + len(source)) - max(begin, offset) for begin, source in pieces.get(key, []))
    return len(target) - sum(max(0, count) for count in shared)
