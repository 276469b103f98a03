"""What the forward pass leaves for the backward pass: bytes of the tensors that autograd holds, from shapes alone.

A tensor of a block is so many times T d, with T tokens of width d: `kept_by_block` lists them in the order in which
`model/layers.py` makes them. What several operations save is one storage and counts once; parameters are not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sora_train.model.config import ModelConfig
from sora_train.model.embed import TIME_CHANNELS
from sora_train.train.config import TrainConfig

FLOAT, HALF = 4, 2
"""Bytes of a float32 and of a bfloat16."""


@dataclass(frozen=True)
class Sizes:
    """A micro-batch's shape: b clips of latents of axes f c h w, and captions of l tokens."""

    b: int
    f: int
    h: int
    w: int
    l: int  # noqa: E741

    def tokens(self, model: ModelConfig) -> int:
        """Patches of all clips together."""
        return self.b * self.f * (self.h // model.patch) * (self.w // model.patch)


@dataclass(frozen=True)
class Formats:
    """Bytes of a number, by where it comes from.

    Stage 0 computes bf16 by autocast: matrix products and attention are in bf16, and what is added up in the residual
    stream, norms and what touches them in float32. Everywhere else all is of one format.
    """

    product: int
    """Of matrix products, attention, and what goes into them."""
    stream: int
    """Of the residual stream, and of norms."""

    @classmethod
    def of(cls, train: TrainConfig) -> "Formats":
        """The formats that a recipe trains in."""
        if train.precision == "fp32":
            return cls(FLOAT, FLOAT)
        return cls(HALF, HALF if train.zero_stage else FLOAT)


def kept(model: ModelConfig, train: TrainConfig, sizes: Sizes) -> tuple[int, int]:
    """Bytes that are held between the forward and the backward pass of a micro-batch: those of the blocks, and of what
    stands before and behind them.
    """
    formats = Formats.of(train)
    blocks = sum(kept_by_block(model, train, sizes, *kind) for kind in blocks_run(model, sizes.f))
    if train.activation_checkpointing != "none":
        blocks -= sizes.tokens(model) * model.width * (formats.stream - formats.product)  # no norm was before the first
        blocks += 6 * sizes.b * model.width * formats.product  # the modulation, which all blocks share
    return blocks, kept_around(model, formats, sizes)


def blocks_run(model: ModelConfig, f: int) -> Iterator[tuple[bool, bool]]:
    """For every block that a clip of f latent frames passes, whether it reads the caption, and whether it turns queries
    and keys.
    """
    joint = model.attention == "joint"
    space, time = model.positions == "rotary", "rotary" in (model.positions, model.temporal_positions)
    for i in range(model.depth):
        temporal = not joint and i % 2 == 1
        if not (temporal and f == 1):
            yield joint or not temporal or model.cross_attention_in == "every", time if joint or temporal else space


def kept_by_block(model: ModelConfig, train: TrainConfig, sizes: Sizes, text: bool, turned: bool) -> int:
    """Bytes that one block leaves, under `train.activation_checkpointing`; a block with or without attention to the
    text, and with or without rotary positions.
    """
    formats, mode = Formats.of(train), train.activation_checkpointing
    stream, product = formats.stream, formats.product
    b, d, l = sizes.b, model.width, sizes.l  # noqa: E741
    tokens = sizes.tokens(model)
    if mode == "full":
        return tokens * d * stream  # the block's input; all else is computed again
    logsumexp = tokens * model.heads * FLOAT
    # q k v, attention, its map out, and the two maps of the feed-forward
    products = (3 + 1 + 1 + 4 + 1) * product
    if text:
        products += (1 + 1) * product  # q, attention
    if mode == "selective":
        held = tokens * d * (stream + products + (product if text else 0))
    else:
        # x and its norm, twice; what goes into qkv and into the feed-forward; the GELU's output
        held = tokens * d * (4 * stream + products + (1 + 1 + 4) * product)
        if text:
            held += tokens * d * product  # what goes into q
        if turned:
            held += tokens * d * 3 * product  # q and k, turned, and attention's output, which then lies otherwise
        held += (6 + 2) * b * d * stream + 4 * tokens * stream  # the modulation, 1 + scale, and the norms' statistics
        if product < stream:
            held += (16 if text else 12) * d * d * product  # autocast's copies of the weights
    held += logsumexp
    if text:
        held += logsumexp + b * l * 2 * d * product  # keys and values of the caption
    return held


def kept_around(model: ModelConfig, formats: Formats, sizes: Sizes) -> int:
    """Bytes of patches, time, text and the output layer."""
    stream, product = formats.stream, formats.product
    b, d, e, l = sizes.b, model.width, model.text_width, sizes.l  # noqa: E741
    tokens = sizes.tokens(model)
    patch_in = tokens * model.patch**2 * model.in_channels * product
    text = b * l * (e + 3 * d) * product
    time = b * (TIME_CHANNELS + 4 * d) * product
    pooled = b * (e + 2 * d) * product if model.pooled_text else 0
    out = tokens * d * (2 * stream + product)  # the norm's input and output, and what goes into the last map
    copies = 0
    if product < stream:  # autocast's copies of the weights whose products are differentiated by both factors
        copies = ((8 + bool(pooled)) * d * d + model.patch**2 * model.out_channels * d) * product
    return patch_in + text + time + pooled + out + copies
