"""`sora_export.json`: what an exported folder holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sora_train.codec.files import content_hash
from sora_train.errors import UserError
from sora_train.train.weights import EXPORT_INFO

EXPORT_FORMAT = 1

Weights = Literal["ema", "raw"]


@dataclass(frozen=True)
class ExportNote:
    """The content of an exported folder."""

    kind: Literal["pipeline", "weights", "lora"]
    """A diffusers pipeline with its own VAE and text encoder, weights alone, or adapters alone."""
    weights: Weights
    step: int
    vae: str
    """Hash of the VAE that goes with the weights. A LattePipeline's VAE is not that of the shards, because the
    normalisation of latents is folded into it."""
    text: str
    """Hash of the text encoder."""
    transformer: str = ""
    """sha256 over a pipeline's transformer; empty for others, which have checksums in their file."""


def transformer_hash(folder: Path) -> str:
    """sha256 over weights and config of a pipeline's transformer."""
    files = (folder / "transformer").iterdir()
    return content_hash(tuple(path for path in files if path.suffix in (".safetensors", ".json")))


def read_note(folder: Path) -> ExportNote | None:
    """The note that `sora export` left in a folder, or None. Raises UserError if it can't be read."""
    place = folder / EXPORT_INFO
    if not place.is_file():
        return None
    try:
        about = json.loads(place.read_text(encoding="utf-8"))
        if about.pop("format") != EXPORT_FORMAT:
            raise ValueError("another format")
        note = ExportNote(**about)
        if note.kind not in ("pipeline", "weights", "lora") or note.weights not in ("ema", "raw"):
            raise ValueError("an unknown kind")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{place} can't be read ({error!r}); export the run again with this version", code="run"
        ) from None
    return note
