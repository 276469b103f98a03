"""DeepSpeed ZeRO 0 to 3 behind six verbs: call, backward, step, slices, assemble, sync.

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) lays the float32 master weights and Adam's moments out over the ranks,
each stage its own way. `Engine.slices` says in one form what this rank holds: for every parameter, by name, a run of
its flattened elements. EMA and checkpoints are written against that form: they know no stage and no world size.
"""

import contextlib
import logging
import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sora_train.train.config import TrainConfig


@dataclass(frozen=True)
class Slice:
    """Elements `offset` to `offset + master.numel()` of a flattened parameter. The tensors are views of what trains."""

    offset: int
    owned: bool  # in exactly one rank's keeping; false for the copies that stage 0 leaves on the other ranks
    master: Float[Tensor, "m"]
    exp_avg: Float[Tensor, "m"]
    exp_avg_sq: Float[Tensor, "m"]


class Engine:
    """A model, AdamW and ZeRO on the process group that is already there.

    Gradients of `accumulation` calls of `backward` are summed, then averaged over the ranks; nothing else is divided,
    so the caller scales the loss. Raises RuntimeError where no process group was started.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, *, accumulation: int, device: torch.device) -> None:
        if not dist.is_initialized():
            raise RuntimeError("the engine needs a process group: call torch.distributed.init_process_group first")
        deepspeed = _quiet_deepspeed(device)
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.device, self.clip, self.stage = device, config.gradient_clip, config.zero_stage
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        # Stage 0 keeps the whole float32 model on every rank: it computes bf16 by autocast, with no second copy.
        self.autocast = self.stage == 0 and self.dtype == torch.bfloat16
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        model = model.to(device)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=device.type == "cuda",
        )
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
        self.inner: Any
        with contextlib.redirect_stdout(None):  # the bf16 optimizer prints the machine's memory
            self.inner, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                dist_init_required=False,
                config=deepspeed_config(config, accumulation=accumulation, world=self.world),
            )
        if self.inner.world_size != self.world or self.inner.global_rank != self.rank:
            raise RuntimeError(
                f"DeepSpeed took rank {self.inner.global_rank} of {self.inner.world_size}, "
                f"the process group says {self.rank} of {self.world}"
            )
        self.adam: torch.optim.AdamW = self.inner.basic_optimizer
        self._slices = self._find_slices()

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
        self.inner.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float | None:
        """Ends a micro-batch. After a step's last: clips, updates the weights, returns the norm before clipping."""
        if not self.inner.is_gradient_accumulation_boundary():
            self.inner.step()
            return None
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        norm = self._clip_replicated() if self.stage == 0 else None
        self.inner.step()
        return float(self.inner.get_global_grad_norm() if norm is None else norm)

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
        for name, shape in self.shapes.items():
            buffer = torch.zeros(math.prod(shape), dtype=torch.float32, device=self.device)
            if name in parts:
                offset, elements = parts[name]
                buffer[offset : offset + elements.numel()] = elements.to(self.device)
            if self.world > 1:
                dist.reduce(buffer, dst=0)
            if self.rank == 0:
                whole[name] = buffer.view(shape).cpu()
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

    def _clip_replicated(self) -> float:
        """Stage 0: clips as the other stages do. DeepSpeed would, but keeps the norm to itself."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]  # averaged by the last backward
        norm = float(torch.nn.utils.get_total_norm(grads))
        if self.clip and (excess := (norm + 1e-6) / self.clip) > 1:
            for grad in grads:
                grad.div_(excess)
        return norm

    def _find_slices(self) -> dict[str, Slice]:
        optimizer, found = self.inner.optimizer, {}
        params: list[tuple[str, Any]] = list(self.model.named_parameters())  # with DeepSpeed's own attributes
        for i, (name, p) in enumerate(params):
            if self.stage == 0:
                flat, start, offset, count, owned = p, 0, 0, p.numel(), i % self.world == self.rank
            elif self.stage == 3:
                group, start, count = optimizer.grad_position[optimizer.get_param_id(p)]
                flat, offset, owned = optimizer.fp32_partitioned_groups_flat[group], count * self.rank, True
                count = min(count, p.ds_numel - offset)  # the last ranks' parts are padded
            else:
                mapping = p._hp_mapping
                if mapping is None:
                    continue
                flat = self.adam.param_groups[mapping.param_group_index]["params"][0]
                start, count = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
                offset, owned = mapping.lp_fragment_address.start, True
            if count > 0:
                m, v = _moments(self.adam, flat)
                part = [tensor.detach().view(-1)[start : start + count] for tensor in (flat, m, v)]
                found[name] = Slice(offset, owned, *part)
        return found


def _moments(adam: torch.optim.AdamW, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's two moments of a tensor; made here, as AdamW would at its first step, so that they can be loaded into."""
    state = adam.state[flat]
    if not state:
        device = flat.device if adam.defaults["fused"] else None
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat.detach()), torch.zeros_like(flat.detach())
    return state["exp_avg"], state["exp_avg_sq"]


def deepspeed_config(config: TrainConfig, *, accumulation: int, world: int) -> dict:
    """The recipe in DeepSpeed's words."""
    half = config.precision == "bf16" and config.zero_stage > 0
    return {
        "train_batch_size": config.micro_batch_size * accumulation * world,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.gradient_clip if config.zero_stage else 0.0,  # stage 0: see _clip_replicated
        "bf16": {"enabled": half},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def _quiet_deepspeed(device: torch.device):
    """DeepSpeed without its banner and without a compiler: gloo does what its shared-memory collective would."""
    os.environ["DS_ACCELERATOR"] = device.type  # it guesses otherwise, and wrongly for a CPU run on a GPU machine
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    warnings.filterwarnings("ignore", message=r".*`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Set as a whole: asking for the entry would probe every op, which runs the compiler for seconds.
    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    return deepspeed
