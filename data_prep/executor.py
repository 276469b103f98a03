"""Ends an execution of Ray Data at once: its actors, and the threads of this process that use Ray."""

from __future__ import annotations

import contextlib

from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor


class CurrentExecutor(ExecutionCallback):
    """Keeps the executor of the latest dataset. Ray Data itself gives it only once there is output."""

    value: StreamingExecutor | None = None

    def before_execution_starts(self, executor: StreamingExecutor) -> None:
        CurrentExecutor.value = executor


def record_executor() -> None:
    """Lets `end_execution` end the datasets that are executed from now on."""
    DataContext.get_current().custom_execution_callback_classes = [CurrentExecutor]


def end_execution() -> None:
    """Kills the actors of the latest dataset, those that hang too, and ends its thread. Its output then ends."""
    executor, CurrentExecutor.value = CurrentExecutor.value, None
    if executor is not None:
        with contextlib.suppress(Exception):  # an error while it ends must not hide why it ends
            executor.shutdown(force=True)
