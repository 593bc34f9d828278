"""Every manifest and every overlay against the schemas, the server's rules and Lorry's promises; and the checks
themselves against manifests broken on purpose."""

import copy
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from tests.k8s.checks import GPU, GPU_STAGES, STAGES, failure_action, problems, quantity, schema_problems
from tests.k8s.manifests import (
    K8S,
    REPOSITORY,
    Document,
    build,
    built_overlay,
    children,
    jobs,
    manifest_files,
    overlay_names,
    read,
)

VERSION: str = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
TARGETS = {
    name: facts
    for name, facts in tomllib.loads((REPOSITORY / "images" / "targets.toml").read_text()).items()
    if "variant_of" not in facts
}
"""The targets with a card of their own; a variant (other software for the same card) has no overlay."""
CLAIMS = {claim["metadata"]["name"] for claim in read((K8S / "storage.yaml").read_text())}
OLDEST = "1.29"
"""What the manifests say they need. (The schemas up to 1.28 want onPodConditions in rules on exit codes too.)"""
NEWEST = kubernetes_validate.latest_version()


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(K8S)) for path in paths]


@pytest.fixture(params=manifest_files(), ids=ids(manifest_files()))
def file(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(params=sorted(TARGETS))
def target(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def load(name: str, kind: str = "Job") -> Document:
    """The document of that kind in a file of k8s/."""
    (document,) = [document for document in read((K8S / name).read_text()) if document["kind"] == kind]
    return document


class TestFiles:
    def test_schema(self, file: Path) -> None:
        for document in read(file.read_text()):
            for version in (OLDEST, "1.33", NEWEST):
                assert schema_problems(document, version) == []

    def test_what_schemas_do_not_know(self, file: Path) -> None:
        for document in read(file.read_text()):
            assert problems(document, CLAIMS, VERSION) == []

    def test_says_what_it_is(self, file: Path) -> None:
        """Each file can be used by one who has read nothing else, and the paths it names are there."""
        comment = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
        for heading in ("What it shows:", "# Apply", "# Check", "# Clean"):
            assert heading in comment
        assert f"kubectl apply -f k8s/{file.relative_to(K8S)}".replace("/base/", "/") in comment
        for name in re.findall(r"k8s/[\w/-]+\.yaml", comment):
            assert (REPOSITORY / name).is_file(), name
        assert "condition=complete" not in comment, "kubectl would wait on after a failure"
        for timeout in re.findall(r"--timeout=(\S+)", comment):
            assert re.fullmatch(r"\d+[smh]", timeout), f"{timeout}: kubectl knows no days"

    def test_names_do_not_meet(self) -> None:
        """Two files never fight over one object."""
        names = [(d["kind"], d["metadata"]["name"]) for path in manifest_files() for d in read(path.read_text())]
        assert len(set(names)) == len(names)

    @pytest.mark.parametrize("name", ["serve", *(f"{stage}-job" for stage in STAGES)])
    def test_links(self, name: str) -> None:
        """`kubectl apply -f k8s/train-job.yaml` and the overlays take the same file."""
        link = K8S / f"{name}.yaml"
        assert link.is_symlink()
        assert link.resolve() == K8S / "base" / f"{name}.yaml"
        assert link.resolve().is_file()
        assert not link.readlink().is_absolute()

    def test_training_is_given_most_time_to_stop(self) -> None:
        grace = {
            stage: load(f"{stage}-job.yaml")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
            for stage in STAGES
        }
        assert max(grace, key=lambda stage: grace[stage]) == "train"

    def test_the_service_leads_to_the_pods(self) -> None:
        service, job = load("scale-out/train-multinode.yaml", "Service"), load("scale-out/train-multinode.yaml")
        assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
        assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
        (port,) = job["spec"]["template"]["spec"]["containers"][0]["ports"]
        assert [p["targetPort"] for p in service["spec"]["ports"]] == [port["name"]]
        assert [p["port"] for p in service["spec"]["ports"]] == [port["containerPort"]]

    @pytest.mark.parametrize("stage", STAGES)
    def test_jobset_has_the_stages_of_the_plain_jobs(self, stage: str) -> None:
        child = {job["metadata"]["name"]: job for job in children(load("scale-out/jobset.yaml", "JobSet"))}
        plain = load(f"{stage}-job.yaml")["spec"]
        spec = dict(child[f"lorry-{stage}-0"]["spec"])
        assert (spec.pop("completions"), spec.pop("parallelism")) == (1, 1)
        assert spec == {key: value for key, value in plain.items() if key != "ttlSecondsAfterFinished"}

    def test_both_multinode_files_train_alike(self) -> None:
        (child,) = children(load("scale-out/train-multinode-jobset.yaml", "JobSet"))
        plain = load("scale-out/train-multinode.yaml")
        assert pod_without_addresses(child) == pod_without_addresses(plain)

    @pytest.mark.parametrize("name", ["preprocess", "infer", "adapters"])
    def test_merge_goes_with_its_shards(self, name: str) -> None:
        """The merge is the same run and recipe, without a shard; only that of preprocess needs a GPU, to classify."""
        shards, merge = (load(f"scale-out/{name}-{part}.yaml") for part in ("indexed", "merge"))
        of_shards, of_merge = (job["spec"]["template"]["spec"]["containers"][0] for job in (shards, merge))
        settings = {"LORRY_RECIPE", "LORRY_PROFILE", "LORRY_SET", "LORRY_RUN"}
        assert [v for v in of_shards["env"] if v["name"] in settings] == [
            v for v in of_merge["env"] if v["name"] in settings
        ]
        assert "LORRY_SHARDS" not in {v["name"] for v in of_merge["env"]}
        assert "completionMode" not in merge["spec"]
        assert of_shards["image"] == of_merge["image"]
        assert (GPU in of_merge["resources"]["limits"]) == (name == "preprocess")
        assert shards["spec"]["template"]["metadata"] == merge["spec"]["template"]["metadata"]

    def test_one_adapters_bad_data_do_not_stop_the_others(self) -> None:
        policy = load("scale-out/adapters-indexed.yaml")["spec"]["podFailurePolicy"]
        assert {code: failure_action(policy, code) for code in (2, 3, 4)} == {
            2: "FailJob",
            3: "FailIndex",
            4: "FailJob",
        }


def deployment(target: str) -> Document:
    """The server of an overlay."""
    (found,) = [document for document in built_overlay(target) if document["kind"] == "Deployment"]
    return found


def pod_without_addresses(job: Document) -> Document:
    """A multi-node Job's spec without what JobSet does by itself."""
    spec = copy.deepcopy(job["spec"])
    spec.pop("ttlSecondsAfterFinished", None)
    pod = spec["template"]["spec"]
    pod.pop("subdomain", None)
    pod["containers"][0]["env"] = [v for v in pod["containers"][0]["env"] if v["name"] != "LORRY_RENDEZVOUS"]
    return spec  # type: ignore[no-any-return]


class TestOverlays:
    def test_one_for_each_target(self) -> None:
        assert overlay_names() == sorted(TARGETS)

    def test_schema(self, target: str) -> None:
        for document in built_overlay(target):
            for version in (OLDEST, "1.33", NEWEST):
                assert schema_problems(document, version) == []

    def test_what_schemas_do_not_know(self, target: str) -> None:
        for document in built_overlay(target):
            assert problems(document, CLAIMS, VERSION) == []

    def test_is_whole(self, target: str) -> None:
        names = sorted(document["metadata"]["name"] for document in built_overlay(target))
        assert names == sorted([*(f"lorry-{stage}" for stage in STAGES), "lorry-serve", "lorry-serve"])

    def test_leaves_storage_alone(self, target: str) -> None:
        """The server refuses to shrink a claim, or to change its access mode or class: a cluster's own claims stay."""
        assert "PersistentVolumeClaim" not in {document["kind"] for document in built_overlay(target)}

    def test_starts_nothing_by_itself(self, target: str) -> None:
        """Four Jobs that all started at once would fail, but for the first."""
        assert all(job["spec"]["suspend"] is True for job in jobs(built_overlay(target)))
        assert deployment(target)["spec"]["replicas"] == 0

    def test_images_are_the_targets(self, target: str) -> None:
        for job in jobs(built_overlay(target)):
            stage = job["metadata"]["labels"]["app.kubernetes.io/component"]
            (container,) = job["spec"]["template"]["spec"]["containers"]
            assert container["image"] == f"lorry-{stage}:{VERSION}-{target}"
        assert container_of(deployment(target))["image"] == f"lorry-infer:{VERSION}-{target}"

    def test_the_server_has_the_card_of_infer(self, target: str) -> None:
        (infer,) = [job for job in jobs(built_overlay(target)) if job["metadata"]["name"] == "lorry-infer"]
        served = deployment(target)
        for key in ("nodeSelector", "tolerations", "volumes", "securityContext"):
            assert pod_of(served).get(key) == pod_of(infer).get(key), key
        for key in ("image", "resources", "volumeMounts", "securityContext"):
            assert container_of(served)[key] == container_of(infer)[key], key
        own = {"LORRY_PROFILE", "LORRY_SET"}
        there = [v for v in container_of(infer)["env"] if v["name"] not in own]
        assert [v for v in container_of(served)["env"] if v["name"] != "LORRY_API_KEY"] == there

    def test_environment_is_that_of_targets_toml(self, target: str) -> None:
        facts = TARGETS[target]
        for job in jobs(built_overlay(target)):
            stage, pod = job["metadata"]["labels"]["app.kubernetes.io/component"], job["spec"]["template"]["spec"]
            nccl = {v["name"]: v["value"] for v in pod["containers"][0]["env"] if v["name"].startswith("NCCL_")}
            on_card = stage in GPU_STAGES and "capability" in facts
            assert nccl == (facts.get("environment", {}) if on_card else {})
            if stage != "preprocess":  # whether it needs one is the recipe's: test_cards.py
                assert bool(pod["containers"][0]["resources"]["limits"].get(GPU)) == on_card

    def test_cpu_takes_the_small_profile_and_no_gpu(self) -> None:
        for job in jobs(built_overlay("cpu")):
            pod = job["spec"]["template"]["spec"]
            assert {"name": "LORRY_PROFILE", "value": "tiny"} in pod["containers"][0]["env"]
            assert "nvidia.com" not in str(job)

    def test_kueue_takes_one_label(self, tmp_path: Path) -> None:
        shutil.copytree(K8S, tmp_path / "k8s", symlinks=True)
        overlay = tmp_path / "k8s" / "overlays" / "a800"
        text = (overlay / "kustomization.yaml").read_text()
        line = "- ../../components/suspended\n"
        assert line in text
        (overlay / "kustomization.yaml").write_text(text.replace(line, f"{line}- ../../components/kueue\n"))
        queued = build(overlay)
        for document in queued:
            label = document["metadata"]["labels"].pop("kueue.x-k8s.io/queue-name", None)
            assert label == ("lorry" if document["kind"] == "Job" else None)
        assert queued == built_overlay("a800")

    def test_arbitrary_uid_leaves_the_user_to_the_cluster(self, tmp_path: Path) -> None:
        shutil.copytree(K8S, tmp_path / "k8s", symlinks=True)
        overlay = tmp_path / "k8s" / "overlays" / "a800" / "kustomization.yaml"
        line = "- ../../components/suspended\n"
        overlay.write_text(overlay.read_text().replace(line, f"{line}- ../../components/arbitrary-uid\n"))
        for document in build(overlay.parent):
            if "template" in document["spec"]:
                left = document["spec"]["template"]["spec"]["securityContext"]
                assert left == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


Break = Callable[[Document], Any]


def pod_of(job: Document) -> Document:
    pod: Document = job["spec"]["template"]["spec"]
    return pod


def container_of(job: Document) -> Document:
    container: Document = pod_of(job)["containers"][0]
    return container


def cards_of(job: Document) -> list[Document]:
    required = pod_of(job)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    expressions: list[Document] = required["nodeSelectorTerms"][0]["matchExpressions"]
    return expressions


def rules_of(job: Document) -> list[Document]:
    rules: list[Document] = job["spec"]["podFailurePolicy"]["rules"]
    return rules


def variable(job: Document, name: str) -> Document:
    return next(v for v in container_of(job)["env"] if v["name"] == name)


def label_both(job: Document, key: str, value: str) -> None:
    for metadata in (job["metadata"], job["spec"]["template"]["metadata"]):
        metadata["labels"][key] = value


def both_gpus(job: Document, value: Any) -> None:
    for kind in ("requests", "limits"):
        container_of(job)["resources"][kind][GPU] = value


BROKEN_JOBS: dict[str, tuple[Break, str]] = {
    "restartPolicy Always": (lambda j: pod_of(j).update(restartPolicy="Always"), "restartPolicy must be Never"),
    "restartPolicy OnFailure": (lambda j: pod_of(j).update(restartPolicy="OnFailure"), "restartPolicy must be Never"),
    "restartPolicy missing": (lambda j: pod_of(j).pop("restartPolicy"), "restartPolicy must be Never"),
    "unknown completionMode": (lambda j: j["spec"].update(completionMode="indexed"), "completionMode 'indexed'"),
    "Indexed alone": (lambda j: j["spec"].update(completionMode="Indexed"), "needs completions"),
    "index without shards": (lambda j: j["spec"].update(completionMode="Indexed", completions=2), "LORRY_SHARDS or"),
    "per index, not Indexed": (lambda j: j["spec"].update(backoffLimitPerIndex=1), "backoffLimitPerIndex needs"),
    "maxFailedIndexes": (lambda j: j["spec"].update(maxFailedIndexes=1), "maxFailedIndexes needs backoffLimitPerIndex"),
    "no backoffLimit": (lambda j: j["spec"].pop("backoffLimit"), "backoffLimit is missing"),
    "negative": (lambda j: j["spec"].update(backoffLimit=-1), "backoffLimit is negative"),
    "no ttl": (lambda j: j["spec"].pop("ttlSecondsAfterFinished"), "ttlSecondsAfterFinished is missing"),
    "no deadline": (lambda j: j["spec"].pop("activeDeadlineSeconds"), "activeDeadlineSeconds is missing"),
    "no policy": (lambda j: j["spec"].pop("podFailurePolicy"), "podFailurePolicy is missing"),
    "75 fails": (lambda j: rules_of(j).pop(1), "exit code 75: Count instead of Ignore"),
    "3 is tried again": (lambda j: rules_of(j)[2]["onExitCodes"].update(values=[2, 4]), "exit code 3: Count"),
    "1 is never tried again": (
        lambda j: rules_of(j)[2]["onExitCodes"].update(values=[1, 2, 3, 4]),
        "exit code 1: FailJob",
    ),
    "a disruption counts": (lambda j: rules_of(j).pop(0), "of a disrupted pod: Count instead of Ignore"),
    "a broad rule before a disruption": (
        lambda j: rules_of(j).insert(0, {"action": "Count", "onExitCodes": {"operator": "NotIn", "values": [0, 75]}}),
        "of a disrupted pod: Count instead of Ignore",
    ),
    "FailIndex": (lambda j: rules_of(j)[2].update(action="FailIndex"), "FailIndex needs backoffLimitPerIndex"),
    "unknown action": (lambda j: rules_of(j)[2].update(action="Fail"), "action 'Fail' is not known"),
    "codes in disorder": (lambda j: rules_of(j)[2]["onExitCodes"].update(values=[4, 3, 2]), "in order"),
    "codes twice": (lambda j: rules_of(j)[2]["onExitCodes"].update(values=[2, 2, 3, 4]), "none twice"),
    "no codes": (lambda j: rules_of(j)[1]["onExitCodes"].update(values=[]), "must be some"),
    "code 0": (lambda j: rules_of(j)[2]["onExitCodes"].update(values=[0, 2, 3, 4]), "exit code 0 is no failure"),
    "unknown operator": (lambda j: rules_of(j)[1]["onExitCodes"].update(operator="is"), "operator 'is' is not known"),
    "rule on another container": (
        lambda j: rules_of(j)[1]["onExitCodes"].update(containerName="train"),
        "no container 'train'",
    ),
    "rule of both kinds": (lambda j: rules_of(j)[0].update(rules_of(j)[1]), "one of onExitCodes and onPodConditions"),
    "condition without status": (lambda j: rules_of(j)[0]["onPodConditions"][0].pop("status"), "needs status"),
    "too many rules": (lambda j: rules_of(j).extend(rules_of(j) * 6 + rules_of(j)), "more than 20 rules"),
    "half a GPU": (lambda j: both_gpus(j, "0.5"), "whole number"),
    "no whole GPU": (lambda j: both_gpus(j, 0), "whole number"),
    "GPU request alone": (lambda j: container_of(j)["resources"]["limits"].pop(GPU), "same in requests and limits"),
    "GPU limit alone": (lambda j: container_of(j)["resources"]["requests"].pop(GPU), "same in requests and limits"),
    "fewer requested": (lambda j: container_of(j)["resources"]["limits"].update({GPU: 2}), "same in requests"),
    "no cpu request": (lambda j: container_of(j)["resources"]["requests"].pop("cpu"), "no request for cpu"),
    "no memory request": (lambda j: container_of(j)["resources"]["requests"].pop("memory"), "no request for memory"),
    "no memory limit": (lambda j: container_of(j)["resources"]["limits"].pop("memory"), "no limit on memory"),
    "request above limit": (
        lambda j: container_of(j)["resources"]["requests"].update(memory="65Gi"),
        "above its limit",
    ),
    "no quantity": (lambda j: container_of(j)["resources"]["limits"].update(memory="64GB"), "'64GB' is no quantity"),
    "undeclared volume": (lambda j: pod_of(j)["volumes"].pop(), "volume shm is mounted but not declared"),
    "unused volume": (lambda j: container_of(j)["volumeMounts"].pop(), "volume shm is declared but not mounted"),
    "volume twice": (lambda j: pod_of(j)["volumes"].append(pod_of(j)["volumes"][0]), "same name"),
    "path twice": (
        lambda j: container_of(j)["volumeMounts"].append({"name": "shm", "mountPath": "/data"}),
        "mounted at the same path",
    ),
    "volume of two kinds": (lambda j: pod_of(j)["volumes"][0].update(emptyDir={"sizeLimit": "1Gi"}), "one source"),
    "unknown claim": (
        lambda j: pod_of(j)["volumes"][0]["persistentVolumeClaim"].update(claimName="data"),
        "no claim 'data'",
    ),
    "no sizeLimit": (lambda j: pod_of(j)["volumes"][-1]["emptyDir"].pop("sizeLimit"), "sizeLimit"),
    "shm above memory": (lambda j: pod_of(j)["volumes"][-1]["emptyDir"].update(sizeLimit="64Gi"), "as large as"),
    "shm on disk": (lambda j: pod_of(j)["volumes"][-1]["emptyDir"].pop("medium"), "medium must be Memory"),
    "unknown medium": (lambda j: pod_of(j)["volumes"][-1]["emptyDir"].update(medium="RAM"), "medium 'RAM'"),
    "host path": (
        lambda j: pod_of(j)["volumes"].__setitem__(0, {"name": "data", "hostPath": {"path": "/data"}}),
        "volume of kind hostPath",
    ),
    "writable data": (lambda j: container_of(j)["volumeMounts"][0].pop("readOnly"), "mounts (read-only?)"),
    "no runs": (lambda j: container_of(j)["volumeMounts"][2].update(mountPath="/run"), "mounts (read-only?)"),
    "name with capitals": (lambda j: j["metadata"].update(name="Lorry"), "no DNS-1123 label"),
    "name too long": (lambda j: j["metadata"].update(name="l" * 64), "at most 63 characters"),
    "index makes the name too long": (
        lambda j: j["metadata"].update(name="l" * 62) or j["spec"].update(completionMode="Indexed", completions=2),
        "at most 63 characters",
    ),
    "container name": (lambda j: container_of(j).update(name="lorry_train"), "container name 'lorry_train'"),
    "label value": (lambda j: label_both(j, "app.kubernetes.io/instance", "my run"), "value 'my run' is not valid"),
    "label value too long": (lambda j: label_both(j, "app.kubernetes.io/instance", "r" * 64), "is not valid"),
    "label key": (lambda j: label_both(j, "/run", "x"), "label key '/run' is not valid"),
    "no part-of": (lambda j: j["metadata"]["labels"].pop("app.kubernetes.io/part-of"), "part-of is missing"),
    "another version": (lambda j: label_both(j, "app.kubernetes.io/version", "9"), f"version is not {VERSION}"),
    "no stage": (lambda j: label_both(j, "app.kubernetes.io/component", "tune"), "'tune' is no stage"),
    "two runs": (
        lambda j: j["metadata"]["labels"].update({"app.kubernetes.io/instance": "x"}),
        "labels of the Job and",
    ),
    "another stage's image": (
        lambda j: container_of(j).update(image=f"lorry-infer:{VERSION}-a800"),
        "is not lorry-train",
    ),
    "another version's image": (lambda j: container_of(j).update(image="lorry-train:9-a800"), "is not lorry-train"),
    "misspelt variable": (
        lambda j: variable(j, "LORRY_PROFILE").update(name="LORRY_PROFIL"),
        "nobody reads LORRY_PROFIL",
    ),
    "no name of a variable": (lambda j: variable(j, "LORRY_SET").update(name="1 SET"), "no name of a variable"),
    "variable twice": (lambda j: variable(j, "LORRY_SET").update(name="LORRY_PROFILE"), "LORRY_PROFILE is given twice"),
    "value and valueFrom": (lambda j: variable(j, "LORRY_RUN").update(value="x"), "one of value and valueFrom"),
    "no recipe": (lambda j: variable(j, "LORRY_RECIPE").update(value=""), "LORRY_RECIPE is missing"),
    "run not from the label": (
        lambda j: container_of(j)["env"].__setitem__(3, {"name": "LORRY_RUN", "value": "mine"}),
        "LORRY_RUN does not come from",
    ),
    "visible devices with a GPU": (
        lambda j: container_of(j)["env"].append({"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}),
        "the device plugin's to set",
    ),
    "no GPU, all visible": (
        lambda j: [container_of(j)["resources"][kind].pop(GPU) for kind in ("requests", "limits")],
        "needs NVIDIA_VISIBLE_DEVICES none",
    ),
    "any card": (lambda j: pod_of(j).pop("affinity"), "nodeAffinity is missing"),
    "cards of two sizes": (lambda j: cards_of(j)[2].update(values=["1", "2"]), "gpu.memory Gt takes one whole number"),
    "cards of no size": (lambda j: cards_of(j)[2].update(values=["80Gi"]), "gpu.memory Gt takes one whole number"),
    "values of what does not exist": (lambda j: cards_of(j)[3].update(values=["1"]), "DoesNotExist with values"),
    "no toleration": (lambda j: pod_of(j).pop("tolerations"), "the taint nvidia.com/gpu is not tolerated"),
    "a CPU's pod on a GPU node": (
        lambda j: container_of(j).update(image=f"lorry-train:{VERSION}-cpu"),
        "the taint nvidia.com/gpu is tolerated",
    ),
    "a GPU to evaluate": (lambda j: label_both(j, "app.kubernetes.io/component", "eval"), "eval needs no GPU"),
    "short grace": (lambda j: pod_of(j).update(terminationGracePeriodSeconds=30), "too short to save"),
    "default grace": (lambda j: pod_of(j).pop("terminationGracePeriodSeconds"), "too short to save"),
    "token": (lambda j: pod_of(j).pop("automountServiceAccountToken"), "automountServiceAccountToken must be false"),
    "service links": (lambda j: pod_of(j).pop("enableServiceLinks"), "enableServiceLinks must be false"),
    "root": (lambda j: pod_of(j)["securityContext"].pop("runAsNonRoot"), "runAsNonRoot must be true"),
    "root of the container": (
        lambda j: container_of(j)["securityContext"].update(runAsNonRoot=False),
        "runAsNonRoot must be true",
    ),
    "uid 0": (lambda j: pod_of(j)["securityContext"].update(runAsUser=0), "runAsUser must be given"),
    "no group": (lambda j: pod_of(j)["securityContext"].pop("fsGroup"), "fsGroupChangePolicy OnRootMismatch"),
    "no seccomp": (lambda j: pod_of(j)["securityContext"].pop("seccompProfile"), "seccompProfile must be"),
    "escalation": (lambda j: container_of(j)["securityContext"].pop("allowPrivilegeEscalation"), "allowPrivilege"),
    "writable root": (lambda j: container_of(j)["securityContext"].pop("readOnlyRootFilesystem"), "readOnlyRoot"),
    "capability": (
        lambda j: container_of(j)["securityContext"]["capabilities"].update(add=["SYS_PTRACE"]),
        "capabilities must drop ALL",
    ),
    "host network": (lambda j: pod_of(j).update(hostNetwork=True), "hostNetwork"),
    "host port": (
        lambda j: container_of(j).update(ports=[{"containerPort": 80, "hostPort": 80}]),
        "hostPort",
    ),
    "port name": (
        lambda j: container_of(j).update(ports=[{"containerPort": 80, "name": "a-very-long-port-name"}]),
        "port name",
    ),
}

BROKEN_MULTINODE: dict[str, tuple[Break, str]] = {
    "nodes are not completions": (lambda j: variable(j, "LORRY_NODES").update(value="3"), "LORRY_NODES 3 is not"),
    "one after the other": (lambda j: j["spec"].update(parallelism=1), "parallelism must be completions"),
    "a pod comes back alone": (lambda j: j["spec"].update(backoffLimit=6), "backoffLimit 0"),
    "another host": (lambda j: variable(j, "LORRY_RENDEZVOUS").update(value="job-0.nodes:29500"), "not the first pod"),
    "another port": (
        lambda j: variable(j, "LORRY_RENDEZVOUS").update(value="lorry-train-nodes-0.lorry-train-nodes:29501"),
        "port '29501'",
    ),
    "no subdomain": (lambda j: pod_of(j).update(subdomain="other"), "not the first pod"),
    "a late partner fails it": (lambda j: rules_of(j).pop(1), "exit code 75: Count instead of Ignore"),
    "an eviction fails it": (lambda j: rules_of(j).pop(0), "of a disrupted pod: Count instead of Ignore"),
}

BROKEN_SERVICES: dict[str, tuple[Break, str]] = {
    "not headless": (lambda s: s["spec"].pop("clusterIP"), "clusterIP None"),
    "only ready pods": (lambda s: s["spec"].pop("publishNotReadyAddresses"), "publishNotReadyAddresses"),
    "no selector": (lambda s: s["spec"].pop("selector"), "selector is missing"),
    "ports alike": (lambda s: s["spec"]["ports"].append(s["spec"]["ports"][0]), "a name of its own"),
}

BROKEN_JOBSETS: dict[str, tuple[Break, str]] = {
    "unknown field": (lambda s: s["spec"].update(replicatedJob=[]), "unknown field replicatedJob"),
    "unknown field of a Job": (lambda s: s["spec"]["replicatedJobs"][0].update(depends=[]), "unknown field depends"),
    "wrong order": (lambda s: s["spec"]["replicatedJobs"].reverse(), "does not come before it"),
    "begins too early": (
        lambda s: s["spec"]["replicatedJobs"][1]["dependsOn"][0].update(status="Ready"),
        "must be Complete",
    ),
    "begins at once": (lambda s: s["spec"]["replicatedJobs"][1].pop("dependsOn"), "dependsOn is missing"),
    "two dependencies": (
        lambda s: s["spec"]["replicatedJobs"][2]["dependsOn"].append({"name": "preprocess", "status": "Complete"}),
        "one item",
    ),
    "ttl of a child": (
        lambda s: s["spec"]["replicatedJobs"][0]["template"]["spec"].update(ttlSecondsAfterFinished=1),
        "made again",
    ),
    "no ttl": (lambda s: s["spec"].pop("ttlSecondsAfterFinished"), "JobSets would pile up"),
    "failure policy": (lambda s: s["spec"].update(failurePolicy={"restarts": 1}), "unknown field restarts"),
    "failure action": (
        lambda s: s["spec"].update(failurePolicy={"rules": [{"name": "a", "action": "Fail"}]}),
        "unknown action Fail",
    ),
    "broken child": (
        lambda s: s["spec"]["replicatedJobs"][3]["template"]["spec"]["template"]["spec"].pop("restartPolicy"),
        "restartPolicy must be Never",
    ),
}

BROKEN_CLAIMS: dict[str, tuple[Break, str]] = {
    "access mode": (lambda c: c["spec"].update(accessModes=["ReadWrite"]), "accessModes"),
    "size": (lambda c: c["spec"]["resources"]["requests"].update(storage="100GB"), "'100GB' is no quantity"),
    "no size": (lambda c: c["spec"]["resources"].pop("requests"), "storage"),
}

BROKEN_DEPLOYMENTS: dict[str, tuple[Break, str]] = {
    "selects others": (
        lambda d: d["spec"]["selector"]["matchLabels"].update({"app.kubernetes.io/name": "x"}),
        "own pods",
    ),
    "restartPolicy": (lambda d: pod_of(d).update(restartPolicy="Never"), "must be Always"),
    "rolls": (lambda d: d["spec"].update(strategy={"type": "RollingUpdate"}), "strategy must be Recreate"),
    "many": (lambda d: d["spec"].update(replicas=2), "replicas must be 1"),
    "another command": (lambda d: container_of(d).update(command=["lorry-infer"]), "that of lorry-serve"),
    "no port": (lambda d: container_of(d).pop("ports"), "one port, named http"),
    "no readiness": (lambda d: container_of(d).pop("readinessProbe"), "readinessProbe must ask /health"),
    "liveness of a path with a token": (
        lambda d: container_of(d)["livenessProbe"]["httpGet"].update(path="/v1/models"),
        "livenessProbe must ask /health",
    ),
    "short start": (lambda d: container_of(d)["startupProbe"].update(failureThreshold=3), "gives up too early"),
    "token in the open": (
        lambda d: container_of(d)["env"].__setitem__(2, {"name": "LORRY_API_KEY", "value": "x"}),
        "must come from a Secret",
    ),
    "another image": (lambda d: container_of(d).update(image=f"lorry-eval:{VERSION}-a800"), "is not lorry-infer"),
    "root": (lambda d: pod_of(d)["securityContext"].pop("runAsNonRoot"), "runAsNonRoot must be true"),
    "writable models": (lambda d: container_of(d)["volumeMounts"][1].pop("readOnly"), "mounts (read-only?)"),
}

BROKEN_SERVING: dict[str, tuple[Break, str]] = {
    "for everybody": (lambda s: s["spec"].update(type="LoadBalancer"), "must be of type ClusterIP"),
    "no selector": (lambda s: s["spec"].pop("selector"), "selector is missing"),
    "another port": (lambda s: s["spec"]["ports"][0].update(targetPort="metrics"), "port `http`"),
}

BROKEN_SHARDS: dict[str, tuple[Break, str]] = {
    "shards are not completions": (lambda j: j["spec"].update(completions=5), "LORRY_SHARDS 4 is not completions 5"),
}

BREAKS: list[Any] = [
    pytest.param(source, kind, change, expected, id=f"{kind}: {name}")
    for source, kind, broken in (
        ("train-job.yaml", "Job", BROKEN_JOBS),
        ("scale-out/train-multinode.yaml", "Job", BROKEN_MULTINODE),
        ("scale-out/train-multinode.yaml", "Service", BROKEN_SERVICES),
        ("scale-out/jobset.yaml", "JobSet", BROKEN_JOBSETS),
        ("serve.yaml", "Deployment", BROKEN_DEPLOYMENTS),
        ("serve.yaml", "Service", BROKEN_SERVING),
        ("scale-out/infer-indexed.yaml", "Job", BROKEN_SHARDS),
    )
    for name, (change, expected) in broken.items()
]


class TestTheChecksThemselves:
    """A check that cannot fail proves nothing: each finds the one thing broken in a manifest that is good otherwise."""

    @pytest.mark.parametrize(("source", "kind", "change", "expected"), BREAKS)
    def test_finds(self, source: str, kind: str, change: Break, expected: str) -> None:
        document = copy.deepcopy(load(source, kind))
        assert problems(document, CLAIMS, VERSION) == []
        change(document)
        assert expected in "\n".join(problems(document, CLAIMS, VERSION))

    @pytest.mark.parametrize("name", BROKEN_CLAIMS)
    def test_finds_in_claims(self, name: str) -> None:
        change, expected = BROKEN_CLAIMS[name]
        document = copy.deepcopy(read((K8S / "storage.yaml").read_text())[0])
        change(document)
        assert expected in "\n".join(problems(document, CLAIMS, VERSION))

    @pytest.mark.parametrize(
        ("kind", "change"),
        [
            ("Job", lambda j: j["spec"].update(backOffLimit=3)),
            ("Job", lambda j: pod_of(j).update(restartpolicy="Never")),
            ("Job", lambda j: variable(j, "LORRY_RECIPE").update(value=5)),
            ("Job", lambda j: j["spec"].pop("template")),
            ("JobSet", lambda s: s["spec"]["replicatedJobs"][2]["template"]["spec"].update(backOffLimit=3)),
        ],
        ids=["misspelt field", "misspelt field of the pod", "number for a string", "no template", "child of a JobSet"],
    )
    @pytest.mark.parametrize("version", [OLDEST, "1.33", NEWEST])
    def test_schema_finds(self, kind: str, change: Break, version: str) -> None:
        document = copy.deepcopy(load("train-job.yaml" if kind == "Job" else "scale-out/jobset.yaml", kind))
        assert schema_problems(document, version) == []
        change(document)
        assert schema_problems(document, version) != []

    def test_a_key_given_twice_is_refused(self) -> None:
        with pytest.raises(Exception, match="given twice: name"):
            read("metadata:\n  name: a\n  name: b\n")

    def test_unknown_kind(self) -> None:
        document = {"kind": "StatefulSet", "metadata": {"name": "a"}}
        assert "kind StatefulSet: no check knows it" in problems(document, CLAIMS, VERSION)

    def test_quantities(self) -> None:
        assert [quantity(text) for text in ("100m", "1.5", 2, "1Gi")] == [quantity("0.1"), quantity("1500m"), 2, 2**30]
