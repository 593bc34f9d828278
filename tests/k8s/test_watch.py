"""The watch of a Job, through Kubernetes' client, of a server that answers one look after the other."""

import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from stages.contract.errors import Exit, UsageError
from stages.host.kubernetes import watch
from stages.host.outcome import Problem
from tests.k8s.test_reasons import answer

COMPLETE = {"conditions": [{"type": "Complete", "status": "True"}], "succeeded": 1}
STAMP = "2026-01-01T00:00:0{}.{:09}Z"


class Looks:
    """The looks at a cluster that a watch is to have: the Job (None: no such Job, a number: that status), with its
    pods, events and the lines of all pods so far."""

    def __init__(self) -> None:
        self.looks: list[tuple[Any, list[Any], list[Any], list[str]]] = []
        self.log_queries: list[dict[str, list[str]]] = []
        self.log_status = 200

    def add(self, job: Any, pods: Any = (), events: Any = (), lines: Any = ()) -> None:
        self.looks.append((job, list(pods), list(events), list(lines)))

    def answer(self, path: str, query: dict[str, list[str]]) -> tuple[int, Any]:
        """Status and body; a look at the Job goes on to the next."""
        if "/jobs/" in path:
            if len(self.looks) > 1 and hasattr(self, "_begun"):
                self.looks.pop(0)
            self._begun = True
            job = self.looks[0][0]
            return (200, job) if isinstance(job, dict) else (job or 404, {"message": "none"})
        _, pods, events, lines = self.looks[0]
        if path.endswith("/log"):
            self.log_queries.append(query)
            return self.log_status, "".join(f"{line}\n" for line in lines)
        if path.endswith("/pods"):
            return 200, {"items": pods}
        if path.endswith("/events"):
            return 200, {"items": events}
        return 403, {"message": "forbidden"}


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    monkeypatch.setattr(watch, "POLL", 0.0)
    monkeypatch.setattr(watch, "SETTLING", 0.0)
    return Looks()


@pytest.fixture
def api(looks: Looks) -> Iterator[Any]:
    """A client of a server with the looks."""
    client = pytest.importorskip("kubernetes").client

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            status, body = looks.answer(url.path, parse_qs(url.query))
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{server.server_port}"))
    server.shutdown()
    server.server_close()


def watched(api: Any) -> tuple[int | None, list[str]]:
    """The exit code and the lines of a watch."""
    lines, watching = [], watch.watch_job(api, "lab", "lorry-train")
    while True:
        try:
            lines.append(next(watching))
        except StopIteration as end:
            return end.value, lines


def job_of(name: str, **status: Any) -> Any:
    job = copy.deepcopy(answer(name).job)
    job["status"] = status or job["status"]
    return job


def running() -> Any:
    """A pod that runs."""
    (pod,) = answer("written-node-lost").pods
    pod["status"]["conditions"] = []
    return pod


def ended(code: int) -> Any:
    """A pod that ended with a code."""
    (pod,) = answer("written-data-unusable").pods
    pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] = code
    pod["status"]["phase"] = "Failed" if code else "Succeeded"
    return pod


def stamped(*lines: str) -> list[str]:
    return [f"{STAMP.format(1, number)} {line}" for number, line in enumerate(lines)]


def test_the_lines_of_a_pod_come_once_each_and_in_order(api: Any, looks: Looks) -> None:
    job = job_of("written-drained")
    looks.add(job, [running()], lines=stamped("train: 3 个样本"))
    looks.add(job, [running()], lines=stamped("train: 3 个样本", "train: 1 of 9 steps"))
    looks.add(job, [running()], lines=stamped("train: 3 个样本", "train: 1 of 9 steps"))
    looks.add(job_of("written-drained", **COMPLETE), [ended(0)], lines=stamped("a", "b", "train: done")[2:])
    code, lines = watched(api)
    assert code == 0
    assert lines == ["train: 3 个样本", "train: 1 of 9 steps", "train: done", "job/lorry-train is complete"]
    assert "sinceSeconds" not in looks.log_queries[0]
    assert all("sinceSeconds" in query for query in looks.log_queries[1:])


@pytest.mark.parametrize("code", [1, 2, 3, 4])
def test_a_failed_job_has_its_stages_code(api: Any, looks: Looks, code: int) -> None:
    """Also if a pod was interrupted before or after that."""
    looks.add(job_of("written-drained"), [running()])
    interrupted = ended(75)
    interrupted["metadata"]["name"] = "lorry-train-early"
    looks.add(job_of("written-data-unusable"), [interrupted, ended(code)], lines=stamped("error: what was found"))
    found, lines = watched(api)
    assert found == code
    assert "error: what was found" in lines
    assert isinstance(lines[-1], Problem)
    assert f"pod/lorry-train-x7k2p exited with {code}" in lines[-1]


