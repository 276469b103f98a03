"""Checkpoints: each rank one safetensors file with the runs of elements it owns, and one `state.json`. No pickles.

    step_00000500/
      part_00000_of_00002.safetensors   weights/NAME, exp_avg/NAME, exp_avg_sq/NAME, ema/NAME: flat float32; the file's
                                        metadata says at which element of NAME each begins, and its CRC-32
      ema.safetensors                   the whole averaged model, for sampling
      state.json                        where the run stands: `State`, and the world size: which parts there are

A reader puts the runs together as it needs them, so world size and ZeRO stage may differ between writer and reader.
Files get their names only when they are written through, a safetensors file says how long it must be, and all files of
a checkpoint carry one token, so that what an interrupted attempt left never fills a gap. A checkpoint is whole when
`state.json` is there and every part that it implies opens and has its token.
"""

import json
import math
import re
import secrets
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sora_train.data.order import batch_number
from sora_train.errors import UserError
from sora_train.storage import atomic_file, atomic_write_text
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine

FORMAT = 2
AVERAGED = "ema.safetensors"


@dataclass(frozen=True)
class State:
    """Where a run stands. With the recipe's seed it fixes everything that follows."""

    step: int = 0
    """Steps done, those that the guard skipped among them."""
    samples_seen: int = 0
    """Clips that the weights learned from: padding and skipped steps left out."""
    updates: int = 0
    """AdamW's own count of steps, which its bias correction uses: without the skipped ones."""
    skipped: tuple[int, ...] = ()
    """Numbers of the batches that are never taken again, after a rollback."""
    streak: tuple[int, ...] = ()
    """Numbers of the batches of the last steps, as far as they were skipped in a row."""
    rollbacks: int = 0
    """How many times the guard went back to a checkpoint."""
    back_at: int = -1
    """The step of the checkpoint that it last went back to; -1 where it never did."""
    norms: tuple[float, ...] = ()
    """Gradient norms of the last good steps, which the guard judges by."""
    loss: float | None = None
    """Mean loss since the checkpoint before."""
    clips: str = ""
    """`ShardSet.fingerprint` of the clips that the order of samples is over."""
    data_from: int = 0
    """The batch number at which their first epoch began: 0, or where the run went on with new data."""
    data_epoch: int = 0
    """The number of that epoch."""
    epoch: int = 0
    """The epoch of the last batch that was taken."""


def with_clips(state: State, clips: str, epoch: int = 0) -> State:
    """The state of a run that goes on with the clips of this fingerprint.

    If they are others than the state's, an epoch of them begins with the next batch. It is the one after the state's
    epoch, or after `epoch` if that is later.
    """
    if state.clips in ("", clips):
        return replace(state, clips=clips)
    next_batch = batch_number(state.step, state.skipped)
    return replace(state, clips=clips, data_from=next_batch, data_epoch=max(state.epoch, epoch) + 1, streak=())


