"""Jobs on a cluster of three machines with addresses of their own, and the drill's plan of faults."""

import sys
from itertools import islice
from pathlib import Path

import pytest

from tests.cluster.page_drill import blocks
from tests.cluster.world import ROOT, lacking, run_inside
from tests.drills.cluster_faults import FAULTS, schedule
from tests.drills.cluster_verdict import Row


def test_the_pages_commands_for_several_machines_are_found():
    once, on_first, on_others, submitting = blocks((ROOT / "cluster/README.md").read_text()).values()
    assert ["get-auth-token" in line for line in once] == [True]
    assert on_first[-1].endswith("ray start --head")
    assert on_others[-1] == "ray start --address FIRST_NODE:6379"
    assert [line.split(" -- ")[-1].split()[:2] for line in submitting[2:]] == [["sora", "prep"], ["sora", "train"]]


def test_the_same_seed_plans_the_same_faults_each_kind_as_often():
    plans = list(islice(schedule(7), 3 * len(FAULTS)))
    assert plans == list(islice(schedule(7), len(plans)))
    assert plans != list(islice(schedule(8), len(plans)))
    assert sorted(plan.kind for plan in plans) == sorted(list(FAULTS) * 3)
    assert all(2 <= plan.pause_s <= 10 and 0 <= plan.where < 1 for plan in plans)


@pytest.mark.parametrize(
    ("attempts", "told", "seen"),
    [(0, [], True), (1, ["worker_lost", "resume"], True), (1, ["resume"], False), (1, ["worker_lost"], False),
     (2, ["worker_lost", "resume"], False), (1, ["preempted", "checkpoint", "resume"], True)],
)  # fmt: skip
def test_the_drill_finds_a_restart_that_is_not_in_the_events(attempts: int, told: list[str], seen: bool):
    row = Row(0.0, "train-1", "", "node2", "", 0.0, (0, 0), 1, 0, 0, attempts=attempts)
    row.add_events([{"event": event} for event in told])
    assert row.is_recorded() == seen


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_the_pages_commands_run_jobs_on_three_machines(tmp_path_factory: pytest.TempPathFactory):
    if why := lacking():
        pytest.skip(why)
    said = run_inside("tests.cluster.page_drill", Path(tmp_path_factory.mktemp("p")), timeout_s=1700)
    assert said.splitlines()[-1].startswith("training workers were on node"), said
