"""Checks manifests for what an API server refuses beyond its schema, and for what Lorry's docs promise.

Each check takes a document and returns what is wrong with it, one line each; nothing wrong is an empty list. The rules
of the server are those of Kubernetes' pkg/apis/{batch,core}/validation and of Pod Security "restricted".
"""

import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from itertools import chain
from typing import Any

import kubernetes_validate

from tests.k8s.manifests import Document, children

GPU = "nvidia.com/gpu"
STAGES = ("preprocess", "train", "infer", "eval")
GPU_STAGES = ("preprocess", "train", "infer")
SERVE = "serve"
"""Component of the Deployment, which runs infer's image."""

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
UNITS: dict[str | None, Decimal] = {
    None: Decimal(1),
    "m": Decimal("0.001"),
    **{prefix: Decimal(1000) ** power for power, prefix in enumerate("kMGT", 1)},
    **{f"{prefix}i": Decimal(1024) ** power for power, prefix in enumerate("KMGT", 1)},
}

COMMON_LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/part-of", "app.kubernetes.io/component")
TERMS = "nodeSelectorTerms"
RUN_LABEL = "app.kubernetes.io/instance"
ENVIRONMENT = {"LORRY_RECIPE", "LORRY_PROFILE", "LORRY_SET", "LORRY_RUN", "LORRY_SHARDS", "LORRY_NODES"}
ENVIRONMENT |= {"LORRY_API_KEY", "LORRY_RENDEZVOUS", "NVIDIA_VISIBLE_DEVICES", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"}
"""The variables that a stage or a library below it reads; one that nobody reads is a misspelt one."""
LEAST_GRACE = {"preprocess": 60, "train": 600, "infer": 180, "eval": 30, SERVE: 30}
"""Seconds that a stage may need to save its state after SIGTERM."""
MOUNTS = {"/data": True, "/models": True, "/runs": False, "/caches": False, "/tmp": False, "/dev/shm": False}
"""What a stage finds mounted, and whether read-only."""
RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim"}
RESTRICTED_VOLUMES |= {"projected", "secret"}


def schema_problems(document: Document, version: str) -> list[str]:
    """What the strict schema of a Kubernetes version says; a JobSet has none there, its Jobs have."""
    if document["kind"] == "JobSet":
        return list(chain.from_iterable(schema_problems(job, version) for job in children(document)))
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{version}: {'.'.join(map(str, error.path))}: {error.message}"]
    return []


def problems(document: Document, claims: set[str], version: str) -> list[str]:
    """All problems of one document; `claims` are the volume claims that exist, `version` is Lorry's."""
    found = list(_metadata(document["metadata"]))
    match document["kind"]:
        case "PersistentVolumeClaim":
            found += _claim(document["spec"])
        case "Service":
            serves = document["metadata"].get("labels", {}).get("app.kubernetes.io/component") == SERVE
            found += _serving_service(document["spec"]) if serves else _service(document["spec"])
        case "Pod":
            found += _pod(document["spec"], claims) + _restricted(document["spec"])
        case "Job":
            found += _job(document, claims, version)
            if "ttlSecondsAfterFinished" not in document["spec"]:
                found.append("ttlSecondsAfterFinished is missing: finished Jobs would pile up")
        case "Deployment":
            found += _deployment(document, claims, version)
        case "JobSet":
            found += _jobset(document["spec"])
            found += chain.from_iterable(_job(job, claims, version) for job in children(document))
        case other:
            found.append(f"kind {other}: no check knows it")
    return found


def quantity(value: str | int) -> Decimal:
    """A resource quantity as a number. Raises ValueError if the server would refuse it."""
    match = QUANTITY.fullmatch(str(value))
    if match is None:
        raise ValueError(f"{value!r} is no quantity")
    return Decimal(match[1]) * UNITS[match[2]]


def failure_action(policy: Document, code: int, disrupted: bool = False) -> str:
    """The action of a podFailurePolicy for a failed pod: that of the first rule that matches."""
    for rule in policy["rules"]:
        codes = rule.get("onExitCodes")
        if codes and (code in codes["values"]) == (codes["operator"] == "In"):
            return str(rule["action"])
        if disrupted and any(on["type"] == "DisruptionTarget" for on in rule.get("onPodConditions", [])):
            return str(rule["action"])
    return "Count"


def _metadata(metadata: Document) -> Iterator[str]:
    if not DNS_LABEL.fullmatch(metadata["name"]):
        yield f"metadata.name {metadata['name']!r} is no DNS-1123 label"
    yield from _labels(metadata.get("labels", {}))


def _labels(labels: Document) -> Iterator[str]:
    for key, value in labels.items():
        if not LABEL_KEY.fullmatch(key):
            yield f"label key {key!r} is not valid"
        if not isinstance(value, str) or not LABEL_VALUE.fullmatch(value):
            yield f"label {key}: value {value!r} is not valid"
    yield from (f"label {key} is missing" for key in COMMON_LABELS if key not in labels)


def _claim(spec: Document) -> Iterator[str]:
    try:
        quantity(spec["resources"]["requests"]["storage"])
    except (KeyError, ValueError) as error:
        yield f"storage: {error}"
    if not set(spec["accessModes"]) <= {"ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"}:
        yield f"accessModes {spec['accessModes']} are not valid"


def _service(spec: Document) -> Iterator[str]:
    if spec.get("clusterIP") != "None":
        yield "a rendezvous needs a headless Service: clusterIP None"
    if spec.get("publishNotReadyAddresses") is not True:
        yield "publishNotReadyAddresses is not set: pods that wait for each other would never find each other"
    if not spec.get("selector"):
        yield "selector is missing"
    names = [port.get("name") for port in spec["ports"]]
    if len(set(names)) < len(names) or (len(names) > 1 and None in names):
        yield "each of several ports needs a name of its own"


def _serving_service(spec: Document) -> Iterator[str]:
    if spec.get("type") != "ClusterIP" or "clusterIP" in spec:
        yield "the server's Service must be of type ClusterIP: only an Ingress with TLS may lead to it from outside"
    if not spec.get("selector"):
        yield "selector is missing"
    if [port.get("targetPort") for port in spec["ports"]] != ["http"]:
        yield "the one port must lead to the container's port `http`"


def _deployment(deployment: Document, claims: set[str], version: str) -> list[str]:
    spec, template = deployment["spec"], deployment["spec"]["template"]
    return [
        *_deployment_spec(spec),
        *_labels(template["metadata"]["labels"]),
        *_pod(template["spec"], claims),
        *_restricted(template["spec"]),
        *_stage(deployment, version),
        *_server(template["spec"]["containers"][0]),
    ]


def _deployment_spec(spec: Document) -> Iterator[str]:
    """The server's rules on a Deployment's own fields, and what a GPU and volumes of one node need."""
    labels = spec["template"]["metadata"]["labels"]
    selected = spec["selector"].get("matchLabels", {})
    if not selected or not selected.items() <= labels.items():
        yield "selector does not select the Deployment's own pods"
    if spec["template"]["spec"].get("restartPolicy", "Always") != "Always":
        yield "restartPolicy of a Deployment must be Always"
    if spec.get("strategy") != {"type": "Recreate"}:
        yield "strategy must be Recreate: a second pod would wait for the first one's GPU and volumes"
    if spec.get("replicas") not in (0, 1):
        yield "replicas must be 1, or 0 in overlays"


def _server(container: Document) -> Iterator[str]:
    """What the server's container needs: its command, one port, probes of it, and a token out of a Secret."""
    if container.get("command", [])[:3] != ["tini", "--", "lorry-serve"]:
        yield "command is not that of lorry-serve under the init"
    if [port.get("name") for port in container.get("ports", [])] != ["http"]:
        yield "the container needs one port, named http"
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        if container.get(name, {}).get("httpGet") != {"path": "/health", "port": "http"}:
            yield f"{name} must ask /health on the port http"
    startup = container.get("startupProbe", {})
    if startup.get("periodSeconds", 10) * startup.get("failureThreshold", 3) < 900:
        yield "startupProbe gives up too early: a large model takes minutes to load"
    tokens = [v for v in container.get("env", []) if v["name"] == "LORRY_API_KEY"]
    if not any("secretKeyRef" in v.get("valueFrom", {}) for v in tokens):
        yield "LORRY_API_KEY must come from a Secret"


def _jobset(spec: Document) -> Iterator[str]:
    known = {"replicatedJobs", "network", "failurePolicy", "ttlSecondsAfterFinished", "suspend"}
    yield from (f"JobSet: unknown field {key}" for key in set(spec) - known)
    if "ttlSecondsAfterFinished" not in spec:
        yield "ttlSecondsAfterFinished is missing: finished JobSets would pile up"
    before: list[str] = []
    for replicated in spec["replicatedJobs"]:
        name = replicated["name"]
        yield from (
            f"{name}: unknown field {k}" for k in set(replicated) - {"name", "replicas", "dependsOn", "template"}
        )
        for needed in replicated.get("dependsOn", []):
            if needed["name"] not in before:
                yield f"{name}: dependsOn names {needed['name']!r}, which does not come before it"
            if needed["status"] != "Complete":
                yield f"{name}: dependsOn status {needed['status']!r}: the stage before must be Complete"
        if len(replicated.get("dependsOn", [])) > 1:
            yield f"{name}: dependsOn takes one item"
        if before and "dependsOn" not in replicated:
            yield f"{name}: dependsOn is missing"
        if "ttlSecondsAfterFinished" in replicated["template"]["spec"]:
            yield f"{name}: a Job with a ttl is deleted before the JobSet ends, and made again"
        before.append(name)
    policy = spec.get("failurePolicy", {})
    yield from (f"failurePolicy: unknown field {k}" for k in set(policy) - {"maxRestarts", "restartStrategy", "rules"})
    for rule in policy.get("rules", []):
        if rule["action"] not in {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}:
            yield f"failurePolicy: unknown action {rule['action']}"


def _job(job: Document, claims: set[str], version: str) -> list[str]:
    spec, template = job["spec"], job["spec"]["template"]
    return [
        *_job_spec(job["metadata"]["name"], spec),
        *_labels(template["metadata"]["labels"]),
        *_pod(template["spec"], claims),
        *_restricted(template["spec"]),
        *_stage(job, version),
        *_on_failure(spec),
        *_sharding(job["metadata"]["name"], spec),
    ]


def _job_spec(name: str, spec: Document) -> Iterator[str]:
    """The server's rules on a Job's own fields."""
    indexed = spec.get("completionMode") == "Indexed"
    if spec.get("completionMode", "NonIndexed") not in {"Indexed", "NonIndexed"}:
        yield f"completionMode {spec['completionMode']!r} is not known"
    if indexed and "completions" not in spec:
        yield "completionMode Indexed needs completions"
    host = f"{name}-{spec['completions'] - 1}" if indexed and "completions" in spec else name
    if not DNS_LABEL.fullmatch(host):
        yield f"{host!r}, a pod's host name, is no DNS-1123 label of at most 63 characters"
    if spec["template"]["spec"].get("restartPolicy") != "Never":
        yield "restartPolicy must be Never: podFailurePolicy and backoffLimitPerIndex need it"
    for field in ("backoffLimitPerIndex", "maxFailedIndexes"):
        if field in spec and not indexed:
            yield f"{field} needs completionMode Indexed"
    if "maxFailedIndexes" in spec and "backoffLimitPerIndex" not in spec:
        yield "maxFailedIndexes needs backoffLimitPerIndex"
    if "backoffLimit" not in spec and "backoffLimitPerIndex" not in spec:
        yield "backoffLimit is missing"
    if "activeDeadlineSeconds" not in spec:
        yield "activeDeadlineSeconds is missing: a pod that finds no node would wait for ever"
    for field, value in spec.items():
        if isinstance(value, int) and value < 0:
            yield f"{field} is negative"


def _on_failure(spec: Document) -> Iterator[str]:
    """Problems: exit codes that do not lead to the action that docs/runs.md states."""
    policy = spec.get("podFailurePolicy")
    if not policy:
        yield "podFailurePolicy is missing"
        return
    if len(policy["rules"]) > 20:
        yield "podFailurePolicy has more than 20 rules"
    for rule in policy["rules"]:
        yield from (f"podFailurePolicy: {problem}" for problem in _rule(rule, spec))
    together = "LORRY_NODES" in _environment(spec)
    if together and spec.get("backoffLimit") != 0:
        yield "pods that can only restart together need backoffLimit 0"
    expected = {(75, False): "Ignore", (1, True): "Ignore", (1, False): "Count", (137, False): "Count"}
    expected |= {(code, False): "FailJob" for code in (2, 3, 4)}
    for (code, disrupted), action in expected.items():
        taken = failure_action(policy, code, disrupted)
        if taken != action and not (code == 3 and taken == "FailIndex"):
            yield f"exit code {code}{' of a disrupted pod' if disrupted else ''}: {taken} instead of {action}"


def _rule(rule: Document, spec: Document) -> Iterator[str]:
    """The server's rules on one rule of a podFailurePolicy."""
    if rule["action"] not in {"FailJob", "FailIndex", "Ignore", "Count"}:
        yield f"action {rule['action']!r} is not known"
    if rule["action"] == "FailIndex" and "backoffLimitPerIndex" not in spec:
        yield "FailIndex needs backoffLimitPerIndex"
    if ("onExitCodes" in rule) == ("onPodConditions" in rule):
        yield "a rule has one of onExitCodes and onPodConditions"
    for condition in rule.get("onPodConditions", []):
        if condition.get("status") != "True":  # a Job may leave it out, a JobSet may not
            yield 'onPodConditions needs status "True"'
    if "onExitCodes" in rule:
        operator, values = rule["onExitCodes"]["operator"], rule["onExitCodes"]["values"]
        if operator not in {"In", "NotIn"}:
            yield f"operator {operator!r} is not known"
        if not 0 < len(values) <= 255 or values != sorted(set(values)):
            yield f"exit codes {values} must be some, in order, none twice"
        if operator == "In" and 0 in values:
            yield "exit code 0 is no failure"
        containers = [container["name"] for container in spec["template"]["spec"]["containers"]]
        named = rule["onExitCodes"].get("containerName", containers[0])
        if named not in containers:
            yield f"there is no container {named!r}"


def _sharding(name: str, spec: Document) -> Iterator[str]:
    """An index means something only together with LORRY_SHARDS or LORRY_NODES, which must agree with the Job."""
    environment = _environment(spec)
    pod = spec["template"]["spec"]
    if spec.get("completionMode") == "Indexed" and not {"LORRY_SHARDS", "LORRY_NODES"} & set(environment):
        yield "an Indexed Job needs LORRY_SHARDS or LORRY_NODES: the index alone means nothing"
    for variable in ("LORRY_SHARDS", "LORRY_NODES"):
        if variable in environment and environment[variable] != str(spec.get("completions")):
            yield f"{variable} {environment[variable]} is not completions {spec.get('completions')}"
    if "LORRY_NODES" in environment:
        if spec.get("parallelism") != spec.get("completions"):
            yield "all machines must run at once: parallelism must be completions"
        host, _, port = environment.get("LORRY_RENDEZVOUS", "").rpartition(":")
        service = pod.get("subdomain", host.partition(".")[2])  # JobSet gives its pods the subdomain
        if host != f"{name}-0.{service}" or not DNS_LABEL.fullmatch(service):
            yield f"LORRY_RENDEZVOUS {host!r} is not the first pod of {name}"
        ports = [str(port["containerPort"]) for port in pod["containers"][0].get("ports", [])]
        if port not in ports:
            yield f"LORRY_RENDEZVOUS port {port!r} is not among the container's ports"


def _stage(job: Document, version: str) -> Iterator[str]:
    """What Lorry promises of a stage's Job: labels, image, environment, mounts, time to stop."""
    labels = job["spec"]["template"]["metadata"]["labels"]
    own = job["metadata"].get("labels", labels)
    if own != {**labels, **{key: value for key, value in own.items() if key not in labels}}:
        yield "the labels of the Job and of its pods differ"
    if RUN_LABEL not in labels:
        yield f"label {RUN_LABEL}, the run's name, is missing"
    if labels.get("app.kubernetes.io/version") != version:
        yield f"label app.kubernetes.io/version is not {version}"
    stage = labels.get("app.kubernetes.io/component", "")
    if stage not in (*STAGES, SERVE):
        yield f"label app.kubernetes.io/component {stage!r} is no stage"
        return
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    image = "infer" if stage == SERVE else stage
    if not re.fullmatch(rf"(.+/)?lorry-{image}:{re.escape(version)}-[a-z0-9-]+", container["image"]):
        yield f"image {container['image']!r} is not lorry-{image}:{version}-<target>"
    if pod.get("terminationGracePeriodSeconds", 0) < LEAST_GRACE[stage]:
        yield f"terminationGracePeriodSeconds is below {LEAST_GRACE[stage]}: too short to save what {stage} has"
    mounts = {mount["mountPath"]: bool(mount.get("readOnly")) for mount in container["volumeMounts"]}
    environment = _environment(job["spec"])
    expected = {**MOUNTS, "/recipe": True} if environment.get("LORRY_RECIPE", "").startswith("/recipe/") else MOUNTS
    if mounts != expected:
        yield f"mounts (read-only?) are {mounts}, not {expected}"
    yield from (f"environment: nobody reads {name}" for name in environment if name not in ENVIRONMENT)
    if not environment.get("LORRY_RECIPE"):
        yield "LORRY_RECIPE is missing"
    if environment.get("LORRY_RUN") != f"metadata.labels['{RUN_LABEL}']" and not (
        labels.get("app.kubernetes.io/managed-by") == "lorry" and environment.get("LORRY_RUN")
    ):  # a label cannot have every run's name
        yield f"LORRY_RUN does not come from the label {RUN_LABEL}"
    asks = bool(container["resources"].get("limits", {}).get(GPU))
    if asks and stage not in (*GPU_STAGES, SERVE):
        yield f"{stage} needs no GPU"
    yield from _placement(pod, bool(asks), container["image"])
    if asks and "NVIDIA_VISIBLE_DEVICES" in environment:
        yield "NVIDIA_VISIBLE_DEVICES is the device plugin's to set where GPUs are asked for"
    if not asks and environment.get("NVIDIA_VISIBLE_DEVICES") != "none":
        yield "a pod that asks for no GPU needs NVIDIA_VISIBLE_DEVICES none, or it sees all of them"


def _placement(pod: Document, asks: bool, image: str) -> Iterator[str]:
    """A pod with GPUs states on which cards; all pods of a target with cards may follow volumes to a tainted node."""
    required = (pod.get("affinity") or {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution")
    if asks and not required:
        yield "nodeAffinity is missing: the pod could land on a card that its image has no code for"
    for expression in chain.from_iterable(term["matchExpressions"] for term in (required or {}).get(TERMS, [])):
        values = expression.get("values", [])
        if expression["operator"] in {"Gt", "Lt"} and not (len(values) == 1 and values[0].isdecimal()):
            yield f"nodeAffinity: {expression['key']} {expression['operator']} takes one whole number, not {values}"
        if (expression["operator"] in {"Exists", "DoesNotExist"}) == bool(values):
            yield f"nodeAffinity: {expression['key']} {expression['operator']} with values {values}"
    tolerated = any(one.get("key") == GPU and one.get("effect") == "NoSchedule" for one in pod.get("tolerations") or [])
    if tolerated == image.endswith("-cpu"):
        yield f"the taint {GPU} is {'tolerated' if tolerated else 'not tolerated'}"


def _pod(spec: Document, claims: set[str]) -> list[str]:
    """The server's rules on a pod, and what every pod of ours has."""
    found = list(_volumes(spec, claims))
    for field in ("automountServiceAccountToken", "enableServiceLinks"):
        if spec.get(field) is not False:
            found.append(f"{field} must be false")
    for container in spec["containers"]:
        found += chain(_resources(container["resources"]), _container(container))
    return found


def _container(container: Document) -> Iterator[str]:
    if not DNS_LABEL.fullmatch(container["name"]):
        yield f"container name {container['name']!r} is no DNS-1123 label"
    names = [variable["name"] for variable in container.get("env", [])]
    yield from (f"environment: {name} is given twice" for name, count in Counter(names).items() if count > 1)
    for variable in container.get("env", []):
        if not re.fullmatch(r"[-._a-zA-Z][-._a-zA-Z0-9]*", variable["name"]):
            yield f"environment: {variable['name']!r} is no name of a variable"
        if ("value" in variable) == ("valueFrom" in variable):
            yield f"environment: {variable['name']} needs one of value and valueFrom"
    for port in container.get("ports", []):
        if not re.fullmatch(r"(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?", port.get("name", "a")):
            yield f"port name {port['name']!r} is not valid"
        if "hostPort" in port:
            yield 'Pod Security "restricted": hostPort'


def _resources(resources: Document) -> Iterator[str]:
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for kind in ("cpu", "memory"):
        if kind not in requests:
            yield f"resources: no request for {kind}"
    if "memory" not in limits:
        yield "resources: no limit on memory"
    try:
        amounts = {kind: quantity(value) for kind, value in limits.items()}
        requested = {kind: quantity(value) for kind, value in requests.items()}
    except ValueError as error:
        yield f"resources: {error}"
        return
    for kind, amount in requested.items():
        if kind in amounts and amount > amounts[kind]:
            yield f"resources: the request for {kind} is above its limit"
    if requested.get(GPU) != amounts.get(GPU):
        yield f"resources: {GPU} must be the same in requests and limits"
    if amounts.get(GPU, Decimal(1)) % 1 or amounts.get(GPU, 1) < 1:
        yield f"resources: {GPU} must be a whole number, 1 or more"


def _volumes(spec: Document, claims: set[str]) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    if len(volumes) < len(spec.get("volumes", [])):
        yield "two volumes have the same name"
    mounted: set[str] = set()
    for container in spec["containers"]:
        paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
        if len(set(paths)) < len(paths):
            yield "two volumes are mounted at the same path"
        mounted |= {mount["name"] for mount in container.get("volumeMounts", [])}
    yield from (f"volume {name} is mounted but not declared" for name in sorted(mounted - set(volumes)))
    yield from (f"volume {name} is declared but not mounted" for name in sorted(set(volumes) - mounted))
    memory = spec["containers"][0]["resources"].get("limits", {}).get("memory", 0)
    for name, volume in volumes.items():
        sources = set(volume) - {"name"}
        if not DNS_LABEL.fullmatch(name) or len(sources) != 1:
            yield f"volume {name!r} needs a DNS-1123 name and one source"
        yield from (f'Pod Security "restricted": volume of kind {kind}' for kind in sources - RESTRICTED_VOLUMES)
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim is not None and claim not in claims:
            yield f"volume {name}: no claim {claim!r} in storage.yaml"
        if "emptyDir" in volume:
            yield from _empty_dir(name, volume["emptyDir"], memory)


def _empty_dir(name: str, source: Document, memory: Any) -> Iterator[str]:
    try:
        size, limit = quantity(source["sizeLimit"]), quantity(memory)
    except (KeyError, ValueError) as error:
        yield f"volume {name}: sizeLimit: {error}"
        return
    if source.get("medium", "") not in {"", "Memory"}:
        yield f"volume {name}: medium {source['medium']!r} is not known"
    if source.get("medium") == "Memory" and size >= limit:
        yield f"volume {name}: as large as the container's limit on memory, which it counts towards"
    if name == "shm" and source.get("medium") != "Memory":
        yield "volume shm: medium must be Memory"


def _restricted(spec: Document) -> list[str]:
    """Pod Security "restricted", beside its rule on volumes: see the Pod Security Standards of Kubernetes."""
    found = [field for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)]
    pod = spec.get("securityContext", {})
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        own = container.get("securityContext", {})
        if not own.get("runAsNonRoot", pod.get("runAsNonRoot")):
            found.append("runAsNonRoot must be true")
        if not own.get("runAsUser", pod.get("runAsUser")):
            found.append("runAsUser must be given, and not 0")
        if own.get("seccompProfile", pod.get("seccompProfile", {})).get("type") != "RuntimeDefault":
            found.append("seccompProfile must be RuntimeDefault")
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            found.append("allowPrivilegeEscalation must be false")
        if own.get("capabilities") != {"drop": ["ALL"]}:
            found.append("capabilities must drop ALL and add none")
        if own.get("readOnlyRootFilesystem") is not True:
            found.append("readOnlyRootFilesystem must be true")
    if not pod.get("runAsGroup") or not pod.get("fsGroup") or pod.get("fsGroupChangePolicy") != "OnRootMismatch":
        found.append("runAsGroup, fsGroup and fsGroupChangePolicy OnRootMismatch must be given")
    return [f'Pod Security "restricted": {line}' for line in found]


def _environment(spec: Document) -> dict[str, str]:
    """The variables of the container; one taken from the pod or a Secret has the field's path or the key for value."""
    found = {}
    for variable in spec["template"]["spec"]["containers"][0].get("env", []):
        source = variable.get("valueFrom", {})
        taken = source.get("fieldRef", {}).get("fieldPath") or source.get("secretKeyRef", {}).get("key", "")
        found[variable["name"]] = variable.get("value", taken)
    return found
