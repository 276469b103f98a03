"""Checkpoints: each rank one safetensors file with the runs of elements it owns, and one `state.json`. No pickles.

    step_00000500/
      part_00000_of_00002.safetensors   weights/NAME, exp_avg/NAME, exp_avg_sq/NAME, ema/NAME: flat float32;
                                        the file's metadata says at which element of NAME each begins
      ema.safetensors                   the whole averaged model, for sampling
      state.json                        step, samples seen, and every file with its size

A reader puts the runs together as it needs them, so world size and ZeRO stage may differ between writer and reader. A
checkpoint is whole when `state.json` is there and each file that it names has the size that it says.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sora_train.errors import UserError
from sora_train.train.ema import Ema
from sora_train.train.engine import Engine

FORMAT = 1


@dataclass(frozen=True)
class State:
    """Where a run stands. With the recipe's seed it fixes everything that follows."""

    step: int
    """Optimizer steps done."""
    samples_seen: int
    """Clips in those steps, padding left out."""


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def save(folder: Path, engine: Engine, ema: Ema, state: State) -> None:
    """Writes this rank's part into `folder`, and on rank 0 the averaged model and `state.json`. Collective.

    Each rank may write into a folder of its own; together their files are the checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owned = {name: part for name, part in engine.slices().items() if part.owned}
    tensors: dict[str, Tensor] = {}
    for name, part in owned.items():
        tensors[f"weights/{name}"] = part.master
        tensors[f"exp_avg/{name}"] = part.exp_avg
        tensors[f"exp_avg_sq/{name}"] = part.exp_avg_sq
        tensors[f"ema/{name}"] = ema.shadow[name]
    part_file = folder / f"part_{engine.rank:05d}_of_{engine.world:05d}.safetensors"
    offsets = json.dumps({name: part.offset for name, part in owned.items()})
    # Copies: the views share memory, which safetensors refuses.
    save_file({key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}, part_file, {"offsets": offsets})
    written = [part_file]
    averaged = ema.full_weights()
    if engine.rank == 0:
        save_file(averaged, folder / "ema.safetensors", {"format": "pt"})
        written.append(folder / "ema.safetensors")
    sizes: list[dict[str, int]] = [{}] * engine.world
    dist.all_gather_object(sizes, {file.name: file.stat().st_size for file in written})
    if engine.rank == 0:
        files = {name: size for part in sizes for name, size in part.items()}
        about = {
            "format": FORMAT,
            **asdict(state),
            "world_size": engine.world,
            "zero_stage": engine.stage,
            "files": files,
        }
        (folder / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def load(folder: Path, engine: Engine, ema: Ema) -> State:
    """Reads weights, moments and EMA of a checkpoint written at any world size and ZeRO stage. Collective.

    Raises UserError, naming the file, for a checkpoint that is incomplete, damaged, or of another model.
    """
    about = read_state(folder)
    if about is None:
        raise UserError(f"{folder} is no whole checkpoint; remove it, and the run goes on from the one before")
    missing = {name: sum(target.numel() for _, target in targets(engine, ema, name)) for name in engine.slices()}
    for part in sorted(name for name in about["files"] if name.startswith("part_")):
        try:
            with safe_open(folder / part, "pt") as file:
                offsets = json.loads(file.metadata()["offsets"])
                for name in offsets.keys() & engine.slices().keys():
                    begin = engine.slices()[name].offset
                    for kind, target in targets(engine, ema, name):
                        missing[name] -= _copy_overlap(file.get_slice(f"{kind}/{name}"), offsets[name], target, begin)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise UserError(
                f"{folder / part} can't be read ({error}); remove {folder} to go on from the one before"
            ) from None
    if lacking := [name for name, count in missing.items() if count]:
        raise UserError(
            f"{folder} does not hold all of {lacking[0]} and {len(lacking) - 1} more: it is of another model"
        )
    engine.set_adam_step(about["step"])
    engine.sync()
    return State(about["step"], about["samples_seen"])


def targets(engine: Engine, ema: Ema, name: str) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds of one parameter, and where this rank keeps it."""
    part = engine.slices()[name]
    yield "weights", part.master
    yield "exp_avg", part.exp_avg
    yield "exp_avg_sq", part.exp_avg_sq
    if name in ema.shadow:
        yield "ema", ema.shadow[name]


@torch.no_grad()
def _copy_overlap(source, source_offset: int, target: Tensor, target_offset: int) -> int:
    """Copies the elements that both runs hold of a parameter; returns how many. `source` is read only where needed."""
    begin = max(source_offset, target_offset)
    end = min(source_offset + source.get_shape()[0], target_offset + target.numel())
    if begin >= end:
        return 0
    target[begin - target_offset : end - target_offset] = source[begin - source_offset : end - source_offset].to(target)
    return end - begin


def read_state(folder: Path) -> dict | None:
    """`state.json` of a whole checkpoint; None if anything of it is missing or cut short. Raises for a newer format."""
    try:
        about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if any((folder / name).stat().st_size != size for name, size in about["files"].items()):
            return None
    except (OSError, ValueError, KeyError):
        return None
    if about["format"] > FORMAT:
        raise UserError(
            f"{folder} has checkpoint format {about['format']}, this version reads {FORMAT}: update sora_train"
        )
    return about


def whole(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints in a folder of checkpoints, oldest first, with their steps."""
    found = ((read_state(path), path) for path in folder.glob("step_*"))
    return sorted((about["step"], path) for about, path in found if about is not None)
