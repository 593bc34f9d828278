"""Why a Job of a cluster does not start, and how its pods ended: read from the API's objects, as plain dicts.

Each function takes objects as the API's JSON has them. The words of scheduler, kubelet, controllers and Kueue change
between versions; tests/k8s/answers/ has an answer for each reason. A message that is not known is passed on as it is.
"""

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from stages.contract.errors import Exit

Document = dict[str, Any]

CONTAINER = "lorry"
"""The name of the container that runs a stage."""

QUEUE = "kueue.x-k8s.io/queue-name"

KILLED = 128
"""An exit code above it is a signal's number plus this."""


@dataclass(frozen=True)
class Reason:
    """Why a Job does not start, or how a pod ended."""

    kind: str
    """A short name: the same reason with other figures is no news."""
    text: str
    """What was found, and after a semicolon what to do."""
    code: int
    """The exit code of a launch that this reason ends."""
    is_final: bool = False
    """Whether waiting does not help."""


@dataclass(frozen=True)
class Seen:
    """A Job and all that belongs to it, at one look."""

    job: Document
    pods: list[Document] = field(default_factory=list)
    """The Job's own pods, the oldest first."""
    events: list[Document] = field(default_factory=list)
    """Events of the namespace, the oldest first."""
    claims: list[Document] | None = None
    """The namespace's volume claims; None: not known."""
    workloads: list[Document] | None = None
    """Kueue's Workloads in the namespace; None: not known."""


def condition(thing: Document, kind: str) -> Document | None:
    """A condition of an object by its type, if it is true; else None."""
    found = [one for one in thing.get("status", {}).get("conditions") or [] if one["type"] == kind]
    return found[-1] if found and found[-1].get("status") == "True" else None


def has_started(pod: Document) -> bool:
    """Whether the container of a pod has ever run."""
    states = [one.get("state") or {} for one in pod.get("status", {}).get("containerStatuses") or []]
    return any("running" in state or (state.get("terminated") or {}).get("startedAt") for state in states)


def exit_code(pod: Document) -> int | None:
    """The exit code of the stage in a pod; None if it runs or never ran."""
    for one in pod.get("status", {}).get("containerStatuses") or []:
        ended = (one.get("state") or {}).get("terminated")
        if one["name"] == CONTAINER and ended:
            return int(ended["exitCode"])
    return None


def why_waiting(seen: Seen) -> Reason | None:
    """Why a Job has no pod that runs, or too few of them; None if nothing is in the way, or nothing says what."""
    if seen.job["spec"].get("suspend"):
        return queue_reason(seen.job, seen.workloads)
    waiting = [pod for pod in seen.pods if pod.get("status", {}).get("phase") == "Pending"]
    for pod in waiting:
        found = container_reason(pod, seen.events) or scheduling_reason(pod, seen)
        if found is not None:
            return found
    wanted = seen.job["spec"].get("parallelism", 1) - seen.job.get("status", {}).get("succeeded", 0)
    alive = [pod for pod in seen.pods if pod.get("status", {}).get("phase") in ("Pending", "Running")]
    return creation_reason(_events_of(seen, "Job", seen.job)) if len(alive) < wanted else None


