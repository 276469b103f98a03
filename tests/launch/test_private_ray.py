"""Ray's private functions that we use still exist, and Ray still calls them."""

import inspect

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.context import TrainContext

from sora_train.launch.private_ray import Trainer, preemption_info, start_autoscaling_coordinator


def test_ray_still_calls_what_is_overridden():
    assert "self._register_sigint_handler(controller)" in inspect.getsource(TorchTrainer._initialize_and_run_controller)
    ours, theirs = Trainer._register_sigint_handler, TorchTrainer._register_sigint_handler
    assert inspect.signature(ours).parameters.keys() == inspect.signature(theirs).parameters.keys()


def test_a_workers_context_still_knows_of_preemption():
    assert "preemption_context" in inspect.signature(TrainContext).parameters
    assert callable(preemption_info)
    assert callable(start_autoscaling_coordinator)
