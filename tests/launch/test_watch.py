"""Ray's metrics of a run, the dashboard that draws them, and the nodes' own metrics."""

import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sora_train.launch.node_stats import NodeStats, parse_metrics
from sora_train.ray_cluster.metrics import METRICS, RayMetrics

BOARD = json.loads((Path(__file__).parents[2] / "cluster/grafana/sora_train.json").read_text())
PANELS = BOARD["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]
NAMES = {f"ray_{name}" + ("_total" if metric.kind == "counter" else ""): metric for name, metric in METRICS.items()}
ENDPOINT = """\
# HELP ray_node_cpu_utilization Total CPU usage on a ray node
# TYPE ray_node_cpu_utilization gauge
ray_node_cpu_utilization{IsHeadNode="true",ip="10.0.0.1",otel_scope_version=""} 40.5
ray_node_mem_used{IsHeadNode="true",ip="10.0.0.1"} 5.0e+09
ray_node_mem_used_host{IsHeadNode="true",ip="10.0.0.1"} 9.0e+09
ray_node_disk_utilization_percentage{ip="10.0.0.1"} 31.5
ray_node_gpus_utilization{GpuDeviceName="NVIDIA H100 80GB HBM3",GpuIndex="0",ip="10.0.0.1"} 93.0
ray_node_gpus_utilization{GpuDeviceName="NVIDIA H100 80GB HBM3",GpuIndex="1",ip="10.0.0.1"} 0.0
ray_node_gram_used{GpuDeviceName="NVIDIA H100 80GB HBM3",GpuIndex="0",ip="10.0.0.1"} 1000.0
"""


def test_the_dashboard_draws_exactly_the_published_metrics():
    drawn = {name for query in QUERIES for name in re.findall(r"\bray_sora_\w+", query)}
    assert drawn == NAMES.keys()


def test_metrics_are_drawn_by_the_chosen_runs_and_their_labels():
    for query in QUERIES:
        for name in re.findall(r"\bray_sora_\w+", query):
            assert f'{name}{{run=~"$run"}}' in query
            (tags,) = re.findall(r"by \(([^)]*)\)", query)
            assert set(tags.split(", ")) == {"run", NAMES[name].tag} - {""}
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "run"]
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in PANELS if panel["type"] != "row")


def test_panels_do_not_overlap():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    places = [panel["gridPos"] for panel in PANELS]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


def test_the_dashboard_has_its_rows_and_units():
    rows = [panel["title"] for panel in PANELS if panel["type"] == "row"]
    assert rows[:5] == ["Training", "Data and speed", "Checkpoints and validation", "Prep", "Events"]
    units = {
        target["expr"]: panel["fieldConfig"]["defaults"]["unit"]
        for panel in PANELS
        for target in panel.get("targets", [])
    }
    for query, unit in units.items():
        if re.search(r"ray_sora_\w+_s\{", query) and "per_s" not in query:
            assert unit == "s"
        if re.search(r"_share|_mfu", query):
            assert unit == "percentunit"


def test_a_nodes_figures_are_read_off_what_its_agent_shows():
    assert parse_metrics(ENDPOINT) == pytest.approx(
        {"cpu": 40.5, "memory_gb": 5.0, "disk": 31.5, "gpu0": 93.0, "gpu1": 0.0, "gpu0_memory_gb": 1000 * 2**20 / 1e9}
    )
    assert parse_metrics("no metrics at all") == {}


def test_a_process_without_ray_publishes_nothing_and_goes_on():
    code = (
        "import ray; from sora_train.ray_cluster.metrics import RayMetrics\n"
        "from sora_train.launch.node_stats import NodeStats\n"
        "shown = RayMetrics('run'); shown.set_from_record({'step': 1}); shown.count('sora_events', 'start')\n"
        "assert not shown.handles and not ray.is_initialized() and NodeStats().read() == {}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_metrics_that_fail_say_so_once_and_never_raise(capsys: pytest.CaptureFixture):
    shown = RayMetrics("run")
    shown.on = True
    for _ in range(2):
        shown.set({"sora_events": 1.0})  # a counter can't be set
    assert capsys.readouterr().err.count("Ray metrics stopped (AttributeError") == 1
    assert not shown.on


@pytest.mark.ray
def test_every_node_is_asked_what_it_is_busy_with(local_ray: None):
    until = time.monotonic() + 60  # a Ray that has just started takes some seconds to measure
    while not (found := (stats := NodeStats()).read()) and time.monotonic() < until:
        time.sleep(0.5)
    assert {key.split("/")[0] for key in found} == {"node"}
    assert {key.rsplit("/", 1)[1] for key in found} >= {"cpu", "memory_gb", "disk"}
    assert all(value >= 0 for value in found.values())
    assert stats.read() == {}  # not twice within seconds