def queue_reason(job: Document, workloads: list[Document] | None) -> Reason | None:
    """Why Kueue does not admit a suspended Job. `workloads` are those of its namespace; None: Kueue has none here."""
    queue = job["metadata"].get("labels", {}).get(QUEUE)
    if queue is None:
        return Reason(
            "suspended",
            "the Job is suspended; start it: kubectl patch job"
            f' {job["metadata"]["name"]} --type merge --patch \'{{"spec":{{"suspend":false}}}}\'',
            Exit.INTERRUPTED,
        )
    own = [one for one in workloads or [] if _is_owned(one, job)]
    if not own:
        unseen = "no Workload can be seen (Kueue is not installed, or you have no right to list Workloads)"
        missing = unseen if workloads is None else "Kueue made no Workload for it"
        return Reason(
            "no workload",
            f"suspended for Kueue's queue {queue}, but {missing}; install Kueue, or let it manage this namespace"
            " (managedJobsNamespaceSelector), or remove `queue` from the settings",
            Exit.USAGE,
        )
    workload = own[-1]
    if condition(workload, "Admitted"):
        return None
    found = [one for one in workload.get("status", {}).get("conditions") or [] if one["type"] == "QuotaReserved"]
    if (stopped := _stopped_reason(workload)) is not None:
        return stopped
    if found and found[-1]["status"] == "False":
        return _unreserved_reason(str(queue), _line(found[-1].get("message", "")))
    return Reason("queued", f"waits in Kueue's queue {queue}; see `kubectl get workloads`", Exit.INTERRUPTED)


def _stopped_reason(workload: Document) -> Reason | None:
    """Why Kueue has stopped a Workload; None if it has not."""
    evicted = condition(workload, "Evicted")
    why = f" ({_line(evicted.get('message', ''))})" if evicted else ""
    if workload.get("spec", {}).get("active") is False:
        text = f"Kueue has stopped it for good{why}; delete the Job, and run the same command again"
        return Reason("deactivated", text, Exit.INTERRUPTED, is_final=True)
    if evicted:
        text = f"was suspended by Kueue{why}; its state is saved, and Kueue starts it again"
        return Reason("kueue evicted", text, Exit.INTERRUPTED)
    return None


def _unreserved_reason(queue: str, message: str) -> Reason:
    """The reason behind the message of a Workload that has no quota."""
    if re.search(r"LocalQueue .* doesn't exist", message):
        text = f"Kueue has no queue {queue} in this namespace; set `queue` to one of `kubectl get localqueues`"
        return Reason("no queue", text, Exit.USAGE)
    if re.search(r"ClusterQueue .*(doesn't exist|not found)", message):
        text = f"Kueue's queue {queue} leads to no ClusterQueue ({message}); ask the cluster's admin to create it"
        return Reason("no cluster queue", text, Exit.USAGE)
    if "inactive" in message or "stopped" in message.lower():
        text = f"Kueue's queue {queue} is stopped ({message}); wait, or ask the cluster's admin to start it"
        return Reason("queue stopped", text, Exit.INTERRUPTED)
    if "insufficient unused quota" in message:
        text = f"waits in Kueue's queue {queue}, which is full ({message}); it starts when other jobs end"
        return Reason("queue full", text, Exit.INTERRUPTED)
    if "insufficient quota" in message or "maximum capacity" in message or "no quota" in message:
        text = f"asks for more than Kueue's queue {queue} ever has ({message}); ask for fewer GPUs, or set `queue`"
        return Reason("queue too small", text, Exit.DOES_NOT_FIT)
    text = f"Kueue's queue {queue} does not admit it ({message}); see `kubectl get workloads`"
    return Reason("not admitted", text, Exit.INTERRUPTED)


def creation_reason(events: list[Document]) -> Reason | None:
    """Why no pod of a Job can be made, from the Job's events."""
    made = [one for one in events if one.get("reason") in ("FailedCreate", "SuccessfulCreate")]
    if not made or made[-1]["reason"] == "SuccessfulCreate":
        return None
    message = _line(made[-1].get("message", ""))
    quota = re.search(r"exceeded quota: (\S+), requested: (.*), used: (.*), limited: (.*)", message)
    if quota:
        name, requested, used, limited = quota.groups()
        text = (
            f"quota {name} is used up: it asks for {requested}, {used} is used of {limited}; wait until other pods end,"
            " or ask for less (--gpus, `resources`), or ask the cluster's admin for more"
        )
        return Reason("quota", text, Exit.INTERRUPTED)
    needed = re.search(r"failed quota: (\S+): must specify (.*)", message)
    if needed:
        wants = "set `limit_cpu: true`" if "limits.cpu" in needed[2] else "add it to `pod`"
        text = f"quota {needed[1]} demands {needed[2]}; {wants} in the settings, or ask for a LimitRange with a default"
        return Reason("quota demands", text, Exit.USAGE, is_final=True)
    refusal = message.partition(" is forbidden: ")[2] or message
    for word, kind, cure in REFUSALS:
        if word in message.lower():
            return Reason(kind, f"the cluster refuses its pods: {refusal}; {cure}", Exit.USAGE, is_final=True)
    return Reason("no pod", f"no pod can be made: {refusal}; correct what it names", Exit.USAGE)


