"""Checkpoints: one safetensors file per rank with the elements it owns, and one `state.json`. No pickles.

    step_00000500/
      part_00000_of_00002.safetensors   weights/NAME, exp_avg/NAME, exp_avg_sq/NAME, ema/NAME: flat float32; the file's
                                        metadata says at which element of NAME each begins, and its CRC-32
      ema.safetensors                   the whole averaged model, for sampling
      state.json                        the training state: `State`, and the world size, which says what parts there are

A reader joins the parts as it needs them, so world size and ZeRO stage may differ between writer and reader. Files get
their names only when they are completely written, and all files of a checkpoint carry one token, so the remains of an
interrupted attempt never complete another. A checkpoint is complete when `state.json` is there and every part that it
implies opens and has its token.
"""

import json
import math
import re
import secrets
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sora_train.errors import UserError
from sora_train.storage import atomic_file, atomic_write_text
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine
from sora_train.train.state import State

FORMAT = 2
EMA_FILE = "ema.safetensors"
KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")


@dataclass(frozen=True)
class Snapshot:
    """A copy in CPU memory of one rank's part of a checkpoint; it can be written while training continues."""

    state: State
    rank: int
    world: int
    stage: int
    owned: dict[str, Tensor]
    offsets: dict[str, int]
    averaged: dict[str, Tensor]
    """The whole averaged model on rank 0; empty on the others."""
    token: str
    """Random, the same on all ranks."""

    def write(self, folder: Path) -> None:
        """Writes this rank's files into `folder`, which all ranks share.

        Raises UserError if that fails, for example on a full disk, and leaves no incomplete file.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sums = {key: part_crc32(key, tensor, self.offsets) for key, tensor in self.owned.items()}
            metadata = {"offsets": json.dumps(self.offsets), "crc32": json.dumps(sums), "token": self.token}
            with atomic_file(folder / part_name(self.rank, self.world)) as draft:
                save_file(self.owned, draft, metadata)
            if self.rank == 0:
                sums = {name: crc32(name, tensor) for name, tensor in self.averaged.items()}
                metadata = {"crc32": json.dumps(sums), "token": self.token}
                with atomic_file(folder / EMA_FILE) as draft:
                    save_file(self.averaged, draft, metadata)
                about = {"format": FORMAT, "token": self.token, **asdict(self.state)}
                about |= {"world_size": self.world, "zero_stage": self.stage}
                atomic_write_text(folder / "state.json", json.dumps(about | {"crc32": state_crc32(about)}, indent=1))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the checkpoint of step {self.state.step} can't be written to {folder}: {error}. Make room there or "
                "make it writable, and run the same command again: it resumes from the last complete checkpoint",
                code="not_writable",
            ) from error


def part_name(rank: int, world: int) -> str:
    return f"part_{rank:05d}_of_{world:05d}.safetensors"


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def snapshot(engine: Engine, ema: Ema, state: State) -> Snapshot:
    """Copies what this rank owns. Collective. Raises UserError on every rank if weights are not finite."""
    finite = torch.tensor(all(bool(part.master.isfinite().all()) for part in engine.slices().values())).int()
    finite = finite.to(engine.device)
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    if not finite.item():
        raise UserError(
            f"at step {state.step} weights are no longer finite, so no checkpoint was made. Lower train.learning_rate",
            code="checkpoint",
        )
    owned = {name: part for name, part in engine.slices().items() if part.owned}
    tensors = {f"{kind}/{name}": source for name in owned for kind, source in rank_tensors(engine, ema, name)}
    # Copies in any case: the originals change with the next step, and share memory, which safetensors rejects.
    copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    offsets = {name: part.offset for name, part in owned.items()}
    token = [secrets.token_hex(8)]
    dist.broadcast_object_list(token, src=0)
    return Snapshot(state, engine.rank, engine.world, engine.stage, copies, offsets, ema.full_weights(), token[0])


def load(folder: Path, engine: Engine, ema: Ema) -> State:
    """Loads weights, moments and EMA of a checkpoint written at any world size and ZeRO stage. Collective.

    Raises UserError on every rank, naming the file, for a checkpoint that is incomplete, damaged, or of another model.
    """
    problem = ""
    try:
        state = _load(folder, engine, ema)
    except UserError as error:
        problem, state = str(error), State()
    problems = [problem] * engine.world
    dist.all_gather_object(problems, problem)  # otherwise the others would wait for this rank forever
    if found := [problem for problem in problems if problem]:
        raise UserError(found[0], code="checkpoint")
    engine.set_adam_step(state.updates)
    engine.sync()
    return state


@torch.no_grad()
def _load(folder: Path, engine: Engine, ema: Ema) -> State:
    about = read_state(folder)
    if about is None:
        raise UserError(
            f"{folder} is no complete checkpoint. Remove it to resume from the one before", code="checkpoint"
        )
    slices, found = engine.slices(), Counter[str]()

    def is_wanted(name: str, begin: int, count: int) -> bool:
        found[name] += count
        own = slices.get(name)
        return own is not None and begin < own.offset + own.master.numel() and own.offset < begin + count

    for name, begin, tensors in read_parts(folder, about["world_size"], KINDS, is_wanted):
        for kind, target in rank_tensors(engine, ema, name):
            offset, source = slices[name].offset, tensors[kind]
            first, end = max(begin, offset), min(begin + len(source), offset + len(target))
            target[first - offset : end - offset] = source[first - begin : end - begin].to(target)
    wanted = {name: math.prod(shape) for name, shape in engine.shapes.items()}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name, 0) != found[name]):
        raise UserError(
            f"{folder} is of another model: it holds {found[wrong[0]]} numbers of {wrong[0]}, this model has "
            f"{wanted.get(wrong[0], 0)}. Give the run the model it began with, or another name (--name)",
            code="checkpoint",
        )
    known = {field.name for field in fields(State)}
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in about.items() if key in known}
    return State(**values)


def read_parts(
    folder: Path, world: int, kinds: tuple[str, ...], is_wanted: Callable[[str, int, int], bool]
) -> Iterator[tuple[str, int, dict[str, Float[Tensor, "i"]]]]:
    """Yields (parameter, its first element here, tensors by kind) from all parts, with checksums verified.

    `is_wanted(parameter, first, count)` says whether to read a tensor. Raises UserError, naming the file, for a damaged
    one.
    """
    for rank in range(world):
        part = folder / part_name(rank, world)
        try:
            with safe_open(part, "pt") as file:
                offsets, sums = (json.loads(file.metadata()[key]) for key in ("offsets", "crc32"))
                for name, begin in offsets.items():
                    if not is_wanted(name, begin, file.get_slice(f"weights/{name}").get_shape()[0]):
                        continue
                    tensors = {kind: file.get_tensor(f"{kind}/{name}") for kind in kinds}
                    for kind, tensor in tensors.items():
                        if part_crc32(f"{kind}/{name}", tensor, offsets) != sums[f"{kind}/{name}"]:
                            raise ValueError(f"{kind}/{name} has another checksum than was written")
                    yield name, begin, tensors
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{part} can't be read ({error}). Use another checkpoint, or remove {folder} to resume from the one "
                "before",
                code="checkpoint",
            ) from None


def rank_tensors(engine: Engine, ema: Ema, name: str) -> Iterator[tuple[str, Float[Tensor, "i"]]]:
    """This rank's tensors of one parameter that a checkpoint holds, by kind."""
    part = engine.slices()[name]
    yield "weights", part.master
    yield "exp_avg", part.exp_avg
    yield "exp_avg_sq", part.exp_avg_sq
    if name in ema.shadow:
        yield "ema", ema.shadow[name]