@dataclass(frozen=True)
class Snapshot:
    """A copy of what one rank puts into a checkpoint, in the CPU's memory: it can be written while training goes on."""

    state: State
    rank: int
    world: int
    stage: int
    owned: dict[str, Tensor]
    offsets: dict[str, int]
    averaged: dict[str, Tensor]
    """The whole averaged model on rank 0; empty on the others."""
    token: str
    """The same on all ranks, and another for every checkpoint."""

    def write(self, folder: Path) -> None:
        """Writes this rank's files into `folder`, which all ranks share.

        Raises UserError where that fails, such as on a full disk, and leaves nothing half written behind.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sums = {key: checksum(key, tensor, self.offsets) for key, tensor in self.owned.items()}
            metadata = {"offsets": json.dumps(self.offsets), "crc32": json.dumps(sums), "token": self.token}
            with atomic_file(folder / part_name(self.rank, self.world)) as draft:
                save_file(self.owned, draft, metadata)
            if self.rank == 0:
                sums = {name: crc32(name, tensor) for name, tensor in self.averaged.items()}
                metadata = {"crc32": json.dumps(sums), "token": self.token}
                with atomic_file(folder / AVERAGED) as draft:
                    save_file(self.averaged, draft, metadata)
                about = {"format": FORMAT, "token": self.token, **asdict(self.state)}
                about |= {"world_size": self.world, "zero_stage": self.stage}
                text = json.dumps(about | {"crc32": _checksum(about)}, indent=1)
                atomic_write_text(folder / "state.json", text)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the checkpoint of step {self.state.step} can't be written to {folder}: {error}. Make room there "
                "(train.keep_checkpoints says how many stay) or make it writable; then the same command goes on from "
                "the last whole checkpoint"
            ) from error


def part_name(rank: int, world: int) -> str:
    return f"part_{rank:05d}_of_{world:05d}.safetensors"


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def snapshot(engine: Engine, ema: Ema, state: State) -> Snapshot:
    """Copies what this rank owns. Collective. Raises UserError on every rank where weights are not finite."""
    finite = torch.tensor(all(bool(part.master.isfinite().all()) for part in engine.slices().values())).int()
    finite = finite.to(engine.device)
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    if not finite.item():
        raise UserError(
            f"at step {state.step} weights are no longer finite, so that no checkpoint was made of "
            "them; lower train.learning_rate"
        )
    owned = {name: part for name, part in engine.slices().items() if part.owned}
    tensors = {f"{kind}/{name}": source for name in owned for kind, source in targets(engine, ema, name)}
    # Copies in any case: the originals change with the next step, and share memory, which safetensors refuses.
    copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    offsets = {name: part.offset for name, part in owned.items()}
    token = [secrets.token_hex(8)]
    dist.broadcast_object_list(token, src=0)
    return Snapshot(state, engine.rank, engine.world, engine.stage, copies, offsets, ema.full_weights(), token[0])


def load(folder: Path, engine: Engine, ema: Ema) -> State:
    """Reads weights, moments and EMA of a checkpoint written at any world size and ZeRO stage. Collective.

    Raises UserError on every rank, naming the file, for a checkpoint that is incomplete, damaged, or of another model.
    """
    problem = ""
    try:
        state = _load(folder, engine, ema)
    except UserError as error:
        problem, state = str(error), State()
    problems = [problem] * engine.world
    dist.all_gather_object(problems, problem)  # or the others would wait for this rank in vain
    if found := [problem for problem in problems if problem]:
        raise UserError(found[0])
    engine.set_adam_step(state.updates)
    engine.sync()
    return state


def _load(folder: Path, engine: Engine, ema: Ema) -> State:
    about = read_state(folder)
    if about is None:
        raise UserError(f"{folder} is no whole checkpoint; remove it, and the run goes on from the one before")
    slices, found = engine.slices(), Counter[str]()
    for rank in range(about["world_size"]):
        part = folder / part_name(rank, about["world_size"])
        try:
            with safe_open(part, "pt") as file:
                offsets, sums = (json.loads(file.metadata()[key]) for key in ("offsets", "crc32"))
                for name, begin in offsets.items():
                    count = file.get_slice(f"weights/{name}").get_shape()[0]
                    found[name] += count
                    own = slices.get(name)
                    if own is None or begin >= own.offset + own.master.numel() or own.offset >= begin + count:
                        continue
                    for kind, target in targets(engine, ema, name):
                        key = f"{kind}/{name}"
                        source = file.get_tensor(key)
                        if checksum(key, source, offsets) != sums[key]:
                            raise ValueError(f"{key} has another checksum than was written")
                        _copy_overlap(source, begin, target, own.offset)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{part} can't be read ({error}); remove {folder} to go on from the checkpoint before"
            ) from None
    wanted = {name: math.prod(shape) for name, shape in engine.shapes.items()}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name, 0) != found[name]):
        raise UserError(
            f"{folder} is of another model: it holds {found[wrong[0]]} numbers of {wrong[0]}, this model has "
            f"{wanted.get(wrong[0], 0)}, and {len(wrong) - 1} more differ. Give the run the model it began with, or "
            "another name (--name)"
        )
    known = {field.name for field in fields(State)}
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in about.items() if key in known}
    return State(**values)


def targets(engine: Engine, ema: Ema, name: str) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds of one parameter, and where this rank keeps it."""
    part = engine.slices()[name]
    yield "weights", part.master
    yield "exp_avg", part.exp_avg
    yield "exp_avg_sq", part.exp_avg_sq
    if name in ema.shadow:
        yield "ema", ema.shadow[name]


