"""Reads and writes files of adapters.

Names are those of diffusers and peft (`transformer.blocks.0.attn1.to_q.lora_A.weight`), of Wan's own code, which
ComfyUI and kohya's trainers use (`diffusion_model.blocks.0.self_attn.q.lora_down.weight`), or of this project. An
adapter adds alpha / rank × B A to a layer's weight. Its alpha is a tensor `LAYER.alpha`, or in the metadata of
diffusers and peft, or in the recipe next to a checkpoint. A file without any of them means alpha = rank, as in
diffusers.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from sora_train.errors import UserError
from sora_train.lora.config import LoraConfig
from sora_train.lora.names import Layer, known_names, linear_layers
from sora_train.model import ModelConfig
from sora_train.settings import build, read_yaml

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
CHECKPOINT_FILE = "ema.safetensors"
METADATA = "lora_adapter_metadata"
"""Key of diffusers' metadata: peft's settings as JSON."""
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lora_unet_")
MATRIX = re.compile(r"(.+)\.(?:(lora_A|lora_down|lora\.down)|lora_B|lora_up|lora\.up)(?:\.[^.]+)?\.weight")
"""A layer's name and which matrix it is; peft may put the adapter's name in."""
ALPHA = ".alpha"


@dataclass(frozen=True)
class Adapter:
    """Matrices A and B by our names, such as `blocks.0.attention.qkv.q.lora_A.weight`, and each layer's alpha."""

    tensors: dict[str, Tensor]
    alphas: dict[str, float]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer's adapter."""
        return {layer: len(self.tensors[f"{layer}.lora_A.weight"]) for layer in self.alphas}

    @property
    def scales(self) -> dict[str, float]:
        """alpha / rank of each layer."""
        return {layer: alpha / self.ranks[layer] for layer, alpha in self.alphas.items()}


def with_alpha(tensors: Mapping[str, Tensor], scale: float) -> Adapter:
    """The adapter of matrices by our names that all have the same alpha / rank."""
    ranks = {name.removesuffix(".lora_A.weight"): len(a) for name, a in tensors.items() if name.endswith("A.weight")}
    return Adapter(dict(tensors), {layer: scale * rank for layer, rank in ranks.items()})


def read_lora(path: str | Path, config: ModelConfig) -> Adapter:
    """The adapters of a file, or of a folder that holds one, for a model of this shape.

    Raises UserError for a file that can't be read, has more than adapters, or is of another model.
    """
    file = adapter_file(Path(path).expanduser())
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is not a mapping
            metadata: dict[str, str] = opened.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{file} does not exist. Name a file of adapters", code="lora") from None
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} is cut short or no safetensors ({error}). Fetch or export it again", code="lora"
        ) from None
    layers = linear_layers(config)
    matrices, alphas = by_layer(tensors, layers, file)
    for name, matrix in matrices.items():
        if not matrix.isfinite().all():
            raise UserError(f"{file}: {name} has values that are not finite. Fetch or export it again", code="lora")
    found = settings_beside(file, metadata)
    ranks = {layer: len(matrices[f"{layer}.lora_A.weight"]) for layer in layers if f"{layer}.lora_A.weight" in matrices}
    return Adapter(
        matrices,
        {x: alphas[x] if x in alphas else alpha_by(found, layers[x].diffusers, rank) for x, rank in ranks.items()},
    )


def adapter_file(path: Path) -> Path:
    """The file of adapters that a path names. Raises UserError for a pickle, and a folder without such a file."""
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which may run any code when it is read. Convert it to safetensors", code="lora"
        )
    if not path.is_dir():
        return path
    for name in (DIFFUSERS_FILE, PEFT_FILE, CHECKPOINT_FILE):
        if (path / name).is_file():
            return path / name
    raise UserError(
        f"{path} is a folder without {DIFFUSERS_FILE} or {PEFT_FILE}. Name the file, or a checkpoint of a LoRA run",
        code="lora",
    )