REFUSALS = (
    ("violates podsecurity", "pod security", "correct `pod` in the settings"),
    (
        "security context constraint",
        "arbitrary uid",
        "leave the uid to OpenShift: `arbitrary_uid: true` in the settings",
    ),
    ("serviceaccount", "service account", "create it, or correct `service_account` in the settings"),
    ("service account", "service account", "create it, or correct `service_account` in the settings"),
    ("priorityclass", "priority class", "correct `priority_class` in the settings"),
)
"""Words of a refused pod's message, the kind of the reason, and what to do."""


def container_reason(pod: Document, events: list[Document]) -> Reason | None:
    """Why the container of a pod that has a node does not start."""
    for one in pod.get("status", {}).get("containerStatuses") or []:
        waiting = (one.get("state") or {}).get("waiting") or {}
        reason, message = waiting.get("reason", ""), _line(waiting.get("message", ""))
        if reason in ("ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"):
            pulls = [event for event in _events_about(events, "Pod", pod) if event.get("reason") == "Failed"]
            said = [_line(event.get("message", "")) for event in pulls]
            causes = [text for text in said if "Failed to pull image" in text]
            return _image_reason(one["image"], reason, causes[-1] if causes else message)
        if reason == "CreateContainerConfigError":
            text = (
                f"its container cannot be set up: {message}; create what it names in this namespace, or correct `pod`"
            )
            return Reason("container config", f"{text} in the settings", Exit.USAGE, is_final=True)
        if reason in ("CreateContainerError", "RunContainerError"):
            text = f"its container cannot be created: {message}; correct the node's container runtime, or `pod`"
            return Reason("container", f"{text} in the settings", Exit.DOES_NOT_FIT)
    return _mount_reason(_events_about(events, "Pod", pod))


def _image_reason(image: str, reason: str, message: str) -> Reason:
    """Why an image cannot be pulled. `message` is that of the node's container runtime."""
    low = message.lower()
    if reason == "InvalidImageName":
        cure = "correct --registry, such as host/team"
    elif any(word in low for word in ("unauthorized", "denied", "authentication", "authorization", "forbidden")):
        cure = "name the registry's secret in `pull_secrets` of the settings"
    elif "x509" in low or "http response to https" in low:
        cure = "let the nodes trust the registry's certificate"
    elif any(word in low for word in ("no such host", "timeout", "refused", "unreachable", "deadline exceeded")):
        cure = "let the nodes reach the registry, or name another with --registry"
    elif "/" not in image:
        cure = "name the registry that has it with --registry, after `make push TARGET=… REGISTRY=…`"
    else:
        cure = "push it: make push TARGET=… REGISTRY=…"
    found = f" ({message})" if message else ""
    return Reason("image", f"its node cannot pull the image {image}{found}; {cure}", Exit.USAGE, is_final=True)


def _mount_reason(events: list[Document]) -> Reason | None:
    """Why a pod that has a node waits for its volumes, from its events."""
    steps = ("FailedMount", "FailedAttachVolume", "SuccessfulAttachVolume", "Pulling", "Pulled", "Created")
    last = next((one for one in reversed(events) if one.get("reason") in steps), None)
    if last is None or not last["reason"].startswith("Failed"):
        return None
    message = _line(last.get("message", ""))
    if "Multi-Attach" in message:
        text = f"its volume is in use on another node ({message}); end the pod there, such as pod/lorry-load"
        return Reason("volume in use", text, Exit.INTERRUPTED)
    if re.search(r'(configmap|secret) "?[^" ]+"? not found', message):
        text = f"its pod cannot be set up: {message}; create what it names, or correct `pod` in the settings"
        return Reason("mount", text, Exit.USAGE)
    return Reason("mount", f"its volumes cannot be mounted: {message}; see `kubectl describe pod`", Exit.INTERRUPTED)


