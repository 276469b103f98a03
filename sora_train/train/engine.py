"""DeepSpeed ZeRO 0 to 3 behind six verbs: call, backward, step, slices, assemble, sync.

DeepSpeed takes the global gradient norm only inside its optimizer's step, and has a way out of that step for gradients
that overflowed. The engine stands at that point: it shows the norm to a judge, and a refused step takes DeepSpeed's own
way out, with weights and moments untouched.

How each stage lays weights and moments out over the ranks is `zero_layout.py`'s knowledge.
"""

import contextlib
import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sora_train.errors import UserError
from sora_train.model.layers import Block
from sora_train.train.config import TrainConfig
from sora_train.train.deepspeed_config import complaint, deepspeed_config
from sora_train.train.zero_layout import Slice, bucketed, find_slices

Judge = Callable[[float], str]
"""Why a step of this global gradient norm, before clipping, must not be taken, or "". All ranks ask with the same."""


class Engine:
    """A model, AdamW and ZeRO on the process group that is already there.

    Gradients of `accumulation` calls of `backward` are summed, then averaged over the ranks; nothing else is divided,
    so the caller scales the loss. Raises RuntimeError where no process group was started, and UserError for values of
    `train.deepspeed` that DeepSpeed does not take.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, *, accumulation: int, device: torch.device) -> None:
        if not dist.is_initialized():
            raise RuntimeError("the engine needs a process group: call torch.distributed.init_process_group first")
        deepspeed = _quiet_deepspeed(device)
        from deepspeed.runtime.config import DeepSpeedConfigError

        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.device, self.clip, self.stage = device, config.gradient_clip, config.zero_stage
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        # Stage 0 keeps the whole float32 model on every rank: it computes bf16 by autocast, with no second copy.
        self.autocast = self.stage == 0 and self.dtype == torch.bfloat16
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        model = model.to(device)
        optimizer = torch.optim.AdamW(
            decay_groups(model, config.weight_decay),
            lr=config.learning_rate,
            betas=config.betas,
            fused=True,
        )
        self._judge: Judge = lambda norm: ""
        self._verdict = (0.0, "")
        if self.stage == 3:
            # A block's parameters are gathered together: what recomputes or compiles a block finds them whole.
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
        self.inner: Any
        try:
            with contextlib.redirect_stdout(None):  # the bf16 optimizer prints the machine's memory
                self.inner, *_ = deepspeed.initialize(
                    model=model,
                    optimizer=optimizer,
                    dist_init_required=False,
                    config=deepspeed_config(config, accumulation=accumulation, world=self.world),
                )
        except (ValueError, TypeError, AttributeError, AssertionError, DeepSpeedConfigError) as error:
            if not config.deepspeed:
                raise
            raise UserError(complaint(error)) from error
        if self.inner.world_size != self.world or self.inner.global_rank != self.rank:
            raise RuntimeError(
                f"DeepSpeed took rank {self.inner.global_rank} of {self.inner.world_size}, "
                f"the process group says {self.rank} of {self.world}"
            )
        self.adam: torch.optim.AdamW = self.inner.basic_optimizer
        if self.stage:
            self._stand_in_its_step()
        self._slices = find_slices(self.inner, self.stage, self.rank, self.world)

    @property
    def model(self) -> nn.Module:
        return self.inner.module

    def __call__(
        self,
        x: Float[Tensor, "b f c h w"],
        t: Float[Tensor, "b"],
        text: Float[Tensor, "b l e"],
        text_mask: Bool[Tensor, "b l"],
    ) -> Float[Tensor, "b f o h w"]:
        """The model in the run's precision; float32 in, float32 out."""
        if self.autocast:
            with torch.autocast(self.device.type, torch.bfloat16):
                return self.inner(x, t, text, text_mask).float()
        return self.inner(x.to(self.dtype), t, text.to(self.dtype), text_mask).float()

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Adds the gradients of `loss`; with the last micro-batch of a step they are averaged over the ranks."""
        if self.stage == 2:  # which sums, see `deepspeed_config`
            loss = loss / self.world
        self.inner.backward(loss, scale_wrt_gas=False)
        if not self.inner.is_gradient_accumulation_boundary():
            self.inner.step()  # DeepSpeed counts micro-batches by these calls

    def step(self, learning_rate: float, judge: Judge) -> tuple[float, str]:
        """After a step's last micro-batch: clips and updates the weights, unless `judge` refuses the gradient norm.

        Returns that norm, taken before clipping over all ranks, and the judge's reason, which is empty for a step that
        was taken. A refused one leaves weights and moments untouched.
        """
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self._judge = judge
        if self.stage == 0:
            self._clip_replicated()
        self.inner.step()
        return self._verdict

    def slices(self) -> dict[str, Slice]:
        """What this rank holds, by parameter name; a parameter of which it holds nothing is left out."""
        return self._slices

    def set_adam_step(self, step: int) -> None:
        """Sets AdamW's own count of steps, which its bias correction uses."""
        for state in self.adam.state.values():
            state["step"].fill_(float(step))

    @torch.no_grad()
    def assemble(self, parts: dict[str, tuple[int, Tensor]]) -> dict[str, Tensor]:
        """Whole float32 parameters on rank 0 from every rank's (offset, elements); {} on the other ranks. Collective.

        Each element comes from one rank and the rest send zeros, so the sum is exact.
        """
        whole = {}
        for names in bucketed(self.shapes):
            counts = [math.prod(self.shapes[name]) for name in names]
            buffer = torch.zeros(sum(counts), dtype=torch.float32, device=self.device)
            for name, room in zip(names, buffer.split(counts), strict=True):
                if name in parts:
                    offset, elements = parts[name]
                    room[offset : offset + elements.numel()] = elements
            if self.world > 1:
                dist.reduce(buffer, dst=0)
            if self.rank == 0:
                rooms = zip(names, buffer.cpu().split(counts), strict=True)
                whole |= {name: room.view(self.shapes[name]) for name, room in rooms}
        return whole

    @torch.no_grad()
    def sync(self) -> None:
        """Brings the weights that compute in line with the masters, after a checkpoint was loaded. Collective."""
        optimizer = self.inner.optimizer
        if self.stage == 3:
            for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
                optimizer.fp16_partitioned_groups_flat[i].data.copy_(flat.data)
                optimizer._unflatten_partitioned_parameters(i)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self.stage:
            optimizer.update_lp_params()

    def _refuses(self, norm: Tensor | float) -> bool:
        norm = float(norm) if norm >= 0 else math.nan  # DeepSpeed says -1 for what is not finite
        self._verdict = norm, self._judge(norm)
        return bool(self._verdict[1])

    def _clip_replicated(self) -> None:
        """Stage 0: clips as the other stages do. DeepSpeed would, but keeps the norm to itself."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]  # averaged by the last backward
        if self._refuses(torch.nn.utils.get_total_norm(grads)):
            self.adam.zero_grad(set_to_none=True)  # AdamW leaves alone what has no gradient
        elif self.clip and (excess := (self._verdict[0] + 1e-6) / self.clip) > 1:
            for grad in grads:
                grad.div_(excess)

    def _stand_in_its_step(self) -> None:
        """Has DeepSpeed's optimizer show its gradient norm to the judge, and take a refused one for an overflow."""
        optimizer = self.inner.optimizer
        if self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            groups_of = optimizer._get_norm_groups

            def groups() -> list[Tensor]:
                found = groups_of()
                refused = self._refuses(combine_grad_norm_groups(found))
                return [torch.tensor(-1.0, device=self.device)] if refused else found

            optimizer._get_norm_groups = groups
        elif hasattr(optimizer, "scaled_global_norm"):
            norm_of = optimizer.scaled_global_norm
            optimizer.check_grad_overflow = True  # or bf16 would take a refused norm for one to clip by

            def norm() -> Tensor:
                found = norm_of()
                return torch.full_like(found, -1.0) if self._refuses(found) else found

            optimizer.check_overflow = lambda partition_gradients=True: None
            optimizer.scaled_global_norm = norm
        else:  # the bf16 optimizer of stage 1, which asks for gradients twice: for their norm, and to clip them
            from deepspeed.runtime.utils import get_global_norm_of_tensors

            grads_of = optimizer.get_grads_for_norm

            def grads(for_clipping: bool = False) -> Any:
                found = grads_of(for_clipping=for_clipping)
                if for_clipping:
                    return found
                norm = get_global_norm_of_tensors(input_tensors=found[0], mpu=None, norm_type=2)
                return ([torch.full((1,), math.inf, device=self.device)], {}) if self._refuses(norm) else found

            optimizer.get_grads_for_norm = grads


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay; biases and adaLN tables, which hold no direction to forget, do not."""
    tables = {name for name, _ in model.named_parameters() if name.split(".")[-1].startswith("table")}
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim >= 2 and name not in tables]
    rest = [p for name, p in named if p.ndim < 2 or name in tables]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def _quiet_deepspeed(device: torch.device):
    """DeepSpeed without its banner and without a compiler: gloo does what its shared-memory collective would."""
    os.environ["DS_ACCELERATOR"] = device.type  # it guesses otherwise, and wrongly for a CPU run on a GPU machine
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    warnings.filterwarnings("ignore", message=r".*`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import compiler
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Whatever the optimizer, DeepSpeed asks whether it is Muon, and imports that: its functions, which nothing here
    # calls, are given to torch's compiler, whose import takes seconds.
    before, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = before
    # Set as a whole: asking for the entry would probe every op, which runs the compiler for seconds.
    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    return deepspeed
