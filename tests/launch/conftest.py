"""What the tests of launching share: Ray, started once, and a recipe small enough for it."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from sora_train.codec.text import load_text_encoder
from sora_train.codec.vae import load_vae
from sora_train.launch.local_ray import known_address
from sora_train.manifest import Manifest, TextFacts, VaeFacts
from sora_train.recipe import Recipe
from sora_train.settings import build


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    """A Ray of 4 logical CPUs. What starts workers inherits one thread each, and a validation that takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("SORA_VALIDATION_DELAY_S", "5")
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        with known_address():
            # A Ray without a dashboard believes that it has one at 8265, where another Ray of this machine may answer
            # Train's cleaner that it knows no such controller: the workers would be ended.
            ray.init(
                address="local",
                num_cpus=4,
                include_dashboard=False,
                dashboard_port=free_port(),
                log_to_driver=False,
                _system_config={"metrics_report_interval_ms": 1000},
            )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def builtin_shards(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny shards with a manifest that says the builtin networks made them, so that samples can be decoded."""
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
    """A model of 16 wide on two workers; `changes` are keys with `__` for the dot."""
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
