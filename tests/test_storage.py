"""Places, local: what is remote is tested in data_prep/test_s3.py."""

import os
import threading
from pathlib import Path

import pytest
import torch
from pyarrow import fs
from safetensors.torch import save_file

from sora_train.errors import UserError
from sora_train.storage import (
    atomic_file,
    atomic_write,
    follow_umask,
    in_bytes,
    read_bytes,
    reject_job_dir,
    resolve,
    storage_errors,
)


@pytest.mark.parametrize("name", ["ä b.txt", "50%.txt", "a#b.txt", "[1] {2} |^`.txt", "100%41.txt"])
def test_a_uri_may_be_written_as_people_write_names(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"content")
    for place in (str(tmp_path / name), (tmp_path / name).as_uri()):
        assert read_bytes(*resolve(place)) == b"content"
    if "%41" not in name:  # that is an A in a URI
        assert read_bytes(*resolve(f"file://{tmp_path}/{name}")) == b"content"


@pytest.mark.parametrize("place", ["foo://x/y", "s3:///x", "file://host/x", "file:///x?y=1"])
def test_a_place_that_is_none_is_named(place: str):
    with pytest.raises(UserError, match="^" + place.split("?")[0]):
        resolve(place)


def test_a_file_is_overwritten_whole_and_leaves_nothing_beside_it(tmp_path: Path):
    system, path = resolve(str(tmp_path / "new" / "folder" / "file.gz"))
    assert read_bytes(system, path) is None
    for content in (b"first", b"second", b""):
        atomic_write(system, path, content)
        assert Path(path).read_bytes() == content  # not packed, whatever its name
    assert [file.name for file in Path(path).parent.iterdir()] == ["file.gz"]


def test_a_file_that_can_not_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=f"{tmp_path}/file/inner/x can't be written"):
        atomic_write(fs.LocalFileSystem(), f"{tmp_path}/file/inner/x", b"content")


def test_sizes_are_said_as_people_say_them():
    assert [in_bytes(size) for size in (0, 999, 999.6, 1_500_000, 2e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.5 MB",
        "2 TB",
    ]


def test_in_a_submitted_job_only_places_that_last_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reject_job_dir("data.output", "runs/x/shards")
    (job := tmp_path / "working_dir_files" / "_ray_pkg_0").mkdir(parents=True)
    monkeypatch.chdir(job)
    for place in ("/shared/shards", "s3://bucket/shards", "~/shards"):
        reject_job_dir("data.output", place)
    with pytest.raises(UserError, match=r"data\.output is runs/x/shards, .*such as --data\.output /shared/shards"):
        reject_job_dir("data.output", "runs/x/shards")


@pytest.fixture(params=[0o022, 0o027, 0o002])
def mode(request: pytest.FixtureRequest):
    """The mode of new files under a umask."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def test_a_replaced_file_has_the_mode_of_any_new_file(tmp_path: Path, mode: int):
    path = tmp_path / "weights.safetensors"
    with atomic_file(path) as draft:
        save_file({"w": torch.zeros(2)}, draft)  # makes its file for the owner alone
    assert path.stat().st_mode & 0o777 == mode
    (tmp_path / "vae").mkdir()
    save_file({"w": torch.zeros(2)}, tmp_path / "vae/weights.safetensors")
    follow_umask(tmp_path)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.rglob("*") if file.is_file()} == {mode}


def test_a_failed_replacement_keeps_the_file_before_it(tmp_path: Path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(ValueError, match="surrogates"), atomic_file(tmp_path / "file") as draft:
        draft.write_text("half\ud800")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "before")]


def test_writers_of_one_file_never_share_a_draft(tmp_path: Path):
    def write(letter: str) -> None:
        for _ in range(50):
            with atomic_file(tmp_path / "file") as draft:
                draft.write_text(letter * 1000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "file").exists():
            assert (tmp_path / "file").read_text() in {letter * 1000 for letter in "abc"}
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_messages_never_show_a_password(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://user:s3cret@minio.example:9000/?key=s3cret")
    with pytest.raises(UserError) as caught, storage_errors("s3://key:s3cret@bucket/x", "reached"):
        raise OSError("no s3://key:s3cret@bucket/x")
    assert "s3cret" not in str(caught.value)
    assert "is https://minio.example:9000" in str(caught.value)
    assert "s3://bucket/x can't be reached: no s3://bucket/x" in str(caught.value)
