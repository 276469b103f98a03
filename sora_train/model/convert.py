"""Weights to and from diffusers: Latte and Wan both ways, PixArt-alpha in.

The conversion renames, stacks and reshapes tensors; `convert_latte.py` and `convert_wan.py` have the names and settings
of each class.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from sora_train.model import Latte, ModelConfig, Transformer, build, build_empty
from sora_train.model.convert_latte import (
    BUFFERS,
    IMAGE,
    PADDED,
    VIDEO,
    is_image_model,
    latte_config,
    latte_names,
    latte_settings,
    start_as_identity,
    with_variance,
    without_variance,
)
from sora_train.model.convert_wan import CLASS, wan_config, wan_names, wan_settings
from sora_train.weight_headers import WeightsError, check_tensors, read_header

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARD_BYTES = 10 * 10**9
"""Largest weight file that is written, as in diffusers."""


def config_from_diffusers(settings: dict[str, Any]) -> ModelConfig:
    """The model config of a class of diffusers. Raises ValueError for a class or settings without a counterpart."""
    name = settings.get("_class_name")
    if name not in (*VIDEO, *IMAGE, CLASS):
        raise ValueError(f"_class_name is {name!r}; {', '.join((*VIDEO, *IMAGE, CLASS))} can be read")
    try:
        return wan_config(settings) if name == CLASS else latte_config(settings)
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is not given, which a {name} has") from None


def transformer_folder(folder: Path) -> Path:
    """The folder itself, or `transformer` in a pipeline's. Raises FileNotFoundError if neither has a config.json.

    Raises ValueError for a pipeline of two transformers.
    """
    if (folder / "transformer_2" / "config.json").is_file():
        raise ValueError(
            f"{folder} has two experts, transformer and transformer_2, each for a part of the diffusion times; only "
            "pipelines of one can be read. Name the folder of one of the two to train it for all times"
        )
    for place in (folder / "transformer", folder):
        if (place / "config.json").is_file():
            return place
    missing = folder / ("transformer" if (folder / "model_index.json").exists() else "") / "config.json"
    raise FileNotFoundError(f"{missing} is missing: not a model in diffusers' format")


def check_fit(config: ModelConfig, folder: Path) -> None:
    """Raises ValueError, with every key that differs, if a model of this shape can't load the weights in a folder."""
    settings = json.loads((transformer_folder(folder) / "config.json").read_text())
    wrong = config_differences(config, config_from_diffusers(settings))
    if wrong and is_image_model(settings):
        wrong.append(
            "it is an image model: its blocks become the spatial ones of a factorised model, half of model.depth, and "
            "each frame stays its image only where model.temporal_positions adds nothing to tokens, as rotary"
        )
    if wrong:
        raise ValueError("; ".join(wrong))


def config_differences(config: ModelConfig, found: ModelConfig) -> list[str]:
    """A phrase for every key in which weights of the config `found` do not fit a model of `config`."""
    free = ("preset", "sample_frames", "init_from")  # a Latte may be made for other lengths than it was trained on
    inner = [config.feed_forward, found.feed_forward]
    if any(inner):  # 0 stands for four times the width
        inner = [config.inner_width, found.inner_width]
    wanted, there = (asdict(each) | {"feed_forward": n} for each, n in zip((config, found), inner, strict=True))
    keys = ["family"] if config.family != found.family else [key for key in wanted if key not in free]
    return [f"model.{key} is {wanted[key]!r}, there it is {there[key]!r}" for key in keys if wanted[key] != there[key]]


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a diffusers folder: one, or several with an index. WeightsError if one is missing."""
    index = folder / f"{WEIGHTS}.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [WEIGHTS]
    for name in names:
        if not (folder / name).is_file() or Path(name).name != name:
            raise WeightsError(f"{folder / name} is missing: expected safetensors weights next to config.json")
    return [folder / name for name in names]


def check_weights(model: Transformer, folder: Path) -> None:
    """WeightsError if the tensors in a diffusers folder are not those of a model of their config.

    Reads only the headers of the files, and of the model only names and shapes, so it may be on the meta device.
    """
    folder = transformer_folder(folder)
    settings = json.loads((folder / "config.json").read_text())
    config, wanted, shapes = model.config, model.state_dict(), dict[str, tuple[int, ...]]()
    for ours, theirs in tensor_names(config, wanted, is_image_model(settings)).items():
        first, *rest = diffusers_shape(config, ours, wanted[ours])
        if settings.get(PADDED, False) and ours.startswith("patch_out."):
            first *= 2
        shapes |= dict.fromkeys(theirs, (first // len(theirs), *rest))
    headers = {name: tensor for path in weight_files(folder) for name, tensor in read_header(path).items()}
    check_tensors({name: tensor for name, tensor in headers.items() if name not in BUFFERS}, shapes, folder)


def from_diffusers(folder: str | Path) -> Transformer:
    """A model with the weights of a folder in diffusers' format, a transformer's own or a pipeline's.

    Raises FileNotFoundError without a config, ValueError for settings without a counterpart, and WeightsError for
    missing files, other tensors than the model's, and values that are not finite.
    """
    settings = json.loads((transformer_folder(Path(folder)) / "config.json").read_text())
    config = config_from_diffusers(settings)
    model = build(config) if is_image_model(settings) else build_empty(config, "cpu")
    load_diffusers(model, folder)
    return model


def has_every_weight(folder: Path) -> bool:
    """Whether a diffusers folder has all weights of its model; those of an image model's temporal blocks are random."""
    return not is_image_model(json.loads((transformer_folder(folder) / "config.json").read_text()))


