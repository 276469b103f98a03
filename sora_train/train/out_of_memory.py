"""Running out of memory in training, told with the keys that lower what a step takes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sora_train.codec.memory import is_out_of_memory
from sora_train.errors import UserError
from sora_train.train.config import TrainConfig


@contextmanager
def memory_errors(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Turns running out of memory into a UserError, since the same run would do so again."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        why = (str(error).strip().splitlines() or ["not enough memory"])[0]
        raise UserError(
            f"training runs out of memory on {device} with micro-batches of {config.micro_batch_size} clips: {why} "
            "Lower train.micro_batch_size, set train.activation_checkpointing to full, or raise train.zero_stage; "
            "`sora preflight RECIPE --plan` says what fits"
        ) from error
