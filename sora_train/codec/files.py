"""The files of a frozen network and its config, without loading it.

Only safetensors, so nothing is unpickled. No torch, so a driver can plan and check before any worker starts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sora_train.codec import CodecConfig
from sora_train.codec.folders import find_folder
from sora_train.codec.hub import PARTS, is_wanted
from sora_train.errors import UserError
from sora_train.latent_shape import latent_shape
from sora_train.manifest import TextFacts, VaeFacts
from sora_train.weight_headers import WeightsError, read_header

SCALING_FACTORS = {  # the classes' defaults, if a config has none
    "AutoencoderKL": 0.18215,
    "AutoencoderTiny": 1.0,
    "AutoencoderKLTemporalDecoder": 0.18215,
    "AutoencoderKLCogVideoX": 1.15258426,
    "AutoencoderKLWan": 1.0,
}
TEXT_ENCODERS = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}
"""Classes in transformers by the `model_type` of a text encoder's config."""


@dataclass(frozen=True)
class VaeFiles:
    """A VAE on disk. `moments` is 2 if it has a posterior (mean, log-variance), otherwise 1.

    A latent stands for `factor` pixels on a side and `time_factor` frames; a clip's first frame has its own.
    """

    place: Path
    files: tuple[Path, ...]
    kind: str
    channels: int
    factor: int
    time_factor: int
    moments: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @cached_property
    def hash(self) -> str:
        """Hash of weights and config. Reads all their bytes the first time."""
        return content_hash(self.files)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latent shape `f c h w` of a clip of `frames` frames and `height` x `width` pixels."""
        return latent_shape(self.channels, self.factor, self.time_factor, frames, height, width)

    def facts(self, codec: CodecConfig, hash: str) -> VaeFacts:
        """The manifest's facts of it as the VAE of `codec`; `hash` may be "" where none is compared."""
        return VaeFacts(
            name=codec.vae, hash=hash, channels=self.channels, factor=self.factor, time_factor=self.time_factor,
            precision=codec.precision, mean=self.mean, std=self.std,
        )  # fmt: skip


@dataclass(frozen=True)
class TextFiles:
    """A text encoder and its tokenizer on disk. `kind` is the class in transformers."""

    place: Path
    tokenizer: Path
    files: tuple[Path, ...]
    kind: str
    width: int

    @cached_property
    def hash(self) -> str:
        """Hash of weights, config and tokenizer. Reads all their bytes the first time."""
        return content_hash(self.files)

    def facts(self, codec: CodecConfig, hash: str) -> TextFacts:
        """The manifest's facts of it as the text encoder of `codec`; `hash` may be "" where none is compared."""
        return TextFacts(
            name=codec.text, hash=hash, width=self.width, max_tokens=codec.max_tokens,
            precision=codec.text_precision, caption_cleaning=codec.caption_cleaning,
        )  # fmt: skip


def find_vae(name: str, models: str = "") -> VaeFiles:
    """The VAE that `codec.vae` names: `builtin`, a folder or a hub id, of a VAE or of a whole pipeline.

    `models` is a folder that `sora download` filled. Raises UserError, with what to do, if there is no such VAE.
    """
    folder = find_folder(name, "codec.vae", PARTS["codec.vae"], models)
    place = part_of(folder, PARTS["codec.vae"], "config.json")
    if place is None:
        raise UserError(
            f"codec.vae: {folder} has no VAE in diffusers' format: no config.json, no vae/config.json", code="weights"
        )
    config = read_config(place)
    kind = config.get("_class_name", "network without a class name")
    if kind not in SCALING_FACTORS:
        raise UserError(f"codec.vae: {place} holds a {kind}. Supported: {', '.join(SCALING_FACTORS)}", code="weights")
    channels, factor, time_factor = sizes(kind, config)
    if kind == "AutoencoderKLWan" and time_factor != 4:
        raise UserError(
            f"codec.vae: {place} compresses time by {time_factor}; diffusers reads Wan's VAE only with 4",
            code="weights",
        )
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if kind == "AutoencoderKLCogVideoX" or mean is None or std is None:  # CogVideoX's pipelines only scale
        if kind == "AutoencoderKLWan":
            raise UserError(
                f"codec.vae: {place / 'config.json'} has no latents_mean and latents_std. Add them", code="weights"
            )
        mean = [float(config.get("shift_factor") or 0.0)] * channels
        std = [1 / (config.get("scaling_factor") or SCALING_FACTORS[kind])] * channels
    files = (*weight_files(place, "codec.vae"), place / "config.json")
    moments = 1 if kind == "AutoencoderTiny" else 2
    return VaeFiles(place, files, kind, channels, factor, time_factor, moments, tuple(mean), tuple(std))


