"""The page in a real browser: it needs no network, its videos play, the slider moves them, and it fits a phone.

Screenshots go to the folder that SORA_ARTIFACTS names.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import synthetic

from sora_train.report import media, write_report
from sora_train.video import write_mp4

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

PLAYING = "[...document.querySelectorAll('.slides video')].every(v => v.readyState >= 2 && v.currentTime > 0.2)"
READY = "document.querySelectorAll('.slides video').length == {0} && " \
    "document.querySelectorAll('.slides video.ready').length == {0}"  # fmt: skip
COLOUR = """video => {
  const canvas = document.createElement('canvas'); canvas.width = canvas.height = 8;
  const pen = canvas.getContext('2d'); pen.drawImage(video, 0, 0, 8, 8);
  return [...pen.getImageData(0, 0, 8, 8).data].filter((_, i) => i % 4 < 3).reduce((a, b) => a + b) / 192; }"""


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return synthetic.make_run(tmp_path_factory.mktemp("runs") / "one", frames=8, side=32)


@pytest.fixture(scope="module")
def page(run) -> Path:
    return write_report(run)


@pytest.fixture
def artifacts(tmp_path) -> Path:
    folder = Path(os.environ.get("SORA_ARTIFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Visit:
    """A page that is open, and what went wrong in it; what it asked of the network beside its own file."""

    def __init__(self, browser, path: Path, width: int = 1280, scheme: str = "light", scripts: bool = True) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=scripts
        )
        self.page = self.context.new_page()
        self.wrong, self.asked = [], []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("requestfailed", lambda request: self.wrong.append(request.url[:200]))
        self.page.on("request", lambda request: self.asked.append(request.url[:200]))
        self.page.goto(path.resolve().as_uri())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def wait(self, condition: str) -> None:
        """Playwright's own way to wait is a script made of a string, which the page's policy refuses."""
        self.until(lambda: self.page.evaluate(condition), condition)

    def until(self, holds: Callable[[], bool], what: str = "") -> None:
        """Waits until something holds, and lets the page go on meanwhile."""
        ends = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < ends, f"still not so: {what}"
            self.page.wait_for_timeout(50)

    def brightness(self) -> list[float]:
        return [self.page.evaluate(COLOUR, video) for video in self.page.query_selector_all(".slides video")]


def test_a_page_asks_for_nothing_and_its_videos_play(browser, page, artifacts):
    with Visit(browser, page) as visit:
        visit.wait(READY.format(4))
        visit.wait(PLAYING)
        assert visit.page.evaluate("document.querySelector('video').videoWidth") == 32
        visit.page.screenshot(path=artifacts / "report-light.png", full_page=True)
        assert not visit.wrong
        assert [url for url in visit.asked if not url.startswith("blob:")] == [page.resolve().as_uri()]


@pytest.mark.parametrize("width", [1280, 360])
def test_a_given_first_frame_is_shown_beside_its_video(browser, artifacts, tmp_path, width):
    run = synthetic.make_run(tmp_path / "run", validations=2, frames=8, side=32, given=True)
    synthetic.make_samples(run / "samples/prompts", 1.0, ("a disc",), 32, 4, np.random.default_rng(0), given=True)
    with Visit(browser, write_report(run), width=width) as visit:
        visit.wait("document.querySelectorAll('.slides video.ready').length >= 2")
        figures = visit.page.locator("#samples ~ .clips figure.begun").all()
        assert len(figures) == 4
        for figure in figures[:2]:
            picture, player = figure.locator(".given img").bounding_box(), figure.locator(".player").bounding_box()
            assert picture["y"] == pytest.approx(player["y"], abs=1)
            assert picture["width"] == pytest.approx(player["width"], abs=1)
            assert picture["height"] == pytest.approx(player["height"], abs=1)
            assert 0 < player["x"] - picture["x"] - picture["width"] < 20
        assert visit.page.evaluate("[...document.querySelectorAll('.given img')].every(i => i.naturalWidth == 32)")
        assert visit.page.evaluate("document.documentElement.scrollWidth") == width
        visit.page.locator("details", has_text="prompts, 1 video").locator("summary").click()
        visit.wait("document.querySelectorAll('details .begun video.ready').length == 1")
        visit.page.screenshot(path=artifacts / f"report-given-{width}.png", full_page=True)
        assert not visit.wrong


def test_the_slider_shows_another_steps_videos(browser, page):
    with Visit(browser, page) as visit:
        visit.wait(READY.format(4))
        assert visit.page.inner_text("#said") == "step 1,000"
        addresses = "[...document.querySelectorAll('.slides video')].map(v => v.src)"
        newest, before = visit.brightness(), visit.page.evaluate(addresses)
        visit.page.focus("#step")
        visit.page.keyboard.press("Home")
        visit.wait("document.getElementById('said').textContent == 'step 250'")
        visit.wait(READY.format(4))
        oldest, after = visit.brightness(), visit.page.evaluate(addresses)
        assert not set(before) & set(after)
        # the synthetic videos are of bright noise at first, of a disc on a dark ground in the end
        assert min(oldest) > max(newest)
        visit.page.click("#learn")
        visit.wait("document.getElementById('said').textContent == 'step 1,000'")
        assert not visit.wrong


def test_only_videos_near_the_window_are_attached(browser, tmp_path):
    prompts = tuple(f"prompt {i}" for i in range(40))
    run = synthetic.make_run(tmp_path / "run", validations=1, prompts=prompts, side=16, frames=2)
    with Visit(browser, write_report(run), width=360) as visit:
        visit.wait("document.querySelectorAll('.slides video.ready').length > 1")
        count = "document.querySelectorAll('video').length"
        assert visit.page.evaluate(count) < 20
        near = "[...document.querySelectorAll('video')].map(v => v.getBoundingClientRect().top)"
        assert all(-400 < top < 1000 for top in visit.page.evaluate(near))
        visit.page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        visit.wait(f"{count} == 0")
        visit.page.evaluate("window.scrollTo(0, 0)")
        visit.wait("document.querySelectorAll('.slides video.ready').length > 1")
        assert not visit.wrong


def test_every_step_stands_beside_every_other_when_asked(browser, page):
    with Visit(browser, page) as visit:
        visit.page.click("#every summary")
        visit.wait("document.querySelectorAll('.every .player').length == 16")  # the table is made once it is opened
        assert visit.page.locator(".every tbody th").all_inner_texts() == ["1,000", "750", "500", "250"]
        visit.wait("document.querySelectorAll('.every video.ready').length > 3")
        assert not visit.wrong


def test_a_phone_needs_no_sideways_scrolling_light_or_dark(browser, run, artifacts, tmp_path):
    other = synthetic.make_run(tmp_path / ("x" * 60), seed=1, side=16, validations=2, frames=2)
    shares = {"colour": 1.0, "direction": 0.98, "shape": 0.7, "all": 0.69, "clips": 96}
    (other / "obedience.json").write_text(json.dumps({**shares, "seen": shares, "held_out": shares}))
    shutil.copy(other / "obedience.json", run)
    page = write_report(run, out=tmp_path / "one.html")
    both = write_report(run, other, out=tmp_path / "both.html")
    looks = {"light": ("rgb(251, 251, 250)", "rgb(104, 113, 124)"), "dark": ("rgb(20, 23, 27)", "rgb(148, 157, 168)")}
    for scheme, name, file in (("light", "one", page), ("dark", "one", page), ("dark", "several", both)):
        with Visit(browser, file, width=360, scheme=scheme) as visit:
            visit.page.locator(".slides").first.scroll_into_view_if_needed()
            visit.wait("document.querySelectorAll('.slides video.ready').length > 0")
            visit.page.screenshot(path=artifacts / f"report-phone-{scheme}-{name}.png", full_page=True)
            assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
            ground = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
            tick = visit.page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
            assert (ground, tick) == looks[scheme]
            first = visit.page.locator(".obedience td:first-child").first
            assert first.bounding_box()["height"] < 50  # one line, whatever the other columns take
            assert not visit.wrong


def test_several_runs_play_beside_each_other(browser, run, artifacts, tmp_path):
    other = synthetic.make_run(tmp_path / "two", steps=600, validations=2, side=32, rate=3e-3)
    with Visit(browser, write_report(run, other, out=tmp_path / "both.html")) as visit:
        visit.wait("document.querySelectorAll('.slides video.ready').length > 1")
        assert visit.page.locator(".prompt").first.inner_text() == "a red circle moving left"
        assert visit.page.locator("#step").get_attribute("data-steps") == "250 300 500 600 750 1000"
        visit.page.focus("#step")
        visit.page.keyboard.press("Home")
        visit.wait("document.querySelector('.at').textContent == 'step 250'")
        labels = visit.page.locator(".at").all_inner_texts()[:2]
        assert labels == ["step 250", ""]
        assert visit.page.locator(".player").nth(1).get_attribute("data-flaw") == "none at this step"
        visit.page.keyboard.press("End")
        visit.wait("document.querySelector('.at').textContent == 'step 1,000'")
        assert visit.page.locator(".at").all_inner_texts()[:2] == ["step 1,000", "step 600"]
        visit.wait(PLAYING)
        visit.page.screenshot(path=artifacts / "report-several.png", full_page=True)
        assert not visit.wrong


def test_hostile_prompts_run_nothing(browser, tmp_path):
    prompts = (
        "</script><script>document.title = 'taken'</script>",
        '"><img src=x onerror="document.title=\'taken\'">',
        "{{ 7*7 }}",
    )
    run = synthetic.make_run(tmp_path / "run", prompts=prompts, side=16, frames=2)
    (run / "recipe.yaml").write_text("name: </title><script>alert(1)</script>")
    with Visit(browser, write_report(run)) as visit:
        visit.wait(READY.format(3))
        assert visit.page.locator(".clips figcaption").all_inner_texts() == list(prompts)
        visit.page.click("#every summary")
        visit.wait("document.querySelectorAll('.every thead th').length == 4")  # the table is made once it is opened
        assert visit.page.locator(".every thead th").all_inner_texts()[1:] == list(prompts)
        assert visit.page.title() == "</title><script>alert(1)</script> · sora_train"
        assert not visit.wrong


def test_a_script_that_is_not_the_pages_own_is_refused(browser, page, tmp_path):
    html = page.read_text().replace("</h1>", "</h1><script>document.title = 'taken'</script>", 1)
    (tmp_path / "page.html").write_text(html)
    with Visit(browser, tmp_path / "page.html") as visit:
        visit.wait(READY.format(4))
        assert visit.page.title() != "taken"
        visit.until(lambda: any("Content Security Policy" in text for text in visit.wrong))


def test_linked_videos_play_from_the_runs_folder(browser, run, tmp_path, monkeypatch):
    monkeypatch.setattr(media, "MAX_EMBEDDED", 0)
    with Visit(browser, write_report(run, out=tmp_path / "page.html")) as visit:
        visit.wait(READY.format(4))
        visit.wait(PLAYING)
        assert not visit.wrong


def test_without_scripts_curves_events_and_the_sheet_are_there(browser, page):
    with Visit(browser, page, scripts=False) as visit:
        assert visit.page.locator("img.sheet").first.is_visible()
        assert visit.page.locator(".chart svg").nth(4).is_visible()
        assert visit.page.get_by_text("a worker was lost").first.is_visible()
        assert "Videos need JavaScript" in visit.page.inner_text("body")
        assert not visit.page.locator(".slider").is_visible()


def test_a_damaged_video_says_so_and_the_others_play(browser, tmp_path):
    run = synthetic.make_run(tmp_path / "run", validations=1, side=16, frames=2)
    (run / "samples" / "step_00001000" / "001-clip.mp4").write_bytes(b"no video")
    with Visit(browser, write_report(run)) as visit:
        visit.wait("document.querySelectorAll('.slides video.ready').length == 3")
        visit.wait("document.querySelectorAll('.player')[1].dataset.flaw == \"can't be played\"")


def test_a_wide_video_keeps_its_shape(browser, tmp_path):
    run = synthetic.make_run(tmp_path / "run", validations=1, side=16, frames=2, prompts=("wide",))
    place = run / "samples" / "step_00001000"
    write_mp4(place / "000-clip.mp4", np.zeros((2, 32, 64, 3), np.uint8), fps=8)
    (place / "samples.json").write_text(json.dumps({"samples": []}))
    with Visit(browser, write_report(run)) as visit:
        visit.wait(READY.format(1))
        box = visit.page.locator(".player").bounding_box()
        assert box["width"] / box["height"] == pytest.approx(2, abs=0.02)
