"""FLOPs of a training step, of all weights or of adapters on a frozen base.

All weights: three forward passes. Adapters: the backward pass of a frozen layer has one product, for the gradient of
its input, and none before the blocks. Attention has no weights, so its backward pass has two for each. So a step costs
two forward passes and more: 2.0 where feed-forward and projections dominate, up to 3 for the attention of long clips.
"""

from sora_train.lora.config import LoraConfig
from sora_train.model import ModelConfig
from sora_train.model.flops import forward_flops, forward_products


def training_flops(
    config: ModelConfig,
    lora: LoraConfig,
    f: int,
    h: int,
    w: int,
    l: int | float,  # noqa: E741
    frame_times: bool = False,
    recompute: bool = False,
) -> int:
    """FLOPs of one sample's forward and backward pass, with the arguments of `forward_flops`.

    `recompute` adds the second forward pass of full activation checkpointing.
    """
    if not lora.rank:
        return (4 if recompute else 3) * forward_flops(config, f, h, w, l, frame_times)
    d, inner, targets = config.width, config.inner_width, set(lora.targets)
    base = forward_products(config, f, h, w, l, frame_times)
    # in cross-attention keys and values, which are one tensor, have a gradient only where one of them has adapters
    passes_back = 2 if targets & {"to_k", "to_v"} else 1
    backward = (
        base.self_projections
        + base.cross_projections
        + base.feed_forward
        + base.output
        + 2 * base.self_attention
        + passes_back * base.cross_attention
    )
    of_self = base.self_projections / (4 * d * d)  # tokens of all blocks, here and below
    of_cross = base.cross_projections / (2 * d * d)
    of_text = base.text_projections / (2 * d * d)
    tokens = {  # that pass through adapters of d x d, and of text, whose own gradient is not needed
        "to_q": (of_self + of_cross, 0),
        "to_k": (of_self, of_text),
        "to_v": (of_self, of_text),
        "to_out": (of_self + of_cross, 0),
        "ff": (of_self * (d + inner) / d, 0),  # two adapters of d x inner
    }
    forward = adapted = 0.0
    for target in sorted(targets):  # the same rounding on every rank
        whole, text = tokens[target]
        forward += lora.rank * 2 * d * (whole + text)
        adapted += lora.rank * (4 * d * whole + 3 * d * text)
    passes = 2 if recompute else 1
    return round(2 * (passes * (base.total + forward) + backward + adapted))
