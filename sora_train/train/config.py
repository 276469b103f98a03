"""The recipe's `train` section."""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from sora_train.section import Section


class TrainConfig(Section):
    """Optimisation, precision, checkpoints and logging."""

    output: str = "runs"
    """Folder of all runs. This run's folder is `output/name`."""
    steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    batch_size: PositiveInt = 16
    """Clips in one optimizer step, over all workers and micro-batches.
    It does not depend on the number of workers."""
    micro_batch_size: PositiveInt = 8
    """Clips that one worker processes at a time.
    Gradients accumulate until `batch_size` is reached."""
    balance: float = Field(default=0.0, ge=0, le=1)
    """Balances the steps of buckets of unlike cost: 1 fully, 0 not at all.
    `batch_size` and `micro_batch_size` apply to the costliest bucket. With 1 the others take more clips, so each step
    has about as many FLOPs and takes about equally long. With p between 0 and 1 they take `batch_size` times the ratio
    of FLOPs to the power of p. Their micro-batches are as large as the costliest clips' tokens allow."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate of AdamW."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up of the learning rate from zero."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate schedule after warm-up.
    `cosine` decays to a hundredth of `learning_rate` at the last step."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay.
    It applies to matrices, not to biases and adaLN's scale-shift tables."""
    gradient_clip: NonNegativeFloat = 1.0
    """Maximum global gradient norm; larger gradients are scaled down. 0: off."""
    log_every: PositiveInt = 10
    """Steps between records in `metrics.jsonl` and in the log."""
    log_samples: bool = False
    """Log the clips that each rank trained on at each step.
    The files are in the run's `trained` folder."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints. The last step always saves one."""
    keep_checkpoints: PositiveInt = 3
    """Number of checkpoints to keep."""
    keep_by: Literal["newest", "loss"] = "newest"
    """Which checkpoints to keep: the newest, or those with the lowest loss.
    The loss is the mean since the previous checkpoint. The newest one is always kept."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the exponential moving average (EMA) of the weights.
    Sampling uses the EMA. 0 means the weights themselves. The decay warms up as (1 + n) / (10 + n) after n updates:
    0.9999 is reached at 89,990 updates, 0.999 at 8,990."""
    shard_cache_gb: NonNegativeFloat = 4.0
    """Maximum CPU memory, in 10⁹ bytes, of each worker's cache of row groups.
    2.6 is enough for clips of 16x256x256 with T5-XXL. With less, row groups of the shards are read again."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of samples whose caption is replaced by the null prompt.
    Classifier-free guidance needs it."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage.
    Shards the optimizer (1), also gradients (2), also parameters (3) over the workers."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """CPU offload: `none`, `optimizer` or `all`.
    `optimizer` offloads master weights and moments (ZeRO 1 to 3), `all` parameters too (ZeRO 3)."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Number format of the forward and backward pass.
    Master weights are always float32. `fp8` is bf16 with the large products of the blocks in FP8, by torchao: for Ada
    and Hopper GPUs or later, with `compile`. On a CPU it is emulated, which is slow."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format in which gradients are summed over ranks.
    `bf16` halves the traffic. Its relative error is 1e-3 and grows with the number of ranks; that of `fp32` is 1e-7.
    Accumulation over micro-batches is always float32."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Saves memory by recomputing activations in the backward pass.
    `selective` recomputes all except matmuls and attention, `full` recomputes every block."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Apply torch.compile to every block; `auto`: on GPUs, if a C compiler and triton are there.
    The first step of each bucket and padded caption length takes up to a minute longer. Not worth it on CPUs."""
    guard_spike: NonNegativeFloat = 5.0
    """Skips a step whose gradient norm is too large.
    The limit is this many times the largest norm of the last 100 good steps. Steps that are not finite are always
    skipped; 0 skips only those."""
    guard_max_consecutive: PositiveInt = 5
    """Number of skipped steps in a row after which training rolls back.
    It returns to a checkpoint and skips those batches."""
    guard_max_rollbacks: NonNegativeInt = 2
    """Maximum number of rollbacks; one more stops the run with a message."""
    profile: tuple[PositiveInt, PositiveInt] | None = None
    """Steps to profile on rank 0: the first one, and how many. Such as `[20, 3]`.
    Writes torch's trace, a table by part and, on GPUs, a snapshot of the memory into the run's folder `profile`."""
    deepspeed: dict[str, Any] = {}
    """Additional keys of DeepSpeed's own configuration.
    For instance `{zero_optimization: {overlap_comm: true}}`."""
    seed: NonNegativeInt = 0
    """Seed of initial weights, sample order, noise, diffusion times and dropout."""

    @property
    def half(self) -> bool:
        """Whether weights and activations are bfloat16, with `fp8` too."""
        return self.precision != "fp32"

    @field_validator("compile", mode="before")
    @classmethod
    def takes_truth_values(cls, value: object) -> object:
        """Reads the truth values that `compile` had before version 0.2."""
        return {"true": "yes", "on": "yes", "false": "no", "off": "no"}.get(str(value).lower(), value)
