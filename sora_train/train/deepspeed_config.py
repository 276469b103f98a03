"""DeepSpeed's configuration for a recipe, and which of its keys a recipe may set in `train.deepspeed`."""

from typing import Any

from sora_train.settings import flatten
from sora_train.train.config import TrainConfig

PASSED_ON = (
    "zero_optimization",
    "prescale_gradients",
    "gradient_predivide_factor",
    "zero_allow_untested_optimizer",
    "aio",
    "disable_python_gc",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "flops_profiler",
    "comms_logger",
    "timers",
    "tensorboard",
    "csv_monitor",
    "comet",
    "dump_state",
)
"""Keys that are passed on. Others are set by keys of the recipe, or change the model or its batches; DeepSpeed ignores
unknown keys, such as typing errors.
"""

REFUSED = {
    "stage": "train.zero_stage sets it",
    "offload_optimizer.device": "train.offload sets it",
    "offload_param.device": "train.offload sets it",
    "cpu_offload": "train.offload sets it",
    "compute_grad_norm": "the guard checks that norm at every step",
    "round_robin_gradients": "DeepSpeed then reports wrongly which weights are where",
    "zenflow": "it updates weights before the guard has checked the step",
    "offload_optimizer.super_offload": "it needs an optimizer that DeepSpeed compiles",
    "offload_optimizer.ratio": "it needs an optimizer that DeepSpeed compiles",
}
"""Keys of `zero_optimization` that a recipe may not set, and why."""


def deepspeed_config(config: TrainConfig, *, accumulation: int, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe at a world size."""
    half = config.half and config.zero_stage > 0
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    ours = {
        "train_batch_size": config.micro_batch_size * accumulation * world,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.gradient_clip if config.zero_stage else 0.0,  # stage 0: see Engine
        "bf16": {"enabled": half},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": config.reduce_dtype,  # DeepSpeed's own default is the format of the weights
        # Stage 2 would divide bfloat16 gradients by the ranks before it makes them float32: an error of 1e-3 unless the
        # ranks are a power of two. Engine.backward divides the loss.
        "gradient_allreduce_op": "sum" if config.zero_stage == 2 else "mean",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own fused AdamW runs there too, with nothing to compile
        "steps_per_print": 10**9,
    }
    return deep_merge(ours, parse_scalars(config.deepspeed))


def contradictions(config: TrainConfig) -> list[str]:
    """Contradictions of `train.deepspeed` and `train.offload` with other keys: a message for each."""
    wrong = [sentence for key, _ in flatten(config.deepspeed) if (sentence := why_not_allowed(key))]
    least = {"none": 0, "optimizer": 1, "all": 3}[config.offload]
    if config.zero_stage < least:
        wrong.append(
            f"train.offload {config.offload} needs train.zero_stage {least} or more, it is {config.zero_stage}. "
            "Raise it, or set train.offload to none"
        )
    return wrong


def why_not_allowed(key: str) -> str:
    """Why `train.deepspeed` may not set a dotted key, or an empty string."""
    if (top := key.split(".", 1)[0]) not in PASSED_ON:
        return (
            f"train.deepspeed sets {top}, which is not passed on. Precision, batch sizes, optimizer and schedule are "
            f"keys of train; those that are passed on: {', '.join(PASSED_ON)}"
        )
    for name, why in REFUSED.items():
        refused = f"zero_optimization.{name}"
        if key == refused or key.startswith(f"{refused}."):
            return f"train.deepspeed sets {key}, which is not allowed: {why}. Remove it"
        if refused.startswith(f"{key}."):
            return f"train.deepspeed sets {key} to a value, but it is a section and takes keys of its own"
    return ""


def rejection(error: Exception) -> str:
    """DeepSpeed's error about values of `train.deepspeed`, as one message."""
    return (
        f"DeepSpeed rejects train.deepspeed: {' '.join(str(error).split())}. Its keys and their values are documented "
        "at https://www.deepspeed.ai/docs/config-json"
    )


def parse_scalars(setting: Any) -> Any:
    """Settings with strings such as `5e8` and `true`, as YAML and the command line give them, parsed."""
    if isinstance(setting, dict):
        return {key: parse_scalars(value) for key, value in setting.items()}
    if isinstance(setting, list):
        return [parse_scalars(value) for value in setting]
    if not isinstance(setting, str):
        return setting
    if setting.lower() in ("true", "false"):
        return setting.lower() == "true"
    try:
        number = float(setting)
    except ValueError:
        return setting
    return int(number) if number.is_integer() else number


def deep_merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested settings with the leaves of `above` replaced."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        result[key] = deep_merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result
