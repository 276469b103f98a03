"""A report is one page that holds everything, whatever a run has left behind and whatever its captions say."""

import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sora_train.errors import UserError
from sora_train.recipe import Recipe, save_recipe
from sora_train.report import page, write_report
from sora_train.report.charts import line_chart, smooth, thin
from sora_train.report.read import read_run, series
from sora_train.video import write_mp4

HOSTILE = (
    "</figcaption><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }} \u202e\n\x00 'quoted\" & "
    + "long " * 2000
)


class Page(HTMLParser):
    """Tags, addresses and text of a page; fails on tags that close what was not opened."""

    void = {"meta", "img", "br", "link", "path", "use", "rect"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.attributes: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def make_run(folder: Path, caption: str = "a red circle") -> Path:
    folder.mkdir()
    save_recipe(Recipe(name="trial"), folder / "recipe.yaml")
    lines = [{"step": step, "loss": 1 / (1 + step), "lr": 1e-3, "odd <metric> $x$": step} for step in range(60)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 60, "lo')
    (folder / "events.jsonl").write_text(
        json.dumps({"event": "resume", "step": 30, "time": 1e9, "reason": caption}) + "\n"
    )
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": caption}}))
    shares = {"colour": 1.0, "direction": 0.98, "shape": 0.7, "all": 0.69, "clips": 96}
    (folder / "obedience.json").write_text(
        json.dumps({**shares, "seen": shares, "held_out": {**shares, "shape": 0.65}})
    )
    for name in ("step_00000020", "step_00000040", "final"):
        place = folder / "samples" / name
        place.mkdir(parents=True)
        write_mp4(place / "000-a.mp4", np.zeros((2, 16, 16, 3), np.uint8), fps=8)
        (place / "samples.json").write_text(
            json.dumps({"samples": [{"file": "000-a.mp4", "prompt": caption, "seed": 0}]})
        )
    return folder


def test_a_report_holds_curves_samples_obedience_events_and_recipe(tmp_path):
    report = write_report(make_run(tmp_path / "trial"))
    seen = Page(report)
    assert report == tmp_path / "trial" / "report.html"
    assert not seen.open
    assert seen.tags.count("video") == 3
    assert seen.tags.count("svg") == 3
    for words in ("trial", "step 40", "step 20", "held out", "65%", "Training loss", "resumed", "3.11"):
        assert words in seen.text


def test_a_report_fetches_nothing(tmp_path):
    seen = Page(write_report(make_run(tmp_path / "trial")))
    assert seen.addresses
    assert all(address.startswith("data:video/mp4;base64,") for address in seen.addresses)
    assert not {"script", "link", "iframe"} & set(seen.tags)


def test_hostile_text_stays_text(tmp_path):
    plain, hostile = (Page(write_report(make_run(tmp_path / f"run{i}", text))) for i, text in enumerate(("a", HOSTILE)))
    assert hostile.tags == plain.tags
    assert not any(name.startswith("on") for name in hostile.attributes)
    assert "<script>alert(1)</script>" in hostile.text
    assert "{{ 7*7 }}" in hostile.text


def test_ids_are_unique(tmp_path):
    ids = Page(write_report(make_run(tmp_path / "trial"))).ids
    assert ids
    assert len(ids) == len(set(ids))


def test_a_run_that_has_only_started_has_a_report(tmp_path):
    save_recipe(Recipe(name="young"), tmp_path / "recipe.yaml")
    seen = Page(write_report(tmp_path))
    assert "0 of 1,000" in seen.text
    assert "No step has been logged yet" in seen.text
    assert not seen.open


def test_what_was_cut_short_or_is_nonsense_is_left_out(tmp_path):
    folder = make_run(tmp_path / "trial")
    for name in ("metrics.jsonl", "events.jsonl", "obedience.json", "environment.json", "samples/final/samples.json"):
        (folder / name).write_bytes(
            b'[1, 2]\n"text"\n\xff\xfe\n{"step": "x", "loss": null}\n{"step": 3, "loss": NaN}\n{"st'
        )
    (folder / "recipe.yaml").write_bytes(b"name: [\xff\n\x01")
    (folder / "samples" / "stray.txt").write_text("x")
    (folder / "samples" / "empty").mkdir()
    seen = Page(write_report(folder))
    assert not seen.open
    assert "000-a" in seen.text


def test_files_beyond_the_budget_are_linked_relative_to_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "INLINE_ALL", 10)
    folder = make_run(tmp_path / "trial")
    for address in Page(write_report(folder)).addresses:
        assert (folder / address).is_file()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "none")


def test_of_a_step_that_was_logged_twice_the_later_line_counts():
    metrics = [{"step": 2, "loss": 5}, {"step": 1, "loss": 7}, {"step": 2, "loss": 4}, {"step": 3, "loss": True}]
    assert series(metrics, "loss") == [(1, 7), (2, 4)]


def test_steps_are_in_numeric_order_whatever_their_digits(tmp_path):
    for name in ("step_900", "step_1000", "prompts"):
        (tmp_path / "samples" / name).mkdir(parents=True)
        (tmp_path / "samples" / name / "sheet.png").write_bytes(b"")
    save_recipe(Recipe(), tmp_path / "recipe.yaml")
    assert [one.name for one in read_run(tmp_path).samples] == ["step_900", "step_1000", "prompts"]


def test_a_chart_is_well_formed_and_takes_the_colour_of_the_page():
    svg = line_chart([(float(step), step**2.0) for step in range(5000)], "a <title> & $more", marks=[7], large=True)
    ElementTree.fromstring(svg)
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert len(svg) < 200_000
    ElementTree.fromstring(line_chart([(1.0, 2.0)], "one point"))


def test_thinning_keeps_the_mean_and_smoothing_keeps_a_line():
    points = np.stack([np.arange(6000.0), np.random.default_rng(0).normal(size=6000)], 1)
    steps, values = thin(points)
    assert len(values) == 1200
    assert np.isclose(values.mean(), points[:, 1].mean())
    assert np.allclose(smooth(steps), steps)