def test_a_reason_is_said_once_and_the_watch_goes_on(api: Any, looks: Looks) -> None:
    waiting = answer("too-few-gpus")
    for _ in range(3):
        looks.add(waiting.job, waiting.pods, waiting.events)
    looks.add(job_of("too-few-gpus", **COMPLETE))
    code, lines = watched(api)
    assert code == 0
    assert [line.partition(": ")[0] for line in lines] == ["job/lorry-train", "job/lorry-train is complete"]
    assert "1 with fewer than 4 free GPUs" in lines[0]


def test_a_reason_that_passes_is_not_said(api: Any, looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SETTLING", 60.0)
    waiting = answer("too-few-gpus")
    looks.add(waiting.job, waiting.pods, waiting.events)
    looks.add(job_of("too-few-gpus", **COMPLETE))
    assert watched(api) == (0, ["job/lorry-train is complete"])


@pytest.mark.parametrize("name", ["written-image-not-found", "written-container-config", "quota-demands-limits-cpu"])
def test_what_waiting_does_not_help_ends_the_watch(api: Any, looks: Looks, name: str) -> None:
    seen = answer(name)
    looks.add(seen.job, seen.pods, seen.events)
    code, lines = watched(api)
    assert (code, len(lines)) == (Exit.USAGE, 1)


def test_at_its_deadline_a_job_that_never_ran_says_why(api: Any, looks: Looks) -> None:
    waiting = answer("quota-used-up")
    looks.add(waiting.job, waiting.pods, waiting.events)
    failed = copy.deepcopy(waiting.job)
    failed["status"] = answer("deadline-never-ran").job["status"]
    looks.add(failed)
    code, lines = watched(api)
    assert code == Exit.INTERRUPTED
    assert "no pod of it ran: quota team is used up" in lines[-1]
    assert "log.txt" not in lines[-1]


def test_a_cluster_that_does_not_answer_for_a_while(api: Any, looks: Looks) -> None:
    looks.add(job_of("written-drained"))
    looks.add(503)
    looks.add(429)
    looks.add(job_of("written-drained", **COMPLETE))
    assert watched(api)[0] == 0


def test_a_cluster_that_never_answers_again(api: Any, looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PATIENCE", 0.0)
    looks.add(503)
    code, lines = watched(api)
    assert code == Exit.INTERRUPTED
    assert "job/lorry-train: the cluster no longer answers (503" in lines[0]


def test_no_right_to_see_jobs_is_no_missing_job(api: Any, looks: Looks) -> None:
    looks.add(403)
    with pytest.raises(UsageError, match=r"job/lorry-train: the cluster refused it \(none\)"):
        watched(api)


def test_a_job_that_is_not_there_or_no_longer(api: Any, looks: Looks) -> None:
    looks.add(None)
    with pytest.raises(UsageError, match="job/lorry-train: no such Job in namespace lab"):
        watched(api)
    looks.looks = []
    looks.add(None)
    looks.add(job_of("written-drained"), [running()])
    looks.add(None)
    code, lines = watched(api)
    assert (code, lines) == (
        Exit.INTERRUPTED,
        ["job/lorry-train: was deleted while it was watched; run the same command again"],
    )


def test_another_job_of_that_name_is_not_followed(api: Any, looks: Looks) -> None:
    looks.add(job_of("written-drained"), [running()])
    other = job_of("written-drained", **COMPLETE)
    other["metadata"]["uid"] = "another one"
    looks.add(other)
    assert watched(api)[0] == Exit.INTERRUPTED


def test_what_is_no_line_of_a_pod_silences_nothing(api: Any, looks: Looks) -> None:
    """A node's own words on a log, and characters at which only Python ends a line."""
    job = job_of("written-drained")
    looks.add(job, [running()], lines=["unable to retrieve container logs for containerd://x"])
    looks.add(job, [running()], lines=stamped("Loading:\x85 zz\u2028 zz"))
    looks.add(job_of("written-drained", **COMPLETE), [ended(0)], lines=stamped("a", "train: done"))
    code, lines = watched(api)
    assert (code, lines[0], lines[1]) == (0, "Loading:\x85 zz\u2028 zz", "train: done")


def test_a_log_that_cannot_be_read_does_not_change_the_exit_code(api: Any, looks: Looks) -> None:
    looks.log_status = 500
    looks.add(job_of("written-data-unusable"), [ended(3)])
    assert watched(api)[0] == Exit.DATA


def test_pods_of_an_earlier_job_of_that_name_do_not_count(api: Any, looks: Looks) -> None:
    old = ended(3)
    old["metadata"]["ownerReferences"][0]["uid"] = "an earlier one"
    looks.add(job_of("written-drained"), [old])
    looks.add(job_of("written-drained", **COMPLETE), [old])
    assert watched(api) == (0, ["job/lorry-train is complete"])
