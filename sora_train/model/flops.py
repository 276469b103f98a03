"""Parameters and FLOPs of a model, from its shape alone.

Every multiply-add of a matrix product counts as two, as in torch's `FlopCounterMode`; norms, activations and softmax,
a few in a thousand, are ignored. A training step is three forward passes: the backward pass has two products for each.
That of adapters on a frozen base is less (`lora/flops.py`).
"""

from dataclasses import astuple, dataclass

import torch

from sora_train.model import ModelConfig, build
from sora_train.model.embed import TIME_CHANNELS


def parameter_count(config: ModelConfig) -> int:
    """Parameters of a model of this shape; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config).parameters())


@dataclass(frozen=True)
class Products:
    """Multiply-adds of one sample's forward pass."""

    embeddings: int | float
    """Of time, text and patches."""
    self_projections: int | float
    """Query, key, value and output of self-attention: four maps of width x width."""
    self_attention: int | float
    """Scores, and sums of values."""
    cross_projections: int | float
    """Query and output of cross-attention: two maps of width x width."""
    text_projections: int | float
    """Key and value of cross-attention: two maps of width x width."""
    cross_attention: int | float
    feed_forward: int | float
    output: int | float

    @property
    def total(self) -> int | float:
        return sum(astuple(self))


def forward_products(
    config: ModelConfig,
    f: int,
    h: int,
    w: int,
    l: int | float,  # noqa: E741
    frame_times: bool = False,
) -> Products:
    """The products of one sample: f latent frames of h x w latents and a caption of l tokens, or l on average.

    With `frame_times` each frame has a diffusion time, instead of the clip. A single frame skips the temporal blocks of
    a factorised model, as in the model.
    """
    d, e, p = config.width, config.text_width, config.patch
    n, inner = h * w // p**2, config.inner_width
    tokens, joint = f * n, not config.factorised
    l = config.text_tokens or l  # noqa: E741

    def embedding(channels: int) -> int:
        return channels * d + d * d

    blocks, cross, seen = 0, 0, 0  # blocks that run, those with cross-attention, tokens that one attends to in all
    for i in range(config.depth):
        temporal = not joint and i % 2 == 1
        if temporal and f == 1:
            continue
        blocks += 1
        seen += tokens if joint else f if temporal else n
        cross += joint or not temporal or config.cross_attention_in == "every"
    embeddings = (f if frame_times else 1) * (embedding(TIME_CHANNELS) + 6 * d * d) + l * embedding(e)
    embeddings += tokens * d * p**2 * config.in_channels
    if config.pooled_text:
        embeddings += embedding(e)
    return Products(
        embeddings=embeddings,
        self_projections=blocks * tokens * 4 * d * d,
        self_attention=tokens * 2 * seen * d,
        cross_projections=cross * tokens * 2 * d * d,
        text_projections=cross * l * 2 * d * d,
        cross_attention=cross * tokens * 2 * l * d,
        feed_forward=blocks * tokens * 2 * d * inner,
        output=tokens * d * p**2 * config.out_channels,
    )


def forward_flops(
    config: ModelConfig,
    f: int,
    h: int,
    w: int,
    l: int | float,  # noqa: E741
    frame_times: bool = False,
) -> int:
    """FLOPs of one sample's forward pass, with the arguments of `forward_products`."""
    return round(2 * forward_products(config, f, h, w, l, frame_times).total)
