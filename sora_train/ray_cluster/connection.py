"""Connects to a Ray cluster, or starts one on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from sora_train.errors import UserError
from sora_train.log import log
from sora_train.ray_cluster.local_ray import (
    fixed_address,
    outside_working_dir,
    own_process_groups,
    private_token,
    short_temp_dir,
    temp_dir,
)

WAIT_S, AGAIN_S = 30.0, 60.0
"""A wait for Ray is explained after `WAIT_S`, and again every `AGAIN_S`."""


@contextmanager
def connect(address: str = "auto", min_cpus: int = 1) -> Iterator[bool]:
    """Connects this process to Ray for the length of a `with` block. Yields whether it started a Ray of its own.

    Args:
        address: `auto` joins the cluster of this job (`RAY_ADDRESS`) or of `ray start` on this machine, and starts one
            if there is none; `local` always starts one; anything else is the address to join.
        min_cpus: a cluster started here has one logical CPU per core, but at least these. It ends with the block; a
            joined one is left running. A process that is already connected stays so.

    Raises:
        UserError: the address can't be joined.
    """
    if ray.is_initialized():
        yield False
        return
    key = "cluster.address" if address != "auto" else "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else "auto"
    address = (running_cluster() or "local") if address == "auto" else address
    # Hides the warning that a local cluster has a generated token.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    own = address == "local"
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(outside_working_dir())
            if own:
                # With `local` Ray never joins a cluster that another process left running; `num_cpus` would raise then.
                for setting in (short_temp_dir, private_token, fixed_address, own_process_groups):
                    stack.enter_context(setting())
                cpus, wait = max(os.cpu_count() or 1, min_cpus), "Ray is still starting on this machine"
            else:
                wait_until_reachable(address, key)
                cpus, wait = None, f"Ray at {address} ({key}) answers, but has not accepted this process yet"
            stack.enter_context(explain_wait(wait))
            ray.init(address, num_cpus=cpus, logging_level=logging.WARNING, log_to_driver=False)
        restore_sigterm()
    except UserError:
        raise
    except Exception as error:  # Ray raises plain exceptions, for instance for a node that starts too slowly
        if own:
            raise UserError(
                f"Ray can't start on this machine: {error}. Its logs: {temp_dir()}/ray/session_latest/logs", code="ray"
            ) from error
        # With a wrong token Ray only says that it could not connect.
        raise UserError(
            f"{key}: can't join the Ray cluster at {address}: {error}. Is its token the one of this process? Copy "
            "~/.ray/auth_token of the head node to the same place here (or to RAY_AUTH_TOKEN_PATH) and set "
            f"RAY_AUTH_MODE=token. {local_hint(key)}",
            code="ray",
        ) from error
    try:
        yield own
    finally:
        ray.shutdown()


def restore_sigterm() -> None:
    """Has SIGTERM raise SystemExit, by Ray's handler in Python. Ray then installs one in C++ that prints a stack."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def wait_until_reachable(address: str, key: str) -> None:
    """UserError if nothing listens at a cluster's address for `WAIT_S`. Ray itself would wait for ever."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return
    ends, logged = time.monotonic() + WAIT_S, False
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > ends:
                raise UserError(
                    f"no Ray at {address} ({key}): {error}. Start that cluster. {local_hint(key)}", code="ray"
                ) from None
            if not logged:
                log.info(f"no Ray at {address} ({key}) yet: waiting up to {WAIT_S:.0f} s for it")
                logged = True
            time.sleep(1)


def local_hint(key: str) -> str:
    """How to run without the cluster that `key` gives."""
    unset = "unset RAY_ADDRESS or " if key == "RAY_ADDRESS" else ""
    return f"To run on this machine alone, {unset}give --cluster.address local"


@contextmanager
def explain_wait(what: str) -> Iterator[None]:
    """Logs what a block waits for, if it takes more than `WAIT_S`, and again every `AGAIN_S`."""
    ended, began = threading.Event(), time.monotonic()

    def explain() -> None:
        pause = WAIT_S
        while not ended.wait(pause):
            pause = AGAIN_S
            log.info(f"{what} ({time.monotonic() - began:.0f} s so far; Ctrl-C ends it)")

    thread = threading.Thread(target=explain, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def running_cluster() -> str | None:
    """The address in RAY_ADDRESS, or of the cluster that `ray start` started here, if it still answers."""
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    note = Path(temp_dir()) / "ray" / "ray_current_cluster"
    try:
        address = note.read_text().strip()
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=2).close()
    except (OSError, ValueError):
        return None
    return address


def resources_in_use() -> str:
    """Describes CPUs and GPUs that other jobs use; empty if all are free."""
    total, free = ray.cluster_resources(), ray.available_resources()
    held = {kind: total.get(kind, 0) - free.get(kind, 0) for kind in ("CPU", "GPU")}
    return " and ".join(f"{count:g} of {total[kind]:g} {kind}s" for kind, count in held.items() if count >= 1)


def root_cause(error: BaseException) -> str:
    """The original error inside Ray's wrappers, on one line."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = failures[min(failures)]
    cause = getattr(error, "cause", None) or getattr(error, "health_check_failure", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    text = lines[-1] if lines and lines[0].startswith("Traceback") else " ".join(lines[:3])
    return text if isinstance(cause, UserError) else f"{type(cause).__name__}: {text}"[:500]
