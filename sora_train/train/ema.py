"""An exponential moving average (EMA) of the float32 master weights, sharded as they are.

It is float32 too: in bf16 a decay of 0.9999 never moves, since each update is below half a unit in the last place.
"""

import torch
from torch import Tensor

from sora_train.train.engine import Engine


class Ema:
    """The average of what this rank owns; `decay` 0 follows the weights themselves."""

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.masters = {name: part.master for name, part in engine.slices().items() if part.owned}
        self.shadow = {name: master.clone() for name, master in self.masters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """ema += (1 - decay) (weights - ema), after optimizer step number `step`, counted from 0."""
        if self.shadow:  # at stage 0 with more ranks than parameters, a rank may own none
            weight = 1 - decay_at(self.decay, step)
            torch._foreach_lerp_(list(self.shadow.values()), list(self.masters.values()), weight)

    def full_weights(self) -> dict[str, Tensor]:
        """The whole averaged model by parameter name, on rank 0; {} on the others. Collective."""
        slices = self.engine.slices()
        return self.engine.gather_to_rank0({name: (slices[name].offset, part) for name, part in self.shadow.items()})


def decay_at(decay: float, step: int) -> float:
    """min(decay, (1 + step) / (10 + step)): the warm-up lets the average forget the initial weights soon."""
    return min(decay, (1 + step) / (10 + step))
