"""Places, local: what is remote is tested in data_prep/test_s3.py."""

from pathlib import Path

import pytest
from pyarrow import fs

from sora_train.errors import UserError
from sora_train.places import in_bytes, lasting, read_bytes, resolve, write_whole


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
        write_whole(system, path, content)
        assert Path(path).read_bytes() == content  # not packed, whatever its name
    assert [file.name for file in Path(path).parent.iterdir()] == ["file.gz"]


def test_a_file_that_can_not_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=f"{tmp_path}/file/inner/x can't be written"):
        write_whole(fs.LocalFileSystem(), f"{tmp_path}/file/inner/x", b"content")


def test_sizes_are_said_as_people_say_them():
    assert [in_bytes(size) for size in (0, 999, 999.6, 1_500_000, 2e12)] == ["0 B", "999 B", "1 kB", "1.5 MB", "2 TB"]


def test_in_a_submitted_job_only_places_that_last_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lasting("data.output", "runs/x/shards")
    (job := tmp_path / "working_dir_files" / "_ray_pkg_0").mkdir(parents=True)
    monkeypatch.chdir(job)
    for place in ("/shared/shards", "s3://bucket/shards", "~/shards"):
        lasting("data.output", place)
    with pytest.raises(UserError, match=r"data\.output is runs/x/shards, .*such as --data\.output /shared/shards"):
        lasting("data.output", "runs/x/shards")
