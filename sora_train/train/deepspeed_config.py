"""The recipe in DeepSpeed's words, and which of those words a recipe may not say itself."""

import difflib
from typing import Any

from pydantic import ValidationError

from sora_train.settings import flatten
from sora_train.train.config import TrainConfig

OWNED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "gradient_clipping": "train.gradient_clip",
    "bf16": "train.precision",
    "fp16": "train.precision (float16 is not offered: bf16 needs no loss scaling)",
    "torch_autocast": "train.precision",
    "amp": "train.precision",
    "data_types": "train.precision (gradients accumulate in float32)",
    "communication_data_type": "train.reduce_dtype",
    "optimizer": "train.learning_rate, train.betas and train.weight_decay",
    "scheduler": "train.schedule and train.warmup_steps",
    "activation_checkpointing": "train.activation_checkpointing",
    "compile": "train.compile",
    "checkpoint": "train.checkpoint_every (checkpoints have a format of their own)",
    "zero_force_ds_cpu_optimizer": "train.offload",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.offload_optimizer.device": "train.offload",
    "zero_optimization.offload_param.device": "train.offload",
    "zero_optimization.cpu_offload": "train.offload",
    "wandb": "tracking.wandb",
}
"""Keys of DeepSpeed's that the recipe sets by keys of its own."""

BARRED = {
    "zero_optimization.compute_grad_norm": "the guard judges every step by that norm",
    "zero_optimization.round_robin_gradients": "DeepSpeed's own books then say wrongly which weights lie where",
    "zero_optimization.zenflow": "it updates weights before the guard has judged the step",
    "zero_optimization.offload_optimizer.super_offload": "it needs an optimizer that DeepSpeed compiles",
    "zero_optimization.offload_optimizer.ratio": "it needs an optimizer that DeepSpeed compiles",
}
"""Keys of `zero_optimization` that training can't work with, and why."""

PASSED = (
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
"""The other keys that are passed on. DeepSpeed itself says nothing of one that it does not know, such as a slip of the
pen, and has more that would change the model or its batches.
"""


def deepspeed_config(config: TrainConfig, *, accumulation: int, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe at a world size."""
    half = config.precision == "bf16" and config.zero_stage > 0
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
    return laid_over(ours, as_meant(config.deepspeed))


def contradictions(config: TrainConfig) -> list[str]:
    """What `train.deepspeed` and `train.offload` say against other keys: a sentence each, with the remedy."""
    wrong = [sentence for key, _ in flatten(config.deepspeed) if (sentence := objection(key))]
    least = {"none": 0, "optimizer": 1, "all": 3}[config.offload]
    if config.zero_stage < least:
        wrong.append(
            f"train.offload {config.offload} needs train.zero_stage {least} or more, it is {config.zero_stage}: raise "
            "it, or set train.offload to none"
        )
    return wrong


def objection(key: str) -> str:
    """Why `train.deepspeed` may not set a dotted key, or an empty string."""
    for table, sentence in (
        (OWNED, "train.deepspeed sets {key}, which is {why} in a recipe: set that instead"),
        (BARRED, "train.deepspeed sets {key}, which can't be: {why}; leave it out"),
    ):
        for known, why in table.items():
            if key == known or key.startswith(f"{known}."):
                return sentence.format(key=key, why=why)
            if known.startswith(f"{key}."):
                return f"train.deepspeed sets {key} to a value, but it is a section and takes keys of its own"
    top = key.split(".", 1)[0]
    if top not in PASSED:
        meant = difflib.get_close_matches(top, PASSED, n=1)
        hint = f"did you mean {meant[0]}?" if meant else f"those that are: {', '.join(PASSED)}"
        return f"train.deepspeed sets {top}, which is not passed on; {hint}"
    return ""


def complaint(error: Exception) -> str:
    """What DeepSpeed says against values of `train.deepspeed`, in one sentence."""
    said = [str(error)]
    if isinstance(error, ValidationError):
        said = [f"{'.'.join(map(str, e['loc']))} is {e['input']!r}: {e['msg']}" for e in error.errors()]
    return (
        f"DeepSpeed does not start with what train.deepspeed says: {'; '.join(said)}. Its keys and their values are at "
        "https://www.deepspeed.ai/docs/config-json"
    )


def as_meant(setting: Any) -> Any:
    """Settings with the numbers and truth values that YAML and the command line leave as words: `5e8`, `true`."""
    if isinstance(setting, dict):
        return {key: as_meant(value) for key, value in setting.items()}
    if isinstance(setting, list):
        return [as_meant(value) for value in setting]
    if not isinstance(setting, str):
        return setting
    if setting.lower() in ("true", "false"):
        return setting.lower() == "true"
    try:
        number = float(setting)
    except ValueError:
        return setting
    return int(number) if number.is_integer() else number


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` with the leaves of `above` in their places."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        result[key] = laid_over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result
