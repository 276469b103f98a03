"""Settings for a Ray started on this machine: temporary folder, address, token, process groups."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import ray
from ray._private import services

import sora_train
from sora_train.errors import UserError
from sora_train.log import log

SOCKETS = "ray/session_2026-11-27_03-57-09_123456_4194304/sockets/dash_TaskEventsHead"
"""The longest socket path that Ray creates in its temporary folder."""
SOCKET_BYTES = 107
"""The longest socket path that Linux allows."""


@contextmanager
def outside_working_dir() -> Iterator[None]:
    """Changes into the folder that this package was imported from.

    Ray puts the driver's working folder first on `sys.path` of every worker, where a `random.py` would be imported. A
    job submitted with `ray job submit --working-dir` has that folder in any case.
    """
    before = os.getcwd()
    os.chdir(Path(sora_train.__file__).parents[1])
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def own_process_groups() -> Iterator[None]:
    """Ray's processes that are started in the block leave this command's process group.

    A closed terminal and `timeout` send their signal to the whole group, which would end Ray before a checkpoint is
    saved. Ray has no setting for it, so its class for processes is replaced (ray 2.60).
    """
    before = services.ConsolePopen
    services.ConsolePopen = partial(before, process_group=0)  # type: ignore[assignment]
    try:
        yield
    finally:
        services.ConsolePopen = before


@contextmanager
def fixed_address() -> Iterator[None]:
    """Sets the address of a Ray started in the block for all its processes.

    Otherwise Ray Train's cleanup process asks another cluster of `ray start` on this machine whether the controller is
    alive; that cluster does not know it, and the process kills the workers.
    """
    port = free_port()
    with env_vars(
        RAY_GCS_SERVER_PORT=str(port), RAY_ADDRESS=f"{ray.util.get_node_ip_address()}:{port}", PYTHONSAFEPATH="1"
    ):
        yield


def free_port() -> int:
    """A free port outside the ephemeral range, so the system gives it to no other process meanwhile."""
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
        ports = [port for port in random.sample(range(10_000, 32_000), 50) if port < int(text.split()[0])]
    except (OSError, ValueError):
        ports = []
    for port in (*ports, 0):
        with contextlib.suppress(OSError), socket.create_server(("", port)) as free:
            return free.getsockname()[1]
    raise UserError("this machine has no free TCP port for Ray. Stop processes that hold many", code="ray")


@contextmanager
def short_temp_dir() -> Iterator[None]:
    """Gives Ray a temporary folder with a path short enough for its sockets. UserError if there is none."""
    place = temp_dir()
    if len(os.fsencode(os.path.join(place, SOCKETS))) <= SOCKET_BYTES:
        yield
        return
    key = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    why = f"{key} {place} is too long for Ray's sockets, whose paths may have {SOCKET_BYTES} bytes"
    if key == "RAY_TMPDIR" or not os.access("/tmp", os.W_OK):
        raise UserError(f"{why}. Set RAY_TMPDIR to a short folder of this machine, such as /tmp", code="ray")
    log.info(f"{why}: Ray keeps its files in /tmp/ray instead (RAY_TMPDIR names another folder)")
    with env_vars(RAY_TMPDIR="/tmp"):
        yield


@contextmanager
def private_token() -> Iterator[None]:
    """Gives Ray a token for this run if it can't be stored in the home folder."""
    home = Path(os.path.expanduser("~/.ray"))
    asked = any(name.startswith("RAY_AUTH_") for name in os.environ) or (home / "auth_token").is_file()
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except OSError:
        if not asked:
            with env_vars(RAY_AUTH_TOKEN=secrets.token_hex(32)):  # Ray uses a token if one is set
                yield
            return
    yield


@contextmanager
def env_vars(**values: str) -> Iterator[None]:
    """Sets environment variables for the length of a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def temp_dir() -> str:
    """The folder of Ray's `ray` folder (ray 2.60, `get_default_system_temp_dir`)."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
