"""Attention of a training run: whether it uses our kernels, and which of torch's backends. All ranks alike.

torch's `scaled_dot_product_attention` takes the first backend of a fixed order that fits. On a GPU, rank 0 measures the
run's attention with some backends switched off, and all ranks use what is fastest in all. A switch holds for the whole
process, so compiled blocks and recomputed ones follow it.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import attention as backends

from sora_train.data.shards import ShardSet
from sora_train.errors import error_line
from sora_train.kernels.short_attention import TOLERANCE, refused, why_no_short_attention
from sora_train.log import log
from sora_train.model import ModelConfig
from sora_train.model.attention_shapes import AttentionShape, attention_shapes
from sora_train.schema import bucket_size
from sora_train.train.compile import first_reason
from sora_train.train.config import TrainConfig
from sora_train.train.hardware import seconds
from sora_train.train.run_dir import TRYING_FILE, RunDir

OWN, FLASH3 = "torch's order", "FlashAttention-3"
OFF: dict[str, tuple[str, ...]] = {
    OWN: (), "no cuDNN": ("cudnn",), "no flash": ("flash",), "no cuDNN, no flash": ("cudnn", "flash"),
    FLASH3: ("cudnn",),
}  # fmt: skip
"""The choices, and the backends that each switches off; `FlashAttention-3` replaces torch's flash attention."""
LEAST_GAIN = 0.97
"""Another choice is used if it takes at most this share of the time of torch's own."""
MEASURED_S, LIMIT_S = 0.05, 60.0
"""Seconds for which each choice is measured, at least once. After LIMIT_S in all, no further shape is measured."""


def may_try_kernels(run_dir: RunDir, device: torch.device) -> bool:
    """Whether to try and measure kernels: not if an earlier start of this command ended meanwhile. Collective.

    On a GPU an illegal memory access ends the process, which no check inside it can prevent.
    """
    if device.type != "cuda":
        return False
    file, ended = run_dir.run / TRYING_FILE, [False]
    if dist.get_rank() == 0:
        ended = [file.exists()]
        with contextlib.suppress(OSError):  # a full disk
            file.touch()
    dist.broadcast_object_list(ended, src=0)
    if ended[0]:
        refused.append(why := "a start ended while it tried kernels")
        report_no_kernels(run_dir, f"{why}. All ranks use torch's own, until the command is run again")
    return not ended[0]


def choose_attention(
    by_bucket: Mapping[str, TrainConfig], model: ModelConfig, shards: ShardSet, run_dir: RunDir, device: torch.device,
    shared: int = 1,
) -> None:  # fmt: skip
    """Tries our kernels and measures torch's backends, in bf16 on GPUs. A resume on like GPUs keeps the choice.

    `by_bucket` are the settings of each bucket, of whose clips `shared` ranks have a share each. Collective.
    """
    if device.type != "cuda" or not next(iter(by_bucket.values())).half:
        return
    weights, facts = dict[AttentionShape, float](), shards.manifest
    for name, config in by_bucket.items():
        f, _, h, w = facts.vae.latent_shape(*bucket_size(name))
        for one in attention_shapes(model, (f, h, w), config.micro_batch_size, facts.text.max_tokens, shared):
            weights[one] = weights.get(one, 0.0) + one.blocks * shards.rows[name] / config.micro_batch_size
    try_kernels_on_all_ranks([one for one in weights if one.is_short], run_dir, device)
    rest = {one: weight for one, weight in weights.items() if refused or not one.is_short}
    use(choice := choose_on_rank_0(rest, run_dir, device))
    if choice != OWN:  # the key of torch's cache of compiled code leaves the switches out
        torch.compiler.config.cache_key_tag += f" {choice}"


def try_kernels_on_all_ranks(groups: Iterable[AttentionShape], run_dir: RunDir, device: torch.device) -> None:
    """Has all ranks use torch's attention, and writes an event, if the kernels are wrong on any. Collective."""
    sizes = sorted({(one.s, one.m, one.k) for one in groups})
    reasons = (why_no_short_attention(device, *size) for size in sizes)
    if why := first_reason(next(filter(None, reasons), "")):
        refused.append(why)
        report_no_kernels(run_dir, f"{why}. All ranks use torch's attention, which is slower")


def report_no_kernels(run_dir: RunDir, why: str) -> None:
    """Writes the event `no_kernels`, on rank 0."""
    if dist.get_rank() == 0:
        run_dir.events.write("no_kernels", run_dir.metrics.last_step(), why)


