"""Fixtures of the launch tests: a local Ray, started once, and a small recipe."""

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from sora_train.codec.text import load_text_encoder
from sora_train.codec.vae import load_vae
from sora_train.manifest import Manifest, TextFacts, VaeFacts
from sora_train.ray_cluster.local_ray import fixed_address
from sora_train.recipe import Recipe
from sora_train.settings import build


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="session")
def start_local_ray(one_ray) -> Callable[[], None]:
    """Starts a Ray of 4 logical CPUs, whose processes run one thread each and whose validations take 5 s more."""
    # A Ray without a dashboard assumes one at port 8265. Another Ray of this machine there would answer Train's
    # cleanup process that it knows no such controller, and the workers would be killed.
    dashboard_port = free_port()

    def start() -> None:
        with fixed_address():
            one_ray.start(
                {
                    "OMP_NUM_THREADS": "1",
                    "SORA_VALIDATION_DELAY_S": "5",
                    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
                },
                num_cpus=4,
                dashboard_port=dashboard_port,
                _system_config={"metrics_report_interval_ms": 1000},
            )

    return start


@pytest.fixture
def local_ray(start_local_ray: Callable[[], None]) -> None:
    """Ray as `start_local_ray` starts it."""
    start_local_ray()


@pytest.fixture(scope="session")
def builtin_shards(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny shards with a manifest of the builtin networks, so samples can be decoded."""
    folder = tmp_path_factory.mktemp("builtin") / "shards"
    shutil.copytree(tiny_shards, folder)
    vae, text = load_vae("builtin"), load_text_encoder("builtin", 4)
    Manifest.load(str(folder)).model_copy(
        update={
            "vae": VaeFacts(
                name="builtin",
                hash=vae.hash,
                channels=4,
                factor=8,
                mean=tuple(vae.mean.tolist()),
                std=tuple(vae.std.tolist()),
            ),
            "text": TextFacts(name="builtin", hash=text.hash, width=text.width, max_tokens=4),
        }
    ).save(str(folder))
    return folder


def tiny_recipe(shards: Path, output: Path, **changes: object) -> Recipe:
    """A model of width 16 on two workers; `changes` are keys with `__` for the dot."""
    settings = {
        "name": "tiny",
        "data.output": str(shards),
        "data.frames": 2,
        "data.height": 32,
        "data.width": 32,
        "model.width": 16,
        "model.depth": 2,
        "model.heads": 2,
        "model.text_width": 64,
        "model.sample_size": 4,
        "train.output": str(output),
        "train.steps": 12,
        "train.batch_size": 4,
        "train.micro_batch_size": 2,
        "train.log_every": 1,
        "train.checkpoint_every": 4,
        "cluster.workers": 2,
    }
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return build(Recipe, {}, settings | changed, "tiny")


@pytest.fixture(scope="session")
def recipe_of():
    return tiny_recipe