def scheduling_reason(pod: Document, seen: Seen) -> Reason | None:
    """Why a pod has no node: its claims, or else the scheduler's message and the autoscaler's events."""
    found = [one for one in pod.get("status", {}).get("conditions") or [] if one["type"] == "PodScheduled"]
    if not found or found[-1]["status"] == "True":
        return None
    events = _events_about(seen.events, "Pod", pod)
    if found[-1].get("reason") == "SchedulingGated":
        gates = ", ".join(one["name"] for one in pod["spec"].get("schedulingGates") or [])
        return Reason("gated", f"its pod is held back by {gates}; it starts when that lets it", Exit.INTERRUPTED)
    message = _line(found[-1].get("message", ""))
    # every message of a newer scheduler speaks of "no new claims to deallocate", which are devices
    about_volumes = re.search(r"persistentvolumeclaim|volumes? to bind", message, re.IGNORECASE)
    claims = claim_reason(pod, seen) if about_volumes else None
    if claims is not None:
        return claims
    grows = [one for one in events if one.get("reason") in ("TriggeredScaleUp", "NotTriggerScaleUp", "Nominated")]
    if grows and grows[-1]["reason"] != "NotTriggerScaleUp":
        text = f"waits for a new node ({_line(grows[-1].get('message', ''))}); it starts when the node is there"
        return Reason("scale up", text, Exit.INTERRUPTED)
    return nodes_reason(message, pod)


def claim_reason(pod: Document, seen: Seen) -> Reason | None:
    """Which of a pod's volume claims is missing or unbound, and why."""
    names = [one["persistentVolumeClaim"]["claimName"] for one in _volumes(pod) if "persistentVolumeClaim" in one]
    claims = {one["metadata"]["name"]: one for one in seen.claims or []}
    missing = [name for name in dict.fromkeys(names) if name not in claims]
    if missing and seen.claims is not None:
        text = f"no volume claim {', '.join(missing)}; kubectl apply -f k8s/storage.yaml, or name yours in `claims`"
        return Reason("no claim", text, Exit.USAGE)
    unbound = [
        name for name in dict.fromkeys(names) if claims.get(name, {}).get("status", {}).get("phase") == "Pending"
    ]
    if not unbound:
        return None
    causes = [
        _line(event.get("message", ""))
        for name in unbound
        for event in _events_about(seen.events, "PersistentVolumeClaim", claims[name])
        if event.get("reason") in ("FailedBinding", "ProvisioningFailed")
    ]
    classes = {claims[name]["spec"].get("storageClassName") for name in unbound}
    if classes & {None, ""}:
        cure = "set storageClassName in k8s/storage.yaml to one of `kubectl get storageclass`, then create them again"
    elif any("not found" in cause for cause in causes):
        cure = "correct storageClassName in k8s/storage.yaml (kubectl get storageclass), then create them again"
    else:
        cure = "see `kubectl describe pvc`, or ask the cluster's admin for volumes of that size and access mode"
    why = f" ({causes[-1]})" if causes else ""
    return Reason("unbound", f"volume claim {', '.join(unbound)} is not bound{why}; {cure}", Exit.USAGE)


NEAREST = ("volume", "gpus", "resources", "taint", "not ready", "cordoned", "cards", "other")
"""Why a node does not take a pod, in the order in which a cure is near: a node whose volume is in the way fits
otherwise."""