@torch.no_grad()
def load_diffusers(model: Transformer, folder: str | Path) -> None:
    """Copies weights in diffusers' format into a model of their config, one tensor at a time. Raises as above."""
    folder = transformer_folder(Path(folder))
    check_weights(model, folder)
    if isinstance(model, Latte) and not has_every_weight(folder):
        start_as_identity(model)
    wanted = model.state_dict()
    for name, read in open_diffusers(model, folder).items():
        wanted[name].copy_(read())


def open_diffusers(model: Transformer, folder: Path) -> dict[str, Callable[[], Tensor]]:
    """The weights in a transformer's folder by our names, for a model of their config. Each is read when called.

    Raises WeightsError then for values that are not finite.
    """
    settings = json.loads((folder / "config.json").read_text())
    shapes, padded = {name: tensor.shape for name, tensor in model.state_dict().items()}, settings.get(PADDED, False)
    files: list[Any] = [safe_open(path, "pt") for path in weight_files(folder)]
    there: dict[str, Any] = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def read(ours: str, theirs: tuple[str, ...]) -> Tensor:
        tensor = torch.cat([there[name].get_tensor(name) for name in theirs])
        if not tensor.isfinite().all():
            raise WeightsError(f"{folder}: {', '.join(theirs)} has values that are not finite")
        if padded and ours.startswith("patch_out."):
            tensor = without_variance(tensor, model.config)
        return tensor.reshape(shapes[ours])

    names = tensor_names(model.config, shapes, is_image_model(settings))
    return {ours: partial(read, ours, theirs) for ours, theirs in names.items()}


def tensor_names(config: ModelConfig, wanted: Collection[str], image: bool = False) -> dict[str, tuple[str, ...]]:
    """Our tensors, and the names of those in diffusers that are stacked to each."""
    pairs = wan_names(config.depth) if config.family == "wan" else latte_names(config.depth, image)
    return {
        ours + part: tuple(name + part for name in theirs)
        for ours, theirs in pairs
        for part in ("", ".weight", ".bias")
        if ours + part in wanted
    }


def diffusers_shape(config: ModelConfig, ours: str, tensor: Tensor) -> tuple[int, ...]:
    """The shape of one of our tensors in diffusers, before stacks are cut."""
    wan = config.family == "wan"
    if ours == "patch_in.weight":  # a convolution, of Wan in three dimensions
        return (config.width, config.in_channels, *((1,) if wan else ()), config.patch, config.patch)
    is_table = ours.split(".")[-1].startswith("table")
    return (*((1,) if wan and is_table else ()), *tensor.shape)


def to_diffusers(model: Transformer, folder: str | Path, frames: int = 16, pad_variance: bool = False) -> None:
    """Writes a folder that diffusers' class reads, a Latte for clips of `frames` frames.

    With `pad_variance`, a Latte without a learned variance gets one of zeros, because LattePipeline drops half of the
    output; `from_diffusers` removes it again. Raises ValueError for a setting that diffusers' class can't express.
    """
    config, folder = model.config, Path(folder)
    padded = pad_variance and config.family == "latte" and not config.learned_variance
    settings = wan_settings(config) if config.family == "wan" else latte_settings(config, frames, padded)
    weights, there = model.state_dict(), dict[str, Tensor]()
    for ours, theirs in tensor_names(config, weights).items():
        tensor = weights[ours].reshape(diffusers_shape(config, ours, weights[ours]))
        if padded and ours.startswith("patch_out."):
            tensor = with_variance(tensor, config)
        there |= {name: part.contiguous() for name, part in zip(theirs, tensor.chunk(len(theirs)), strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    save_shards(there, folder)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def save_shards(weights: dict[str, Tensor], folder: Path, most: int = SHARD_BYTES) -> None:
    """Writes one file, or several of at most `most` bytes with an index, as diffusers does."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    stem, suffix = Path(WEIGHTS).stem, Path(WEIGHTS).suffix
    places = [f"{stem}-{i:05}-of-{len(shards):05}{suffix}" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        places = [WEIGHTS]
    for place, shard in zip(places, shards, strict=True):
        save_file(shard, folder / place, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in weights.values())
        where = {name: place for place, shard in zip(places, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
