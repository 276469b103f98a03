"""The model's configuration and its presets.

S, B, L and XL are Latte's presets (Ma et al. 2024, arXiv 2401.03048, section 3), with the sizes of DiT. XL has heads of
width 72, for which cuDNN computes 128. `XL_heads64` and `XL_heads128` are XL with 18 heads of 64 and 9 of 128: the same
parameters and FLOPs. `latte_t2v` is the released text-to-video model, `maxin-cn/Latte-1`. The presets of Wan are the
released `Wan-AI/Wan2.1-T2V-1.3B`, `Wan2.1-T2V-14B` and `Wan2.2-TI2V-5B`.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

LARGEST = 2**16
"""Largest side of a weight, so torch can count the product of two."""


@dataclass(frozen=True)
class ModelConfig:
    """The recipe's `model` section: the shape of the transformer."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    preset: Literal[
        "", "S", "B", "L", "XL", "XL_heads64", "XL_heads128", "latte_t2v", "wan2.1_t2v_1.3b", "wan2.1_t2v_14b",
        "wan2.2_ti2v_5b",
    ] = ""  # fmt: skip
    """Named shape that sets the keys of `model` not given here: Latte's S, B, L, XL, XL with heads of 64 or 128, which
    GPUs compute faster than its 72, or a released model. As a flag it replaces the shape in the recipe's file."""
    family: Literal["latte", "wan"] = "latte"
    """Architecture: `latte` (Latte and PixArt-alpha's block), or `wan` (Wan 2.1 and 2.2)."""
    width: int = 384
    """Width of the token vectors."""
    depth: int = 12
    """Number of blocks, spatial and temporal ones together. It must be even if `attention` is `factorised`."""
    heads: int = 6
    """Number of attention heads. It must divide the width."""
    feed_forward: int = 0
    """With `family: wan`: width inside the feed-forward layers. 0: four times the width, as always in Latte."""
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
    """Initial weights of a new run: a Latte, a PixArt-alpha or a Wan (a folder in diffusers' format or a hub id), or a
    run, a checkpoint or an export of this project. Averaged weights are used, except from an export of raw ones."""

    def __post_init__(self) -> None:
        for key in ("width", "depth", "heads", "patch", "in_channels", "text_width", "sample_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key} is {getattr(self, key)}; it must be at least 1")
            if getattr(self, key) > LARGEST:
                raise ValueError(f"model.{key} is {getattr(self, key)}; it must be at most {LARGEST}")
        for key in ("sample_frames", "feed_forward"):
            if getattr(self, key) < 0:
                raise ValueError(f"model.{key} is {getattr(self, key)}; it must be 0 or more")
        if self.feed_forward > LARGEST:
            raise ValueError(f"model.feed_forward is {self.feed_forward}; it must be at most {LARGEST}")
        if self.width % self.heads:
            raise ValueError(f"model.width {self.width} is not a multiple of model.heads {self.heads}")
        other = LATTE_ONLY if self.family == "wan" else WAN_ONLY
        if wrong := {f.name for f in fields(self) if f.name in other and getattr(self, f.name) != f.default}:
            raise ValueError(not_taken(self.family, {key: getattr(self, key) for key in wrong}))
        head = self.width // self.heads
        rotary = self.family == "wan" or "rotary" in (self.positions, self.temporal_positions)
        if rotary and (head % 2 or head < 6):
            raise ValueError(
                f"model.width {self.width} over model.heads {self.heads} is {head} a head; rotary positions rotate "
                "pairs on three axes, so it must be even and at least 6"
            )
        if self.family == "wan":
            return
        if self.width % 4:
            raise ValueError(
                f"model.width {self.width} must be a multiple of 4: positions take sines and cosines of two axes"
            )
        if self.attention == "factorised" and self.depth % 2:
            raise ValueError(f"model.depth {self.depth} must be even: spatial and temporal blocks alternate")
        if self.sample_size % self.patch:
            raise ValueError(f"model.sample_size {self.sample_size} must be a multiple of model.patch {self.patch}")

    @property
    def factorised(self) -> bool:
        """Whether odd blocks are temporal. A single frame skips them."""
        return self.family == "latte" and self.attention == "factorised"

    def shares_clips_by(self, size: int) -> bool:
        """Whether groups of `size` ranks can share clips: attention over whole clips is shared by heads."""
        return self.factorised or self.heads % size == 0

    @property
    def inner_width(self) -> int:
        """Width inside the feed-forward layers."""
        return self.feed_forward or 4 * self.width

    @property
    def text_tokens(self) -> int:
        """Tokens that captions are zero-padded to, without a mask (Wan). 0: any number, with a mask (Latte)."""
        return 512 if self.family == "wan" else 0

    @property
    def vae_factors(self) -> tuple[int, int]:
        """Pixels on a side, and frames, of a latent of the VAE that released models like this one use."""
        return (16 if self.in_channels == 48 else 8, 4) if self.family == "wan" else (8, 1)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learned_variance else 1)