def nodes_reason(message: str, pod: Document) -> Reason:
    """Why no node takes a pod, from the scheduler's message, such as `0/3 nodes are available: 1 Insufficient cpu`."""
    found = re.match(r"0/(\d+) nodes are available: (.*?)\.?(?: [^.]*preemption: .*)?$", message)
    if found is None:
        none = "no nodes available" in message
        return Reason(
            "no node",
            "the cluster has no node; add one, or wait for the autoscaler"
            if none
            else f"no node for its pod: {message}; see `kubectl describe pods`",
            Exit.DOES_NOT_FIT if none else Exit.INTERRUPTED,
        )
    gpus = _gpus(pod)
    causes: dict[str, list[str]] = {}
    for clause in re.split(r", (?=\d+ )", found[2]):
        kind, text = _node_clause(clause, gpus)
        causes.setdefault(kind, []).append(text)
    nearest = next(kind for kind in NEAREST if kind in causes)
    texts = ", ".join(text for kind in NEAREST for text in causes.get(kind, []))
    taint = re.search(r"taint (\S+)", " ".join(causes.get("taint", [])))
    cures = {
        "volume": "k8s/storage.yaml says how volume and cards come together",
        "gpus": "wait until GPUs are free, or ask for fewer with --gpus",
        "resources": "wait, or ask for less with `resources` in the settings",
        "taint": "tolerate it with `tolerations` in the settings"
        f" ({f'key: {taint[1]}' if taint else '`kubectl describe nodes` shows its key'})",
        "not ready": "wait until these nodes are ready: kubectl get nodes",
        "cordoned": "wait until these nodes take pods again: kubectl get nodes",
        "cards": "give the --target of your cards, or label the nodes (docs/kubernetes.md): kubectl get nodes -L"
        " nvidia.com/gpu.product,nvidia.com/gpu.memory",
        "other": "see `kubectl describe nodes`",
    }
    code = Exit.INTERRUPTED if nearest in ("not ready", "cordoned") else Exit.DOES_NOT_FIT
    return Reason(nearest, f"no node for its pod; of {found[1]} nodes: {texts}; {cures[nearest]}", code)


CLAUSES = (
    ("Insufficient \\S*gpu", "gpus", "with fewer than {gpus} free GPUs"),
    ("Insufficient (.*)", "resources", "with too little {0} free"),
    ("(.*(?:volume|PersistentVolume).*)", "volume", "out of its volume's reach ({0})"),
    (r"(?:were unschedulable|.*taint \{node\.kubernetes\.io/unschedulable.*)", "cordoned", "cordoned"),
    (r".*taint \{node\.kubernetes\.io/([^:}]+).*", "not ready", "{0}"),
    (r".*taint \{((?:node-role\.kubernetes|node\.cloudprovider)[^:}]+).*", "other", "with the taint {0}"),
    (r".*taint \{([^:}]+).*", "taint", "with the taint {0}"),
    (r".*untolerated taint\(s\).*", "taint", "with taints that it does not tolerate"),
    (".*(?:affinity/selector|node affinity|node selector)", "cards", "without the labels of the target's cards"),
    ("(.*)", "other", "{0}"),
)
"""What the scheduler says of nodes, the kind of it, and the same in plain words. The first that matches counts."""


def _node_clause(clause: str, gpus: int) -> tuple[str, str]:
    """The kind and the plain text of one clause of the scheduler's message, such as `2 Insufficient nvidia.com/gpu`."""
    number, cause = re.match(r"(\d+ )?(?:node\(s\) )?(.*)", clause).groups()  # type: ignore[union-attr]  # always
    for pattern, kind, text in CLAUSES:
        found = re.fullmatch(pattern, cause)
        if found:
            return kind, f"{number or ''}{text.format(*found.groups(), gpus=gpus)}"
    raise AssertionError(clause)


