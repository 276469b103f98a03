"""Where a frozen network's files are (embedded, a folder, the hub) and what they say of it, without loading it.

Safetensors only: nothing is unpickled. No torch here, so that a driver can plan and check before any worker starts.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sora_train.codec import BUILTIN
from sora_train.errors import UserError

SCALING_FACTORS = {"AutoencoderKL": 0.18215, "AutoencoderTiny": 1.0}  # what the classes take where a config is silent


@dataclass(frozen=True)
class VaeFiles:
    """A VAE on disk: `moments` is 2 where it has a posterior (mean, log-variance) and 1 where it has none."""

    place: Path
    files: tuple[Path, ...]
    kind: str
    channels: int
    factor: int
    moments: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @cached_property
    def hash(self) -> str:
        """Hash of weights and configuration; reads all their bytes the first time."""
        return content_hash(self.files)


@dataclass(frozen=True)
class TextFiles:
    """A text encoder and its tokenizer on disk."""

    place: Path
    tokenizer: Path
    files: tuple[Path, ...]
    width: int

    @cached_property
    def hash(self) -> str:
        """Hash of weights, configuration and tokenizer; reads all their bytes the first time."""
        return content_hash(self.files)


def find_vae(name: str) -> VaeFiles:
    """The VAE that `codec.vae` names: `builtin`, a folder, or a hub id; also the `vae` of a whole pipeline.

    Raises UserError, with what to do, where it can't be had.
    """
    folder = find_folder(name, "codec.vae", ("vae",))
    place = part_of(folder, ("vae",), "config.json")
    if place is None:
        raise UserError(
            f"codec.vae: {folder} has no VAE in diffusers' format (no `config.json`, nor `vae/config.json`)"
        )
    config = read_config(place)
    kind = config.get("_class_name", "network without a class name")
    if kind not in SCALING_FACTORS:
        raise UserError(f"codec.vae: {place} holds a {kind}; known are {' and '.join(SCALING_FACTORS)}")
    posterior = kind == "AutoencoderKL"
    channels = config.get("latent_channels", 4)
    blocks = (
        config.get("block_out_channels", (64,)) if posterior else config.get("encoder_block_out_channels", (64,) * 4)
    )
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean = [float(config.get("shift_factor") or 0.0)] * channels
        std = [1 / (config.get("scaling_factor") or SCALING_FACTORS[kind])] * channels
    files = (*weight_files(place, "codec.vae"), place / "config.json")
    return VaeFiles(place, files, kind, channels, 2 ** (len(blocks) - 1), 1 + posterior, tuple(mean), tuple(std))


def find_text_encoder(name: str) -> TextFiles:
    """The text encoder that `codec.text` names: `builtin`, a folder, or a hub id; also a whole pipeline's.

    Raises UserError, with what to do, where it can't be had.
    """
    folder = find_folder(name, "codec.text", ("text_encoder", "tokenizer"))
    place = part_of(folder, ("text_encoder",), "config.json")
    if place is None:
        raise UserError(f"codec.text: {folder} has no text encoder (no `config.json`, nor `text_encoder/config.json`)")
    config = read_config(place)
    if (kind := config.get("model_type")) != "t5":
        raise UserError(f"codec.text: {place} holds a {kind!r} model; a T5 encoder is needed")
    for file in ("tokenizer.json", "spiece.model"):
        if tokenizer := part_of(folder, ("tokenizer",), file):
            files = (*weight_files(place, "codec.text"), place / "config.json", tokenizer / file)
            return TextFiles(place, tokenizer, files, config["d_model"])
    raise UserError(
        f"codec.text: no tokenizer in {folder} (no `tokenizer.json` or `spiece.model`, nor in `tokenizer/`); "
        "put the tokenizer's files beside the encoder's"
    )


def find_folder(name: str, key: str, parts: tuple[str, ...]) -> Path:
    """The local folder of the network that the recipe's `key` names: `builtin`, a folder, or a hub id.

    Of a hub repository only the first of the subfolders `parts` that is there is fetched, or else its top level. Raises
    UserError, with what to do, where nothing can be had.
    """
    if name == "builtin":
        folder = BUILTIN / key.rpartition(".")[2]
        if not folder.is_dir():
            raise UserError(f"{key}: the embedded network is missing ({folder}); reinstall sora_train or name a folder")
        return folder
    if os.path.isdir(name):
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"{key}: no folder {name!r}; give `builtin`, an existing folder, or a hub id such as `owner/name`"
        )
    return _from_hub(name, key, parts)


def part_of(folder: Path, parts: tuple[str, ...], file: str) -> Path | None:
    """The first of `folder/part` and `folder` itself that holds `file`."""
    return next((place for place in (*(folder / part for part in parts), folder) if (place / file).is_file()), None)


def weight_files(folder: Path, key: str) -> list[Path]:
    """The safetensors of a network, float16 variants left out; UserError where there are none."""
    files = sorted(path for path in folder.glob("*.safetensors") if _is_wanted(path.name))
    if not files:
        raise UserError(
            f"{key}: no safetensors in {folder}: pickled weights are never loaded; convert them once with "
            "`model.save_pretrained(folder)` in a place that you trust, and name that folder"
        )
    return files


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def content_hash(files: tuple[Path, ...]) -> str:
    """sha256 over the files' names and bytes, so that two folders with the same content hash alike."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0" + path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _is_wanted(file: str) -> bool:
    return not any(variant in file for variant in (".fp16.", ".non_ema.", "flax"))


def _from_hub(name: str, key: str, parts: tuple[str, ...]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = [sibling.rfilename for sibling in HfApi().model_info(name, timeout=10).siblings or ()]
        inside = [file for file in files if file.split("/")[0] in parts]
        wanted = [
            file
            for file in inside or [file for file in files if "/" not in file]
            if file.endswith((".json", ".safetensors", "spiece.model")) and _is_wanted(file)
        ]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except RepositoryNotFoundError:
        raise UserError(
            f"{key}: the hub has no repository {name!r} that you may read; use `builtin` or a folder"
        ) from None
    except Exception as error:  # whichever HTTP client the hub's library is on, and whatever is wrong with the network
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except Exception:
            places = " and ".join(f"`{part}/`" for part in parts)
            raise UserError(
                f"{key}: {name!r} is neither a folder nor in the local cache, and the hub can't be reached ({error}); "
                f"download the repository {name} elsewhere (of a whole pipeline only {places}) and set {key} to that "
                "folder, or use `builtin`"
            ) from None
