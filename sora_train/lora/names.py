"""Names of the layers that an adapter file may change: here, in diffusers, and in Wan's own code (ComfyUI, kohya)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sora_train.lora.adapters import FUSED, weight_rows
from sora_train.model import ModelConfig, build
from sora_train.model.convert_latte import latte_names
from sora_train.model.convert_wan import wan_names

WAN_PARTS = (
    ("attn1.to_", "self_attn."),
    ("attn2.to_", "cross_attn."),
    ("_attn.out.0", "_attn.o"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
)
"""Parts of names in diffusers, and in Wan's own code, replaced in this order."""


@dataclass(frozen=True)
class Layer:
    """A linear map: its name here, in diffusers and, for Wan, in Wan's own code; and its sizes."""

    name: str
    diffusers: str
    original: str
    """Empty for Latte."""
    out_features: int
    in_features: int


def linear_layers(config: ModelConfig) -> dict[str, Layer]:
    """The linear maps of a model by name; query, key and value are one each.

    The patch map is left out: diffusers has a convolution there.
    """
    with torch.device("meta"):
        model = build(config)
    found: dict[str, Layer] = {}
    for name, theirs in split_names(config):
        try:
            rows = weight_rows(model, name)
        except ValueError:  # a norm, a table, or a layer that only other models have
            continue
        found[name] = Layer(name, theirs, original_name(theirs) if config.family == "wan" else "", *rows.shape)
    return found


def split_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Pairs of a module here and its counterpart in diffusers; parts of a fused map have a name each."""
    for ours, theirs in wan_names(config.depth) if config.family == "wan" else latte_names(config.depth):
        fused = ours.rpartition(".")[2]
        parts = [f"{ours}.{letter}" for letter in fused] if fused in FUSED else [ours]
        if ours != "patch_in":
            yield from zip(parts, theirs, strict=True)


def original_name(theirs: str) -> str:
    """The name in Wan's own code of a layer of diffusers' `WanTransformer3DModel`."""
    for diffusers, original in WAN_PARTS:
        theirs = theirs.replace(diffusers, original)
    return theirs


def known_names(layers: dict[str, Layer]) -> dict[str, str]:
    """Our names of layers by every name that files use; kohya writes underscores for dots."""
    found: dict[str, str] = {}
    for layer in layers.values():
        for name in filter(None, (layer.name, layer.diffusers, layer.original)):
            found[name] = found[name.replace(".", "_")] = layer.name
    return found
