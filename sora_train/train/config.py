"""The recipe's `train` section."""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from sora_train.section import Section


class TrainConfig(Section):
    """Optimisation, precision, checkpoints and logging."""

    output: str = "runs"
    """Folder that holds the runs; this one is `output/name`."""
    steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    batch_size: PositiveInt = 16
    """Clips in one optimizer step over all workers and micro-batches, whatever the number of workers."""
    micro_batch_size: PositiveInt = 8
    """Clips that one worker processes at a time; gradients accumulate until `batch_size` is reached."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate of AdamW."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate schedule after warm-up: constant, or a cosine to a hundredth at the last step."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay. It applies to matrices, not to biases and adaLN's scale-shift tables."""
    gradient_clip: NonNegativeFloat = 1.0
    """Clips the global gradient norm to this value; 0 turns clipping off."""
    log_every: PositiveInt = 10
    """Steps between two records in `metrics.jsonl` and the log."""
    log_samples: bool = False
    """Every rank logs which clips it trained on at each step, in the run's `trained` folder."""
    checkpoint_every: PositiveInt = 500
    """Steps between two checkpoints; the last step always saves one."""
    keep_checkpoints: PositiveInt = 3
    """How many checkpoints are kept."""
    keep_by: Literal["newest", "loss"] = "newest"
    """Which ones stay: the newest, or those of the lowest loss since the one before, and always the newest."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the exponential moving average (EMA) of the weights, which sampling uses; 0: the weights themselves. It
    warms up as (1 + n) / (10 + n) after n updates: 0.9999 is reached at 89,990 updates, 0.999 at 8,990."""
    shard_cache_gb: NonNegativeFloat = 4.0
    """Most CPU memory, in 10⁹ bytes, in which each worker caches row groups of the shards. For clips of 16x256x256 with
    T5-XXL 2.6 is enough; with less, row groups are read again."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of samples whose caption is replaced by the empty one, for classifier-free guidance."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: shards the optimizer (1), also gradients (2), also parameters (3) over the workers."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """CPU offload: `optimizer` (master weights and moments, ZeRO 1 to 3) or `all` (parameters too, ZeRO 3)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the forward and backward pass; master weights are always float32."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format in which gradients are summed over ranks. `bf16` halves the traffic; its relative error is 1e-3 and
    grows with the ranks, that of `fp32` is 1e-7. Accumulation over micro-batches is always float32."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Saves memory by recomputing in the backward pass: all but matmuls and attention (`selective`), or every block."""
    compile: bool = False
    """torch.compile for every block. Needs a C++ compiler and minutes for each shape; worth it on GPUs."""
    guard_spike: NonNegativeFloat = 5.0
    """Skips a step whose gradient norm is above this many times the largest of the last 100. Steps that are not finite
    are always skipped; 0 skips only those."""
    guard_max_consecutive: PositiveInt = 5
    """After this many skipped steps in a row, training rolls back to a checkpoint and skips those batches."""
    guard_max_rollbacks: NonNegativeInt = 2
    """Most rollbacks; the next one stops the run with a message."""
    deepspeed: dict[str, Any] = {}
    """More keys of DeepSpeed's own configuration, such as `{zero_optimization: {overlap_comm: true}}`."""
    seed: NonNegativeInt = 0
    """Seed of initial weights, order of samples, noise, diffusion times and dropout."""
