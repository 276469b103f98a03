"""What ZeRO left on this rank, in one form for all stages.

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) lays the float32 master weights and Adam's moments out over the ranks,
each stage its own way. A slice says what a rank holds of a parameter: a run of its flattened elements. EMA and
checkpoints are written against that: they know no stage and no world size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sora_train.errors import UserError


@dataclass(frozen=True)
class Slice:
    """Elements `offset` to `offset + master.numel()` of a flattened parameter. The tensors are views of what trains."""

    offset: int
    owned: bool  # in exactly one rank's keeping; false for the copies that stage 0 leaves on the other ranks
    master: Float[Tensor, "m"]
    exp_avg: Float[Tensor, "m"]
    exp_avg_sq: Float[Tensor, "m"]


def find_slices(inner: Any, stage: int, rank: int, world: int) -> dict[str, Slice]:
    """What this rank holds, by parameter name, once DeepSpeed's engine `inner` is made.

    Raises UserError where that isn't what DeepSpeed's books say.
    """
    optimizer, adam, found = inner.optimizer, inner.basic_optimizer, {}
    params: list[tuple[str, Any]] = list(inner.module.named_parameters())  # with DeepSpeed's own attributes
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
                    f"DeepSpeed keeps {name} elsewhere than it says, so that no checkpoint could be made: leave out of "
                    "train.deepspeed what changes how parameters are laid out, such as round_robin_gradients"
                )
            found[name] = Slice(offset, owned, *part)
    return found


def bucketed(shapes: dict[str, torch.Size], most: int = 2**25) -> Iterator[list[str]]:
    """Names in order, in lists of at most so many elements together, or of a single larger parameter."""
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
    """Adam's two moments of a tensor; made here, as AdamW would at its first step, so that they can be loaded into."""
    state = adam.state[flat]
    if not state:
        device = flat.device if adam.defaults["fused"] else None
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat.detach()), torch.zeros_like(flat.detach())
    return state["exp_avg"], state["exp_avg_sq"]
