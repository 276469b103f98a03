"""First frames that are given, as in Wan 2.2's TI2V: they are clean, have time 0, and are left out of the loss.

So one model makes videos from text alone and videos that begin with an image, or go on with a video.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ConditioningConfig:
    """The recipe's `conditioning` section: clips whose first frames are given, for videos from an image."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    frames: int = 1
    """Latent frames that are given. 1 is an image. With a VAE that compresses time by 4, n are 4n - 3 video frames."""
    probability: float = 0.0
    """Share of clips in training whose first frames are given. 0: none, and the model makes videos from text alone.
    1: all. Clips with no more than `frames` latent frames, such as images, are trained without."""

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"conditioning.frames is {self.frames}; it must be at least 1 latent frame")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"conditioning.probability is {self.probability}; it must be within 0 to 1")

    @property
    def frame_times(self) -> bool:
        """Whether training tells the model a time for each frame. It is one for a clip if frames are never given."""
        return self.probability > 0

    def leaves_nothing(self, longest: int) -> str:
        """Why nothing is left to learn of clips of at most `longest` latent frames; empty if something is."""
        if not self.frame_times or longest > self.frames:
            return ""
        return (
            f"conditioning.frames {self.frames} leaves nothing to learn, since the longest clips have {longest} latent "
            "frames. Use fewer frames, longer clips, or conditioning.probability 0"
        )

    def draw(self, generator: torch.Generator, f: int) -> int:
        """How many first frames of a clip of `f` latent frames are given: `frames`, or 0. Draws only if some may be."""
        if not self.frame_times:
            return 0
        chosen = torch.rand((), generator=generator, dtype=torch.float64).item() < self.probability
        return self.frames if chosen and f > self.frames else 0


def is_given(given: Int[Tensor, "b"], f: int) -> Bool[Tensor, "b f"]:
    """Which of f frames are given, by the number of each clip."""
    return torch.arange(f, device=given.device) < given[:, None]


def of_frames(
    values: Float[Tensor, "b"], given: Int[Tensor, "b"] | None, f: int, where_given: float
) -> Float[Tensor, "b #f"]:
    """A clip's value for each of its f frames, and another one for those that are given; None: all have the same."""
    return values[:, None] if given is None else torch.where(is_given(given, f), where_given, values[:, None])


def mean_of_clips(values: Float[Tensor, "b f c h w"], given: Int[Tensor, "b"] | None) -> Float[Tensor, "b"]:
    """The mean over a clip without its given frames."""
    if given is None:
        return values.mean(dim=(1, 2, 3, 4))
    learned = ~is_given(given, values.shape[1])
    return values.mean(dim=(2, 3, 4)).masked_fill(~learned, 0).sum(1) / learned.sum(1)