def pod_end(pod: Document) -> Reason | None:
    """How a pod ended, unless it did well; None if it has not ended. The code is that of the stage where it had one.

    The container's own code is passed on if it is one of Lorry's. Out of memory is DOES_NOT_FIT, and a signal what it
    is on a host: INTERRUPTED or CRASHED.
    """
    status, name = pod.get("status", {}), pod["metadata"]["name"]
    code, message = exit_code(pod), _line(status.get("message", ""))
    ended = [(one.get("state") or {}).get("terminated") or {} for one in status.get("containerStatuses") or []]
    if any(one.get("reason") == "OOMKilled" for one in ended):
        limit = pod["spec"]["containers"][0].get("resources", {}).get("limits", {}).get("memory", "its limit")
        text = f"pod/{name} took more memory than {limit} (OOMKilled); give it more with `resources` in the settings"
        return Reason("out of memory", text, Exit.DOES_NOT_FIT)
    if status.get("phase") == "Succeeded" or code == Exit.DONE:
        return None
    disrupted = condition(pod, "DisruptionTarget")
    if disrupted is not None and (code is not None or status.get("phase") == "Failed"):
        return _disruption(name, disrupted, message)
    for reason, kind, what, reason_code in POD_REASONS:
        if status.get("reason") == reason:
            return Reason(kind, f"pod/{name} {what.format(message=message)}", reason_code)
    if status.get("phase") == "Failed" and code is None:
        return Reason("failed", f"pod/{name} failed; see `kubectl describe pod {name}`", Exit.CRASHED)
    return None if code is None else _stage_end(name, code)


def _stage_end(name: str, code: int) -> Reason:
    """The end of a pod whose stage exited with a code that is not 0."""
    if code in (Exit.INTERRUPTED, KILLED + signal.SIGINT, KILLED + signal.SIGTERM):
        return Reason("interrupted", f"pod/{name} was interrupted ({code}); its state is saved", Exit.INTERRUPTED)
    own = code if code in tuple(Exit) else Exit.CRASHED
    return Reason(f"exited {code}", f"pod/{name} exited with {code}; its last lines are above", own)


EVICTED = "was evicted by its node: {message}; give it more with `resources` in the settings"
REFUSED = "was refused by its node: {message}; the Job tries again"
WITH_NODE = "ended with its node ({message}); it starts on another"
POD_REASONS = (
    ("Evicted", "evicted", EVICTED, Exit.DOES_NOT_FIT),
    ("UnexpectedAdmissionError", "refused by node", REFUSED, Exit.DOES_NOT_FIT),
    ("NodeAffinity", "refused by node", REFUSED, Exit.DOES_NOT_FIT),
    ("NodeLost", "node lost", WITH_NODE, Exit.INTERRUPTED),
    ("NodeShutdown", "node lost", WITH_NODE, Exit.INTERRUPTED),
    ("Terminated", "node lost", WITH_NODE, Exit.INTERRUPTED),
)
"""What the kubelet and the node controller write as a pod's reason, the kind of it, the text and the exit code."""


DISRUPTIONS = {
    "PreemptionByScheduler": "made way for a pod of higher priority",
    "EvictionByEvictionAPI": "was evicted, such as by a drain of its node",
    "DeletionByTaintManager": "lost its node, which no longer answers or got a taint",
    "DeletionByPodGC": "lost its node, which is no longer in the cluster",
    "TerminationByKubelet": "was stopped by its node",
}


def _disruption(name: str, disrupted: Document, message: str) -> Reason:
    """The end of a pod that somebody else needed to end: its Job starts it again, and does not count it."""
    what = DISRUPTIONS.get(disrupted.get("reason", ""), f"was disrupted: {_line(disrupted.get('message', ''))}")
    detail = f" ({message})" if message else ""
    kind = "node lost" if "lost its node" in what else "evicted"
    return Reason(kind, f"pod/{name} {what}{detail}; it starts again and resumes", Exit.INTERRUPTED)


