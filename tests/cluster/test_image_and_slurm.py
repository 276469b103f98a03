"""cluster/Dockerfile by hadolint, cluster/slurm.sbatch by shellcheck and, with a Ray of its own, for real."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.world import lacking, run_inside

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DOCKERFILE, SBATCH = ROOT / "cluster/Dockerfile", ROOT / "cluster/slurm.sbatch"


def hadolint(text: str) -> list[str]:
    command = [BIN / "hadolint", "--no-color", "--failure-threshold", "style", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert bool(done.returncode) == bool(done.stdout.strip()), done
    return done.stdout.splitlines()


def shellcheck(text: str) -> list[str]:
    command = [BIN / "shellcheck", "--enable=quote-safe-variables", "--format=gcc", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert bool(done.returncode) == bool(done.stdout.strip()), done
    return done.stdout.splitlines()


def test_hadolint_has_nothing_to_say_of_the_image():
    assert hadolint(DOCKERFILE.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("FROM python:3.11.14-slim-bookworm", "FROM python", "DL3006"),
        ("    && rm -rf /var/lib/apt/lists/*", "    && true", "DL3009"),
        ("WORKDIR /home/ray", "WORKDIR home", "DL3000"),
        ('CMD ["bash"]', "CMD bash", "DL3025"),
        ("USER 1000", "USER root", "DL3002"),
    ],
)
def test_hadolint_finds_a_broken_image(old: str, new: str, code: str):
    text = DOCKERFILE.read_text()
    assert old in text
    assert any(code in line for line in hadolint(text.replace(old, new)))


def test_the_image_has_pinned_versions_no_root_and_no_secret():
    text = DOCKERFILE.read_text()
    instructions = [line for line in text.splitlines() if not line.startswith("#")]
    assert all("-c constraints.txt" in line for line in instructions if "pip install" in line)
    assert [line.split()[1] for line in instructions if line.startswith("USER")] == ["1000"]
    assert "RAY_AUTH_MODE=token" in text
    assert {"openssh-client", "rsync"} <= set(text.split())  # by which `ray up` reaches nodes from the head's container
    assert not re.search(r"(KEY|TOKEN|SECRET|PASSWORD)=", text)
    needed = {name.split("/")[0] for line in instructions if line.startswith("COPY") for name in line.split()[1:-1]}
    ignore = (ROOT / "cluster/Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignore  # all is left out that is not asked for
    assert {line[1:] for line in ignore if line.startswith("!")} == needed
    assert all((ROOT / name).exists() for name in needed)


def test_the_image_installs_what_the_project_depends_on():
    """The line of Python in the Dockerfile, run here."""
    import tomllib

    program = re.search(r"python -c '([^']+)'", DOCKERFILE.read_text())
    assert program
    done = subprocess.run([sys.executable, "-c", program[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert done.stdout.splitlines() == project["dependencies"]


def test_shellcheck_has_nothing_to_say_of_the_script():
    assert shellcheck(SBATCH.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ('cd "$SLURM_SUBMIT_DIR"', "cd $SLURM_SUBMIT_DIR", "SC2086"),
        ("stopped=yes", "stopped = yes", "SC2283"),
        ('status=$(cat "$state/status")', 'stats=$(cat "$state/status")', "SC2034"),
        ("trap stop TERM", "trap stop KILL", "SC2173"),
        ("\nfi\necho", "\necho", "SC1"),
    ],
)
def test_shellcheck_finds_a_broken_script(old: str, new: str, code: str):
    text = SBATCH.read_text()
    assert old in text
    assert any(f"[{code}" in line for line in shellcheck(text.replace(old, new)))


def test_slurm_signals_the_script_alone_and_requeues_the_job():
    asked = re.findall(r"^#SBATCH (\S+)", SBATCH.read_text(), flags=re.MULTILINE)
    assert "--signal=B:TERM@300" in asked
    assert "--requeue" in asked
    assert "--open-mode=append" in asked
    assert "--ntasks-per-node=1" in asked


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_script_trains_saves_a_checkpoint_and_requeues(
    tmp_path_factory: pytest.TempPathFactory,
):
    if why := lacking():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("s")
    said = run_inside("tests.cluster.slurm_drill", folder, timeout_s=850)
    assert said.splitlines()[-1] == "no token is left", said
