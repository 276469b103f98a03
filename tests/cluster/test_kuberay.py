"""cluster/kuberay/: fields by KubeRay's own list, pods by the schemas of Kubernetes, and what must hold beside them."""

import copy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from sora_train.flags import parse_flags
from tests.cluster.kuberay_schema import KINDS, pod_templates

FOLDER = Path(__file__).parents[2] / "cluster/kuberay"
KUBERNETES = "1.34"
FILES = sorted(FOLDER.glob("*.yaml"))


def manifests(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def check(manifest: dict[str, Any]) -> None:
    """ValidationError (of jsonschema, or of kubernetes_validate, which is one) where something is wrong."""
    if manifest["kind"] not in KINDS:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    jsonschema.validate(manifest, KINDS[manifest["kind"]])
    for template in pod_templates(manifest):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


RAY = [(path, manifest) for path in FILES for manifest in manifests(path) if manifest["kind"] in KINDS]
RAY_IDS = [path.stem for path, _ in RAY]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_manifest_is_valid(path: Path):
    assert manifests(path)
    for manifest in manifests(path):
        check(manifest)


def broken(change: str) -> dict[str, Any]:
    """The cluster with one thing wrong."""
    manifest = copy.deepcopy(manifests(FOLDER / "cluster.yaml")[0])
    spec = manifest["spec"]
    pod = spec["headGroupSpec"]["template"]["spec"]
    head, group = pod["containers"][0], spec["workerGroupSpecs"][0]
    match change:
        case "a field that KubeRay does not have":
            spec["autoscaling"] = True
        case "a mode that there is not":
            spec["authOptions"]["mode"] = "password"
        case "a start parameter that is no word":
            spec["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
        case "a group without a name":
            del group["groupName"]
        case "a name that DNS can't have":
            manifest["metadata"]["name"] = "Sora_1"
        case "a field that a container does not have":
            head["volumeMount"] = head.pop("volumeMounts")
        case "a probe without its port":
            del head["livenessProbe"]["httpGet"]["port"]
        case "an environment variable that is a number":
            head["env"][0]["value"] = 300
        case "a pod without containers":
            del pod["containers"]
    return manifest


@pytest.mark.parametrize(
    "change",
    [
        "a field that KubeRay does not have",
        "a mode that there is not",
        "a start parameter that is no word",
        "a group without a name",
        "a name that DNS can't have",
        "a field that a container does not have",
        "a probe without its port",
        "an environment variable that is a number",
        "a pod without containers",
    ],
)
def test_a_broken_manifest_is_found(change: str):
    with pytest.raises(jsonschema.ValidationError):
        check(broken(change))


def test_a_storage_claim_with_a_wrong_access_mode_is_found():
    claim = next(m for m in manifests(FOLDER / "storage.yaml") if m["kind"] == "PersistentVolumeClaim")
    claim["spec"]["accessMode"] = claim["spec"].pop("accessModes")
    with pytest.raises(jsonschema.ValidationError):
        check(claim)


@pytest.mark.parametrize(("path", "manifest"), RAY, ids=RAY_IDS)
def test_the_token_comes_from_a_secret_that_no_file_holds(path: Path, manifest: dict[str, Any]):
    assert cluster_of(manifest)["authOptions"] == {"mode": "token", "secretName": "sora-ray-token"}
    assert not any(m["kind"] == "Secret" for file in FILES for m in manifests(file))
    for template in pod_templates(manifest):
        for container in template["spec"]["containers"]:
            for variable in container.get("env", ()):
                secret = any(word in variable["name"] for word in ("KEY", "TOKEN", "SECRET", "PASSWORD"))
                assert secret == ("valueFrom" in variable), variable


@pytest.mark.parametrize(("path", "manifest"), RAY, ids=RAY_IDS)
def test_every_pod_has_no_root_a_probe_and_the_shared_storage(path: Path, manifest: dict[str, Any]):
    claims = [m["metadata"]["name"] for m in manifests(FOLDER / "storage.yaml") if m["kind"] == "PersistentVolumeClaim"]
    for template in pod_templates(manifest):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            if container["name"] == "ray-job-submitter":
                continue
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert container[probe]["httpGet"]["path"].endswith("healthz")
            assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
            assert any(v.get("persistentVolumeClaim", {}).get("claimName") in claims for v in pod["volumes"])


@pytest.mark.parametrize(("path", "manifest"), RAY, ids=RAY_IDS)
def test_versions_are_pinned_and_the_head_has_a_stop_time(path: Path, manifest: dict[str, Any]):
    from sora_train import __version__

    root = FOLDER.parents[1]
    assert f"ray=={cluster_of(manifest)['rayVersion']}" in (root / "constraints.txt").read_text().splitlines()
    images = {c["image"] for template in pod_templates(manifest) for c in template["spec"]["containers"]}
    assert {image.rpartition(":")[2] for image in images} == {__version__}
    (head,) = cluster_of(manifest)["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "300"} in head["env"]


def test_the_job_names_a_recipe_of_the_image_that_fits_its_gpus():
    from sora_train.recipe import Recipe, load_recipe

    (job,) = manifests(FOLDER / "job.yaml")
    sora, verb, *words = job["spec"]["entrypoint"].split()
    flags, (file,) = parse_flags(words, Recipe)
    assert (sora, verb) == ("sora", "train")
    recipe = load_recipe(FOLDER.parents[1] / Path(file).relative_to("/opt/sora_train"), flags)
    gpus = sum(
        group["minReplicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        for group in cluster_of(job)["workerGroupSpecs"]
    )
    assert recipe.cluster.most + recipe.validation.resources.get("GPU", 0) <= gpus


def test_the_groups_of_the_cluster_have_gpus_and_none():
    (cluster,) = manifests(FOLDER / "cluster.yaml")
    limits = {
        group["groupName"]: group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for group in cluster_of(cluster)["workerGroupSpecs"]
    }
    assert limits.keys() == {"decode", "gpu"}
    assert "nvidia.com/gpu" not in limits["decode"]
    assert limits["gpu"]["nvidia.com/gpu"] == "8"
