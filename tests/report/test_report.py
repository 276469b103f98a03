"""The report of complete, damaged and hostile runs."""

import base64
import io
import json
import re
import shutil
import threading
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import synthetic
from PIL import Image

from sora_train import cli
from sora_train.errors import UserError
from sora_train.recipe import Recipe, save_recipe
from sora_train.report import media, write_report
from sora_train.report.charts import Line, draw, smooth, thin, ticks
from sora_train.report.curves import Chart, chart_groups
from sora_train.report.events import all_rows, problems, state_of
from sora_train.report.media import MediaIndex, given_address, make_grid
from sora_train.report.page import differences
from sora_train.report.read import read_curves, read_run
from sora_train.sample.condition import GivenFrames, given_entry, save_given
from sora_train.video import write_mp4

HOSTILE = (
    "</figcaption></script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }} \u202e\n\x00 'quoted\" &"
    + "\u2028long " * 2000
)


class Page(HTMLParser):
    """Tags, stored videos and text of a page; fails on tags that close what was not opened."""

    void = {"meta", "img", "br", "link", "input"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.attributes: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.videos: list[str] = []
        self.shown: list[list[str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.attributes += values
        self.addresses += [values[name] or "" for name in ("src", "href", "data-href") if name in values]
        self.ids += [values["id"] or ""] if "id" in values else []
        self.shown += [values["data-media"].split(" ")] if "data-media" in values else []
        if values.get("type") == "application/octet-stream":
            self.videos.append(values.get("data-href") or "")
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
        if self.open and self.open[-1] == "script" and self.videos and not self.videos[-1]:
            self.videos[-1] = data
        elif not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


def make_run(folder: Path, caption: str = "a red circle", seed: int | None = 0) -> Path:
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
            json.dumps({"samples": [{"file": "000-a.mp4", "prompt": caption, "seed": seed}]})
        )
    return folder


def test_a_report_has_curves_samples_accuracy_events_and_recipe(tmp_path):
    report = write_report(make_run(tmp_path / "trial"))
    seen = Page(report)
    assert report == tmp_path / "trial" / "report.html"
    assert not seen.open
    assert seen.shown == [["1", "0"], ["2"]]
    assert seen.tags.count("svg") == 6  # an outer and an inner one each
    for words in (
        "trial",
        "Training loss",
        "held out",
        "65%",
        "resumed, 1×",
        "3.11",
        "odd <metric> $x$",
        "59 of 1,000",
    ):
        assert words in seen.text


def test_every_validation_video_is_embedded_byte_for_byte(tmp_path):
    folder = synthetic.make_run(tmp_path / "run", steps=100, validations=15, side=16, frames=2)
    seen = Page(write_report(folder))
    files = sorted(path.read_bytes() for path in folder.glob("samples/*/*.mp4"))
    assert len(files) == 60
    assert sorted(base64.b64decode(video) for video in seen.videos) == files
    # and the slider finds the video of its step: position i of prompt j is the j-th file of the i-th validation
    for j, numbers in enumerate(seen.shown):
        for i, number in enumerate(numbers):
            path = folder / "samples" / f"step_{6 * (i + 1):08d}" / f"{j:03d}-clip.mp4"
            assert base64.b64decode(seen.videos[int(number)]) == path.read_bytes()


def test_a_page_of_many_steps_weighs_little_more_than_its_videos(tmp_path):
    folder = synthetic.make_run(tmp_path / "run", steps=20_000, log_every=1, validations=10, side=32)
    videos = sum(path.stat().st_size for path in folder.glob("samples/*/*.mp4"))
    assert write_report(folder).stat().st_size < 1.34 * videos + 2e6


def test_hostile_text_stays_text(tmp_path):
    plain, hostile = (Page(write_report(make_run(tmp_path / f"run{i}", text))) for i, text in enumerate(("a", HOSTILE)))
    assert hostile.tags == plain.tags
    assert not any(name.startswith("on") for name in hostile.attributes)
    assert "<script>alert(1)</script>" in hostile.text
    assert "{{ 7*7 }}" in hostile.text
    assert not any(sign in hostile.text for sign in "\u202e\u2028\x00")


def test_ids_are_unique(tmp_path):
    ids = Page(write_report(synthetic.make_run(tmp_path / "trial", side=16))).ids
    assert len(ids) > 20
    assert len(ids) == len(set(ids))


def test_a_run_that_has_only_started_has_a_report(tmp_path):
    save_recipe(Recipe(name="young"), tmp_path / "recipe.yaml")
    seen = Page(write_report(tmp_path))
    assert "0 of 1,000" in seen.text
    assert "No step has been logged yet" in seen.text
    assert "not started" in seen.text
    assert not seen.open


def test_what_was_cut_short_or_is_nonsense_is_left_out(tmp_path):
    folder = make_run(tmp_path / "trial")
    garbage = (
        b'[1, 2]\n"text"\n\xff\xfe\n{"step": "x", "loss": null}\n{"step": 3, "loss": NaN}\n{"step": 1e999, "loss": 1}\n'
        b'{"step": 1%s, "loss": 1}\n{"event": {"a": []}, "step": [], "time": {}}\n{"event": "\\ud800", "time": 1e300}\n'
        b'{"samples": 7, "status": []}\n{"st' % (b"0" * 400)
    )
    for name in ("metrics.jsonl", "events.jsonl", "obedience.json", "environment.json", "samples/final/samples.json"):
        (folder / name).write_bytes(garbage)
    (folder / "samples" / "step_00000020" / "samples.json").write_text('{"samples": [{"file": [], "prompt": {}}, 3]}')
    (folder / "samples" / "step_00000040" / "samples.json").write_text('{"samples": 3}')
    (folder / "recipe.yaml").write_bytes(b"name: [\xff\n\x01")
    (folder / "samples" / "final" / "sheet.png").write_bytes(b"no picture" * 100_000)
    (folder / "samples" / "stray.txt").write_text("x")
    (folder / "samples" / "empty").mkdir()
    seen = Page(write_report(folder))
    assert not seen.open
    assert len(seen.videos) == 3
    (folder / "recipe.yaml").write_text("[" * 3000)
    assert not Page(write_report(folder)).open


def test_unreadable_files_are_named_on_the_page_and_on_stderr(tmp_path, capsys):
    folder = synthetic.make_run(tmp_path / "run", steps=100, validations=3, side=16, frames=2)
    write_report(folder)
    assert capsys.readouterr().err == ""
    assert "not readable" not in Page(folder / "report.html").text
    first, second, third = sorted((folder / "samples").iterdir())
    (first / "samples.json").write_bytes((first / "samples.json").read_bytes()[:90])
    (second / "000-clip.mp4").unlink()
    (second / "001-clip.mp4").write_bytes(b"")
    (third / "sheet.png").write_bytes((third / "sheet.png").read_bytes()[:-1])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('nonsense\n\n{"step": 5, "lo')
    (folder / "events.jsonl").write_text("nonsense\n")
    (folder / "obedience.json").write_text('{"all": 0.')
    (folder / "recipe.yaml").write_text("name: [")
    lines = len((folder / "metrics.jsonl").read_text().splitlines())
    wanted = [
        "events.jsonl (1 of 1 lines)",
        f"metrics.jsonl (2 of {lines} lines)",
        "obedience.json (truncated or not a JSON object)",
        "recipe.yaml (not a recipe in YAML)",
        f"samples/{first.name}/samples.json (truncated or not a JSON object)",
        f"samples/{second.name}/000-clip.mp4 (missing)",
        f"samples/{second.name}/001-clip.mp4 (empty)",
        f"samples/{third.name}/sheet.png (truncated or not a PNG)",
    ]
    seen = Page(write_report(folder))
    assert capsys.readouterr().err.splitlines() == [f"warning: not readable: {folder}/{line}" for line in wanted]
    assert re.findall(r"not readable: (.*?\))", seen.text) == wanted
    # nothing that only a readable recipe or whole events would tell
    assert "step" in seen.text
    assert not re.search(r" of \?|100 of|worker|not started", seen.text.split("Samples")[0])
    (folder / "metrics.jsonl").write_text("nonsense")
    assert "0step" not in Page(write_report(folder)).text


def test_given_frames_are_shown_and_damaged_or_foreign_ones_left_out(tmp_path, capsys):
    folder = synthetic.make_run(tmp_path / "run", steps=100, validations=1, side=16, frames=2, given=True)
    place = folder / "samples" / "step_00000100"
    pictures = [entry["given"]["file"] for entry in json.loads((place / "samples.json").read_text())["samples"]]
    page = write_report(folder).read_text()
    for name in pictures:
        assert base64.b64encode((place / name).read_bytes()).decode() in page
    (place / pictures[0]).unlink()
    (place / pictures[1]).write_bytes((place / pictures[1]).read_bytes()[:-1])
    secret = tmp_path / f"given-{'0' * 12}.png"
    shutil.copy(place / pictures[2], secret)
    (place / pictures[3]).unlink()
    (place / pictures[3]).symlink_to(secret)
    about = json.loads((place / "samples.json").read_text())
    about["samples"][2]["given"] = {"file": f"../../../{secret.name}"}
    (place / "samples.json").write_text(json.dumps(about))
    capsys.readouterr()
    assert 'class="given"' not in write_report(folder).read_text()
    said = capsys.readouterr().err
    assert f"{pictures[0]} (missing)" in said
    assert f"{pictures[1]} (truncated or not a PNG)" in said


def test_a_large_given_frame_is_a_small_jpeg_in_the_page(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1, 720, 1280, 3), np.uint8)
    save_given(tmp_path, given := GivenFrames(noise, ""))
    assert (tmp_path / given.file_name).stat().st_size > 2_000_000
    content = base64.b64decode(given_address(tmp_path / given.file_name).removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(content)).size == (853, 480)


def test_videos_of_one_prompt_that_begin_with_other_images_are_other_rows(tmp_path):
    folder = synthetic.make_run(tmp_path / "run", steps=100, validations=2, side=16, frames=2, given=True)
    first = folder / "samples" / "step_00000050"
    about = json.loads((first / "samples.json").read_text())
    save_given(first, other := GivenFrames(np.zeros((1, 16, 16, 3), np.uint8), ""))
    about["samples"][0] |= given_entry(other)
    (first / "samples.json").write_text(json.dumps(about))
    grid = make_grid([read_run(folder)], MediaIndex(tmp_path / "page.html"))
    rows = {(row.prompt, row.given): [number is not None for number in row.cells[0].numbers] for row in grid.rows}
    assert len(rows) == 5
    assert sorted(shown for (prompt, _), shown in rows.items() if prompt == synthetic.PROMPTS[0]) == [
        [False, True], [True, False],
    ]  # fmt: skip


def test_of_many_unreadable_files_only_the_first_are_named(tmp_path, capsys):
    folder = make_run(tmp_path / "trial")
    listing = [{"file": f"{i:04d}-<b>.mp4", "prompt": "p"} for i in range(5000)]
    (folder / "samples" / "final" / "samples.json").write_text(json.dumps({"samples": [*listing, {"file": "/a.mp4"}]}))
    seen = Page(write_report(folder))
    assert len(capsys.readouterr().err.splitlines()) == 21
    assert seen.text.count("not readable: samples/final/") == 19  # and metrics.jsonl, whose last line is cut
    assert "not readable: 4,981 more files" in seen.text
    assert "0018-<b>.mp4 (missing)" in seen.text


def test_one_of_a_thing_is_not_called_many(tmp_path):
    folder = make_run(tmp_path / "trial")
    (folder / "samples" / "step_00000020").rename(folder / "samples" / "prompts")
    text = Page(write_report(folder)).text
    assert "prompts, 1 video\n" in text
    assert "All 1 event\n" in text
    assert "1worker\n" in text
    assert not re.search(r"\b1 ?(videos|events|workers)\b", text)


@pytest.mark.parametrize("name", ["sora_export.json", "model_index.json", "model.safetensors"])
def test_an_export_has_no_history_to_report_on(tmp_path, name):
    save_recipe(Recipe(), tmp_path / "recipe.yaml")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError) as caught:
        write_report(tmp_path)
    assert caught.value.code == "run"
    assert not (tmp_path / "report.html").exists()


