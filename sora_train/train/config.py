"""What a training run can be told."""

from typing import Any, Literal

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
    """AdamW's weight decay, of the matrices; biases and the adaLN tables are left out."""
    gradient_clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""
    log_every: PositiveInt = 10
    """Steps between two lines of `metrics.jsonl` and of the log."""
    log_samples: bool = False
    """Every rank writes down which clips it learned from at each step, in the run's `trained` folder."""
    checkpoint_every: PositiveInt = 500
    """Steps between two checkpoints; the last step always makes one."""
    keep_checkpoints: PositiveInt = 3
    """How many checkpoints stay."""
    keep_by: Literal["newest", "loss"] = "newest"
    """Which ones stay: the newest, or those of the lowest loss since the one before, and always the newest."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, which sampling uses; 0 is the weights themselves. It
    warms up as (1 + n) / (10 + n) after n updates: 0.9999 is reached at 89,990 updates, 0.999 at 8,990."""
    shard_cache_gb: NonNegativeFloat = 4.0
    """Most memory of the machine, in 10⁹ bytes, in which each worker keeps row groups of the shards that it comes back
    to. 2.6 holds all it comes back to for clips of 16x256x256 with T5-XXL; with less, row groups are read again."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of samples whose caption is replaced by the empty one, for classifier-free guidance."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: what is sharded over the workers (1 optimizer, 2 and gradients, 3 and parameters)."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What waits in the CPU's memory: master weights and moments (ZeRO 1 to 3), or parameters too (ZeRO 3)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the forward and backward pass; the master weights are float32 in either."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format in which ranks add up gradients. `bf16` halves the traffic; its error in a gradient is 1e-3 and
    grows with the ranks, that of `fp32` is 1e-7. Accumulation over micro-batches is float32 in either."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Saves memory by computing again in the backward pass: what is cheap to compute, or every block."""
    compile: bool = False
    """torch.compile for every block: needs a C++ compiler, and minutes for each shape; pays on GPUs."""
    guard_spike: NonNegativeFloat = 5.0
    """A step is skipped whose gradient norm is so many times the largest of the last 100, as one that is not finite
    always is; 0 lets any finite norm pass."""
    guard_max_consecutive: PositiveInt = 5
    """After so many skipped steps in a row training goes back to a checkpoint and leaves those batches out."""
    guard_max_rollbacks: NonNegativeInt = 2
    """How many times it may; the next time it stops with a message."""
    deepspeed: dict[str, Any] = {}
    """Further keys of DeepSpeed's own configuration, such as `{zero_optimization: {overlap_comm: true}}`."""
    seed: NonNegativeInt = 0
    """Fixes initial weights, order of samples, noise, times and dropout."""
