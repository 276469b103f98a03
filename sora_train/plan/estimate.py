"""Peak memory of a training step on one GPU, the largest micro-batch that fits, and the FLOPs of a step."""

from dataclasses import dataclass, replace

from sora_train.lora.config import NO_LORA, LoraConfig
from sora_train.lora.flops import training_flops
from sora_train.model.config import ModelConfig
from sora_train.plan.activations import FLOAT, HALF, Sizes, activations
from sora_train.plan.states import States, states
from sora_train.train.config import TrainConfig
from sora_train.train.loop import accumulation

MAX_MICRO_BATCH = 4096


@dataclass(frozen=True)
class Estimate:
    """Bytes on one rank's device. `total` is less than their sum, since the moments of a step have different peaks."""

    states: States
    blocks: int
    """Activations of the blocks, between forward and backward pass."""
    other: int
    """Activations before and after the blocks, embedded captions included."""
    batch: int
    """Latents, noise and text of the micro-batch, the model's target and its output."""
    backward: int
    """In addition to what is always held: as the backward pass of the last micro-batch begins."""
    sending: int
    """The same as gradients are reduced."""
    stepping: int
    """The same as AdamW steps."""

    @property
    def total(self) -> int:
        """The peak, which is one of a step: before the first, parameters are made one at a time."""
        return self.states.held + max(self.backward, self.sending, self.stepping)

    @property
    def buffers(self) -> int:
        """`total` without states, activations and batch: communication, the update, gradients of activations."""
        shown = self.states.held + self.states.gradients + self.blocks + self.other + self.batch
        return max(0, self.total - shown)


def estimate(model: ModelConfig, train: TrainConfig, sizes: Sizes, world: int, lora: LoraConfig = NO_LORA) -> Estimate:
    """The memory that a micro-batch of these sizes takes on each of `world` ranks."""
    held, made = states(model, train, world, lora), activations(model, train, sizes, lora)
    recomputed = 0
    if train.activation_checkpointing != "none":
        plain = activations(model, train.model_copy(update={"activation_checkpointing": "none"}), sizes, lora)
        recomputed = max(whole - part for whole, part in zip(plain.blocks, made.blocks, strict=True))
    number = HALF if train.half else FLOAT
    # gradients within a block, and of padded captions
    values = sizes.tokens_of_rank(model) * max(8 * model.width, 2 * model.inner_width)
    workspace = number * (values + sizes.b * model.text_tokens * model.width) + recomputed
    if lora.base_precision == "int8":  # a layer's weight, widened for its product
        workspace += number * model.width * model.inner_width
    if train.precision == "fp8":
        workspace += fp8_bytes(model, sizes)
    batch = batch_bytes(model, train, sizes)
    before = held.gradients if accumulation(train, world // sizes.shared) > 1 else held.lasting
    return Estimate(
        states=held,
        blocks=sum(made.blocks),
        other=made.other,
        batch=batch,
        backward=before + made.total + batch + workspace + held.bucket + held.gathered,
        sending=held.gradients + held.bucket + held.copies + held.gathered + batch,
        stepping=held.gradients + held.update + (held.bucket if train.zero_stage == 3 else 0),
    )


def batch_bytes(model: ModelConfig, train: TrainConfig, sizes: Sizes) -> int:
    """Latents, noise, their mixture, target and error in float32, text in float16, and the output.

    In bf16 also a second mixture and output. The text in the model's own dtype is among the activations.
    """
    half = HALF if train.half else 0
    values = sizes.b * sizes.f * sizes.h * sizes.w
    text = sizes.b * sizes.l * model.text_width * HALF
    return values * (model.in_channels * (5 * FLOAT + half) + model.out_channels * (FLOAT + half)) + text


def fp8_bytes(model: ModelConfig, sizes: Sizes) -> int:
    """FP8 copies in the backward pass of the block's largest layer: of input, gradient and weight, each in the order
    of both its products. A layer saves the same bfloat16 input as without FP8.
    """
    d, inner = model.width, model.inner_width
    return 2 * (sizes.tokens_of_rank(model) * (d + inner) + d * inner)


def largest_micro_batch(
    model: ModelConfig, train: TrainConfig, sizes: Sizes, world: int, room: int, lora: LoraConfig = NO_LORA
) -> int:
    """The most clips per micro-batch whose step fits into `room` bytes; 0 if one does not fit."""

    def fits(b: int) -> bool:
        changed = train.model_copy(update={"micro_batch_size": b})
        return estimate(model, changed, replace(sizes, b=b), world, lora).total <= room

    low, high = 0, 1
    while high <= MAX_MICRO_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1 and low < MAX_MICRO_BATCH:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def step_flops(model: ModelConfig, train: TrainConfig, sizes: Sizes, world: int, lora: LoraConfig = NO_LORA) -> int:
    """FLOPs of one step on all ranks, with a second forward pass if blocks are recomputed. Clips that pad the last
    micro-batches count too.
    """
    groups = world // sizes.shared
    clips = accumulation(train, groups) * train.micro_batch_size * groups
    shape = sizes.f, sizes.h, sizes.w, sizes.l, sizes.frame_times
    return clips * training_flops(model, lora, *shape, recompute=train.activation_checkpointing == "full")
