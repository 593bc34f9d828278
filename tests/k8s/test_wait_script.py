"""k8s/wait.sh against a cluster that is a folder (fake_kubectl.py)."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.k8s.manifests import K8S


@dataclass(frozen=True)
class Ended:
    code: int
    output: str
    error: str


@dataclass(frozen=True)
class Cluster:
    folder: Path
    path: str

    def __call__(self, *arguments: str, path: str | None = None) -> Ended:
        """Run k8s/wait.sh."""
        ended = subprocess.run(
            ["/bin/sh", str(K8S / "wait.sh"), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={"PATH": path or self.path, "FAKE_CLUSTER": str(self.folder), "LORRY_POLL_SECONDS": "0"},
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def calls(self, *verbs: str) -> list[str]:
        calls = (self.folder / "calls").read_text().splitlines()
        return [call for call in calls if call.removeprefix("--namespace=lab ").split()[0] in verbs]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """An empty cluster."""
    for name in ("jobs", "pods", "bin"):
        (tmp_path / name).mkdir()
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "fake_kubectl.py"} "$@"\n')
    kubectl.chmod(0o755)
    return Cluster(tmp_path, f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.mark.parametrize("code", [1, 2, 3, 4, 137])
def test_failure_ends_it_with_the_stages_code(cluster: Cluster, code: int) -> None:
    cluster.write("jobs/lorry-train", "\n\nFailureTarget \nFailureTarget Failed ")
    cluster.write("pods/lorry-train", f"lorry-train-a 75\nlorry-train-b {code}\nlorry-train-c \n")
    ended = cluster("lorry-train")
    assert ended.code == code
    assert "job/lorry-train failed: PodFailurePolicy" in ended.error
    assert f"pod/lorry-train-b, which exited with {code}" in ended.error
    assert "no line can be used" in ended.error
    assert cluster.calls("logs") == ["logs lorry-train-b --tail=40"]


def test_failure_without_a_pod(cluster: Cluster) -> None:
    """After activeDeadlineSeconds the pods are gone."""
    cluster.write("jobs/lorry-infer", "Failed ")
    ended = cluster("lorry-infer")
    assert ended.code == 1
    assert "no pod of it ran or is left (no event says why); correct that" in ended.error
    cluster.write("events", "lorry-infer-x FailedScheduling: 0/2 nodes are available\nlorry-infer-2-y Other: no\n")
    ended = cluster("lorry-infer")
    assert ended.code == 1
    assert "log.txt" not in ended.error


def test_why_nothing_starts(cluster: Cluster) -> None:
    """The last warning about the Job and its pods, once; those about other objects do not count."""
    cluster.write("jobs/lorry-infer", "\n\n\nComplete ")
    cluster.write("state", "Pending \n")
    cluster.write(
        "events",
        "lorry-infer FailedCreate: quota\nlorry-infer-x FailedScheduling: 0/2 nodes\nlorry-eval-y Failed: no\n",
    )
    ended = cluster("lorry-infer")
    assert (ended.code, ended.error) == (0, "")
    assert ended.output == "infer: Pending \ninfer: FailedScheduling: 0/2 nodes\ninfer: done\n"


def test_a_container_that_cannot_be_set_up(cluster: Cluster) -> None:
    cluster.write("jobs/lorry-infer", "")
    cluster.write("state", "Pending CreateContainerConfigError\n")
    cluster.write("events", 'lorry-infer-x Failed: Error: secret "s" not found\n')
    ended = cluster("lorry-infer")
    assert ended.code == 2
    assert 'cannot be set up (Failed: Error: secret "s" not found)' in ended.error


def test_a_server_that_does_not_answer_for_a_while(cluster: Cluster) -> None:
    cluster.write("jobs/lorry-train", "unanswered\nunanswered\n\nComplete ")
    assert cluster("lorry-train").code == 0


def test_a_server_that_never_answers_again(cluster: Cluster) -> None:
    cluster.write("jobs/lorry-preprocess", "unanswered")
    ended = cluster("lorry-preprocess")
    assert ended.code == 1
    assert "no longer answers (Unable to connect" in ended.error


def test_a_job_deleted_by_somebody_else(cluster: Cluster) -> None:
    cluster.write("jobs/lorry-train", "\ndeleted")
    ended = cluster("lorry-train")
    assert ended.code == 1
    assert "no job/lorry-train (it may have been deleted)" in ended.error


def test_no_kubectl(cluster: Cluster) -> None:
    tools = cluster.folder / "tools"
    tools.mkdir()
    for tool in ("awk", "tail", "sleep"):
        found = shutil.which(tool)
        assert found
        (tools / tool).symlink_to(found)
    ended = cluster("lorry-train", path=str(tools))
    assert (ended.code, ended.error) == (2, "error: no kubectl on the PATH; install it, or add its folder to PATH\n")


def test_waiting_ends_when_a_job_is_complete(cluster: Cluster) -> None:
    cluster.write("jobs/lorry-train", "\nSuspended \n\nComplete ")
    ended = cluster("job/lorry-train", "lab")
    assert (ended.code, ended.output, ended.error) == (0, "train: Running \ntrain: done\n", "")
    assert all(call.startswith("--namespace=lab ") for call in cluster.calls("get"))


def test_waiting_ends_when_a_job_has_failed_and_names_its_failed_indexes(cluster: Cluster) -> None:
    cluster.write("jobs/lorry-adapters-shards", "\nFailureTarget \nFailureTarget Failed ")
    cluster.write("pods/lorry-adapters-shards", "lorry-adapters-shards-8-a 3\nlorry-adapters-shards-0-b 0\n")
    cluster.write("failed-indexes", "4,8")
    ended = cluster("lorry-adapters-shards")
    assert ended.code == 3
    assert "failed indexes, counted from 0: 4,8\n" in ended.error
    assert "pod/lorry-adapters-shards-8-a, which exited with 3" in ended.error


def test_waiting_for_no_job(cluster: Cluster) -> None:
    ended = cluster("lorry-none")
    assert (ended.code, len(ended.error.splitlines())) == (1, 1)
    assert cluster().code == 2


def test_shellcheck() -> None:
    tool = Path(sys.executable).with_name("shellcheck")  # requirements/dev.txt brings it; it need not be on the PATH
    checked = subprocess.run([tool, *map(str, K8S.glob("*.sh"))], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