def not_taken(family: str, keys: dict[str, Any]) -> str:
    """The message for keys of another family."""
    given = ", ".join(f"model.{key} {keys[key]!r}" for key in sorted(keys))
    return f"model.family {family} does not take {given}. Leave out these keys"


WAN_ONLY = {"feed_forward"}
LATTE_ONLY = {
    "learned_variance",
    "attention",
    "cross_attention_in",
    "positions",
    "temporal_positions",
    "pooled_text",
    "sample_size",
    "sample_frames",
    "attention_bias",
}

LATTE: dict[str, Any] = {"family": "latte", "patch": 2}
WAN: dict[str, Any] = {"family": "wan", "patch": 2, "text_width": 4096, "norm_eps": 1e-6}
PRESETS: dict[str, dict[str, Any]] = {
    "S": LATTE | {"depth": 12, "width": 384, "heads": 6},
    "B": LATTE | {"depth": 12, "width": 768, "heads": 12},
    "L": LATTE | {"depth": 24, "width": 1024, "heads": 16},
    "XL": LATTE | {"depth": 28, "width": 1152, "heads": 16},
    "XL_heads64": LATTE | {"depth": 28, "width": 1152, "heads": 18},
    "XL_heads128": LATTE | {"depth": 28, "width": 1152, "heads": 9},
    "latte_t2v": LATTE
    | {
        "depth": 56,
        "width": 1152,
        "heads": 16,
        "learned_variance": True,
        "text_width": 4096,
        "sample_size": 64,
        "attention_bias": True,
        "norm_eps": 1e-6,
    },
    "wan2.1_t2v_1.3b": WAN | {"depth": 30, "width": 1536, "heads": 12, "feed_forward": 8960, "in_channels": 16},
    "wan2.1_t2v_14b": WAN | {"depth": 40, "width": 5120, "heads": 40, "feed_forward": 13824, "in_channels": 16},
    "wan2.2_ti2v_5b": WAN | {"depth": 30, "width": 3072, "heads": 24, "feed_forward": 14336, "in_channels": 48},
}


def preset(name: str) -> ModelConfig:
    """The preset of that name, for code without a recipe. Raises KeyError if unknown."""
    return ModelConfig(preset=name, **PRESETS[name])  # pyright: ignore[reportArgumentType]


def with_preset(keys: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe's `model` section, with those of its preset filled in.

    Raises ValueError for written keys that only Latte takes in a Wan, even at their defaults, which would be ignored.
    The recipe of a run has all of them.
    """
    name = keys.get("preset")
    filled = {**PRESETS[name], **keys} if isinstance(name, str) and name in PRESETS else keys
    written = LATTE_ONLY & keys.keys()
    if filled.get("family") == "wan" and written and written != LATTE_ONLY:
        raise ValueError(not_taken("wan", {key: keys[key] for key in written}))
    return filled
