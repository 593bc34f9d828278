"""k8s/run.sh against a cluster that is a folder (fake_kubectl.py), with overlays built by the real kubectl."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.k8s.checks import STAGES
from tests.k8s.manifests import K8S, overlay_names, real_kubectl


@dataclass(frozen=True)
class Ended:
    code: int
    output: str
    error: str


@dataclass(frozen=True)
class Cluster:
    folder: Path
    path: str

    def __call__(self, *arguments: str, path: str | None = None, script: str = "run.sh") -> Ended:
        """Run a script of k8s/."""
        ended = subprocess.run(
            ["/bin/sh", str(K8S / script), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={
                "PATH": path or self.path,
                "FAKE_CLUSTER": str(self.folder),
                "REAL_KUBECTL": real_kubectl(),
                "LORRY_POLL_SECONDS": "0",
            },
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def calls(self, *verbs: str) -> list[str]:
        calls = (self.folder / "calls").read_text().splitlines()
        return [call for call in calls if call.removeprefix("--namespace=lab ").split()[0] in verbs]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """An empty cluster in which every Job that is made completes."""
    for name in ("jobs", "after", "pods", "refuse", "bin"):
        (tmp_path / name).mkdir()
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "fake_kubectl.py"} "$@"\n')
    kubectl.chmod(0o755)
    return Cluster(tmp_path, f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.mark.parametrize("target", overlay_names())
def test_four_stages_in_order(cluster: Cluster, target: str) -> None:
    ended = cluster(target)
    assert (ended.code, ended.error) == (0, "")
    assert cluster.calls("apply", "delete") == [
        f"apply --selector app.kubernetes.io/component={part} --filename -" for part in ("storage", *STAGES)
    ]
    done = [line for line in ended.output.splitlines() if line.endswith(": done")]
    assert done == [f"{stage}: done" for stage in STAGES]
    assert sorted(path.name for path in (cluster.folder / "jobs").iterdir()) == sorted(f"lorry-{s}" for s in STAGES)


def test_namespace_goes_to_every_call(cluster: Cluster) -> None:
    assert cluster("a800", "lab").code == 0
    calls = cluster.calls("get", "apply", "delete", "logs")
    assert calls and all(call.startswith("--namespace=lab ") for call in calls)


def test_claims_that_are_there_stay_as_they_are(cluster: Cluster) -> None:
    cluster.write("claims", "")
    assert cluster("cpu").code == 0
    assert not any("storage" in call for call in cluster.calls("apply"))


@pytest.mark.parametrize("condition", ["Complete ", "FailureTarget Failed ", "Suspended "])
def test_older_jobs_give_way(cluster: Cluster, condition: str) -> None:
    """Finished, or made by `kubectl apply -k` and never started."""
    for stage in STAGES:
        cluster.write(f"jobs/lorry-{stage}", condition)
    assert cluster("a800").code == 0
    deleted = [f"delete job lorry-{stage} --cascade=foreground --wait" for stage in STAGES]
    assert cluster.calls("delete") == deleted


def test_a_running_job_is_left_alone(cluster: Cluster) -> None:
    cluster.write("jobs/lorry-train", "")
    ended = cluster("a800")
    assert ended.code == 75
    assert len(ended.error.splitlines()) == 1
    assert "job/lorry-train still runs" in ended.error
    assert "kubectl delete job lorry-train" in ended.error
    assert cluster.calls("apply", "delete") == []


@pytest.mark.parametrize("code", [1, 2, 3, 4, 137])
def test_failure_ends_it_with_the_stages_code(cluster: Cluster, code: int) -> None:
    cluster.write("after/lorry-train", "\n\nFailureTarget \nFailureTarget Failed ")
    cluster.write("pods/lorry-train", f"lorry-train-a 75\nlorry-train-b {code}\nlorry-train-c \n")
    ended = cluster("a800")
    assert ended.code == code
    assert "job/lorry-train failed: PodFailurePolicy" in ended.error
    assert f"pod/lorry-train-b, which exited with {code}" in ended.error
    assert "no line can be used" in ended.error
    assert cluster.calls("logs") == ["logs lorry-train-b --tail=40"]
    assert cluster.calls("apply")[-1].endswith("component=train --filename -")


def test_failure_without_a_pod(cluster: Cluster) -> None:
    """After activeDeadlineSeconds the pods are gone."""
    cluster.write("after/lorry-infer", "Failed ")
    ended = cluster("a800")
    assert ended.code == 1
    assert "its pods are gone; see the stage's log.txt in the run folder" in ended.error
    assert "log.txt" in ended.error


def test_a_server_that_does_not_answer_for_a_while(cluster: Cluster) -> None:
    cluster.write("after/lorry-train", "unanswered\nunanswered\n\nComplete ")
    assert cluster("a800").code == 0


def test_a_server_that_never_answers_again(cluster: Cluster) -> None:
    cluster.write("after/lorry-preprocess", "unanswered")
    ended = cluster("a800")
    assert ended.code == 1
    assert "no longer answers (Unable to connect" in ended.error


def test_a_job_deleted_by_somebody_else(cluster: Cluster) -> None:
    cluster.write("after/lorry-train", "\ndeleted")
    ended = cluster("a800")
    assert ended.code == 1
    assert "no job/lorry-train (it may have been deleted)" in ended.error


def test_refused_by_the_server(cluster: Cluster) -> None:
    cluster.write("refuse/apply", 'Error from server (Forbidden): cannot create resource "jobs"')
    ended = cluster("a800")
    assert ended.code == 2
    assert "Forbidden" in ended.error
    assert "the cluster refused the manifests of 'storage'" in ended.error


def test_jobs_may_not_be_seen(cluster: Cluster) -> None:
    """A refusal must not pass for "there is no such Job"."""
    cluster.write("refuse/get", "Error from server (Forbidden): cannot get resource")
    ended = cluster("a800")
    assert ended.code == 2
    assert cluster.calls("apply", "delete") == []


@pytest.mark.parametrize("target", ["b200", "", "../base", ".", "v100/"])
def test_unknown_target(cluster: Cluster, target: str) -> None:
    ended = cluster(target)
    assert ended.code == 2
    assert ended.error == f"error: no target '{target}'; known targets: {' '.join(overlay_names())}\n"


@pytest.mark.parametrize("arguments", [[], ["a800", "lab", "more"]])
def test_usage(cluster: Cluster, arguments: list[str]) -> None:
    ended = cluster(*arguments)
    assert (ended.code, ended.error) == (2, "error: usage: k8s/run.sh TARGET [NAMESPACE]\n")


def test_no_cluster(cluster: Cluster) -> None:
    cluster.write("refuse/version", "E1122 memcache.go:265] retry\nThe connection to localhost:8080 was refused")
    ended = cluster("a800")
    told = "error: no cluster answers (The connection to localhost:8080 was refused); set KUBECONFIG or the context\n"
    assert (ended.code, ended.error) == (2, told)


def test_no_kubectl(cluster: Cluster) -> None:
    tools = cluster.folder / "tools"
    tools.mkdir()
    for tool in ("dirname", "sed", "awk", "tail", "sleep"):
        found = shutil.which(tool)
        assert found
        (tools / tool).symlink_to(found)
    ended = cluster("a800", path=str(tools))
    assert (ended.code, ended.error) == (2, "error: no kubectl on the PATH; install it, or add its folder to PATH\n")


def test_waiting_ends_when_a_job_is_complete(cluster: Cluster) -> None:
    cluster.write("jobs/lorry-train", "\nSuspended \n\nComplete ")
    ended = cluster("job/lorry-train", "lab", script="wait.sh")
    assert (ended.code, ended.output, ended.error) == (0, "train: Running \ntrain: done\n", "")
    assert all(call.startswith("--namespace=lab ") for call in cluster.calls("get"))


def test_waiting_ends_when_a_job_has_failed_and_names_its_failed_indexes(cluster: Cluster) -> None:
    cluster.write("jobs/lorry-adapters-shards", "\nFailureTarget \nFailureTarget Failed ")
    cluster.write("pods/lorry-adapters-shards", "lorry-adapters-shards-8-a 3\nlorry-adapters-shards-0-b 0\n")
    cluster.write("failed-indexes", "4,8")
    ended = cluster("lorry-adapters-shards", script="wait.sh")
    assert ended.code == 3
    assert "failed indexes, counted from 0: 4,8\n" in ended.error
    assert "pod/lorry-adapters-shards-8-a, which exited with 3" in ended.error


def test_waiting_for_no_job(cluster: Cluster) -> None:
    ended = cluster("lorry-none", script="wait.sh")
    assert (ended.code, len(ended.error.splitlines())) == (1, 1)
    assert cluster(script="wait.sh").code == 2


def test_shellcheck() -> None:
    tool = Path(sys.executable).with_name("shellcheck")  # requirements/dev.txt brings it; it need not be on the PATH
    checked = subprocess.run([tool, *map(str, K8S.glob("*.sh"))], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