def test_samples_that_are_still_being_written_are_left_out(tmp_path):
    folder = make_run(tmp_path / "trial")
    (folder / "samples" / "step_00000040" / "result.json").write_text('{"status": "running"}')
    assert [one.name for one in read_run(folder).samples] == ["step_00000020", "final"]


def test_a_link_to_a_file_elsewhere_is_not_put_into_the_page(tmp_path):
    folder = make_run(tmp_path / "trial")
    (tmp_path / "secret").write_text("secret")
    (folder / "samples" / "final" / "001-b.mp4").symlink_to(tmp_path / "secret")
    assert len(Page(write_report(folder)).videos) == 3


def test_a_clip_deleted_during_writing_leaves_a_complete_page(tmp_path):
    folder = make_run(tmp_path / "trial")
    media = MediaIndex(folder / "report.html")
    make_grid([read_run(folder)], media)
    (folder / "samples" / "step_00000040" / "000-a.mp4").unlink()
    assert [bool(content) for _, _, content in media] == [False, True]


def test_old_videos_beyond_the_budget_are_linked(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "trial")
    size = (folder / "samples" / "final" / "000-a.mp4").stat().st_size
    monkeypatch.setattr(media, "MAX_EMBEDDED", size)
    page = tmp_path / "pages" / "page.html"
    page.parent.mkdir()
    seen = Page(write_report(folder, out=page))
    newest, *rest = seen.videos
    assert base64.b64decode(newest) == (folder / "samples" / "step_00000040" / "000-a.mp4").read_bytes()
    assert [(page.parent / address).resolve().parent.name for address in rest] == ["step_00000020", "final"]
    assert all((page.parent / address).is_file() for address in rest)
    assert "2 older videos are not in this file" in seen.text


