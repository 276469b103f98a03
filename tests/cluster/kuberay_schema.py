"""The kinds of KubeRay v1.7 as JSON schemas: every field they have, and no other. From the field reference of ray.io/v1
that Ray's documentation carries (docs/reference/api.md of ray-project/kuberay at v1.7.0).

Pod templates are core Kubernetes and not judged here: `pod_templates` finds them for a checker that knows them.
"""

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

TEXT, FLAG, NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
WORDS = {"type": "object", "additionalProperties": TEXT}
ANYTHING = {"type": "object"}  # core Kubernetes
LIST = {"type": "array", "items": ANYTHING}


def section(required: str = "", **fields: Schema) -> Schema:
    """A mapping that has these fields and no other."""
    return {"type": "object", "additionalProperties": False, "properties": fields, "required": required.split()}


def choice(*words: str) -> Schema:
    return {"enum": list(words)}


GROUP = {"rayStartParams": WORDS, "template": ANYTHING, "resources": WORDS, "labels": WORDS}
CLUSTER = section(
    "headGroupSpec",
    authOptions=section(mode=choice("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=FLAG),
    autoscalerOptions=section(
        resources=ANYTHING, image=TEXT, imagePullPolicy=TEXT, securityContext=ANYTHING, idleTimeoutSeconds=NUMBER,
        upscalingMode=choice("Default", "Aggressive", "Conservative"), version=choice("v1", "v2"), env=LIST,
        envFrom=LIST, volumeMounts=LIST, command=LIST, args=LIST,
    ),
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=ANYTHING,
    headGroupSpec=section(
        "template", **GROUP, headService=ANYTHING, enableIngress=FLAG, ingressOptions=ANYTHING,
        serviceType=choice("ClusterIP", "NodePort", "LoadBalancer"),
    ),
    headServiceAnnotations=WORDS,
    historyServerOptions=ANYTHING,
    managedBy=TEXT,
    networkPolicy=ANYTHING,
    rayVersion=TEXT,
    suspend=FLAG,
    tlsOptions=section(enabled=FLAG),
    upgradeStrategy=section(type=choice("Recreate", "None")),
    workerGroupSpecs={
        "type": "array",
        "items": section(
            "groupName template", **GROUP, groupName=TEXT, replicas=NUMBER, minReplicas=NUMBER, maxReplicas=NUMBER,
            numOfHosts=NUMBER, idleTimeoutSeconds=NUMBER, priority={"type": "integer"}, suspend=FLAG,
            scaleStrategy=ANYTHING,
        ),
    },
)  # fmt: skip
JOB = section(
    activeDeadlineSeconds=NUMBER, backoffLimit=NUMBER, clusterSelector=WORDS, deletionStrategy=ANYTHING,
    entrypoint=TEXT, entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"},
    entrypointResources=TEXT, jobId=TEXT, managedBy=TEXT, metadata=WORDS, preRunningDeadlineSeconds=NUMBER,
    rayClusterSpec=CLUSTER, runtimeEnvYAML=TEXT, shutdownAfterJobFinishes=FLAG,
    submissionMode=choice("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"), submitterConfig=ANYTHING,
    submitterPodTemplate=ANYTHING, suspend=FLAG, ttlSecondsAfterFinished=NUMBER,
)  # fmt: skip
KINDS = {
    kind: section(
        "apiVersion kind metadata spec", apiVersion={"const": "ray.io/v1"}, kind={"const": kind}, spec=spec,
        metadata=section("name", name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
                         namespace=TEXT, labels=WORDS, annotations=WORDS),
    )
    for kind, spec in (("RayCluster", CLUSTER), ("RayJob", JOB))
}  # fmt: skip


def pod_templates(thing: Any) -> Iterator[Schema]:
    """Every pod template in a manifest."""
    if isinstance(thing, dict):
        for key, value in thing.items():
            if key in ("template", "submitterPodTemplate"):
                yield value
            else:
                yield from pod_templates(value)
    elif isinstance(thing, list):
        for value in thing:
            yield from pod_templates(value)
