"""Recognises out-of-memory errors and releases cached device memory."""

import torch

SIGNS = (
    "can't allocate memory",
    "could not create a primitive",
    "Storage size calculation overflowed",
    "out of memory",
    "_ALLOC_FAILED",
)
"""Out-of-memory messages that have no exception class of their own.
In this order: PyTorch's CPU allocator, oneDNN, a size beyond any memory, an accelerator's driver, cuDNN or cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    )


def still_works(device: torch.device | str) -> bool:
    """Whether a device still computes after an error.

    After some CUDA errors (an illegal memory access, a failed assertion) no CUDA call works any more in this process.
    Out of memory is not such an error.
    """
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except Exception as error:
        return is_out_of_memory(error)


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that tensors may still take, with what torch holds without using it. 0 on other devices."""
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def give_back(device: torch.device) -> None:
    """Returns cached memory blocks to the device.

    Call it outside the `except` block, because the error itself holds tensors.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
