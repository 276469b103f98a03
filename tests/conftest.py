"""What several tests share."""

import functools
import gc
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import hypothesis
import pytest

hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")


@functools.cache
def uses_ray(file: Path) -> bool:
    """Whether a file of tests starts Ray, here or in processes of its own."""
    return "pytest.mark.ray" in file.read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `make test`: the files with Ray go to one process, since two Rays would compete, the others to any."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneProcessForRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:  # as xdist's manual has it
            file = super()._split_scope(nodeid)
            return "ray" if uses_ray(config.rootpath / file) else file

    return OneProcessForRay(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes, the files with Ray begin: no other group takes as long."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not uses_ray(item.path))


def pytest_collection_finish() -> None:
    """Garbage collection skips what the imports made. With Ray and torch loaded a full one takes 0.4 s, and the video
    readers ask for many; the decoder's process does the same (decode_process.py)."""
    gc.collect()
    gc.freeze()


class OneRay:
    """The local Ray of this test process. It stays up while tests ask for the same one, so tests pass in any order."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.patch = pytest.MonkeyPatch()

    def start(self, environment: dict[str, str], **options: Any) -> None:
        """Starts Ray with `options` of `ray.init` and `environment` for its processes, unless it runs already."""
        import ray

        asked = deepcopy({"environment": environment, **options})  # Ray changes what it is given
        if ray.is_initialized() and asked == self.asked:
            return
        self.stop()
        for name, value in environment.items():
            self.patch.setenv(name, value)
        ray.init(address="local", include_dashboard=False, log_to_driver=False, **options)
        self.asked = asked

    def stop(self) -> None:
        """Stops it and takes its environment back."""
        import ray

        self.patch.undo()
        self.asked = {}
        ray.shutdown()


@pytest.fixture(scope="session")
def one_ray() -> Iterator[OneRay]:
    ray = OneRay()
    yield ray
    ray.stop()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real clips and reference models that lies beside a checkout; a test that needs it skips without."""
    folder = (Path(__file__).parents[1] / ".." / "shared").resolve()
    if not folder.is_dir():
        pytest.skip("no ../shared beside this checkout: its real clips and reference models are needed")
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3-compatible server on loopback."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket as `s3://NAME`, by environment variables, which processes started later inherit."""
    from pyarrow import fs

    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"clips-{uuid.uuid4().hex[:12]}"
    fs.S3FileSystem(endpoint_override=s3_server, allow_bucket_creation=True).create_dir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def write_noise_shards() -> Callable[..., Path]:
    """Writes shards of clips of noise, made without a VAE."""
    import base64

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sora_train import manifest, schema

    def write(
        folder: Path,
        caption_tokens: list[int],
        text_width: int,
        size: tuple[int, int, int] = (2, 4, 4),
        images: int = 0,
    ) -> Path:
        """A clip of noise of f h w latents for each number of caption tokens; the first ones are `images`."""
        rng, (f, h, w) = np.random.default_rng(0), size
        names = [f"{1 if i < images else f}x{8 * h}x{8 * w}" for i in range(len(caption_tokens))]
        rows = [
            schema.encode_row(
                sample_id=f"{i:04x}",
                source=f"{i}.mp4",
                source_size=1,
                source_version="1",
                content_hash="",
                start_s=0.0,
                end_s=0.25,
                captions=[f"clip {i}"],
                latents=rng.standard_normal((1, 1 if i < images else f, 4, h, w)),
                text=[rng.standard_normal((tokens, text_width))],
            )
            for i, tokens in enumerate(caption_tokens)
        ]
        for bucket in {*names}:
            (folder / f"bucket={bucket}").mkdir()
            table = pa.Table.from_pylist(
                [row for row, name in zip(rows, names, strict=True) if name == bucket], schema=schema.SHARD_SCHEMA
            )
            pq.write_table(table, folder / f"bucket={bucket}/part.parquet", row_group_size=8)
        manifest.Manifest(
            encoding_hash="tiny",
            vae=manifest.VaeFacts(name="none", hash="none", channels=4, factor=8, mean=(0.0,) * 4, std=(1.0,) * 4),
            text=manifest.TextFacts(name="none", hash="none", width=text_width, max_tokens=max(caption_tokens)),
            latents=manifest.LatentFormat(moments=1),
            frames=f,
            fps=8.0,
            height=8 * h,
            width=8 * w,
            buckets=dict(Counter(names)),
            empty_text=base64.b64encode(np.zeros((1, text_width), np.float16).tobytes()).decode(),
            empty_tokens=1,
            counts=manifest.Counts(asked=len(rows), written=len(rows), quarantined=0, filtered=0),
            reasons={},
        ).save(str(folder))
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_shards(write_noise_shards: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 21 clips of noise: 2 latent frames of 4 x 4 x 4, captions of 1 to 4 tokens, 64 wide."""
    return write_noise_shards(tmp_path_factory.mktemp("shards"), [1 + i % 4 for i in range(21)], 64)


@pytest.fixture(scope="session")
def make_manifest() -> Callable[..., Any]:
    """make_manifest(vae, encoder, size, buckets): the manifest of shards that these two made, of at most 20 tokens."""
    import base64

    from sora_train.manifest import Counts, LatentFormat, Manifest, TextFacts, VaeFacts

    def make(vae: Any, encoder: Any, size: tuple[int, int, int], buckets: dict[str, int]) -> Manifest:
        empty, clips = encoder.encode([""])[0].half().numpy(), sum(buckets.values())
        mean, std = tuple(vae.mean.tolist()), tuple(vae.std.tolist())
        return Manifest(
            encoding_hash="tiny",
            vae=VaeFacts(name="vae", hash=vae.hash, channels=vae.channels, factor=vae.factor, mean=mean, std=std),
            text=TextFacts(name="builtin", hash=encoder.hash, width=encoder.width, max_tokens=20),
            latents=LatentFormat(moments=2),
            frames=size[0],
            fps=8.0,
            height=size[1],
            width=size[2],
            buckets=buckets,
            empty_text=base64.b64encode(empty.tobytes()).decode(),
            empty_tokens=len(empty),
            counts=Counts(asked=clips, written=clips, quarantined=0, filtered=0),
            reasons={},
        )

    return make
