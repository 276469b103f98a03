"""Weights for sampling and export: a checkpoint's averaged (EMA) or trained weights, in one plain process.

The averaged weights are one file. The trained ones are joined from the parts that the ranks wrote (`checkpoint.py`).
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sora_train.errors import UserError
from sora_train.train.checkpoint import check_complete, crc32, read_parts

EXPORTED = "model.safetensors"
"""The weights that `sora export --weights_only` writes."""
EXPORT_INFO = "sora_export.json"
"""What `sora export` writes next to recipe.yaml and manifest.json."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file such as `ema.safetensors`. Raises UserError if a checksum is wrong."""
    return {name: read() for name, read in open_weights(path).items()}


def open_weights(path: Path) -> dict[str, Callable[[], Tensor]]:
    """The same by name; each is read, and its checksum compared, when called."""
    file: Any = safe_open(path, "pt")
    sums = json.loads((file.metadata() or {}).get("crc32", "{}"))

    def read(name: str) -> Tensor:
        tensor: Tensor = file.get_tensor(name)
        if name in sums and crc32(name, tensor) != sums[name]:
            raise UserError(
                f"{path} is damaged: {name} has another checksum than was written. Use another file",
                code="checkpoint",
            )
        return tensor

    return {name: partial(read, name) for name in file.keys()}  # noqa: SIM118  it is not a mapping


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Writes tensors with the checksums that `read_weights` verifies."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(weights, path, {"crc32": json.dumps({name: crc32(name, tensor) for name, tensor in weights.items()})})


def read_trained_weights(checkpoint: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The float32 master weights of a checkpoint for a model of these shapes, written at any world size and stage.

    Raises UserError, naming the file, for a checkpoint that is incomplete, damaged, or of another model.
    """
    about = check_complete(checkpoint)
    if isinstance(about, str):
        raise UserError(
            f"{checkpoint} has no whole trained weights: {about}; use the averaged ones (--weights ema)",
            code="checkpoint",
        )
    weights = {name: torch.empty(math.prod(shape)) for name, shape in shapes.items()}
    missing = {name: len(tensor) for name, tensor in weights.items()}

    for name, begin, tensors in read_parts(checkpoint, about, range(about["world_size"]), ("weights",)):
        source, room = tensors["weights"], weights.get(name, torch.empty(0))
        if begin + len(source) > len(room):
            continue
        room[begin : begin + len(source)] = source
        missing[name] -= len(source)
    if wrong := [name for name, count in missing.items() if count]:
        raise UserError(
            f"{checkpoint} does not fit the model in its recipe.yaml: {wrong[0]} has another size there",
            code="checkpoint",
        )
    return {name: tensor.view(shapes[name]) for name, tensor in weights.items()}
