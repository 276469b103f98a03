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


def test_nodes_need_a_token_and_the_dashboard_is_on_loopback():
    prepared = check(config())
    options = prepared["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    path = next(o.partition("RAY_AUTH_TOKEN_PATH=")[2] for o in options if "RAY_AUTH_TOKEN_PATH=" in o)
    assert str(Path(path).parent) in prepared["file_mounts"]
    assert not any("RAY_AUTH_TOKEN=" in option for option in options)
    assert "--env RAY_JOB_STOP_WAIT_TIME_S=300" in options
    start = " ".join(prepared["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    # A group that Ray makes itself is open to SSH from everywhere.
    assert all(kind["node_config"]["SecurityGroupIds"] for kind in prepared["available_node_types"].values())
    assert "security_group" not in prepared["provider"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_makes_nodes_of_it_in_an_account_of_motos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """moto stands for AWS: roles, keys, networks and machines are made as `ray up` makes them, and are as asked."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    (tmp_path / ".ssh").mkdir()
    for name, value in (("HOME", str(tmp_path)), ("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x")):
        monkeypatch.setenv(name, value)
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        ec2 = boto3.client("ec2", region_name=config()["provider"]["region"])
        vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        group = ec2.create_security_group(GroupName="sora-train", Description="x", VpcId=vpc)["GroupId"]
        prepared = prepare_config(yaml.safe_load(PATH.read_text().replace("sg-0123456789abcdef0", group)))
        AWSNodeProvider.fillout_available_node_types_resources(prepared)
        validate_config(prepared)
        ready = bootstrap_aws(prepared)
        provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
        for kind, machine in (("head", "m7i.2xlarge"), ("decode", "c7i.8xlarge"), ("gpu", "p5.48xlarge")):
            node = dict(ready["available_node_types"][kind]["node_config"])
            ((_, made),) = provider.create_node(node, {"ray-node-type": kind}, 1).items()
            assert made.instance_type == machine
            assert [given["GroupId"] for given in made.security_groups] == [group]
            assert made.placement["AvailabilityZone"] == config()["provider"]["availability_zone"]
        assert [g["GroupName"] for g in ec2.describe_security_groups()["SecurityGroups"]] == ["default", "sora-train"]
