"""Errors of training that a retry would repeat, as messages that say what to change."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sora_train.codec.memory import is_out_of_memory
from sora_train.errors import UserError
from sora_train.train.config import TrainConfig


@contextmanager
def known_errors(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Turns running out of memory, and a failed compilation, into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if is_out_of_memory(error):
            raise UserError(
                f"training runs out of memory on {device} with micro-batches of {config.micro_batch_size} clips: "
                f"{said[0]} Lower train.micro_batch_size, set train.activation_checkpointing to full, or raise "
                "train.zero_stage; `sora preflight RECIPE --plan` says what fits",
                code="memory",
            ) from error
        if any(kind.__name__ == "BackendCompilerFailed" for kind in type(error).__mro__):
            from torch._inductor.runtime.cache_dir_utils import cache_dir

            why = said[min(1, len(said) - 1)][:500]  # the first line names the backend
            raise UserError(
                f"train.compile failed on {socket.gethostname()}: {why}. A compilation that was killed leaves "
                f"incomplete files in torch's cache. Remove the folder {cache_dir()} there and run the same command "
                "again. If that does not help, set train.compile to no",
                code="compile",
            ) from error
        raise
