"""Waits for results of Ray, and ends an execution of Ray Data: its actors, and the threads that use Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import ObjectRef
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from data_prep.watchdog import WRITE_TIMEOUT_S, PipelineStalled
from sora_train.errors import UserError, error_line
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


def fetch(task: ObjectRef, what: str) -> Any:
    """A task's result. Raises as `lost_means_stalled`, and PipelineStalled if it does not come."""
    with lost_means_stalled(what):
        try:
            return ray.get(task, timeout=WRITE_TIMEOUT_S)
        except GetTimeoutError:
            raise PipelineStalled(f"{what} did not come for {WRITE_TIMEOUT_S:.0f} s") from None


@contextmanager
def lost_means_stalled(what: str) -> Iterator[None]:
    """Raises UserError and PipelineStalled as a worker did, and PipelineStalled for what Ray has lost.

    That is what was lost with a node or a worker, again and again, or can't be repeated: if a file times out only then,
    Decode may yield another number of blocks, which Ray refuses.
    """
    try:
        yield
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, UserError | PipelineStalled):
            raise cause from None
        if isinstance(cause, RayError):
            raise PipelineStalled(f"{what} was lost: {error_line(cause)}") from None
        raise