def test_folders_without_a_run_and_unwritable_pages_are_errors(tmp_path):
    folder = make_run(tmp_path / "trial")
    for run, out, code in (
        (tmp_path, None, "run"),
        (tmp_path / "none", None, "run"),
        (folder, tmp_path, "not_writable"),
        (folder, tmp_path / "none" / "page.html", "not_writable"),
    ):
        with pytest.raises(UserError) as caught:
            write_report(run, out=out)
        assert caught.value.code == code


def test_concurrent_writers_leave_one_complete_page(tmp_path):
    folder = make_run(tmp_path / "trial")
    threads = [threading.Thread(target=write_report, args=(folder,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not Page(folder / "report.html").open
    assert sorted(path.name for path in folder.glob(".*")) == []


def test_of_a_step_that_was_logged_twice_the_later_line_counts(tmp_path):
    metrics = [{"step": 2, "loss": 5}, {"step": 1, "loss": 7}, {"step": 2, "loss": 4}, {"step": 3, "loss": True}]
    (tmp_path / "m").write_text("\n".join(map(json.dumps, metrics)))
    assert read_curves(tmp_path / "m", {})["loss"].tolist() == [[1, 7], [2, 4]]


def test_lines_of_validations_join_those_of_training(tmp_path):
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 1, "validation": True, "holdout_loss": 3.0, "fvd": None},
    ]
    (tmp_path / "m").write_text("\n".join(map(json.dumps, lines)))
    curves = read_curves(tmp_path / "m", {})
    assert {key: points.tolist() for key, points in curves.items()} == {
        "loss": [[1, 2], [2, 1]],
        "holdout_loss": [[1, 3]],
    }


def test_steps_are_in_numeric_order_whatever_their_digits(tmp_path):
    for name in ("step_900", "step_1000", "prompts"):
        (tmp_path / "samples" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "samples" / name / "sheet.png")
    save_recipe(Recipe(), tmp_path / "recipe.yaml")
    assert [one.name for one in read_run(tmp_path).samples] == ["step_900", "step_1000", "prompts"]


def test_parts_of_diffusion_time_are_one_chart(tmp_path):
    runs = [read_run(synthetic.make_run(tmp_path / name, validations=2, side=16, frames=2)) for name in ("a", "b")]

    def titled(groups: list[tuple[str, list[Chart]]]) -> dict[str, Chart]:
        return {chart.title: chart for _, charts in groups for chart in charts}

    alone, both = titled(chart_groups(runs[:1])), titled(chart_groups(runs))
    assert len(alone["Training loss by diffusion time"].legend) == 4
    assert len(alone["Held-out loss by diffusion time"].legend) == 10
    assert [label for label, _ in both["Held-out loss"].legend] == ["a", "b"]
    assert "Held-out loss by diffusion time" not in both
    assert [label for label, _ in alone["Training loss"].legend] == [
        "resumed, 1×",
        "rolled back, 1×",
        "steps skipped, 5×",
    ]


def test_each_of_several_runs_shows_its_newest_video_so_far(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    (tmp_path / "b" / "samples" / "step_00000040").rename(tmp_path / "b" / "samples" / "step_00000030")
    (tmp_path / "b" / "samples" / "step_00000020").rename(tmp_path / "b" / "samples" / "step_00000050")
    grid = make_grid([read_run(tmp_path / name) for name in "ab"], MediaIndex(tmp_path / "page.html"))
    assert grid.steps == [20, 30, 40, 50]
    ((prompt, (a, b), _),) = grid.rows
    assert prompt == "a red circle"
    assert a.steps == [20, 20, 40, 40]
    assert b.steps == [None, 30, 30, 50]
    assert b.numbers[0] is None


def test_runs_with_other_prompts_show_what_there_is(tmp_path):
    one, two = make_run(tmp_path / "one", "a red circle"), make_run(tmp_path / "two", "a blue square")
    grid = make_grid([read_run(run) for run in (one, two)], MediaIndex(tmp_path / "page.html"))
    shown = {prompt: [(cell.run, cell.numbers) for cell in cells] for prompt, cells, _ in grid.rows}
    assert {prompt: [run for run, _ in cells] for prompt, cells in shown.items()} == {
        "a red circle": [0],
        "a blue square": [1],
    }
    assert all(None not in numbers for cells in shown.values() for _, numbers in cells)
    assert Page(write_report(one, two, out=tmp_path / "both.html")).text.count("a blue square")


def test_changed_settings_and_new_clips_are_marked(tmp_path):
    folder = make_run(tmp_path / "trial")
    with (folder / "events.jsonl").open("a") as file:
        for kind, step in (("changed", 40), ("new_data", 50)):
            file.write(json.dumps({"event": kind, "step": step, "reason": "train.learning_rate was 1 and is 2"}) + "\n")
    text = Page(write_report(folder)).text
    assert "settings or clips changed, 2×" in text
    assert "clips were added or removed" in text


def test_what_differs_between_runs_is_listed_and_nothing_else(tmp_path):
    for name, rate in (("a", 1e-3), ("b", 3e-3)):
        synthetic.make_run(tmp_path / name, validations=0, rate=rate, name="same")
    page = write_report(tmp_path / "a", tmp_path / "b", out=tmp_path / "both.html")
    seen = Page(page)
    assert not seen.open
    assert "train.learning_rate0.0010.003" in seen.text.replace("\n", "")
    assert "2 runs compared" in seen.text
    one, other = (read_run(tmp_path / name).settings for name in "ab")
    assert [key for key, _ in differences([one, other])] == ["train.learning_rate"]
    assert differences([{"a": {"b": 1}}, {"a": {"b": 1}, "c": 2}]) == [("c", ["–", "2"])]


def test_the_command_writes_a_comparison_to_the_given_file(tmp_path, capsys, monkeypatch):
    for name in "ab":
        make_run(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "a", "b"]) == 0
    assert cli.main(["report", "a", "a", "--out", "same.html"]) == 0
    assert capsys.readouterr().out.split() == ["report.html", "same.html"]
    assert "trial (2)" not in (tmp_path / "report.html").read_text()
    assert "a (2)" in Page(tmp_path / "same.html").text
    assert cli.main(["report"]) == 2
    assert cli.main(["report", "none"]) == 1


def test_trouble_comes_first_and_a_long_streak_of_it_is_counted():
    events = [{"event": "start", "step": 0, "reason": "r"}]
    events += [{"event": "skipped", "step": step, "reason": "nan"} for step in range(1, 9)]
    events += [{"event": "checkpoint", "step": 9}, {"event": "failed", "step": 10, "reason": "disk full"}]
    rows = problems(events)
    assert [(row.what, row.step, row.more) for row in rows] == [
        ("training failed", "10", 0),
        ("a step was skipped", "8", 0),
        ("a step was skipped", "7", 0),
        ("a step was skipped", "6", 5),
    ]
    assert rows[0].grave
    assert state_of(events) == "failed"
    assert state_of([*events, {"event": "resume"}]) == "running"
    assert len(all_rows(events * 1000)) == 3000


def test_a_chart_is_well_formed_and_uses_css_variables():
    points = np.stack([np.arange(5000.0), np.arange(5000.0) ** 2], 1)
    svg = draw([Line(points)], {"resumed": [7], "rolled-back": [9], "skipped": range(3000)})
    ElementTree.fromstring(svg)
    assert 'stroke="var(--rolled-back)"' in svg
    assert len(svg) < 200_000
    ElementTree.fromstring(draw([Line(points[:1])]))
    assert re.search(r">0\.00\d+<", draw([Line(np.array([[0, 0.0], [1, 0.0024]]))]))


def test_a_curve_is_true_to_scale():
    def heights(*curves: list[float]) -> list[list[float]]:
        lines = [Line(np.stack([np.arange(len(values)), values], 1)) for values in curves]
        found = re.findall(r'<polyline points="([^"]*)"', draw(lines))
        return [[float(pair.split(",")[1]) for pair in one.split(" ")] for one in found]

    ((low, middle, high),) = heights([1.0, 2.0, 3.0])
    assert low > middle > high
    assert np.isclose(middle, (low + high) / 2, atol=0.02)
    (a, b), (c, d) = heights([1.0, 3.0], [3.0, 5.0])
    assert np.isclose(b, c)
    assert np.isclose(a - b, c - d, atol=0.02)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.15, 0.16), (-3.0, 1e6), (1e-9, 2e-9), (0.0, 60.0)])
def test_ticks_are_a_few_round_numbers_in_the_range(low: float, high: float):
    found = ticks(low, high, 4)
    assert 2 <= len(found) <= 5
    assert low <= found[0] < found[-1] <= high * (1 + 1e-9)
    assert np.allclose(np.diff(found), found[1] - found[0])


def test_thinning_keeps_the_mean_and_smoothing_keeps_lines():
    points = np.stack([np.arange(6000.0), np.random.default_rng(0).normal(size=6000)], 1)
    steps, values = thin(points)
    assert len(values) == 600
    assert np.isclose(values.mean(), points[:, 1].mean())
    assert np.allclose(smooth(steps), steps)
