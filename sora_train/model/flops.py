"""Parameters and FLOPs of a model, from its shape alone.

Every multiply-add of a matrix product counts as two, as in torch's `FlopCounterMode`; norms, activations and softmax,
a few in a thousand, are ignored. A training step is three forward passes: the backward pass has two products for each.
"""

import torch

from sora_train.model import ModelConfig, build
from sora_train.model.embed import TIME_CHANNELS


def parameter_count(config: ModelConfig) -> int:
    """Parameters of a model of this shape; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config).parameters())


def forward_flops(
    config: ModelConfig,
    f: int,
    h: int,
    w: int,
    l: int | float,  # noqa: E741
    frame_times: bool = False,
) -> int:
    """FLOPs of one sample's forward pass: f latent frames of h x w latents and a caption of l tokens, or l on average.

    With `frame_times` each frame has a diffusion time, instead of the clip. A single frame skips the temporal blocks of
    a factorised model, as in the model.
    """
    d, e, p = config.width, config.text_width, config.patch
    n, inner = h * w // p**2, config.inner_width
    tokens, joint = f * n, not config.factorised
    l = config.text_tokens or l  # noqa: E741

    def embedding(channels: int) -> int:
        return channels * d + d * d

    # A token in a block: four maps of d x d for attention and two of feed-forward; then scores and their sums.
    products: float = (f if frame_times else 1) * (embedding(TIME_CHANNELS) + 6 * d * d) + l * embedding(e)
    if config.pooled_text:
        products += embedding(e)
    for i in range(config.depth):
        temporal = not joint and i % 2 == 1
        if temporal and f == 1:
            continue
        seen = tokens if joint else f if temporal else n
        products += tokens * (4 * d * d + 2 * d * inner + 2 * seen * d)
        if joint or not temporal or config.cross_attention_in == "every":
            products += tokens * (2 * d * d + 2 * l * d) + l * 2 * d * d
    products += tokens * d * p**2 * (config.in_channels + config.out_channels)
    return round(2 * products)
