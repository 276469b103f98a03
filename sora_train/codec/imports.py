"""Imports of diffusers and transformers without torchao."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_torchao() -> Iterator[None]:
    """Hides torchao while frozen networks are loaded, as a context manager or a decorator.

    Where it is installed, diffusers and transformers import it for formats that no network here has. That takes two
    seconds, and prints warnings.
    """
    hides = "torchao" not in sys.modules
    if hides:
        sys.modules["torchao"] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        if hides:
            del sys.modules["torchao"]
