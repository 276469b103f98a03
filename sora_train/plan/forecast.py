"""Goodput and checkpoint interval of a run whose workers fail. Times are in seconds.

Failures come at random with a mean time M between them (a Poisson process). Training stalls for δ at each checkpoint,
while its state is copied, and writing the copy takes ω more in the background. A failure costs R until training
continues from the newest checkpoint that is completely written, and may strike during R too.

Consider the moments at which a checkpoint becomes complete. After τ seconds of steps between two checkpoints the next
such moment is P = δ + max(τ, ω) later if nothing fails: a snapshot waits until the one before is written. A failure
discards all steps since the snapshot of the newest complete checkpoint, and then R + τ + δ + ω without a failure are
needed. A stretch of L seconds takes M (e^(L/M) - 1) on average if each failure starts it again, so the mean time from
one complete checkpoint to the next is

    M (1 - e^(-P/M)) e^((R + τ + δ + ω)/M).

For ω <= τ this is M e^((R + ω)/M) (e^((τ + δ)/M) - 1): the cost function of Daly (2006, "A higher order estimate of the
optimum checkpoint interval for restart dumps", doi 10.1016/j.future.2004.11.016) with R + ω instead of R. So writing in
the background costs as much as a restart that takes ω longer, and does not change the best interval.
"""

from dataclasses import dataclass
from math import ceil, exp, expm1, sqrt

GPUS_PER_NODE = 8
FAILURES_PER_NODE_DAY = 6.5e-3
"""Of Meta's RSC-1, 16,000 A100 over 11 months: 6.50 per 1,000 node-days (Kokolis et al. 2025, arXiv 2410.21680).

RSC-2 had 2.34; Llama 3's 419 unexpected interruptions in 54 days on 16,384 H100 are 3.79 (arXiv 2407.21783, section
3.3.4).
"""


def mean_time_between_failures(gpus: int) -> float:
    """Mean seconds between failures of all nodes of so many GPUs, at RSC-1's rate."""
    return 86400 / (FAILURES_PER_NODE_DAY * ceil(gpus / GPUS_PER_NODE))


@dataclass(frozen=True)
class Lost:
    """Shares of the time that are not goodput."""

    checkpoints: float
    """Stalls, and waiting for the previous checkpoint."""
    repeated: float
    """Steps that a failure discarded."""
    restarts: float


@dataclass(frozen=True)
class Forecast:
    """What failures and checkpoints cost a run. Letters are those of the module's formula."""

    mtbf: float
    """M"""
    stall: float
    """δ"""
    write: float
    """ω"""
    restart: float
    """R: until a failure is noticed, workers have started again and the checkpoint is read."""

    def goodput(self, interval: float) -> float:
        """Share of the time in steps that count, with τ = `interval` seconds of steps between checkpoints."""
        period = self.stall + max(interval, self.write)
        again = self.restart + interval + self.stall + self.write
        if again > 700 * self.mtbf:  # e^709 is the largest float
            return 0.0
        return interval / (-self.mtbf * expm1(-period / self.mtbf) * exp(again / self.mtbf))

    def best_interval(self) -> float:
        """Seconds of steps between checkpoints for the highest goodput; at least those that writing takes.

        Daly's formula, whose leading term is Young's sqrt(2 δ M) (1974, doi 10.1145/361147.361115).
        """
        x = self.stall / (2 * self.mtbf)
        if x >= 1:
            return max(self.mtbf, self.write)
        daly = sqrt(2 * self.stall * self.mtbf) * (1 + sqrt(x) / 3 + x / 9) - self.stall
        return max(daly, self.write)

    def lost(self, interval: float) -> Lost:
        """What the time outside goodput goes into. Workers restart for a share 1 - e^(-R/M) of the time."""
        goodput = self.goodput(interval)
        checkpoints = goodput * (self.stall + max(0.0, self.write - interval)) / interval
        restarts = -expm1(-self.restart / self.mtbf)
        return Lost(checkpoints, 1 - goodput - checkpoints - restarts, restarts)


def best_steps(forecast: Forecast, step_s: float, multiple: int = 0) -> int:
    """Steps between checkpoints for the highest goodput: of two digits, or a divisor of `multiple` if that is not 0."""
    wanted = max(1.0, forecast.best_interval() / step_s)
    if multiple:
        choices = [n for n in range(1, multiple + 1) if multiple % n == 0]
        return max(choices, key=lambda n: forecast.goodput(n * step_s))
    return max(1, int(float(f"{wanted:.2g}")))
