"""The page of `sora inspect --html` shows what is in the shards, holds all of it, and believes nothing it shows."""

import base64
import io
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pyarrow import fs

from data_prep.buckets import Bucket
from data_prep.inspect.page import check_page, write_page
from data_prep.video.clips import ClipSpan
from data_prep.video.decode_process import Decoder
from sora_train import cli, manifest, schema
from sora_train.codec.vae import Vae, load_vae
from sora_train.data.config import DataConfig, SelectionConfig
from sora_train.errors import UserError
from sora_train.storage import resolve
from sora_train.video import write_mp4

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FPS, SHAPES = 10.0, ("4x64x128", "1x64x64")
SOURCES = ("a.mp4", "<img src=x onerror=alert(1)>.mp4")
HOSTILE = "</p><script>alert(1)</script>{{ 7*7 }} \u202e 'quoted\" & \x1b[31m " + "long " * 2000
DATA = DataConfig(fps=FPS, buckets=SHAPES, crop="random", flip=True)


class Page(HTMLParser):
    """Tags, addresses and text of a page; fails on tags that close what was not opened."""

    void = {"meta", "img"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.html = html
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def vae() -> Vae:
    return load_vae("builtin")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of a second, in which something walks from left to right, and a picture."""
    folder = tmp_path_factory.mktemp("sources")
    for colour, name in zip((60, 200), SOURCES, strict=True):
        frames = np.full((30, 80, 160, 3), colour, np.uint8)
        for i, frame in enumerate(frames):
            frame[20:50, 4 * i : 4 * i + 30] = 250 - colour, 40, colour
        write_mp4(folder / name, frames, 30)
    Image.fromarray(np.full((80, 60, 3), 90, np.uint8)).save(folder / "still.png")
    return folder


@pytest.fixture(scope="module")
def shards(sources: Path, vae: Vae, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of two videos and one of a picture, as `sora prep` would make them; one bucket is empty."""
    folder = tmp_path_factory.mktemp("made") / "shards"
    rows: dict[str, list[dict]] = {name: [] for name in SHAPES}
    video, still = (Bucket(*schema.bucket_size(name), FPS) for name in SHAPES)
    places = [(name, ClipSpan(start, start + 0.4, video)) for start in (0.0, 0.3) for name in SOURCES]
    places += [("gone.mp4", places[0][1]), ("still.png", ClipSpan(0.0, 0.0, still))]
    decoder = Decoder(DATA, SelectionConfig())
    for number, (name, span) in enumerate(places):
        clip = decoder.read(str(sources / name.replace("gone", "a")), span, str(number))
        captions = [HOSTILE if number == 1 else f"clip {number}"]
        rows[span.bucket.name].append(
            schema.encode_row(
                sample_id=str(number),
                source=name,
                source_size=1,
                source_version="1",
                content_hash="of another file" if number == 2 else clip.content_hash,
                start_s=span.start_s,
                end_s=span.end_s,
                captions=captions,
                latents=vae.encode(torch.from_numpy(clip.frames[None]))[0].numpy(),
                text=[np.zeros((2, 64))],
            )
        )
    decoder.close()
    for name, made in rows.items():
        (folder / f"bucket={name}").mkdir(parents=True)
        table = pa.Table.from_pylist(made, schema.SHARD_SCHEMA)
        pq.write_table(table, folder / f"bucket={name}" / "part.parquet", row_group_size=2)
    lost = [
        {"source": f"{i}.mp4", "stage": "open", "kind": "filtered", "reason": "too_short", "message": HOSTILE}
        for i in range(250)
    ]
    pq.write_table(pa.Table.from_pylist(lost, schema.QUARANTINE_SCHEMA), folder / "quarantine.parquet")
    facts = {name: getattr(vae, name) for name in ("hash", "channels", "factor")}
    manifest.Manifest(
        encoding_hash="0123",
        vae=manifest.VaeFacts(name="builtin", mean=(0.0,) * 4, std=(1.0,) * 4, **facts),
        text=manifest.TextFacts(name="builtin", hash="4567", width=64, max_tokens=2),
        latents=manifest.LatentFormat(moments=vae.moments),
        frames=4,
        fps=FPS,
        height=64,
        width=128,
        buckets={name: len(made) for name, made in rows.items()} | {"9x64x64": 0},
        settings={
            "data": DATA.model_copy(update={"captions": str(sources / "captions.csv")}).model_dump(mode="json"),
            "selection": SelectionConfig(black=True).model_dump(mode="json"),
        },
        empty_text=base64.b64encode(np.zeros((1, 64), np.float16).tobytes()).decode(),
        empty_tokens=1,
        counts=manifest.Counts(asked=256, written=6, quarantined=0, filtered=250),
        reasons={"too_short": 250},
    ).save(str(folder))
    return folder


@pytest.fixture(scope="module")
def page(shards: Path) -> Iterator[Page]:
    out = shards.parent / "new" / "folder" / "page.html"
    assert write_page(str(shards), str(out)) == str(out)
    assert [file.name for file in out.parent.iterdir()] == ["page.html"]
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture
def changed(shards: Path, tmp_path: Path):
    """Makes a copy of the shards with another manifest; without clips where asked."""

    def change(**update: object) -> str:
        folder = tmp_path / "changed"
        fs.copy_files(str(shards), str(folder))
        schema.Manifest.load(str(folder)).model_copy(update=update).save(str(folder))
        return str(folder)

    return change


def test_a_page_shows_every_bucket_and_what_made_it(page: Page, vae: Vae):
    for words in (*SHAPES, "9x64x64", "empty", "clip 4", "builtin", vae.hash, "4567", "0123", "too_short", "still"):
        assert words in page.text
    assert page.tags.count("article") == 6
    assert page.tags.count("img") == 5 * 2 + 1  # a strip of each, and the five that move, moving


def test_every_variable_of_the_style_is_defined(page: Page):
    style = page.html.partition("<style>")[2].partition("</style>")[0]
    used, defined = set(re.findall(r"var\((--[\w-]+)\)", page.html)), set(re.findall(r"(--[\w-]+):", style))
    assert "--accent" in used
    assert used <= defined
    assert "{{" not in style


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_bars_have_the_accents_colour_in_a_browser(page: Page, tmp_path: Path):
    from playwright.sync_api import sync_playwright

    (tmp_path / "page.html").write_text(page.html)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(color_scheme="light")
        tab.goto((tmp_path / "page.html").as_uri())
        folder = Path(os.environ.get("SORA_ARTIFACTS") or tmp_path)
        tab.screenshot(path=folder / "inspect.png", full_page=True)
        look = "getComputedStyle(document.querySelector('.buckets .bar i')).backgroundColor"
        assert tab.evaluate(look) == "rgb(47, 129, 214)"
        browser.close()


def test_a_page_fetches_nothing(page: Page):
    pictures = [address for address in page.addresses if not address.startswith("#")]
    assert pictures
    for address in pictures:
        start, _, content = address.partition(",")
        assert start == "data:image/webp;base64"
        Image.open(io.BytesIO(base64.b64decode(content))).load()
    assert not {"script", "link", "iframe", "video"} & set(page.tags)


def test_hostile_captions_names_and_messages_stay_text(page: Page):
    assert not any(name.startswith("on") for name in page.attributes)
    for words in ("<script>alert(1)</script>{{ 7*7 }}", "<img src=x onerror=alert(1)>.mp4"):
        assert words in page.text
    assert not set("\x1b\u202e") & set(page.text)


def test_psnr_is_that_of_what_the_vae_loses(page: Page, sources: Path, vae: Vae):
    """Random crop and flip are those of the clip's own id, or frames and latents would not be of the same picture."""
    decoder = Decoder(DATA, SelectionConfig())
    for number, start in ((0, 0.0), (2, 0.3)):
        clip = decoder.read(str(sources / "a.mp4"), ClipSpan(start, start + 0.4, Bucket(4, 64, 128, FPS)), str(number))
        latents = vae.encode(torch.from_numpy(clip.frames[None]))[:, 0].half().float()
        error = (vae.decode(latents)[0].double() - torch.from_numpy(clip.frames).double()).square().mean()
        assert f"{10 * torch.log10(255**2 / error):.1f} dB" in page.text
    decoder.close()


def test_a_source_that_is_gone_or_changed_is_a_remark(page: Page):
    assert page.text.count("source not found") == 1
    assert page.text.count("the source has changed since") == 1
    assert page.text.count(" dB") == 5 + 1  # each source that is there, and their median


def test_at_most_20_rows_of_each_reason_are_shown(page: Page):
    assert "and 230 more in quarantine.parquet" in page.text
    assert page.text.count("open, too_short") == 20


def test_sources_are_found_under_another_root(changed, sources: Path, tmp_path: Path):
    folder, out = changed(settings={"data": DATA.model_dump(mode="json")}), str(tmp_path / "page.html")
    assert Page(Path(write_page(folder, out, 1)).read_text()).text.count("source not found") == 2
    seen = Page(Path(write_page(folder, out, 1, root=str(sources))).read_text())
    assert "source not found" not in seen.text
    assert "1 of 5 clips" in seen.text
    with pytest.raises(UserError, match="--root: there is no folder"):
        write_page(folder, out, root=str(tmp_path / "nowhere"))


def test_without_settings_shards_are_shown_without_sources(changed, tmp_path: Path):
    seen = Page(Path(write_page(changed(settings={}), str(tmp_path / "page.html"), 2)).read_text())
    assert seen.text.count("the manifest does not say how clips were cut") == 3


def test_shards_sources_and_page_may_lie_on_an_s3_store(changed, sources: Path, s3: str):
    system, path = resolve(s3)
    fs.copy_files(str(sources), f"{path}/sources", destination_filesystem=system)
    data = DATA.model_copy(update={"root": f"{s3}/sources"}).model_dump(mode="json")
    fs.copy_files(changed(settings={"data": data}), f"{path}/shards", destination_filesystem=system)
    write_page(f"{s3}/shards", f"{s3}/pages/page.html", 2)
    with system.open_input_stream(f"{path}/pages/page.html") as file:
        seen = Page(file.read().decode())
    assert seen.text.count(" dB") == 3 + 1 - seen.text.count("source not found")


def test_nothing_is_written_where_the_vae_is_not_the_one(changed, shards: Path, tmp_path: Path):
    facts = schema.Manifest.load(str(shards)).vae
    out = tmp_path / "page.html"
    for update, message in (
        ({"hash": "another"}, f"its hash is {facts.hash}, the manifest's another"),
        ({"name": str(tmp_path / "gone")}, "gone"),
    ):
        with pytest.raises(UserError, match=message):
            write_page(changed(vae=facts.model_copy(update=update)), str(out))
    with pytest.raises(UserError, match=r"codec.models: no folder .*none"):
        write_page(changed(vae=facts.model_copy(update={"name": "a/vae"})), str(out), models=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"is a folder. Name a file, such as .*/inspect\.html"):
        write_page(str(shards), str(tmp_path))
    assert not out.exists()


@pytest.mark.parametrize("place", ["{tmp_path}/file/page.html", "/proc/page.html", "s3://no-such-bucket/page.html"])
def test_a_page_that_can_not_be_written_is_found_before_the_shards_are_read(
    tmp_path: Path, s3: str, capsys: pytest.CaptureFixture[str], place: str
):
    (tmp_path / "file").touch()
    page = place.format(tmp_path=tmp_path)
    assert cli.main(["inspect", str(tmp_path / "nowhere"), "--check", "--html", page]) == cli.EXIT_FAILED
    assert f"{page} can't be written: " in capsys.readouterr().err


def test_the_check_of_a_page_leaves_nothing(tmp_path: Path, s3: str):
    for folder in (str(tmp_path), s3):
        check_page(f"{folder}/new/page.html")
    system, bucket = resolve(s3)
    infos = system.get_file_info(fs.FileSelector(bucket, recursive=True))
    assert [info.path for info in infos if info.type == fs.FileType.File] == []
    assert not list(tmp_path.iterdir())


def test_latents_of_another_shape_are_named(changed, tmp_path: Path):
    with pytest.raises(UserError, match="5 of bucket 1x64x64 has 512 numbers in its latents"):
        write_page(changed(latents=manifest.LatentFormat(moments=1)), str(tmp_path / "page.html"))


def test_a_set_that_lost_every_clip_still_has_a_page(tmp_path: Path):
    lost = {"source": "a.mp4", "stage": "open", "kind": "quarantined", "reason": "unreadable", "message": "no video"}
    pq.write_table(pa.Table.from_pylist([lost], schema.QUARANTINE_SCHEMA), tmp_path / "quarantine.parquet")
    assert "no video" in Page(Path(write_page(str(tmp_path), str(tmp_path / "page.html"))).read_text()).text


def test_shards_without_a_manifest_have_no_page(shards: Path, tmp_path: Path):
    fs.copy_files(str(shards), str(tmp_path / "shards"))
    (tmp_path / "shards" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no manifest\.json"):
        write_page(str(tmp_path / "shards"), str(tmp_path / "page.html"))
