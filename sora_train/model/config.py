"""The model's configuration and its presets.

S, B, L and XL are Latte's presets (Ma et al. 2024, arXiv 2401.03048, section 3), with the sizes of DiT. `latte_t2v` is
the released text-to-video model, `maxin-cn/Latte-1`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

LARGEST = 2**16
"""Largest side of a weight, so torch can count the product of two."""


@dataclass(frozen=True)
class ModelConfig:
    """The recipe's `model` section: the shape of the transformer."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    preset: Literal["", "S", "B", "L", "XL", "latte_t2v"] = ""
    """Named shape that sets the keys of `model` not given here: Latte's S, B, L, XL, or `latte_t2v` as released. As a
    flag it replaces the shape in the recipe's file."""
    width: int = 384
    """Width of the token vectors."""
    depth: int = 12
    """Number of blocks, spatial and temporal ones together. It must be even if `attention` is `factorised`."""
    heads: int = 6
    """Number of attention heads. It must divide the width."""
    patch: int = 2
    """Side of a patch, in latents."""
    in_channels: int = 4
    """Channels of the VAE's latents."""
    learned_variance: bool = False
    """Doubles the output channels. The second half is the variance of DDPM's reverse step."""
    text_width: int = 4096
    """Width of the text encoder's embeddings (4096 for T5-XXL)."""
    attention: Literal["factorised", "joint"] = "factorised"
    """`factorised`: spatial and temporal blocks alternate, as in Latte. `joint`: every block attends over space and
    time."""
    cross_attention_in: Literal["spatial", "every"] = "spatial"
    """With `factorised`: which blocks attend to the caption. The released Latte uses `spatial`."""
    positions: Literal["sinusoid", "rotary"] = "sinusoid"
    """Position embedding: a `sinusoid` added to each token, as in Latte, or `rotary` (RoPE) in every attention, for any
    size."""
    temporal_positions: Literal["temporal", "input", "rotary"] = "temporal"
    """Where the frame's position enters: at the first temporal block (`joint`: at the input), at the input, or as
    RoPE."""
    pooled_text: bool = False
    """Adds the mean of the caption's embeddings to the time embedding, which conditions every block."""
    sample_size: int = 32
    """Latents on a side for which positions are scaled; other sizes interpolate. For 512 px and a VAE of factor 8 it is
    64."""
    sample_frames: int = 0
    """Latent frames that temporal positions span, whatever the clip's length. 0: positions are 0, 1, 2 …, unscaled."""
    attention_bias: bool = True
    """Biases in the query, key and value projections."""
    norm_eps: float = 1e-6
    """Epsilon that layer norms add to the variance."""
    init_from: str = ""
    """Initial weights of a new run: a Latte or a PixArt-alpha (a folder in diffusers' format or a hub id), or a run, a
    checkpoint or an export of this project. Averaged weights are used, except from an export of raw ones."""

    def __post_init__(self) -> None:
        for key in ("width", "depth", "heads", "patch", "in_channels", "text_width", "sample_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key} is {getattr(self, key)}; it must be at least 1")
            if getattr(self, key) > LARGEST:
                raise ValueError(f"model.{key} is {getattr(self, key)}; it must be at most {LARGEST}")
        if self.sample_frames < 0:
            raise ValueError(f"model.sample_frames is {self.sample_frames}; it must be 0 or more")
        if self.width % self.heads:
            raise ValueError(f"model.width {self.width} is not a multiple of model.heads {self.heads}")
        if self.width % 4:
            raise ValueError(
                f"model.width {self.width} must be a multiple of 4: positions take sines and cosines of two axes"
            )
        if self.attention == "factorised" and self.depth % 2:
            raise ValueError(f"model.depth {self.depth} must be even: spatial and temporal blocks alternate")
        if self.sample_size % self.patch:
            raise ValueError(f"model.sample_size {self.sample_size} must be a multiple of model.patch {self.patch}")
        head = self.width // self.heads
        if "rotary" in (self.positions, self.temporal_positions) and (head % 2 or head < 6):
            raise ValueError(
                f"model.width {self.width} over model.heads {self.heads} is {head} a head; rotary positions rotate "
                "pairs on three axes, so it must be even and at least 6"
            )

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learned_variance else 1)


PRESETS: dict[str, dict[str, Any]] = {
    "S": {"depth": 12, "width": 384, "heads": 6, "patch": 2},
    "B": {"depth": 12, "width": 768, "heads": 12, "patch": 2},
    "L": {"depth": 24, "width": 1024, "heads": 16, "patch": 2},
    "XL": {"depth": 28, "width": 1152, "heads": 16, "patch": 2},
    "latte_t2v": {
        "depth": 56,
        "width": 1152,
        "heads": 16,
        "patch": 2,
        "learned_variance": True,
        "text_width": 4096,
        "sample_size": 64,
        "attention_bias": True,
        "norm_eps": 1e-6,
    },
}


def preset(name: str) -> ModelConfig:
    """The preset of that name, for code without a recipe. Raises KeyError if unknown."""
    return ModelConfig(preset=name, **PRESETS[name])  # pyright: ignore[reportArgumentType]


def with_preset(keys: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe's `model` section, with those of its preset filled in."""
    name = keys.get("preset")
    return {**PRESETS[name], **keys} if isinstance(name, str) and name in PRESETS else keys
