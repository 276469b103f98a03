"""The engine: DeepSpeed ZeRO 0 to 3 behind six functions: call, backward, step, slices, gather_to_rank0, sync.

DeepSpeed computes the global gradient norm inside `optimizer.step()` and skips the update on overflow. The engine
patches that point: a callback checks the norm, and a rejected step is skipped the same way, with weights and moments
unchanged. How each stage lays weights and moments out over the ranks is in `zero_layout.py`.
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
from sora_train.lora.adapters import trained_parameters
from sora_train.model.layers import Block
from sora_train.model.wan import WanBlock
from sora_train.train.config import TrainConfig
from sora_train.train.deepspeed_config import deepspeed_config, rejection
from sora_train.train.placement import Weights, place
from sora_train.train.zero_layout import Slice, bucketed, find_slices

CheckNorm = Callable[[float], str]
"""Takes the global gradient norm before clipping, the same on all ranks. Returns why to skip the step, or ""."""


class Engine:
    """A model, AdamW and ZeRO on an existing process group.

    Gradients of at most `accumulation` calls of `backward` are summed, then averaged over the ranks. Nothing else is
    divided, so the caller scales the loss. Parameters on the meta device get `weights`. Raises RuntimeError without a
    process group, and UserError for values of `train.deepspeed` that DeepSpeed rejects and weights that can't be read.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        *,
        accumulation: int,
        device: torch.device,
        weights: Weights | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError("the engine needs a process group: call torch.distributed.init_process_group first")
        deepspeed = _quiet_deepspeed(device)
        from deepspeed.runtime.config import DeepSpeedConfigError

        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.device, self.clip, self.stage = device, config.gradient_clip, config.zero_stage
        self.dtype = torch.bfloat16 if config.half else torch.float32
        # Stage 0 keeps the whole float32 model on every rank: it computes bf16 by autocast, with no second copy.
        self.autocast = self.stage == 0 and self.dtype == torch.bfloat16
        self.shapes = {name: p.shape for name, p in trained_parameters(model)}
        groups = decay_groups(model, config.weight_decay)  # by shapes, before stage 3 distributes the parameters
        settings = deepspeed_config(config, accumulation=accumulation, world=self.world)
        self._check_norm: CheckNorm = lambda norm: ""
        self._norm_and_reason = (0.0, "")
        if self.stage == 3:
            # A block's parameters are gathered together, so recomputation and compiled code find them whole.
            deepspeed.utils.set_z3_leaf_modules(model, [Block, WanBlock])
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
        self.inner: Any
        try:
            with contextlib.redirect_stdout(None):  # the bf16 optimizer prints the machine's memory
                half = self.dtype == torch.bfloat16 and not self.autocast
                place(model, weights or Weights(), device, half=half, zero3=settings if self.stage == 3 else None)
                self.inner, *_ = deepspeed.initialize(
                    model=model,
                    optimizer=torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True),
                    dist_init_required=False,
                    config=settings,
                )
        except UserError:
            raise
        except (ValueError, TypeError, AttributeError, AssertionError, DeepSpeedConfigError) as error:
            if not config.deepspeed:
                raise
            raise UserError(rejection(error), code="deepspeed") from error
        if self.inner.world_size != self.world or self.inner.global_rank != self.rank:
            raise RuntimeError(
                f"DeepSpeed took rank {self.inner.global_rank} of {self.inner.world_size}, "
                f"the process group says {self.rank} of {self.world}"
            )
        self.adam: torch.optim.AdamW = self.inner.basic_optimizer
        if self.stage:
            self._patch_norm_hook()
        self._slices = find_slices(self.inner, self.stage, self.rank, self.world)

    @property
    def model(self) -> nn.Module:
        return self.inner.module

    def __call__(
        self,
        x: Float[Tensor, "b f c h w"],
        t: Float[Tensor, "b *f"],
        text: Float[Tensor, "b l e"],
        text_mask: Bool[Tensor, "b l"],
    ) -> Float[Tensor, "b f o h w"]:
        """Runs the model in the run's precision; float32 in, with text also float16, and float32 out."""
        if self.autocast:
            with torch.autocast(self.device.type, torch.bfloat16):
                return self.inner(x, t, text.float(), text_mask).float()
        return self.inner(x.to(self.dtype), t, text.to(self.dtype), text_mask).float()

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        """Adds the gradients of `loss`; after a step's `last` micro-batch they are averaged over the ranks."""
        self.inner.set_gradient_accumulation_boundary(last)
        if self.stage == 2:  # it sums over the ranks, see `deepspeed_config`
            loss = loss / self.world
        self.inner.backward(loss, scale_wrt_gas=False)
        if not last:
            self.inner.step()  # DeepSpeed counts micro-batches by these calls

    def step(self, learning_rate: float, check_norm: CheckNorm) -> tuple[float, str]:
        """After a step's last micro-batch: clips and updates the weights, unless `check_norm` returns a reason.

        Returns the gradient norm over all ranks before clipping, and the reason, which is empty for a step that was
        taken. A rejected step leaves weights and moments unchanged.
        """
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self._check_norm = check_norm
        if self.stage == 0:
            self._clip_replicated()
        self.inner.step()
        return self._norm_and_reason

    def slices(self) -> dict[str, Slice]:
        """This rank's slices by parameter name; parameters of which it holds nothing are absent."""
        return self._slices

    def set_adam_step(self, step: int) -> None:
        """Sets AdamW's own count of steps, which its bias correction uses."""
        for state in self.adam.state.values():
            state["step"].fill_(float(step))

    @torch.no_grad()
    def gather_to_rank0(self, parts: dict[str, tuple[int, Float[Tensor, "i"]]]) -> dict[str, Tensor]:
        """Whole float32 parameters on rank 0 from every rank's (offset, elements); {} on the others. Collective.

        Each element comes from one rank and the others send zeros, so the sum is exact.
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
        """Copies the master weights to the weights that compute, after a checkpoint was loaded. Collective."""
        optimizer = self.inner.optimizer
        if self.stage == 3:
            for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
                optimizer.fp16_partitioned_groups_flat[i].data.copy_(flat.data)
                optimizer._unflatten_partitioned_parameters(i)
            optimizer.invalidate_secondary_tensor()  # copies that `zero_hpz_partition_size` makes
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self.stage:
            optimizer.update_lp_params()

    def _reject(self, norm: Tensor | float) -> bool:
        norm = float(norm) if norm >= 0 else math.nan  # DeepSpeed returns -1 for a norm that is not finite
        self._norm_and_reason = norm, self._check_norm(norm)
        return bool(self._norm_and_reason[1])

    def _clip_replicated(self) -> None:
        """Stage 0: clips as the other stages do. DeepSpeed would, but does not expose the norm."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]  # averaged by the last backward
        if self._reject(torch.nn.utils.get_total_norm(grads)):
            self.adam.zero_grad(set_to_none=True)  # AdamW ignores parameters without a gradient
        elif self.clip and (excess := (self._norm_and_reason[0] + 1e-6) / self.clip) > 1:
            for grad in grads:
                grad.div_(excess)

    def _patch_norm_hook(self) -> None:
        """Patches DeepSpeed's optimizer to pass its gradient norm to `_reject`, and to treat rejection as overflow."""
        optimizer = self.inner.optimizer
        if self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            groups_of = optimizer._get_norm_groups

            def groups() -> list[Tensor]:
                found = groups_of()
                rejected = self._reject(combine_grad_norm_groups(found))
                return [torch.tensor(-1.0, device=self.device)] if rejected else found

            optimizer._get_norm_groups = groups
        elif hasattr(optimizer, "scaled_global_norm"):
            norm_of = optimizer.scaled_global_norm
            optimizer.check_grad_overflow = True  # otherwise bf16 would clip by a rejected norm

            def norm() -> Tensor:
                found = norm_of()
                return torch.full_like(found, -1.0) if self._reject(found) else found

            optimizer.check_overflow = lambda partition_gradients=True: None
            optimizer.scaled_global_norm = norm
        else:  # the bf16 optimizer of stage 1
            from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace

            grads_of = optimizer.get_grads_for_norm
            optimizer.clip_grad = 0.0  # it would clip all gradients one by one, also those that other ranks update

            def grads() -> tuple[list[Tensor], dict[str, Any]]:
                norms = torch.stack(torch._foreach_norm(grads_of()[0]))
                norm = norms.pow(2.0).sum().pow(0.5)
                mask_nan_or_inf_with_val_inplace(norm, device=norm.device)  # DeepSpeed's own check, with its -1
                if self._reject(norm):
                    return [torch.full((1,), math.inf, device=self.device)], {}
                if self.clip and (factor := self.clip / (norm + 1e-6)) < 1:
                    torch._foreach_mul_(optimizer.fp32_groups_gradient_flat_partition, factor)
                return [norm], {}  # the optimizer takes the norm of what it gets, which is the norm again

            optimizer.get_grads_for_norm = grads


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices decay; biases and adaLN's scale-shift tables do not."""
    named = list(trained_parameters(model))
    tables = {name for name, _ in named if name.split(".")[-1].startswith("table")}
    matrices = [p for name, p in named if p.ndim >= 2 and name not in tables]
    rest = [p for name, p in named if p.ndim < 2 or name in tables]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]  # adapters are matrices alone


def _quiet_deepspeed(device: torch.device):
    """Imports DeepSpeed without its banner and without compiling its shared-memory collective, which gloo replaces."""
    os.environ["DS_ACCELERATOR"] = device.type  # its guess is wrong for a CPU run on a GPU machine
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    warnings.filterwarnings("ignore", message=r".*`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import compiler
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed imports Muon whatever the optimizer. Its functions, which we never call, are passed to torch's compiler,
    # whose import takes seconds.
    before, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = before
    # Set through __dict__: reading the attribute would probe every op, which runs the compiler for seconds.
    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    return deepspeed
