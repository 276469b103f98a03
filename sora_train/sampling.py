"""The sampling settings that validation, `sora sample` and the sampler share."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator
from pydantic_core import PydanticCustomError

from sora_train.section import Section

Sampler = Literal["auto", "ddim", "dpm++", "ddpm", "euler", "heun", "unipc"]


class Sampling(Section):
    """Sampler and guidance."""

    sampler: Sampler = "auto"
    """`euler`, `heun` or `unipc` (as in WanPipeline) for flow models; `ddim`, `dpm++` or `ddpm` for DDPM models. `auto`
    is the first for the model, and for a released pipeline that of its scheduler."""
    steps: PositiveInt = 20
    """Sampler steps, at most 1000 for DDPM. Each step of `heun` except the last runs the model twice."""
    guidance: NonNegativeFloat = 4.0
    """Classifier-free guidance scale; 1 turns guidance off."""
    guidance_interval: tuple[float, float] = (0.0, 1000.0)
    """Interval of diffusion times with guidance, within 0 (data) to 1000 (noise). Outside it guidance costs nothing."""
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    """Guidance rescale factor in [0, 1] (Lin et al. 2023, section 3.4). Reduces over-saturation at high guidance."""
    guidance_without: Literal["text", "text_and_frames"] = "text"
    """For videos whose first frames are given: guidance leads away from a pass without the caption (`text`), or without
    the frames too. That follows the frames more closely, and needs a `conditioning.probability` below 1 in training."""
    negative: str = ""
    """Negative prompt. Guidance leads away from it instead of from the empty prompt."""

    @field_validator("guidance_interval")
    @classmethod
    def _rises(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= interval[0] <= interval[1] <= 1000:
            raise PydanticCustomError("interval", "it must rise within 0 (data) to 1000 (noise), such as 0 800")
        return interval
