"""The layout of ZeRO's partitions: what a rank holds of each parameter, in one form for all stages.

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) distributes the float32 master weights and Adam's moments over the
ranks, in another way at each stage. A slice is a rank's range of a flattened parameter. EMA and checkpoints use only
slices, so they depend neither on the stage nor on the world size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sora_train.errors import UserError
from sora_train.lora.adapters import trained_parameters


@dataclass(frozen=True)
class Slice:
    """Elements `offset` to `offset + len(master)` of a flattened parameter, as views of the tensors that train."""

    offset: int
    owned: bool  # by exactly one rank; false for the copies on the other ranks at stage 0
    master: Float[Tensor, "i"]
    exp_avg: Float[Tensor, "i"]
    exp_avg_sq: Float[Tensor, "i"]


def find_slices(inner: Any, stage: int, rank: int, world: int) -> dict[str, Slice]:
    """This rank's slices by parameter name, of DeepSpeed's engine `inner`.

    Raises UserError if the data is not where DeepSpeed says.
    """
    optimizer, adam, found = inner.optimizer, inner.basic_optimizer, {}
    params: list[tuple[str, Any]] = list(trained_parameters(inner.module))  # with DeepSpeed's own attributes
    for i, (name, p) in enumerate(params):
        if stage == 0:
            flat, start, offset, count, owned = p, 0, 0, p.numel(), i % world == rank
        elif stage == 3:
            group, start, count = optimizer.grad_position[optimizer.get_param_id(p)]
            flat, offset, owned = optimizer.fp32_partitioned_groups_flat[group], count * rank, True
            count = min(count, p.ds_numel - offset)  # the last ranks' parts are padded
        else:
            mapping = p._hp_mapping
            if mapping is None:
                continue
            flat = adam.param_groups[mapping.param_group_index]["params"][0]
            start, count = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            offset, owned = mapping.lp_fragment_address.start, True
        if count > 0:
            m, v = _moments(adam, flat)
            part = [tensor.detach().view(-1)[start : start + count] for tensor in (flat, m, v)]
            held = p.ds_tensor.detach()[:count] if stage == 3 else p.detach().view(-1)[offset : offset + count]
            if not torch.equal(part[0].to(held), held):
                raise UserError(
                    f"DeepSpeed stores {name} elsewhere than it says, so no checkpoint could be made. Remove keys from "
                    "train.deepspeed that change the layout of parameters, such as round_robin_gradients",
                    code="deepspeed",
                )
            found[name] = Slice(offset, owned, *part)
    return found


def bucketed(shapes: dict[str, torch.Size], most: int = 2**25) -> Iterator[list[str]]:
    """Names in order, in lists of at most `most` elements together, or of a single larger parameter."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + math.prod(shape) > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += math.prod(shape)
    if names:
        yield names


def _moments(adam: torch.optim.AdamW, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's two moments of a tensor; created here, as AdamW would at its first step, so they can be loaded."""
    state = adam.state[flat]
    if not state:
        device = flat.device if adam.defaults["fused"] else None
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat.detach()), torch.zeros_like(flat.detach())
    return state["exp_avg"], state["exp_avg_sq"]
