"""The `cluster` section of a recipe: where training runs, and on how many workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, field_validator

from sora_train.section import Section


class ClusterConfig(Section):
    """Where training runs."""

    address: str = "auto"
    """Ray cluster: `auto`, `local` or an address.
    `auto` joins the cluster that this machine or job belongs to, if any; otherwise it starts one on this machine, as
    `local` always does."""
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Number of training workers: one per GPU, or processes on CPUs.
    Two numbers (minimum, maximum) make training elastic: it continues with fewer workers when nodes are lost, and with
    more when nodes join."""
    elastic_poll_s: PositiveFloat = 60.0
    """Seconds between checks for new nodes, if `workers` is two numbers."""
    gpu: Literal["auto", "yes", "no"] = "auto"
    """Whether each worker uses a GPU; `auto`: if the cluster has enough GPUs."""
    cpus_per_worker: PositiveInt = 1
    """CPU cores (and threads) of a worker."""
    max_failures: NonNegativeInt = 3
    """Maximum number of restarts from the last checkpoint after lost workers."""
    sequence_parallel: PositiveInt = 1
    """Number of workers that share each clip, for clips that are too long for one GPU.
    Each computes a part of a clip's tokens, so activations take that part of the memory. Batches, losses and gradients
    stay the same. A group of workers belongs on one node, since they exchange tokens in every block."""

    @field_validator("workers", mode="wrap")
    @classmethod
    def is_a_number_or_two(
        cls, given: object, take: Callable[[object], int | tuple[int, int]]
    ) -> int | tuple[int, int]:
        """Merges pydantic's two error messages, one for each form, into one."""
        try:
            return take(given)
        except ValidationError:
            raise ValueError(
                f"cluster.workers is {given!r}; it takes a number of workers, such as 4, or the fewest and the most, "
                "such as [2, 4]"
            ) from None

    @property
    def fewest(self) -> int:
        """Minimum number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """Maximum number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]
