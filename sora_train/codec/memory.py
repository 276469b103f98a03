"""Running out of memory: how it looks, and giving back what a failed try held."""

import torch

SIGNS = (
    "can't allocate memory",
    "could not create a primitive",
    "Storage size calculation overflowed",
    "out of memory",
    "_ALLOC_FAILED",
)
"""What PyTorch's CPU allocator, oneDNN, a size past any memory, an accelerator's driver, and cuDNN or
cuBLAS say, without a class for it."""


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    )


def still_works(device: torch.device | str) -> bool:
    """Whether a device computes, after an error. After some CUDA errors (an illegal memory access, a failed assertion)
    nothing works any more in the process; being out of memory is not such an error.
    """
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except Exception as error:
        return is_out_of_memory(error)


def give_back(device: torch.device) -> None:
    """Hands cached blocks back to the device. To be called outside the `except`: the error itself holds tensors."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
