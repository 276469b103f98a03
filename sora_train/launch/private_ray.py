"""All uses of Ray's private modules (ray 2.60). `tests/launch/test_private_ray.py` fails when they change."""

from __future__ import annotations

from typing import Any

from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.context import get_train_context


class Trainer(TorchTrainer):
    """Leaves Ctrl-C to our `SignalHandler`: Ray's handler ends the workers without a checkpoint."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def start_autoscaling_coordinator() -> None:
    """Starts the actor that Ray Train's controller waits for, so both start at the same time."""
    get_or_create_autoscaling_coordinator()


def preemption_info() -> Any:
    """What Ray told this worker about nodes to be preempted, or None.

    The public `ray.train.get_preemption_info` synchronises all workers through an actor. If an answer is lost in a
    short network failure, that worker waits for ever.
    """
    return get_train_context().preemption_context.preemption_info
