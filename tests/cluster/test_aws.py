"""cluster/aws.yaml, by Ray's own checks of cluster files."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
PATH = ROOT / "cluster/aws.yaml"


def config() -> dict[str, Any]:
    return yaml.safe_load(PATH.read_text())


def check(changed: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of it before it asks AWS for anything."""
    prepared = prepare_config(changed)
    validate_config(prepared)
    return prepared


def test_ray_takes_the_cluster_file():
    prepared = check(config())
    kinds = prepared["available_node_types"]
    assert prepared["head_node_type"] == "head"
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert kinds["gpu"]["resources"]["GPU"] == 8
    assert "GPU" not in kinds["decode"]["resources"]
    for kind in ("decode", "gpu"):
        assert 0 < kinds[kind]["min_workers"] <= kinds[kind]["max_workers"]
    assert sum(kinds[kind]["max_workers"] for kind in ("decode", "gpu")) == prepared["max_workers"]


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("max_worker",), 3),
        (("provider", "type"), None),
        (("available_node_types", "gpu", "max_nodes"), 3),
        (("available_node_types", "gpu", "resources", "GPU"), "eight"),
        (("head_node_type",), "boss"),
        (("max_workers",), 1),
        (("docker", "imag"), "x"),
        (("initialization_commands",), "mount /shared"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_a_broken_cluster_file_is_refused(keys: tuple[str, ...], value: Any):
    changed = config()
    *inside, last = keys
    place = changed
    for key in inside:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        check(changed)


def test_the_nodes_ask_for_a_token_and_the_dashboard_stays_on_loopback():
    prepared = check(config())
    options = prepared["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    path = next(o.partition("RAY_AUTH_TOKEN_PATH=")[2] for o in options if "RAY_AUTH_TOKEN_PATH=" in o)
    assert str(Path(path).parent) in prepared["file_mounts"]
    assert not any("RAY_AUTH_TOKEN=" in option for option in options)
    assert "--env RAY_JOB_STOP_WAIT_TIME_S=300" in options
    start = " ".join(prepared["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    opened = prepared["provider"]["security_group"]["IpPermissions"]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in opened] == [(22, 22)]
    assert all(ip["CidrIp"] != "0.0.0.0/0" for rule in opened for ip in rule["IpRanges"])
