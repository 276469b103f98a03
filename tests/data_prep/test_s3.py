"""Captions, files and shards on an S3-compatible server, over HTTP."""

import base64
import csv
import io
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from pyarrow import fs

from data_prep import files, sources
from data_prep.sources import SourceRow
from sora_train.data.config import DataConfig
from sora_train.errors import RecipeError, UserError
from sora_train.manifest import Counts, LatentFormat, Manifest, TextFacts, VaeFacts
from sora_train.schema import shard_files
from sora_train.storage import atomic_write, read_bytes, resolve


def read_rows(data: DataConfig) -> list[SourceRow]:
    return list(sources.read_rows(data))


def put(place: str, content: bytes) -> None:
    system, path = resolve(place)
    atomic_write(system, path, content)


def put_csv(place: str, names: list[str]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([("video_file_name", "prompt"), *((name, f"this is {name}") for name in names)])
    put(place, text.getvalue().encode())


def test_rows_are_found_in_a_bucket_and_missing_ones_are_named(s3: str):
    put(f"{s3}/set/media/a.mp4", b"123")
    put(f"{s3}/set/media/ä b?.mp4".replace("?", "%3F"), b"12345")
    put(f"{s3}/set/media/empty.mp4", b"")
    put_csv(f"{s3}/set/captions.csv", ["a.mp4", "ä b?.mp4", "empty.mp4", "nope.mp4", "../captions.csv", "."])
    for root in (f"{s3}/set/media", f"{s3}/set/media/"):
        rows = read_rows(DataConfig(captions=f"{s3}/set/captions.csv", root=root))
        assert [(row.size, row.reason) for row in rows] == [
            (3, ""),
            (5, ""),
            (0, "empty_file"),
            (0, "missing_file"),
            (0, "outside_root"),
            (0, "missing_file"),
        ]
        assert int(rows[0].version) > 1.6e18
        assert "nope.mp4" in rows[3].message
        assert "folder" in rows[5].message
        system, _ = resolve(s3)
        assert read_bytes(system, rows[1].path) == b"12345"


def test_names_in_a_bucket_may_be_uris_or_another_normal_form(s3: str, monkeypatch: pytest.MonkeyPatch):
    apart = unicodedata.normalize("NFD", "café")
    put(f"{s3}/set/{apart}.mp4", b"123")
    put(f"{s3}/set/b c.mp4", b"12")
    put_csv(f"{s3}/set/c.csv", ["café.mp4", f"{s3}/set/{apart}.mp4", "b%20c.mp4", f"{s3}/other/a.mp4"])
    for above in (100, 0):  # by single requests, and by a listing
        monkeypatch.setattr(files, "LIST_ABOVE", above)
        rows = read_rows(DataConfig(captions=f"{s3}/set/c.csv"))
        assert [(row.source, row.reason) for row in rows] == [
            ("café.mp4", ""),
            ("café.mp4", ""),
            ("b%20c.mp4", "missing_file"),
            (f"{s3}/other/a.mp4", "outside_root"),
        ]
        assert rows[0].path == rows[1].path == f"{s3.removeprefix('s3://')}/set/{apart}.mp4"
        assert "there is 'b c.mp4'" in rows[2].message


def test_the_root_of_captions_in_a_bucket_is_the_bucket(s3: str):
    put(f"{s3}/a.mp4", b"123")
    put_csv(f"{s3}/captions.csv", ["a.mp4"])
    (row,) = read_rows(DataConfig(captions=f"{s3}/captions.csv"))
    assert row.path == f"{s3.removeprefix('s3://')}/a.mp4"
    assert row.size == 3


def test_a_listed_folder_and_single_requests_give_the_same_rows(s3: str, monkeypatch: pytest.MonkeyPatch):
    for i in range(8):
        put(f"{s3}/sub/{i}.mp4", bytes(i))
    put(f"{s3}/sub/deeper/x.mp4", b"x")
    put_csv(f"{s3}/c.csv", [*(f"sub/{i}.mp4" for i in range(10)), "sub/deeper", "sub/deeper/x.mp4", "none/x.mp4"])
    found: list[list[SourceRow]] = []
    for above in (100, 5, 0):
        monkeypatch.setattr(files, "LIST_ABOVE", above)
        found.append(read_rows(DataConfig(captions=f"{s3}/c.csv")))
    assert found[0] == found[1] == found[2]
    reasons = [row.reason for row in found[0]]
    assert reasons == ["empty_file", *[""] * 7, *["missing_file"] * 3, "", "missing_file"]


def test_a_folder_of_media_and_texts_may_lie_in_a_bucket(s3: str, capsys: pytest.CaptureFixture[str]):
    for name, content in {
        "b.mp4": b"x",
        "b.txt": b"of b",
        "in/a.webm": b"xy",
        "in/a.txt": " of ä\n".encode(),
        "c.png": b"x",
        ".hidden/d.mp4": b"x",
        "alone.txt": b"of nothing",
    }.items():
        put(f"{s3}/media/{name}", content)
    rows = read_rows(DataConfig(captions=f"{s3}/media"))
    assert [(row.source, row.captions, row.size, row.reason) for row in rows] == [
        ("b.mp4", ("of b",), 1, ""),
        ("c.png", (), 0, "no_caption"),
        ("in/a.webm", ("of ä",), 2, ""),
    ]
    assert f"{s3}/media: 1 .txt without a video or image, such as alone.txt\n" in capsys.readouterr().out


def test_writing_to_a_bucket_leaves_no_other_files(s3: str):
    system, path = resolve(f"{s3}/new/folder/file")
    assert read_bytes(system, path) is None
    for content in (b"first", b"", b"x" * 20_000_000):  # the last in several parts
        atomic_write(system, path, content)
        assert read_bytes(system, path) == content
    names = [info.path for info in system.get_file_info(fs.FileSelector(path.split("/")[0], recursive=True))]
    assert path in names
    assert not [name for name in names if ".unfinished" in name]


def test_shards_and_their_manifest_may_lie_in_a_bucket(s3: str):
    folder = f"{s3}/out/shards"
    assert shard_files(folder) == []
    for name in ("bucket=2x32x32/part-000001-b.parquet", "bucket=2x32x32/part-000000-a.parquet", "quarantine.parquet"):
        put(f"{folder}/{name}", b"PAR1")
    assert [file.rpartition("/")[2] for file in shard_files(folder)] == [
        "part-000000-a.parquet",
        "part-000001-b.parquet",
    ]
    manifest = Manifest(
        encoding_hash="x",
        vae=VaeFacts(name="none", hash="", channels=4, factor=8, mean=(0.0,), std=(1.0,)),
        text=TextFacts(name="none", hash="", width=4, max_tokens=4),
        latents=LatentFormat(moments=1),
        frames=2,
        fps=8.0,
        height=32,
        width=32,
        buckets={},
        empty_text=base64.b64encode(np.zeros((1, 4), np.float16).tobytes()).decode(),
        empty_tokens=1,
        counts=Counts(asked=0, written=0, quarantined=0, filtered=0),
        reasons={},
    )
    for key in ("one", "another"):
        manifest = manifest.model_copy(update={"encoding_hash": key})
        manifest.save(folder)
        assert Manifest.load(folder) == manifest
    with pytest.raises(UserError, match="no manifest.json in s3://"):
        Manifest.load(f"{s3}/elsewhere")


def test_a_missing_bucket_is_one_message_with_advice(s3: str):
    put_csv(f"{s3}/c.csv", ["a.mp4"])
    with pytest.raises(RecipeError, match="s3://no-such-bucket/c.csv is not a file; .*ACCESS_KEY.*AWS_ENDPOINT_URL"):
        read_rows(DataConfig(captions="s3://no-such-bucket/c.csv"))
    with pytest.raises(RecipeError, match="data.root: there is no folder s3://no-such-bucket/x; .*AWS_ENDPOINT_URL"):
        read_rows(DataConfig(captions=f"{s3}/c.csv", root="s3://no-such-bucket/x"))
    with pytest.raises(UserError, match="s3://no-such-bucket/x can't be written: .*AWS_ACCESS_KEY_ID"):
        put("s3://no-such-bucket/x", b"content")


def test_a_store_that_does_not_answer_is_one_message(s3: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(RecipeError, match="data.captions: s3://.*can't be reached: .*AWS_ENDPOINT_URL.*127.0.0.1:9"):
        read_rows(DataConfig(captions=f"{s3}/c.csv"))


def test_a_query_string_is_refused_with_its_variable(s3: str):
    with pytest.raises(UserError, match="Leave out .endpoint_override=localhost:9000; .* AWS_ENDPOINT_URL"):
        resolve(f"{s3}/x?endpoint_override=localhost:9000")


def test_another_process_reaches_the_bucket_by_the_environment(s3: str):
    put(f"{s3}/x", b"from here")
    code = f"from sora_train.storage import *; print(read_bytes(*resolve('{s3}/x')).decode())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "from here\n"
