"""A checkpoint's weights for who samples or exports: the averaged ones, or those that were trained. One plain process.

The averaged ones lie there whole. The others are put together from the parts that the ranks wrote (`checkpoint.py`).
"""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sora_train.errors import UserError
from sora_train.train.checkpoint import checksum, crc32, examine, part_name

EXPORTED = "model.safetensors"
"""The file of weights in what `sora export --weights_only` writes."""
NOTE = "sora_export.json"
"""What `sora export` leaves in a folder beside recipe.yaml and manifest.json."""


def read_whole(path: Path) -> dict[str, Tensor]:
    """All tensors of a file such as `ema.safetensors`; UserError where its bytes are not those that were written."""
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        sums = json.loads((file.metadata() or {}).get("crc32", "{}"))
    damaged = [name for name, tensor in weights.items() if name in sums and crc32(name, tensor) != sums[name]]
    if damaged:
        raise UserError(f"{path} is damaged: {damaged[0]} has another checksum than was written; use another one")
    return weights


def write_whole(path: Path, weights: dict[str, Tensor]) -> None:
    """Writes tensors with the checksums that `read_whole` compares."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(weights, path, {"crc32": json.dumps({name: crc32(name, tensor) for name, tensor in weights.items()})})


def read_trained(checkpoint: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The float32 master weights of a checkpoint, for a model of these shapes, whatever wrote it.

    Raises UserError, naming the file, for one that is not whole, is damaged, or is of another model.
    """
    about = examine(checkpoint)
    if isinstance(about, str):
        raise UserError(f"{checkpoint} has no whole trained weights: {about}; use the averaged ones (--weights ema)")
    weights = {name: torch.empty(math.prod(shape)) for name, shape in shapes.items()}
    missing = {name: tensor.numel() for name, tensor in weights.items()}
    for rank in range(about["world_size"]):
        part = checkpoint / part_name(rank, about["world_size"])
        try:
            with safe_open(part, "pt") as file:
                offsets, sums = (json.loads(file.metadata()[key]) for key in ("offsets", "crc32"))
                for name, begin in offsets.items():
                    key = f"weights/{name}"
                    source = file.get_tensor(key)
                    if checksum(key, source, offsets) != sums[key]:
                        raise ValueError(f"{key} has another checksum than was written")
                    weights[name][begin : begin + source.numel()] = source
                    missing[name] -= source.numel()
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{part} can't be read ({error}); use another checkpoint") from None
    if wrong := [name for name, count in missing.items() if count]:
        raise UserError(f"{checkpoint} does not fit the model in its recipe.yaml: {wrong[0]} has another size there")
    return {name: tensor.view(shapes[name]) for name, tensor in weights.items()}
