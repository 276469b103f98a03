"""What a training run can be told."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from sora_train.section import Section


class TrainConfig(Section):
    """Optimisation, precision, and what is written down."""

    output: str = "runs"
    """Folder that holds the runs; this one is `output/name`."""
    steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    batch_size: PositiveInt = 16
    """Clips in one optimizer step, over all workers and micro-batches: the same at any number of workers."""
    micro_batch_size: PositiveInt = 8
    """Clips one worker takes at a time; gradients accumulate until `batch_size` is reached."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate of AdamW."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: keep the rate, or let it fall to a hundredth along a cosine until the last step."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's two moments."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""
    gradient_clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""
    log_every: PositiveInt = 10
    """Steps between two lines of `metrics.jsonl` and of the log."""
    checkpoint_every: PositiveInt = 500
    """Steps between two checkpoints; the last step always makes one."""
    keep_checkpoints: PositiveInt = 3
    """How many of the newest checkpoints stay."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, which sampling uses; 0 is the weights themselves."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of samples whose caption is replaced by the empty one, for classifier-free guidance."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: what is sharded over the workers (1 optimizer, 2 and gradients, 3 and parameters)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the forward and backward pass; the master weights are float32 in either."""
    seed: int = 0
    """Fixes initial weights, order of samples, noise, times and dropout."""
