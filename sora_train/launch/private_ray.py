"""Uses of Ray's private modules (ray 2.60), except one in `ray_cluster/local_ray.py`.

`tests/launch/test_private_ray.py` and `test_stops.py` fail when they change.
"""

from __future__ import annotations

from typing import Any

from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor
from ray.train.v2._internal.execution.context import get_train_context

MOST_WORKERS = 100_000
"""Workers that may report at a time."""


class Trainer(TorchTrainer):
    """Leaves Ctrl-C to our `SignalHandler`: Ray's handler ends the workers without a checkpoint."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def start_autoscaling_coordinator() -> None:
    """Starts the actor that Ray Train's controller waits for, so both start at the same time."""
    get_or_create_autoscaling_coordinator()


def allow_many_workers() -> None:
    """Lets more than 1,000 workers report. Has an effect in the process of Ray Train's controller.

    Every worker waits in a call of one actor until all have called it, and by default an actor runs 1,000 calls at a
    time: with more workers none would ever return.
    """
    SynchronizationActor._default_options["max_concurrency"] = MOST_WORKERS  # type: ignore[attr-defined]


def preemption_info() -> Any:
    """What Ray told this worker about nodes to be preempted, or None.

    The public `ray.train.get_preemption_info` synchronises all workers through an actor. If an answer is lost in a
    short network failure, that worker waits for ever.
    """
    return get_train_context().preemption_context.preemption_info