def part_crc32(key: str, tensor: Tensor, offsets: dict[str, int]) -> int:
    """CRC-32 of a part's tensor KIND/NAME and of where in NAME it begins."""
    return crc32(f"{key} {offsets[key.partition('/')[2]]}", tensor)


def crc32(label: str, tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes and of its label: it detects a flipped bit on a disk."""
    return zlib.crc32(tensor.contiguous().numpy().data, zlib.crc32(label.encode()))


def state_crc32(about: dict[str, Any]) -> int:
    """CRC-32 of the values in `state.json`; JSON keeps every float exactly."""
    return zlib.crc32(json.dumps(about).encode())


def read_state(folder: Path) -> dict[str, Any] | None:
    """`state.json` of a complete checkpoint, or None. Raises UserError as `check_complete` does."""
    found = check_complete(folder)
    return found if isinstance(found, dict) else None


def check_complete(folder: Path) -> dict[str, Any] | str:
    """`state.json` of a complete checkpoint, or what is missing, cut short or changed.

    Raises UserError for another format, and for files that exist but can't be read, which may be temporary.
    """
    name = "state.json"
    try:
        about = json.loads((folder / name).read_text(encoding="utf-8"))
        if int(about["format"]) != FORMAT:
            raise UserError(
                f"{folder} has checkpoint format {about['format']}, this version reads {FORMAT}. Use the version of "
                "sora_train in the run's environment.json",
                code="checkpoint",
            )
        if about.pop("crc32") != state_crc32(about):
            return "its state.json was changed"
        for name in (EMA_FILE, *(part_name(rank, about["world_size"]) for rank in range(about["world_size"]))):
            with safe_open(folder / name, "pt") as file:  # compares the file's length with its header
                if file.metadata()["token"] != about["token"]:
                    return f"its {name} is of another attempt"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return f"it has no {name}"
    except OSError as error:
        raise UserError(f"{folder / name} can't be read: {error}; try again when it can", code="checkpoint") from None
    except UserError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return f"its {name} is cut short or damaged"
    return about


def step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders by name, oldest first, complete or not; copies under other names are ignored."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name) and path.is_dir())


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the complete checkpoints in a folder of checkpoints, oldest first."""
    found = ((read_state(path), path) for path in step_folders(folder))
    return sorted((about["step"], path) for about, path in found if about is not None)


def is_unfinished(folder: Path) -> bool:
    """Whether a kill interrupted the writing of a checkpoint: no state.json, and not all other files."""
    parts = list(folder.glob("part_*_of_*.safetensors"))
    worlds = {int(path.stem.rpartition("_")[2]) for path in parts}
    rest = len(worlds) == 1 and len(parts) == max(worlds) and (folder / EMA_FILE).is_file()
    return not (folder / "state.json").exists() and not rest
