"""Why nothing starts, from answers of the API: recorded ones, and `written-` ones that were written after source."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import Exit
from stages.host.kubernetes.reasons import (
    Reason,
    Seen,
    has_started,
    job_end,
    lost_node,
    nodes_reason,
    pod_end,
    why_waiting,
)

ANSWERS = Path(__file__).parent / "answers"

WAITING: dict[str, tuple[Exit, bool, str]] = {
    "claims-missing": (
        Exit.USAGE,
        False,
        "no volume claim lorry-data, lorry-models, lorry-runs, lorry-caches; kubectl",
    ),
    "claims-unbound": (Exit.USAGE, False, "no storage class is set); set storageClassName in k8s/storage.yaml"),
    "claims-wrong-class": (Exit.USAGE, False, '"fast" not found); correct storageClassName in k8s/storage.yaml'),
    "cordoned": (Exit.INTERRUPTED, False, "of 3 nodes: 1 cordoned, 1 without the labels"),
    "no-nodes": (Exit.DOES_NOT_FIT, False, "the cluster has no node; add one"),
    "no-priority-class": (Exit.USAGE, True, "no PriorityClass with name urgent was found; correct `priority_class`"),
    "no-service-account": (Exit.USAGE, True, 'serviceaccount "trainer" not found; create it, or correct `service_acc'),
    "other-cards": (Exit.DOES_NOT_FIT, False, "1 without the labels of the target's cards, 1 with the taint node-role"),
    "quota-demands-limits-cpu": (Exit.USAGE, True, "quota team demands limits.cpu; set `limit_cpu: true`"),
    "quota-used-up": (Exit.INTERRUPTED, False, "quota team is used up: it asks for requests.nvidia.com/gpu=1"),
    "taint": (Exit.DOES_NOT_FIT, False, "tolerate it with `tolerations` in the settings (key: team)"),
    "too-few-gpus": (Exit.DOES_NOT_FIT, False, "of 4 nodes: 1 with fewer than 4 free GPUs, 1 with the taint team, 1"),
    "too-little-memory": (Exit.DOES_NOT_FIT, False, "1 with too little memory free"),
    "volume-elsewhere": (Exit.DOES_NOT_FIT, False, "1 out of its volume's reach (had volume node affinity conflict)"),
    "written-config-map-missing": (Exit.USAGE, False, 'configmap "lorry-mine-recipe" not found; create'),
    "written-container-config": (Exit.USAGE, True, 'secret "wandb" not found; create what it names'),
    "written-image-invalid-name": (Exit.USAGE, True, "must be lowercase); correct --registry"),
    "written-image-not-found": (Exit.USAGE, True, "not found); push it: make push"),
    "written-image-registry-unreachable": (Exit.USAGE, True, "no such host); let the nodes reach the registry"),
    "written-image-unauthorized": (Exit.USAGE, True, "authorization failed); name the registry's secret in `pull_s"),
    "written-image-without-registry": (Exit.USAGE, True, "; name the registry that has it with --registry"),
    "written-kueue-cluster-queue-missing": (Exit.USAGE, False, "leads to no ClusterQueue"),
    "written-kueue-cluster-queue-stopped": (Exit.INTERRUPTED, False, "is stopped (ClusterQueue team is inactive)"),
    "written-kueue-no-workload": (Exit.USAGE, False, "but Kueue made no Workload for it"),
    "written-kueue-not-installed": (Exit.USAGE, False, "Kueue is not installed, or you have no right"),
    "written-kueue-preempted": (Exit.INTERRUPTED, False, "was suspended by Kueue (Preempted to accommodate"),
    "written-kueue-queue-full": (Exit.INTERRUPTED, False, "queue lorry, which is full (couldn't assign flavors"),
    "written-kueue-queue-missing": (Exit.USAGE, False, "has no queue lorry in this namespace; set `queue`"),
    "written-kueue-queue-stopped": (Exit.INTERRUPTED, False, "is stopped (LocalQueue lorry is inactive); wait"),
    "written-kueue-queue-too-small": (Exit.DOES_NOT_FIT, False, "asks for more than Kueue's queue lorry ever has"),
    "written-new-node-comes": (Exit.INTERRUPTED, False, "waits for a new node (pod triggered scale-up"),
    "written-newest-taints": (
        Exit.DOES_NOT_FIT,
        False,
        "2 with taints that it does not tolerate, 1 without the labels",
    ),
    "written-nodes-not-ready": (Exit.INTERRUPTED, False, "of 3 nodes: 1 not-ready, 2 cordoned; wait until"),
    "written-openshift-uid": (Exit.USAGE, True, "leave the uid to OpenShift: `arbitrary_uid: true`"),
    "written-pod-security": (Exit.USAGE, True, 'violates PodSecurity "restricted:latest"'),
    "written-too-few-gpus": (Exit.DOES_NOT_FIT, False, "of 5 nodes: 1 with fewer than 4 free GPUs, 1 with the taint t"),
    "written-volume-elsewhere": (Exit.DOES_NOT_FIT, False, "1 out of its volume's reach (had volume node affinity"),
    "written-volume-in-use": (Exit.INTERRUPTED, False, "end the pod there, such as pod/lorry-load"),
}
NOTHING = ("written-image-first-try", "written-kueue-admitted", "written-quota-then-made")
"""Answers that say of nothing that it is in the way."""

PODS: dict[str, tuple[Exit, str]] = {
    "written-devices-unavailable": (Exit.DOES_NOT_FIT, "unavailable for nvidia.com/gpu. Requested: 4, Available: 3"),
    "written-drained": (Exit.INTERRUPTED, "was evicted, such as by a drain of its node; it starts again and resumes"),
    "written-node-gone": (Exit.INTERRUPTED, "lost its node, which is no longer in the cluster"),
    "written-node-short-of-memory": (Exit.INTERRUPTED, "was stopped by its node (The node was low on resource: memory"),
    "written-node-tainted": (Exit.INTERRUPTED, "lost its node, which no longer answers or got a taint"),
    "written-out-of-memory": (Exit.DOES_NOT_FIT, "took more memory than 64Gi (OOMKilled); give it more"),
    "written-preempted": (Exit.INTERRUPTED, "made way for a pod of higher priority"),
    "written-shm-full": (
        Exit.DOES_NOT_FIT,
        'EmptyDir volume "shm" exceeds the limit "8Gi".; give it more',
    ),
}

JOBS: dict[str, tuple[int, str]] = {
    "deadline-never-ran": (Exit.DOES_NOT_FIT, "deadline of 4 s, and no pod of it ran: no node for its pod; of 3 nodes"),
    "written-data-unusable": (Exit.DATA, "failed (PodFailurePolicy): pod/lorry-train-x7k2p exited with 3"),
    "written-deadline-pods-gone": (Exit.INTERRUPTED, "nothing says whether a pod ran; see `lorry status`"),
    "written-deadline-while-it-ran": (Exit.INTERRUPTED, "its state is saved, run the same command again"),
    "written-failed-indexes": (Exit.DATA, "failed indexes, counted from 0: 0,4-5: pod/"),
}


def answer(name: str) -> Seen:
    """What the API answered."""
    found = json.loads((ANSWERS / f"{name}.json").read_text())
    return Seen(found["job"], found["pods"], found["events"], found["claims"], found.get("workloads"))


def end_of(seen: Seen, waiting: Reason | None = None) -> Reason | None:
    """How a Job ended, for one who sees it for the first time."""
    ends = [end for end in map(pod_end, seen.pods) if end is not None]
    return job_end(seen, ends, any(map(has_started, seen.pods)), waiting)


def test_each_answer_is_used_and_says_where_it_is_from() -> None:
    names = {path.stem for path in ANSWERS.glob("*.json")}
    assert names == {*WAITING, *NOTHING, *PODS, *JOBS, "written-node-lost"}
    for name in names:
        source = json.loads((ANSWERS / f"{name}.json").read_text())["source"]
        assert source.startswith("written after" if name.startswith("written-") else "recorded from Kubernetes")


@pytest.mark.parametrize("name", WAITING)
def test_why_nothing_starts(name: str) -> None:
    code, is_final, expected = WAITING[name]
    seen = answer(name)
    found = why_waiting(seen)
    assert found is not None
    assert expected in found.text
    assert (found.code, found.is_final, "\n" in found.text) == (code, is_final, False)
    assert "; " in found.text, "no cure"
    assert end_of(seen) is None


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_in_the_way(name: str) -> None:
    assert why_waiting(answer(name)) is None


@pytest.mark.parametrize("name", PODS)
def test_how_a_pod_ended(name: str) -> None:
    code, expected = PODS[name]
    (found,) = filter(None, map(pod_end, answer(name).pods))
    assert expected in found.text
    assert found.code == code


@pytest.mark.parametrize("name", JOBS)
def test_how_a_job_ended(name: str) -> None:
    code, expected = JOBS[name]
    found = end_of(answer(name))
    assert found is not None
    assert expected in found.text
    assert found.code == code
    assert "log.txt" not in found.text


def test_a_lost_node() -> None:
    (pod,) = answer("written-node-lost").pods
    found = lost_node(pod)
    assert found is not None
    assert found.text.startswith("node gpu-a of pod/lorry-train-x7k2p no longer answers; ")
    assert pod_end(pod) is None


def test_devices_claims_in_a_newer_schedulers_words_are_no_volumes() -> None:
    """A claim whose class binds it at its first pod is pending until then."""
    seen = answer("written-too-few-gpus")
    (condition,) = [one for one in seen.pods[-1]["status"]["conditions"] if one["type"] == "PodScheduled"]
    condition["message"] += " no new claims to deallocate, preemption: 0/1 nodes are available."
    mounted = {"name": "caches", "persistentVolumeClaim": {"claimName": "lorry-caches"}}
    seen.pods[-1]["spec"]["volumes"] = [mounted]
    found = why_waiting(replace(seen, claims=answer("claims-unbound").claims))
    assert found is not None and found.kind == why_waiting(answer("written-too-few-gpus")).kind  # type: ignore[union-attr]


def test_a_mount_that_has_succeeded_since_is_no_reason() -> None:
    seen = answer("written-volume-in-use")
    assert why_waiting(seen) is not None
    later = {**seen.events[-1], "reason": "SuccessfulAttachVolume", "message": "AttachVolume.Attach succeeded"}
    found = why_waiting(replace(seen, events=[*seen.events, later]))
    assert found is None or not found.kind.startswith(("mount", "volume"))


def test_a_workload_that_kueue_has_stopped_is_not_waited_for() -> None:
    seen = answer("written-kueue-preempted")
    assert why_waiting(seen).is_final is False  # type: ignore[union-attr]
    assert seen.workloads is not None
    seen.workloads[-1].setdefault("spec", {})["active"] = False
    found = why_waiting(seen)
    assert found is not None and (found.kind, found.is_final, found.code) == ("deactivated", True, Exit.INTERRUPTED)


def test_at_a_deadline_the_last_reason_counts() -> None:
    seen = answer("written-deadline-pods-gone")
    found = end_of(seen, waiting=Reason("image", "its node cannot pull the image i; push it", Exit.USAGE))
    assert found is not None
    assert found.code == Exit.USAGE
    assert found.text.endswith("no pod of it ran: its node cannot pull the image i; push it")


@pytest.mark.parametrize(
    ("code", "expected"),
    [(1, 1), (2, 2), (3, 3), (4, 4), (75, 75), (130, 75), (143, 75), (137, 1), (139, 1), (42, 1)],
)
def test_the_stages_exit_code_is_that_of_the_command(code: int, expected: int) -> None:
    (pod,) = answer("written-data-unusable").pods
    pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] = code
    found = pod_end(pod)
    assert found is not None
    assert (found.code, f"({code})" in found.text or f"exited with {code};" in found.text) == (expected, True)


def test_an_older_jobs_events_do_not_count() -> None:
    """A Job of the same name that was replaced."""
    seen = answer("quota-used-up")
    job: dict[str, Any] = {**seen.job, "metadata": {**seen.job["metadata"], "uid": "another"}}
    assert why_waiting(Seen(job, seen.pods, seen.events, seen.claims)) is None


def test_a_message_that_is_not_known_is_passed_on() -> None:
    pod = {"metadata": {"name": "p"}, "spec": {"containers": [{}]}}
    assert "1 node(s) were eaten" in nodes_reason("0/1 nodes are available: 1 node(s) node(s) were eaten.", pod).text
    found = nodes_reason("running PreBind plugin: binding volumes: timed out", pod)
    assert "binding volumes: timed out; see `kubectl describe pods`" in found.text
