"""Fréchet video distance between two sets of videos.

Reference: Unterthiner et al. 2018, arXiv 1812.01717, section 3. A Gaussian is fitted to the I3D features of each set.
The distance is |m1 - m2|² + Tr(S1 + S2 - 2 (S1 S2)^½)  (Dowson and Landau 1982).

A covariance S is represented by a factor R with S = Rᵀ R, from a QR decomposition of the centred features. S itself is
never computed. Tr (S1 S2)^½ = Tr (S1^½ S2 S1^½)^½ is the sum of the singular values of R1 R2ᵀ. So no square root is
taken of a value that rounding made negative. Sets of fewer videos than features, whose covariances are rank-deficient,
are as exact as others. All computations are in float64.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

ENOUGH_CLIPS = 256
"""With fewer clips FVD depends more on their number than on the model."""


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Squared Fréchet distance between the Gaussians of two sets of features.

    Covariances divide by n - 1. The estimate is biased upward, and the bias falls with the number of clips. So compare
    only values from equal numbers of clips. Raises ValueError if a set has fewer than two rows or features that are not
    finite.
    """
    if min(len(a), len(b)) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"expected at least two rows of finite features in each set, got {len(a)} and {len(b)}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    r1, r2 = factor(a), factor(b)
    between = np.square(a.mean(0) - b.mean(0)).sum()
    shared = np.linalg.svd(r1 @ r2.T, compute_uv=False).sum()
    # |R1|² + |R2|² - 2 shared is the minimum of |R1 - Q R2|² over rotations Q: negative only through rounding.
    return float(between + max(0.0, np.square(r1).sum() + np.square(r2).sum() - 2 * shared))


def factor(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "k d"]:
    """A factor R of the covariance of the rows: covariance = Rᵀ R."""
    return np.asarray(np.linalg.qr((features - features.mean(0)) / np.sqrt(len(features) - 1), mode="r"))
