"""Headers of safetensors files: the tensors that they hold, with shape and dtype. No weights are read; no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

DTYPES = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that are read. Others, such as 8-bit ones, are quantised and need scales."""


class WeightsError(ValueError):
    """Weights are cut short, or do not have the tensors of the model that they are for."""


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's shape, and its dtype as safetensors writes it."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file. Raises WeightsError if it is cut short or of another format, and OSError."""
    found: dict[str, TensorHeader] = {}
    try:
        with safe_open(path, "np") as file:  # compares the file's length with its header
            for name in file.keys():  # noqa: SIM118  it is not a mapping
                tensor: Any = file.get_slice(name)
                found[name] = TensorHeader(tuple(tensor.get_shape()), tensor.get_dtype())
    except SafetensorError as error:
        raise WeightsError(f"{path} is cut short or not a safetensors file: {error}") from None
    return found


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is there and complete."""
    try:
        read_header(path)
    except (OSError, WeightsError):
        return False
    return True


def check_tensors(there: Mapping[str, TensorHeader], wanted: Mapping[str, tuple[int, ...]], place: Path) -> None:
    """Raises WeightsError, in one message, for tensors that are missing, unexpected, or of another shape or dtype."""
    both = [name for name in wanted if name in there]
    shapes = [
        f"{name} {list(there[name].shape)} instead of {list(wanted[name])}"
        for name in both
        if there[name].shape != tuple(wanted[name])
    ]
    dtypes = [f"{name} {there[name].dtype}" for name in both if there[name].dtype not in DTYPES]
    wrong = [
        ("lacks", "", [name for name in wanted if name not in there]),
        ("has", " that the model does not have", sorted(there.keys() - wanted.keys())),
        ("has", " of another shape", shapes),
        ("has", f" that are not in {', '.join(DTYPES)}", dtypes),
    ]
    if phrases := [f"{verb} {first_five(names, which)}" for verb, which, names in wrong if names]:
        raise WeightsError(f"{place} {'; it '.join(phrases)}")


def first_five(names: Collection[str], which: str) -> str:
    """The number of tensors, which ones they are, and the names of the first five."""
    more = ", …" if len(names) > 5 else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)}{which}: {', '.join(list(names)[:5])}{more}"
