"""What `ray job submit --working-dir .` takes along, and what its jobs do on a real head node."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, create_package

from sora_train.launch.signals import RAY_JOB_VARIABLE, STOP_WAIT_VARIABLE, warn_if_stop_wait_short
from tests.cluster.world import lacking, run_inside

ROOT = Path(__file__).parents[2]


def package(checkout: Path, target: Path) -> list[str]:
    """Names in the package that Ray makes of a checkout, by the call and the excludes of `ray job submit`."""
    create_package(str(checkout), target, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(target) as archive:
        return archive.namelist()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What is in this checkout's repository, and what is new and not ignored, in a folder of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            place = tmp_path / "checkout" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes((ROOT / name).read_bytes())
    return tmp_path / "checkout"


def test_only_the_code_is_submitted_even_from_a_dirty_checkout(checkout: Path, tmp_path: Path):
    clean = set(package(checkout, tmp_path / "clean.zip"))
    for needed in ("sora_train/cli.py", "data_prep/pipeline.py", "jobs/quickstart.yaml", "jobs/latte_xl_256.yaml"):
        assert needed in clean
    assert any(name.startswith("sora_train/codec/builtin/") and name.endswith(".safetensors") for name in clean)

    dirt = {
        "runs/big/checkpoints/part.safetensors": 1 << 30,
        "shards/bucket=16x256x256/part.parquet": 1 << 30,
        "my_videos/a.mp4": 1 << 30,
        "holiday.mov": 1 << 30,
        "wandb/offline-run/run.wandb": 1 << 20,
        ".git/objects/pack/pack.pack": 1 << 30,
        ".venv/lib/torch.so": 1 << 30,
        "sora_train/__pycache__/cli.cpython-311.pyc": 1 << 20,
        "models/owner--name/model.safetensors": 1 << 30,
        ".env": 10,
        ".netrc": 10,
        "auth_token": 10,
        "cluster/key.pem": 10,
    }
    for name, size in dirt.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        with (checkout / name).open("wb") as file:
            file.truncate(size)  # sparse: takes no room
    (checkout / "jobs/mine.yaml").write_text("name: mine\n")
    dirty = set(package(checkout, tmp_path / "dirty.zip"))
    assert dirty - clean == {"jobs/mine.yaml"}
    assert clean <= dirty
    assert (tmp_path / "dirty.zip").stat().st_size < GCS_STORAGE_MAX_SIZE / 20


def test_without_the_ignore_files_the_dirt_would_travel(checkout: Path, tmp_path: Path):
    """So that the test above can fail."""
    for name in (".gitignore", ".rayignore"):
        (checkout / name).unlink()
    (checkout / "runs").mkdir()
    (checkout / "runs/metrics.jsonl").write_text("{}")
    assert "runs/metrics.jsonl" in package(checkout, tmp_path / "all.zip")


@pytest.mark.parametrize(
    ("environment", "warns"),
    [({}, False), ({RAY_JOB_VARIABLE: "{}"}, True), ({RAY_JOB_VARIABLE: "{}", STOP_WAIT_VARIABLE: "300"}, False),
     ({RAY_JOB_VARIABLE: "{}", STOP_WAIT_VARIABLE: "5"}, True), ({STOP_WAIT_VARIABLE: "5"}, False)],
)  # fmt: skip
def test_a_run_says_where_a_stop_would_leave_it_too_little_time(
    environment: dict[str, str], warns: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in (RAY_JOB_VARIABLE, STOP_WAIT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    warn_if_stop_wait_short()
    assert ("RAY_JOB_STOP_WAIT_TIME_S=300" in capsys.readouterr().out) == warns


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_jobs_are_submitted_stopped_and_resumed(
    tmp_path_factory: pytest.TempPathFactory,
):
    if why := lacking():
        pytest.skip(why)
    said = run_inside("tests.cluster.job_drill", tmp_path_factory.mktemp("j"), timeout_s=1100)
    assert said.splitlines()[-1] == "three seconds are warned of", said
