"""Fréchet video distance (Unterthiner et al. 2018, arXiv 1812.01717, section 3): how far apart two sets of videos are.

Each set is taken for a Gaussian of I3D's features: |m1 - m2|² + Tr(S1 + S2 - 2 (S1 S2)^½)  (Dowson and Landau 1982).

A covariance is kept as a factor R with S = Rᵀ R, from a QR decomposition of the centred features, and never multiplied
out. Tr (S1 S2)^½ = Tr (S1^½ S2 S1^½)^½ is then the sum of the singular values of R1 R2ᵀ. So nothing is taken the root
of that rounding made negative, and sets of fewer videos than features, whose covariances have no full rank, are as
exact as others. All of it is float64.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

ENOUGH_CLIPS = 256
"""Below this many clips FVD says more of their number than of the model."""


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Squared Fréchet distance between the Gaussians of two sets of features; covariances divide by n - 1.

    It has a bias upward that falls with the number of clips: only values of equal numbers compare. Raises ValueError
    for fewer than two of either, and for features that are not finite.
    """
    if min(len(a), len(b)) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"expected at least two rows of finite features in each set, got {len(a)} and {len(b)}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    r1, r2 = factor(a), factor(b)
    between = np.square(a.mean(0) - b.mean(0)).sum()
    shared = np.linalg.svd(r1 @ r2.T, compute_uv=False).sum()
    # |R1|² + |R2|² - 2 shared is the least |R1 - Q R2|² over rotations Q: below 0 only by rounding.
    return float(between + max(0.0, np.square(r1).sum() + np.square(r2).sum() - 2 * shared))


def factor(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "k d"]:
    """R with Rᵀ R the covariance of the rows."""
    return np.asarray(np.linalg.qr((features - features.mean(0)) / np.sqrt(len(features) - 1), mode="r"))