def by_layer(
    tensors: Mapping[str, Tensor], layers: Mapping[str, Layer], file: Path
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The matrices by our names, and alphas by layer. Raises UserError for any other tensor, and for wrong shapes."""
    known = known_names(dict(layers))
    matrices: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        match = MATRIX.fullmatch(key)
        layer = known.get(without_prefix(match[1] if match else key.removesuffix(ALPHA)))
        if layer is None or not (match or (key.endswith(ALPHA) and tensor.numel() == 1)):
            unknown.append(key)
        elif match is None:
            alphas[layer] = float(tensor)
        else:
            matrices[f"{layer}.lora_{'A' if match[2] else 'B'}.weight"] = tensor
    if not any(map(MATRIX.fullmatch, tensors)):
        raise UserError(
            f"{file} holds no adapters, but {shown(list(tensors)) or 'nothing'}. Name another file", code="lora"
        )
    if unknown:
        raise UserError(f"{file} {why_unknown(unknown, len(tensors))}", code="lora")
    for name in dict.fromkeys((*(name.partition(".lora_")[0] for name in matrices), *alphas)):
        a, b = matrices.get(f"{name}.lora_A.weight"), matrices.get(f"{name}.lora_B.weight")
        check_shapes(layers[name], a, b, file)
    return matrices, alphas


def without_prefix(name: str) -> str:
    """A layer's name without what formats put before it."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def why_unknown(unknown: list[str], count: int) -> str:
    """What is wrong with a file of `count` tensors of which some are unknown."""
    names = shown(unknown)
    if any(".diff" in key or key.endswith((".bias", "lora_magnitude_vector", "dora_scale")) for key in unknown):
        return (
            f"changes more than LoRA's matrices ({len(unknown)} of {count} tensors: {names}), such as biases, norms or "
            "DoRA's magnitudes. Only matrices A and B can be read"
        )
    if len(unknown) == count:
        return f"holds no adapters of this model: the model has no layers {names}. Use a file for the same base model"
    return (
        f"has {len(unknown)} of {count} tensors that the model has no layer for: {names}. Use a file for the same "
        "base model"
    )


def shown(names: list[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def check_shapes(layer: Layer, a: Tensor | None, b: Tensor | None, file: Path) -> None:
    """Raises UserError unless A and B are there and their product has the shape of the layer's weight."""
    if a is None or b is None:
        raise UserError(f"{file} has only one matrix of {layer.diffusers}. Fetch or export it again", code="lora")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise UserError(
            f"{file}: the matrices of {layer.diffusers} are {list(a.shape)} and {list(b.shape)}, which have no "
            "product. Fetch or export it again",
            code="lora",
        )
    if (b.shape[0], a.shape[1]) != (layer.out_features, layer.in_features):
        raise UserError(
            f"{file} is of another model: its {layer.diffusers} maps {a.shape[1]} numbers to {b.shape[0]}, and this "
            f"model's {layer.in_features} to {layer.out_features}. Use a file for the same base model",
            code="lora",
        )


def settings_beside(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings of a file: in its metadata, in adapter_config.json next to it, or from a checkpoint's recipe.

    Raises UserError if they can't be read.
    """
    place = file
    try:
        if METADATA in metadata:
            settings = json.loads(metadata[METADATA])
            return {key.removeprefix("transformer."): value for key, value in settings.items()}
        place = file.with_name(PEFT_CONFIG)
        if place.is_file():
            return dict(json.loads(place.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"the settings of {file} in {place} can't be read: {error}", code="lora") from None
    place = file.with_name("recipe.yaml")
    if file.name == CHECKPOINT_FILE and place.is_file():
        lora = build(LoraConfig, read_yaml(place).get("lora") or {}, {}, str(place))
        return {"r": lora.rank, "lora_alpha": lora.alpha or lora.rank}
    return {}


def alpha_by(settings: Mapping[str, Any], name: str, rank: int) -> float:
    """A layer's alpha by peft's settings; the rank if they don't say."""
    from peft.utils.other import get_pattern_key  # peft takes seconds

    patterns: dict[str, float] = settings.get("alpha_pattern") or {}
    key = get_pattern_key(list(patterns), name)
    alpha = float(patterns[key] if key in patterns else settings.get("lora_alpha", rank))
    return alpha * rank**0.5 if settings.get("use_rslora") else alpha  # rank-stabilised: alpha / √rank


def write_lora(folder: Path, adapter: Adapter, config: ModelConfig, name: str = "") -> list[Path]:
    """Writes diffusers' file into a folder and, for Wan and with a name, NAME_comfyui.safetensors. Returns both."""
    layers = linear_layers(config)
    file = folder / DIFFUSERS_FILE
    there = {f"transformer.{layers[layer].diffusers}{rest}": tensor for layer, rest, tensor in parts(adapter)}
    settings = {f"transformer.{key}": value for key, value in peft_settings(adapter, layers).items()}
    save_file(there, file, {"format": "pt", METADATA: json.dumps(settings, indent=2, sort_keys=True)})
    if config.family != "wan" or not name:
        return [file]
    comfy = folder / f"{name}_comfyui.safetensors"
    there = {f"diffusion_model.{layers[layer].original}{rest}": tensor for layer, rest, tensor in parts(adapter)}
    alphas = {f"diffusion_model.{layers[x].original}{ALPHA}": torch.tensor(a) for x, a in adapter.alphas.items()}
    save_file(there | alphas, comfy, {"format": "pt"})
    return [file, comfy]


def parts(adapter: Adapter) -> list[tuple[str, str, Tensor]]:
    """Each matrix with its layer and the rest of its name."""
    split = ((*name.partition(".lora_"), tensor) for name, tensor in adapter.tensors.items())
    return [(layer, dot + rest, tensor.detach().cpu().contiguous()) for layer, dot, rest, tensor in split]


def peft_settings(adapter: Adapter, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """peft's settings of an adapter, with a pattern for each layer whose rank or alpha is not the first one's."""
    names = {layer: layers[layer].diffusers for layer in adapter.alphas}
    rank, alpha = next(iter(adapter.ranks.values())), next(iter(adapter.alphas.values()))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{names[x]}": r for x, r in adapter.ranks.items() if r != rank},
        "alpha_pattern": {f"^{names[x]}": a for x, a in adapter.alphas.items() if a != alpha},
        "target_modules": sorted(names.values()),
    }
