"""The most memory that a training step takes of a GPU, the largest micro-batch that fits, and what a run costs."""

from dataclasses import dataclass, replace

from sora_train.model.config import ModelConfig
from sora_train.model.flops import forward_flops
from sora_train.plan.activations import FLOAT, Formats, Sizes, blocks_run, kept, kept_by_block
from sora_train.plan.states import States, states
from sora_train.train.config import TrainConfig
from sora_train.train.loop import accumulation

MOST = 4096  # clips at a time: nobody asks for more


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank's device; a step's moments are not all at once, so that `total` is less than their sum."""

    states: States
    blocks: int
    """Activations of the blocks, between forward and backward pass."""
    around: int
    """Those before and behind the blocks, embedded captions among them."""
    batch: int
    """Latents, noise and text of the micro-batch, what the model is to predict and what it did."""
    workspace: int
    """Gradients of activations at their largest; with checkpointing also the block that is computed again."""
    backward: int
    """All but what is held at any time, as the backward pass of the last micro-batch begins."""
    sending: int
    """The same as gradients are sent."""
    stepping: int
    """The same as AdamW steps."""

    @property
    def total(self) -> int:
        """The most at any moment."""
        return self.states.held + max(self.backward, self.sending, self.stepping)

    @property
    def buffers(self) -> int:
        """What communication and the update take at the largest moment, and workspace: `total` without the rest."""
        shown = self.states.held + self.states.gradients + self.blocks + self.around + self.batch
        return max(0, self.total - shown)


def estimate(model: ModelConfig, train: TrainConfig, sizes: Sizes, world: int) -> Estimate:
    """What a micro-batch of these sizes takes on each of `world` ranks."""
    held, formats = states(model, train, world), Formats.of(train)
    blocks, around = kept(model, train, sizes)
    again = 0
    if train.activation_checkpointing != "none":
        plain = train.model_copy(update={"activation_checkpointing": "none"})
        kinds = set(blocks_run(model, sizes.f))
        again = max(
            kept_by_block(model, plain, sizes, *kind) - kept_by_block(model, train, sizes, *kind) for kind in kinds
        )
    workspace = 8 * sizes.tokens(model) * model.width * formats.product + again
    batch = batch_bytes(model, train, sizes)
    before = held.gradients if accumulation(train, world) > 1 else held.lasting
    passing = blocks + around + batch + workspace
    return Estimate(
        states=held,
        blocks=blocks,
        around=around,
        batch=batch,
        workspace=workspace,
        backward=before + passing + held.bucket + held.gathered,
        sending=held.gradients + held.bucket + held.copies + held.gathered + batch,
        stepping=held.gradients + held.update + (held.bucket if train.zero_stage == 3 else 0),
    )


def batch_bytes(model: ModelConfig, train: TrainConfig, sizes: Sizes) -> int:
    """Float32: latents, noise, their mixture, the target and the error; and the output, which may be wider. In bf16
    the mixture, the output and the text once more.
    """
    product = Formats.of(train).product
    values = sizes.b * sizes.f * sizes.h * sizes.w
    wide, half = model.out_channels, product < FLOAT
    latents = values * model.in_channels * (5 * FLOAT + (product if half else 0))
    output = values * wide * (FLOAT + (product if half else 0))
    text = sizes.b * sizes.l * model.text_width * FLOAT if half else 0  # in fp32 the activations hold it
    return latents + output + text


def largest_micro_batch(model: ModelConfig, train: TrainConfig, sizes: Sizes, world: int, room: int) -> int:
    """Most clips at a time whose step takes no more than `room` bytes; 0 where one is too many."""

    def fits(b: int) -> bool:
        changed = train.model_copy(update={"micro_batch_size": b})
        return estimate(model, changed, replace(sizes, b=b), world).total <= room

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1 and low < MOST:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def step_flops(model: ModelConfig, train: TrainConfig, sizes: Sizes, world: int) -> int:
    """FLOPs that one step has all ranks do: three forward passes a clip, four where blocks are computed again, and as
    many for the padding that fills the last micro-batches.
    """
    clips = accumulation(train, world) * train.micro_batch_size * world
    passes = 4 if train.activation_checkpointing == "full" else 3
    return passes * clips * forward_flops(model, sizes.f, sizes.h, sizes.w, sizes.l)