def choose_on_rank_0(weights: Mapping[AttentionShape, float], run_dir: RunDir, device: torch.device) -> str:
    """The choice of all ranks, as `agree` finds it, among those that every rank can use. Collective."""
    no_flash3 = first_reason(why_no_flash3())
    choices = [name for name in OFF if name != FLASH3 or not no_flash3]
    measured = partial(measure, weights, choices, device) if weights else dict[str, float]
    return agree("attention", choices, run_dir, device, measured, "Seconds for an epoch of the clips")


def agree(
    event: str, choices: Sequence[str], run_dir: RunDir, device: torch.device,
    measured: Callable[[], Mapping[str, float]], unit: str,
) -> str:  # fmt: skip
    """The choice that an earlier start of the run made on such a GPU, or the fastest that rank 0 measures. Collective.

    The event has the choice and what was measured.
    """
    chosen = [choices[0]]
    if dist.get_rank() == 0:
        where = f"on {torch.cuda.get_device_name(device)} with torch {torch.__version__}"
        reasons = [line["reason"] for line in run_dir.events.lines.read() if line["event"] == event]
        earlier = [name for reason in reasons for name in choices if reason.startswith(f"{name} {where}")]
        if earlier:
            chosen = earlier[-1:]
        elif times := measured():
            chosen = [fastest(times)]
            figures = ", ".join(f"{name} {taken:.3g}" for name, taken in times.items())
            run_dir.events.write(event, run_dir.metrics.last_step(), f"{chosen[0]} {where}. {unit}: {figures}")
    dist.broadcast_object_list(chosen, src=0)
    return chosen[0]


def measure(weights: Mapping[AttentionShape, float], choices: Sequence[str], device: torch.device) -> dict[str, float]:
    """By choice, the weighted sum of the seconds of a forward and backward pass; without what fails or is wrong."""
    began, times = time.monotonic(), dict.fromkeys(choices, 0.0)
    for one in sorted(weights, key=lambda one: one.flops * weights[one], reverse=True):
        if time.monotonic() - began > LIMIT_S:
            break
        expected: list[Tensor] = []
        for name in list(times):
            try:
                use(name)
                found, taken = time_passes(one, device)
                expected = expected or found
                pairs = zip(found, expected, strict=True)
                if not all((a - b).abs().max() <= TOLERANCE * b.abs().max() for a, b in pairs):
                    raise ArithmeticError("another result than that of torch's order")
                times[name] += weights[one] * taken
            except Exception as error:  # it is not chosen then
                log.warning(f"{one.kind} attention, {name}: {error_line(error)}")
                del times[name]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return times if OWN in times else {}


def time_passes(one: AttentionShape, device: torch.device) -> tuple[list[Tensor], float]:
    """Output and gradients, and the seconds that they take."""
    inputs, mask = one.inputs(device, torch.bfloat16), one.mask(device)

    def once() -> list[Tensor]:
        y = one.run(inputs, mask)
        return [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))]

    found, taken = once(), seconds(once)  # the first call is a warm-up
    calls = int(MEASURED_S / max(taken, 1e-4))
    return found, seconds(lambda: [once() for _ in range(calls)]) / calls if calls > 1 else taken


def why_no_flash3() -> str:
    """Why this process can't use FlashAttention-3, or an empty string."""
    if find_spec("flash_attn_interface") is None:
        return "its package is not installed"
    try:
        use(FLASH3)
    except Exception as error:  # of the package, or of another torch
        return error_line(error)
    finally:
        use(OWN)
    return ""


def fastest(times: Mapping[str, float]) -> str:
    """The choice that takes least, or the first, which is torch's own, if that is about as fast."""
    best, own = min(times, key=times.__getitem__), next(iter(times))
    return best if times[best] <= LEAST_GAIN * times[own] else own


def use(choice: str) -> None:
    """Has this process use a choice from now on."""
    torch.backends.cuda.enable_cudnn_sdp("cudnn" not in OFF[choice])
    torch.backends.cuda.enable_flash_sdp("flash" not in OFF[choice])
    if choice == FLASH3:
        backends.activate_flash_attention_impl("FA3")
    elif getattr(backends, "current_flash_attention_impl", bool)():  # older versions of torch have none
        backends.restore_flash_attention_impl()