@torch.no_grad()
def _copy_overlap(source: Tensor, source_offset: int, target: Tensor, target_offset: int) -> None:
    """Copies the elements that both runs hold of a parameter."""
    begin = max(source_offset, target_offset)
    end = min(source_offset + source.numel(), target_offset + target.numel())
    target[begin - target_offset : end - target_offset] = source[begin - source_offset : end - source_offset].to(target)


def checksum(key: str, tensor: Tensor, offsets: dict[str, int]) -> int:
    """CRC-32 of a tensor called KIND/NAME, with where in NAME it begins: a flipped bit on a disk is noticed."""
    return crc32(f"{key} {offsets[key.partition('/')[2]]}", tensor)


def crc32(place: str, tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes, and of where they belong."""
    return zlib.crc32(tensor.contiguous().numpy().data, zlib.crc32(place.encode()))


def _checksum(about: dict[str, Any]) -> int:
    """CRC-32 of what `state.json` says; JSON gives every float back as it was."""
    return zlib.crc32(json.dumps(about).encode())


def read_state(folder: Path) -> dict[str, Any] | None:
    """`state.json` of a whole checkpoint, or None; raises UserError as `examine`."""
    found = examine(folder)
    return found if isinstance(found, dict) else None


def examine(folder: Path) -> dict[str, Any] | str:
    """`state.json` of a whole checkpoint, or what is missing, cut short or, in this file, changed.

    Raises UserError for another format, and where files that are there can't be read: that may pass.
    """
    try:
        about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        written = int(about["format"])
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return "it has no state.json"
    except OSError as error:
        raise UserError(f"{folder / 'state.json'} can't be read: {error}; try again when it can") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return "its state.json is damaged"
    if written != FORMAT:
        raise UserError(
            f"{folder} has checkpoint format {written}, this version reads {FORMAT}: use the version of sora_train "
            "that wrote it (environment.json of the run names it)"
        )
    try:
        if about.pop("crc32") != _checksum(about):
            return "its state.json was changed"
        names = [AVERAGED, *(part_name(rank, about["world_size"]) for rank in range(about["world_size"]))]
        for name in names:
            if not (folder / name).is_file():
                return f"it has no {name}"
            with safe_open(folder / name, "pt") as file:  # it compares the file's length with what its header says
                if file.metadata()["token"] != about["token"]:
                    return f"its {name} is of another attempt"
    except SafetensorError:
        return f"its {name} is cut short or damaged"
    except OSError as error:
        raise UserError(f"{folder} can't be read: {error}; try again when it can") from None
    except (KeyError, TypeError):
        return "its state.json or a part lacks what it should say"
    return about


def step_folders(folder: Path) -> list[Path]:
    """What is named as a checkpoint in a folder of checkpoints, oldest first: not the copies that people make."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name) and path.is_dir())


def whole(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints in a folder of checkpoints, oldest first, with their steps."""
    found = ((read_state(path), path) for path in step_folders(folder))
    return sorted((about["step"], path) for about, path in found if about is not None)


def unfinished(folder: Path) -> bool:
    """Whether a checkpoint is what a kill leaves while one is written: no state.json, and not all other files."""
    parts = {int(path.stem.rpartition("_")[2]) for path in folder.glob("part_*_of_*.safetensors")}
    count = len(list(folder.glob("part_*_of_*.safetensors")))
    complete = len(parts) == 1 and count == max(parts) and (folder / AVERAGED).is_file()
    return not (folder / "state.json").exists() and not complete
