"""The guard: which steps are fit to be taken, and what is left out after several in a row were not.

Pure functions of figures that every rank has alike, so that all ranks decide the same. Going back some way before the
trouble and leaving out the batches around it follows PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1).
"""

import math
from collections.abc import Sequence

RECENT = 100
"""Norms of so many good steps are remembered."""
ENOUGH = 20
"""Before so many are known, only what is not finite is refused."""
WARY = 100
"""At most so many batches before the first bad one are left out with it."""


def verdict(norm: float, *, loss: float, recent: Sequence[float], spike: float) -> str:
    """Why a step must not be taken, or an empty string.

    `norm` is the global gradient norm before clipping, `recent` are those of the last good steps, and a norm above
    `spike` times their largest is refused.
    """
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    if not math.isfinite(norm):
        return f"its gradient norm is {norm}"
    if spike and len(recent) >= ENOUGH and norm > spike * max(recent):
        return f"its gradient norm {norm:.4g} is far beyond the last {len(recent)}, of at most {max(recent):.4g}"
    return ""


def remembered(recent: tuple[float, ...], norm: float) -> tuple[float, ...]:
    """The recent norms after one more good step."""
    return (*recent, norm)[-RECENT:]


def left_out(first: int, streak: Sequence[int], skipped: Sequence[int]) -> tuple[int, ...]:
    """Batches to leave out from now on, when a run goes back to where batch `first` is next.

    Those of the streak and those before it back to `first`, `WARY` at most; with what was left out already, sorted.
    """
    begin = max(first, streak[0] - WARY)
    return tuple(sorted({*skipped, *range(begin, streak[-1] + 1)}))
