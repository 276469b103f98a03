"""All that is taken from Ray's private modules (ray 2.60). `tests/launch/test_private_ray.py` fails when it moves."""

from __future__ import annotations

from typing import Any

from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.context import get_train_context


class Trainer(TorchTrainer):
    """Leaves Ctrl-C to this process's own handler: Ray's ends the workers without a checkpoint."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def start_autoscaling_coordinator() -> None:
    """Starts the actor that Train's controller waits for first, so that both start at the same time."""
    get_or_create_autoscaling_coordinator()


def preemption_info() -> Any:
    """What this worker was told of nodes that are about to be taken away, or None.

    The public `ray.train.get_preemption_info` hands this on through an actor, to which every worker has to come: where
    a network fails for seconds an answer is lost, and that worker waits for ever.
    """
    return get_train_context().preemption_context.preemption_info
