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
import os
import re
import secrets
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
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
READERS = 16
"""Threads that check files: a network file system answers slowly."""
LAST_OFFSET = re.compile(rb"\[\d+,(\d+)\]\}\}\s*\Z")
"""In a header of safetensors: where the last tensor ends."""


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
            code="diverged",
        )
    owned = {name: part for name, part in engine.slices().items() if part.owned}
    tensors = {f"{kind}/{name}": source for name in owned for kind, source in rank_tensors(engine, ema, name)}
    # Copies in any case: the originals change with the next step, and share memory, which safetensors rejects.
    copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    offsets = {name: part.offset for name, part in owned.items()}
    token = [secrets.token_hex(8)]
    dist.broadcast_object_list(token, src=0)
    return Snapshot(state, engine.rank, engine.world, engine.stage, copies, offsets, ema.full_weights(), token[0])


def read_parts(
    folder: Path, about: dict[str, Any], ranks: Iterable[int], kinds: tuple[str, ...]
) -> Iterator[tuple[str, int, dict[str, Float[Tensor, "i"]]]]:
    """Yields (parameter, its first element here, tensors by kind) from the parts of these ranks.

    `about` is the checkpoint's `state.json`. Raises UserError, naming the file, for a part that is damaged or of
    another attempt.
    """
    for rank in ranks:
        part = folder / part_name(rank, about["world_size"])
        try:
            with safe_open(part, "pt") as file:
                metadata = file.metadata()
                offsets, sums = (json.loads(metadata[key]) for key in ("offsets", "crc32"))
                if metadata["token"] != about["token"]:
                    raise ValueError("it is of another attempt")
                for name, begin in offsets.items():
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

    Lists the folder. Each file is opened only once in a process, unless it changes. Raises UserError for another
    format, and for files that exist but can't be read, which may be temporary.
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
        names = EMA_FILE, *(part_name(rank, about["world_size"]) for rank in range(about["world_size"]))
        flaw = flaw_of_files(folder, names, about["token"])
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return f"it has no {name}"
    except OSError as error:
        raise _unreadable(folder / name, error) from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return f"its {name} is cut short or damaged"
    return flaw or about


def flaw_of_files(folder: Path, names: tuple[str, ...], token: str) -> str:
    """Why one of these files of a checkpoint is not a complete one with this token, or an empty string."""
    with os.scandir(folder) as entries:
        there = {entry.name: entry.stat() for entry in entries if entry.is_file()}
    if missing := next((name for name in names if name not in there), ""):
        return f"it has no {missing}"
    stats = [(name, there[name]) for name in names]
    return flaw_of_opened(folder, token, tuple((n, s.st_ino, s.st_size, s.st_mtime_ns) for n, s in stats))


@lru_cache(maxsize=64)
def flaw_of_opened(folder: Path, token: str, files: tuple[tuple[str, int, int, int], ...]) -> str:
    """As `flaw_of_files`, by opening files of this name, inode, size and time of change. A function of these."""

    def flaw(name: str) -> str:
        try:
            if _is_whole_of(folder / name, token):
                return ""
            with safe_open(folder / name, "pt") as file:  # compares the file's length with its header
                return "" if file.metadata()["token"] == token else f"its {name} is of another attempt"
        except FileNotFoundError:
            return f"it has no {name}"
        except OSError as error:
            raise _unreadable(folder / name, error) from None
        except (SafetensorError, ValueError, KeyError, TypeError, OverflowError):
            return f"its {name} is cut short or damaged"

    with ThreadPoolExecutor(READERS) as pool:
        return next(filter(None, pool.map(flaw, (name for name, *_ in files))), "")


def _is_whole_of(path: Path, token: str) -> bool:
    """Whether a file ends where its header says and has this token; False if in doubt.

    Does not parse the header, which takes 40 times as long for one of some hundred parameters.
    """
    with path.open("rb") as file:
        size, count = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        header = file.read(count) if count < size else b""
    end = LAST_OFFSET.search(header)
    has_token = f'"token":"{token}"'.encode() in header
    return has_token and end is not None and 8 + count + int(end[1]) == size


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} can't be read: {error}; try again when it can", code="checkpoint")


def step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders by name, oldest first, complete or not; copies under other names are ignored."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name) and path.is_dir())


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the complete checkpoints in a folder of checkpoints, oldest first."""
    found = ((read_state(path), path) for path in step_folders(folder))
    return sorted((about["step"], path) for about, path in found if about is not None)


def is_unfinished(folder: Path) -> bool:
    """Whether a kill interrupted the writing of a checkpoint: no state.json, and not all other files."""
    if (folder / "state.json").exists():
        return False
    parts = list(folder.glob("part_*_of_*.safetensors"))
    worlds = {int(path.stem.rpartition("_")[2]) for path in parts}
    return len(worlds) != 1 or len(parts) != max(worlds) or not (folder / EMA_FILE).is_file()
