"""Joins the Ray cluster that this process belongs to, or starts one here and takes it down again."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from sora_train.errors import UserError


@contextmanager
def connect(
    address: str = "auto", min_cpus: int = 1, dashboard: bool = True, log_to_driver: bool = True
) -> Iterator[bool]:
    """Connects this process to Ray for the length of a `with` block; gives whether it started a Ray of its own.

    `auto` joins the cluster of this job (`RAY_ADDRESS`) or the one that `ray start` runs on this machine, and starts
    one where there is none; `local` always starts one; anything else is the address to join. A cluster started here
    has a logical CPU per core, at least `min_cpus`, and ends with the block; one that was joined is left running, and
    where the process is connected already nothing happens. With `log_to_driver`, what workers print
    appears here. Raises UserError where an address can't be joined.
    """
    if ray.is_initialized():
        yield False
        return
    address = (running_cluster() or "local") if address == "auto" else address
    # Its warning that a cluster of one's own has a password needs nobody's attention.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        if address == "local":
            # Given `local`, Ray never joins what another process left running, which `num_cpus` alone would raise for.
            cpus = max(os.cpu_count() or 1, min_cpus)
            with known_address():
                ray.init(
                    "local",
                    num_cpus=cpus,
                    include_dashboard=dashboard,
                    logging_level=logging.WARNING,
                    log_to_driver=log_to_driver,
                )
        else:
            ray.init(address, logging_level=logging.WARNING, log_to_driver=log_to_driver)
    except Exception as error:  # a node that takes too long to start is no more than that to Ray
        failed = "start Ray here" if address == "local" else f"join the Ray cluster at {address}"
        token = ""
        if address != "local":  # with another token Ray says no more than that it could not connect
            token = (
                "; is it up, and is its token this process's own? That is ~/.ray/auth_token of its head node, here "
                "with RAY_AUTH_MODE=token in ~/.ray/auth_token or where RAY_AUTH_TOKEN_PATH says"
            )
        raise UserError(
            f"cluster.address: can't {failed}: {error}{token}; unset RAY_ADDRESS or set cluster.address to `local` to "
            "run on this machine alone"
        ) from error
    try:
        yield address == "local"
    finally:
        ray.shutdown()


@contextmanager
def known_address() -> Iterator[None]:
    """Lets a Ray that is started in a `with` block, and all its processes, know the address that it will have.

    Without it Train's cleaner, which looks whether the controller is alive, asks the cluster that `ray start` noted on
    this machine; that one knows no such controller, and so the cleaner ends workers that train.
    """
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    names = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def running_cluster() -> str | None:
    """The address in RAY_ADDRESS, else of the cluster that `ray start` noted on this machine, if it still answers."""
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    note = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    try:
        address = note.read_text().strip()
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=2).close()
    except (OSError, ValueError):
        return None
    return address
