"""A little cluster of machines: network namespaces on a bridge, each with an address, a name, processes, and a disk.

Made inside a world of its own (world.py), and gone with it. What a node shares with the others is the folder `SHARED`,
which stands for the network file system; its own disk, a file system of its own in memory, is at `DISK`.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MOUNTS = Path("/mnt")
SHARED, DISK = MOUNTS / "shared", MOUNTS / "disk"
NETWORK, GATEWAY = "10.9.1", "10.9.1.254"
DISK_BYTES = 700 * 2**20


@dataclass(frozen=True)
class Node:
    """A machine. `init` is its first process, with which all others of it end."""

    number: int
    init: int
    home: Path

    @property
    def name(self) -> str:
        return f"node{self.number}"

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number}"

    def inside(self, line: str) -> list[str]:
        """The command that runs a line of bash on this node."""
        # `-i` leaves Ray's own variables of whoever runs this behind: a node knows what is typed on it.
        environment = [
            f"HOME={self.home}", f"PATH={os.environ['PATH']}", f"TMPDIR={DISK}/tmp", f"RAY_TMPDIR={DISK}",
            "LANG=C.UTF-8", "OMP_NUM_THREADS=1", "PYTHONDONTWRITEBYTECODE=1", "RAY_USAGE_STATS_ENABLED=0",
        ]  # fmt: skip
        # Ray's own would starve its workers where others use the machine.
        environment += [f"{key}={value}" for key, value in os.environ.items() if key == "RAY_worker_niceness"]
        into = ["nsenter", "-t", str(self.init), "--pid", "--net", "--uts", "--mount"]
        return [*into, "env", "-i", *environment, "bash", "-c", line]

    def run(self, line: str, cwd: Path, check: bool = True) -> str:
        """Runs a line of bash on the node; returns all that it said, AssertionError where it failed."""
        moved = f"cd {cwd} && {line}"
        done = subprocess.run(self.inside(moved), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0 or not check, f"{self.name}$ {line}\n{done.stdout[-5000:]}"
        return done.stdout

    def start(self, line: str, cwd: Path, log: Path) -> subprocess.Popen:
        """Runs a line of bash on the node in the background; what it says goes into `log`."""
        with log.open("wb") as file:
            return subprocess.Popen(self.inside(f"cd {cwd} && {line}"), stdout=file, stderr=subprocess.STDOUT)

    def processes(self) -> Iterator[tuple[psutil.Process, str]]:
        """What runs on the node, each with its command line."""
        own = namespace(self.init)
        for process in psutil.process_iter():
            try:
                if namespace(process.pid) == own:
                    yield process, " ".join(process.cmdline()).strip()
            except (OSError, psutil.Error):  # it ended meanwhile
                continue

    def at(self, path: Path) -> Path:
        """A path of this node as others see it."""
        return Path(f"/proc/{self.init}/root{path}")

    def link(self, state: str) -> None:
        """Pulls the node's network cable, `down`, or puts it in again, `up`."""
        sh(f"ip link set veth{self.number} {state}")

    def fill_disk(self) -> None:
        """Writes a file that takes what the node's disk has left."""
        with self.at(DISK / "filler").open("wb") as file:
            try:
                while True:
                    file.write(b"\0" * 2**20)
                    file.flush()
            except OSError:
                pass  # full

    def free_disk(self) -> None:
        self.at(DISK / "filler").unlink(missing_ok=True)

    def power_off(self) -> None:
        """Ends the node and everything on it at once."""
        psutil.Process(self.init).kill()


def prepare(folder: Path) -> None:
    """Lays the bridge and the shared folder, which is `folder/shared`. Once a world."""
    (folder / "shared").mkdir()
    hosts = folder / "hosts"
    names = "\n".join(f"{NETWORK}.{i} node{i}" for i in range(1, 100))
    hosts.write_text(f"127.0.0.1 localhost\n{names}\n")
    # A file system in memory, so that the two folders need not be made on the real one.
    sh(f"mount -t tmpfs -o size=1m cluster {MOUNTS} && mkdir {SHARED} {DISK}")
    sh(f"mount --bind {folder}/shared {SHARED} && mount --bind {hosts} /etc/hosts")
    # No name server would answer, and everybody who asks for a name would wait for it.
    (folder / "resolv").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    sh(f"mount --bind {folder}/resolv /etc/resolv.conf")
    sh("ip link set lo up && ip link add br0 type bridge && ip link set br0 up")
    sh(f"ip addr add {GATEWAY}/24 dev br0")


def boot(number: int, folder: Path) -> Node:
    """Starts a machine: nothing runs on it but its first process."""
    home = folder / f"home{number}"
    home.mkdir()
    # The shell stays, as number 1 of the node, since somebody must see to orphans that end.
    ready = folder / f"ready{number}"
    first = (
        f"hostname node{number} && mount -t tmpfs -o size={DISK_BYTES} disk {DISK} && mkdir {DISK}/tmp && "
        f"touch {ready} && sleep infinity; exit 0"
    )
    into = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL"]
    outer = subprocess.Popen([*into, "bash", "-c", first])
    until = time.monotonic() + 20
    while not ready.exists():
        assert time.monotonic() < until, f"node{number} does not start"
        time.sleep(0.05)
    (init,) = psutil.Process(outer.pid).children()
    node = Node(number, init.pid, home)
    sh(f"ip link add veth{number} type veth peer name eth0 netns {init.pid}")
    sh(f"ip link set veth{number} master br0 && ip link set veth{number} up")
    node.run(
        f"ip link set lo up && ip link set eth0 up && ip addr add {node.address}/24 dev eth0 && "
        f"ip route add default via {GATEWAY}", cwd=Path("/"),
    )  # fmt: skip
    return node


def namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/pid")


def sh(line: str) -> None:
    """Runs a line of shell in the world around the nodes; AssertionError where it fails."""
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
