"""One file is one source however its name is spelt; similar names are hints."""

import os
from pathlib import Path
from unicodedata import normalize

import pytest

from data_prep import sources
from data_prep.sources import SourceRow, row_id
from sora_train.data.config import DataConfig
from sora_train.data.shards import is_held_out


def read_rows(data: DataConfig) -> list[SourceRow]:
    return list(sources.read_rows(data))


def rows_of(folder: Path, *names: str, root: str = ""):
    lines = [f"{name},caption {i}" for i, name in enumerate(names)]
    (folder / "captions.csv").write_text("\n".join(["video_file_name,prompt", *lines]))
    return read_rows(DataConfig(captions=str(folder / "captions.csv"), root=root))


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def test_all_spellings_of_a_file_are_one_source(tmp_path: Path):
    put(tmp_path, "in/a.mp4")
    (tmp_path / "link.mp4").symlink_to("in/a.mp4")
    os.link(tmp_path / "in" / "a.mp4", tmp_path / "hard.mp4")
    names = ("in/a.mp4", "./in/a.mp4", "in//a.mp4", "in/x/../a.mp4", "link.mp4", "hard.mp4", f"{tmp_path}/in/a.mp4")
    rows = rows_of(tmp_path, *names, f"{tmp_path}//in/./a.mp4", (tmp_path / "in" / "a.mp4").as_uri())
    assert [row.reason for row in rows] == [""] * 9
    assert {row.source for row in rows} == {"in/a.mp4"}
    assert {is_held_out(row.source, 0.5) for row in rows} == {is_held_out("in/a.mp4", 0.5)}
    assert rows[4].row_id == row_id("in/a.mp4", ("caption 4",))


def test_two_spellings_with_one_caption_are_a_duplicate_row(tmp_path: Path):
    put(tmp_path, "a.mp4")
    (tmp_path / "c.csv").write_text(f"video_file_name,prompt\na.mp4,x\n./a.mp4,x\n{tmp_path}/a.mp4,x\na.mp4,y\n")
    rows = read_rows(DataConfig(captions=str(tmp_path / "c.csv")))
    assert [row.reason for row in rows] == ["", "duplicate_row", "duplicate_row", ""]
    assert "line 3 repeats line 2" in rows[1].message


def test_equal_files_of_their_own_stay_apart(tmp_path: Path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"same")
        os.utime(tmp_path / name, ns=(1, 1))
    assert [row.source for row in rows_of(tmp_path, "a.mp4", "b.mp4")] == ["a.mp4", "b.mp4"]


def test_absolute_names_may_go_through_a_linked_root(tmp_path: Path):
    put(tmp_path, "real/a.mp4")
    (tmp_path / "linked").symlink_to("real")
    names = (f"{tmp_path}/linked/a.mp4", f"{tmp_path}/real/a.mp4")
    rows = rows_of(tmp_path, *names, f"{tmp_path}/realm/a.mp4", root=str(tmp_path / "linked"))
    assert [(row.source, row.reason) for row in rows[:2]] == [("a.mp4", "")] * 2
    assert rows[2].reason == "outside_root"


@pytest.mark.parametrize(("on_disk", "in_captions"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_name_in_another_normal_form_is_found(tmp_path: Path, on_disk: str, in_captions: str):
    name = "été/ガギ/café.mp4"
    put(tmp_path, normalize(on_disk, name))
    (row,) = rows_of(tmp_path, normalize(in_captions, name))
    assert (row.reason, row.path) == ("", f"{tmp_path}/{normalize(on_disk, name)}")
    assert row.source == normalize(in_captions, name)  # ids are of the name as captions have it
    rows = rows_of(tmp_path, normalize("NFC", name), normalize("NFD", name))
    assert len({row.source for row in rows}) == 1


@pytest.mark.parametrize(
    ("on_disk", "in_captions", "hint"),
    [
        ("E.MP4", "e.mp4", "there is 'E.MP4'"),
        ("Videos/a.mp4", "videos/a.mp4", "there is 'Videos'"),
        ("my clip.mp4", "my%20clip.mp4", "there is 'my clip.mp4'"),
        ("my%20clip.mp4", "my clip.mp4", "there is 'my%20clip.mp4'"),
        ("a.mp4 ", "a.mp4", "there is 'a.mp4 '"),
        ("sub/a.mp4", "sub\\a.mp4", "write / between folders"),
    ],
)
def test_a_similar_name_is_a_hint(tmp_path: Path, on_disk: str, in_captions: str, hint: str):
    put(tmp_path, on_disk)
    (row,) = rows_of(tmp_path, in_captions)
    assert row.reason == "missing_file"
    assert hint in row.message


def test_a_link_below_the_root_is_followed_out_of_it(tmp_path: Path):
    put(tmp_path, "elsewhere/a.mp4", "root/own.mp4")
    (tmp_path / "root" / "a.mp4").symlink_to(tmp_path / "elsewhere" / "a.mp4")  # as folders of a hub's cache are
    (row,) = rows_of(tmp_path, "a.mp4", root=str(tmp_path / "root"))
    assert (row.source, row.reason, row.path) == ("a.mp4", "", f"{tmp_path}/root/a.mp4")


def test_media_and_text_may_differ_in_normal_form(tmp_path: Path):
    put(tmp_path, normalize("NFD", "m/café.mp4"))
    (tmp_path / "m" / normalize("NFC", "café.txt")).write_text("of a café")
    (row,) = read_rows(DataConfig(captions=str(tmp_path / "m")))
    assert row.captions == ("of a café",)


def test_two_texts_of_one_file_are_refused(tmp_path: Path):
    put(tmp_path, "m/a.mp4", "m/a.txt", "m/a.TXT")
    (row,) = read_rows(DataConfig(captions=str(tmp_path / "m")))
    assert (row.reason, row.message) == ("no_caption", "a.TXT and a.txt are both next to it; remove one")