def sizes(kind: str, config: dict) -> tuple[int, int, int]:
    """Latent channels, spatial factor and time factor; defaults are those of the classes."""
    if kind == "AutoencoderKLWan":
        halvings = len(config.get("dim_mult", (1, 2, 4, 4))) - 1
        time_factor = 2 ** sum(config.get("temperal_downsample", (False, True, True)))  # diffusers' spelling
        return config.get("z_dim", 16), 2**halvings * (config.get("patch_size") or 1), time_factor
    if kind == "AutoencoderKLCogVideoX":
        halvings = len(config.get("block_out_channels", (128, 256, 256, 512))) - 1
        return config.get("latent_channels", 16), 2**halvings, int(config.get("temporal_compression_ratio", 4))
    if kind == "AutoencoderTiny":
        blocks = config.get("encoder_block_out_channels", (64,) * 4)
    else:
        blocks = config.get("block_out_channels", (64,))
    return config.get("latent_channels", 4), 2 ** (len(blocks) - 1), 1


def find_text_encoder(name: str, models: str = "") -> TextFiles:
    """The text encoder that `codec.text` names: `builtin`, a folder or a hub id, also of a whole pipeline.

    `models` is a folder that `sora download` filled. Raises UserError, with what to do, if there is none.
    """
    folder = find_folder(name, "codec.text", PARTS["codec.text"], models)
    place = part_of(folder, ("text_encoder",), "config.json")
    if place is None:
        raise UserError(
            f"codec.text: {folder} has no text encoder: no config.json, no text_encoder/config.json", code="weights"
        )
    config = read_config(place)
    if (kind := config.get("model_type")) not in TEXT_ENCODERS:
        raise UserError(
            f"codec.text: {place} holds a {kind!r} model. Supported: {', '.join(TEXT_ENCODERS)}", code="weights"
        )
    for file in ("tokenizer.json", "spiece.model"):
        if tokenizer := part_of(folder, ("tokenizer",), file):
            files = (*weight_files(place, "codec.text"), place / "config.json", tokenizer / file)
            return TextFiles(place, tokenizer, files, TEXT_ENCODERS[kind], config["d_model"])
    raise UserError(
        f"codec.text: no tokenizer in {folder}: no tokenizer.json or spiece.model, also not in tokenizer/. Copy the "
        "tokenizer's files next to the encoder's",
        code="weights",
    )


def part_of(folder: Path, parts: tuple[str, ...], file: str) -> Path | None:
    """The first of the folders `folder/part` and `folder` that has `file`."""
    return next((place for place in (*(folder / part for part in parts), folder) if (place / file).is_file()), None)


def weight_files(folder: Path, key: str) -> list[Path]:
    """A network's safetensors files, except float16 variants. UserError if there are none, or one is cut short."""
    files = sorted(path for path in folder.glob("*.safetensors") if is_wanted(path.name))
    if not files:
        raise UserError(
            f"{key}: no safetensors in {folder}: pickled weights are never loaded. Convert them once with "
            "`model.save_pretrained(folder)` on a machine that may run them, and name that folder",
            code="weights",
        )
    for path in files:
        try:
            read_header(path)
        except WeightsError as error:
            raise UserError(f"{key}: {error}. Fetch it again", code="weights") from None
        except OSError as error:
            raise UserError(f"{key}: {path} can't be read: {error}", code="weights") from None
    return files


def read_config(folder: Path) -> dict:
    """The config of a network. Raises UserError if it is damaged."""
    with damaged_file_errors(str(folder / "config.json")):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
        return config


def check_complete(loading_info: dict[str, Any]) -> None:
    """Raises ValueError if weights lack tensors, to which diffusers and transformers give random values."""
    if missing := sorted(loading_info["missing_keys"]):
        raise ValueError(f"{len(missing)} of the network's tensors are not there, such as {missing[0]}")


@contextmanager
def damaged_file_errors(what: str, folder: Path | None = None) -> Iterator[None]:
    """Turns what JSON, safetensors, diffusers and transformers raise for unreadable files into a UserError.

    The message names the files and the cause. Running out of memory is not the files' fault and passes through.
    """
    try:
        yield
    except Exception as error:  # of four libraries; tokenizers has no class for it
        from sora_train.codec.memory import is_out_of_memory

        if is_out_of_memory(error):
            raise
        cause = (str(error).strip() or "no reason given").splitlines()[0][:300]
        if isinstance(error, ImportError):
            raise UserError(
                f"{what} can't be read: a package is missing here ({cause}). Install it", code="package"
            ) from error
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{what} can't be read: {error.strerror}", code="weights") from error
        raise UserError(
            f"{what} can't be read ({type(error).__name__}: {cause}). The files are damaged, or of another kind of "
            f"network. Fetch them again{newer_library(folder) if folder else ''}",
            code="weights",
        ) from error


def newer_library(folder: Path) -> str:
    """The end of a message if a folder's config names a newer library than the installed one; otherwise empty."""

    def release(of: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", of)[:2]]

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for key, library in (("_diffusers_version", "diffusers"), ("transformers_version", "transformers")):
            written, here = str(config.get(key, "")), version(library)
            if release(written) > release(here):
                return f", or install {library} {written}, which wrote them; {here} is installed"
    except (OSError, ValueError, AttributeError):
        pass
    return ""


def content_hash(files: tuple[Path, ...]) -> str:
    """sha256 over names and bytes of files, so folders with the same content have the same hash."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0" + path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
