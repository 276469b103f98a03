"""Ends an execution of Ray Data at once: its actors, and the threads of this process that use Ray."""

from __future__ import annotations

from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from sora_train.errors import error_line
from sora_train.log import log


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
        try:
            executor.shutdown(force=True)
        except Exception as error:  # must not hide why the execution is ended
            log.debug(f"prep: Ray Data's executor did not end cleanly: {error_line(error)}")