def lost_node(pod: Document) -> Reason | None:
    """Whether the node of a pod that runs no longer answers."""
    if pod.get("status", {}).get("phase") != "Running":
        return None
    ready = [one for one in pod["status"].get("conditions") or [] if one["type"] == "Ready"]
    unknown = ready and ready[-1].get("reason") == "NodeStatusUnknown"
    if not unknown and pod["status"].get("reason") != "NodeLost":
        return None
    node, name = pod["spec"].get("nodeName"), pod["metadata"]["name"]
    text = f"node {node} of pod/{name} no longer answers; the pod starts elsewhere once the cluster gives the node up"
    return Reason("node lost", f"{text} (kubectl get node {node})", Exit.INTERRUPTED)


def job_end(seen: Seen, ends: list[Reason], started: bool, waiting: Reason | None) -> Reason | None:
    """How a Job ended; None while it has not. The code of one that is complete is DONE.

    `ends` are those of its pods so far, the oldest first. `started`: whether a pod of it was seen to run. `waiting` is
    the last reason why none did. Where neither is known, the events say it: the pods of a Job past its deadline are
    gone.
    """
    job, name = seen.job, seen.job["metadata"]["name"]
    if condition(job, "Complete"):
        return Reason("complete", f"job/{name} is complete", Exit.DONE)
    failed = condition(job, "Failed")
    if failed is None:
        return None
    if failed.get("reason") == "DeadlineExceeded":
        limit = job["spec"].get("activeDeadlineSeconds")
        about = [one for one in seen.events if one["involvedObject"].get("name", "").startswith(f"{name}-")]
        scheduling = [one for one in about if one.get("message", "").startswith(("0/", "no nodes"))]
        if waiting is None and scheduling:
            waiting = nodes_reason(_line(scheduling[-1]["message"]), job["spec"].get("template") or {"spec": {}})
        if started or any(one.get("reason") == "Started" for one in about):
            text = f"job/{name} reached its deadline of {limit} s; its state is saved, run the same command again"
            return Reason("deadline", text, Exit.INTERRUPTED)
        why = f"no pod of it ran: {waiting.text}" if waiting else "nothing says whether a pod ran; see `lorry status`"
        text = f"job/{name} reached its deadline of {limit} s, and {why}"
        return Reason("deadline", text, waiting.code if waiting else Exit.INTERRUPTED)
    own = [one for one in ends if one.code != Exit.INTERRUPTED] or ends
    indexes = job.get("status", {}).get("failedIndexes")
    which = f"; failed indexes, counted from 0: {indexes}" if indexes else ""
    why = own[-1].text if own else f"{_line(failed.get('message', ''))}; its pods are gone, run the same command again"
    return Reason("failed", f"job/{name} failed ({failed.get('reason')}){which}: {why}", own[-1].code if own else 1)


def _events_of(seen: Seen, kind: str, thing: Document) -> list[Document]:
    return _events_about(seen.events, kind, thing)


def _events_about(events: Iterable[Document], kind: str, thing: Document) -> list[Document]:
    """The events about an object: by its uid where the event has one, as a name comes again."""
    name, uid = thing["metadata"]["name"], thing["metadata"].get("uid")
    return [
        event
        for event in events
        if event.get("involvedObject", {}).get("kind") == kind
        and event["involvedObject"].get("name") == name
        and (not uid or event["involvedObject"].get("uid", uid) == uid)
    ]


def _is_owned(thing: Document, owner: Document) -> bool:
    """Whether an object belongs to another: by its uid."""
    uids = [one.get("uid") for one in thing["metadata"].get("ownerReferences") or []]
    return owner["metadata"].get("uid") in uids


def _volumes(pod: Document) -> list[Document]:
    return list(pod["spec"].get("volumes") or [])


def _gpus(pod: Document) -> int:
    """The number of GPUs that a pod asks for."""
    containers = pod["spec"].get("containers") or [{}]
    limits = containers[0].get("resources", {}).get("limits", {})
    return sum(int(value) for key, value in limits.items() if key.endswith("/gpu"))


def _line(text: str) -> str:
    """A text as one line."""
    return " ".join(str(text).split())
