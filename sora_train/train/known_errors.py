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
        if is_out_of_memory(error):
            raise UserError(out_of_memory(error, config, device)) from error
        if config.compile and type(error).__name__ == "BackendCompilerFailed":
            raise UserError(not_compiled(error)) from error
        raise


def out_of_memory(error: BaseException, config: TrainConfig, device: torch.device) -> str:
    """A message with the keys that lower what a step takes."""
    why = (str(error).strip().splitlines() or ["not enough memory"])[0]
    return (
        f"training runs out of memory on {device} with micro-batches of {config.micro_batch_size} clips: {why} "
        "Lower train.micro_batch_size, set train.activation_checkpointing to full, or raise train.zero_stage; "
        "`sora preflight RECIPE --plan` says what fits"
    )


def not_compiled(error: BaseException) -> str:
    """A message with the cache of torch.compile, where a compilation that was killed leaves incomplete libraries."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    said = [line for line in str(error).splitlines() if line.strip()]  # the first names the backend
    why = (said[1:] or said or [type(error).__name__])[0][:500]
    return (
        f"train.compile failed on {socket.gethostname()}: {why}. A compilation that was killed leaves incomplete files "
        f"in torch's cache. Remove the folder {cache_dir()} there and run the same command again. If that does not "
        "help, set train.compile to false"
    )
