"""What building kernels needs on a machine."""

import importlib.util
import os
import sysconfig
from pathlib import Path
from shutil import which

import torch


def why_no_compiler(variable: str, *names: str) -> str:
    """Why there is no C compiler, or an empty string. `variable` is the environment variable that may name it."""
    names = (os.environ[variable],) if variable in os.environ else names
    return "" if any(map(which, names)) else f"there is no C compiler ({' or '.join(names)})"


def why_no_triton() -> str:
    """Why Triton can't build kernels, or an empty string."""
    if why := why_no_compiler("CC", "gcc", "clang"):
        return why
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    # Triton itself looks in this scheme, also where a distribution has another default.
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file():
        return "Python's headers (python3-dev), which triton needs, are not installed"
    return ""


def why_no_kernels(device: torch.device) -> str:
    """Why our kernels can't run on a device, or an empty string. On a CPU, Triton's interpreter runs them in tests."""
    if device.type != "cuda":
        return ""
    if not torch.version.cuda:
        return "torch is not built for CUDA"
    if why := why_no_triton():
        return why
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no tensor cores for bfloat16"
    return ""
