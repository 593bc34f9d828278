"""A stand-in for the API of a cluster, over HTTP: what `lorry launch --on kubernetes` asks of one.

It applies Jobs and ConfigMaps as a server does (strict fields, the server's rules by checks.py, a template that cannot
be changed), and moves a Job on by its `script`: each look at it shows the next of these states, and the last one stays.
"""

import copy
import json
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.k8s.checks import problems, schema_problems
from tests.k8s.manifests import K8S, Document, read

COMPLETE = {"conditions": [{"type": "Complete", "status": "True"}], "succeeded": 1}
ACTIVE = {"active": 1}
TIME = "2026-01-01T00:00:00Z"


def failed(reason: str = "PodFailurePolicy", message: str = "Container lorry failed with exit code") -> Document:
    """The status of a Job that has failed."""
    return {"conditions": [{"type": "Failed", "status": "True", "reason": reason, "message": message}], "failed": 1}


@dataclass
class Api:
    """The state of the cluster."""

    version: str
    """Lorry's, as images have it."""
    claims: list[str] = field(default_factory=list)
    jobs: dict[str, Document] = field(default_factory=dict)
    maps: dict[str, Document] = field(default_factory=dict)
    pods: dict[str, list[Document]] = field(default_factory=lambda: defaultdict(list))
    """Pods by the name of their Job."""
    load_pod: Document | None = None
    load_status: Document = field(default_factory=lambda: {"conditions": [{"type": "Ready", "status": "True"}]})
    """State of the load pod that is yet to be made."""
    scripts: dict[str, list[Document]] = field(default_factory=dict)
    """States of a Job that is yet to be made; without one, it completes."""
    refusals: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    """Status and message for a verb and a kind, such as ("PATCH", "jobs"), instead of doing it."""
    warnings: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    """What changed something: "PATCH jobs/name in namespace"."""

    def add_pod(self, job: str, code: int | None = None, waiting: str = "") -> None:
        """A pod of a Job: ended with a code, waiting with a reason, or running."""
        if code is not None:
            state: Document = {"terminated": {"exitCode": code}}
        else:
            state = {"waiting": {"reason": waiting}} if waiting else {"running": {"startedAt": TIME}}
        status = {"name": "lorry", "image": "i", "imageID": "i", "ready": False, "restartCount": 0, "state": state}
        name = f"{job}-{len(self.pods[job])}"
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": "u", "controller": True}
        labels = {"batch.kubernetes.io/job-name": job}
        metadata = {"name": name, "creationTimestamp": TIME, "labels": labels, "ownerReferences": [owner]}
        phase = "Pending" if waiting else "Running" if code is None else "Failed" if code else "Succeeded"
        self.pods[job].append({"metadata": metadata, "status": {"phase": phase, "containerStatuses": [status]}})

    def refused(self, kind: str, body: Document, query: dict[str, list[str]]) -> tuple[int, str] | None:
        """Status and message with which a server refuses to apply a document; None if it takes it."""
        if query.get("fieldManager") != ["lorry"] or query.get("fieldValidation") != ["Strict"]:
            return 400, "not a strict server-side apply"
        found = schema_problems(body, "1.33")
        if kind == "pods":
            found += problems(body, set(self.claims), self.version)
        if kind == "jobs":
            found += problems(body, set(self.claims), self.version)
            there = self.jobs.get(body["metadata"]["name"])
            if there is not None and there["spec"]["template"] != body["spec"]["template"]:
                found.append("spec.template: field is immutable")
        return (422, "; ".join(found)) if found else None

    def applied(self, kind: str, body: Document, namespace: str) -> Document:
        """Keep a document, and return it as the server shows it."""
        kept = copy.deepcopy(body)
        kept["metadata"].update(namespace=namespace, creationTimestamp=TIME, uid="u", resourceVersion="1")
        name = kept["metadata"]["name"]
        if kind == "jobs":
            kept["status"] = {}
            self.scripts.setdefault(name, [ACTIVE, COMPLETE])
            self.jobs[name] = kept
        elif kind == "pods":
            kept["status"] = self.load_status
            self.load_pod = kept
        else:
            self.maps[name] = kept
        return kept

    def look(self, name: str) -> Document | None:
        """A Job in its present state, and on to the next."""
        job = self.jobs.get(name)
        if job is None:
            return None
        script = self.scripts.get(name) or [job["status"]]
        job["status"] = script.pop(0) if len(script) > 1 else script[0]
        return job


class Server:
    """Serves an Api on a port of this machine. A context manager."""

    def __init__(self, api: Api) -> None:
        self.api = api
        handler = type("Handler", (_Handler,), {"api": api})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def write_kubeconfig(self, path: Path, namespace: str | None = None) -> Path:
        """A configuration whose current context is this server."""
        context = {"cluster": "c", "user": "u", **({"namespace": namespace} if namespace else {})}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "x",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{self._http.server_port}"}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "x", "context": context}],
        }
        path.write_text(yaml.safe_dump(config))
        return path


class _Handler(BaseHTTPRequestHandler):
    api: Api

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _answer(self, status: int, body: Document) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for warning in self.api.warnings if self.command == "PATCH" else []:
            self.send_header("Warning", f'299 - "{warning}"')
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, message: str) -> None:
        self._answer(status, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message})

    def _serve(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        namespace, kind, name = [*url.path.partition("/namespaces/")[2].split("/"), "", ""][:3]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command != "GET":
            self.api.calls.append(f"{self.command} {kind}/{name} in {namespace}")
        if (self.command, kind) in self.api.refusals:
            self._refuse(*self.api.refusals[self.command, kind])
            return
        match self.command, kind:
            case "PATCH", "jobs" | "configmaps" | "pods":
                self._apply(namespace, kind, json.loads(body), query)
            case "GET", "jobs":
                job = self.api.look(name)
                self._answer(200, job) if job else self._refuse(404, f'jobs.batch "{name}" not found')
            case "DELETE", "jobs":
                self.api.scripts.pop(name, None)
                self._answer(200, self.api.jobs.pop(name))
            case "GET", "persistentvolumeclaims":
                self._answer(200, {"items": [{"metadata": {"name": claim}} for claim in self.api.claims]})
            case "GET", "pods" if name:
                pod = self.api.load_pod
                self._answer(200, pod) if pod else self._refuse(404, f'pods "{name}" not found')
            case "GET", "pods":
                job_name = query["labelSelector"][0].partition("=")[2]
                self._answer(200, {"items": self.api.pods[job_name]})
            case _:
                self._refuse(404, f"the stand-in has no {self.command} {url.path}")

    def _apply(self, namespace: str, kind: str, body: Document, query: dict[str, list[str]]) -> None:
        if self.headers["Content-Type"] != "application/apply-patch+yaml":
            self._refuse(415, f"not a server-side apply: {self.headers['Content-Type']}")
            return
        refusal = self.api.refused(kind, body, query)
        if refusal:
            self._refuse(*refusal)
        else:
            self._answer(201, self.api.applied(kind, body, namespace))

    do_GET = do_PATCH = do_DELETE = _serve  # noqa: N815 - names of http.server


def all_claims() -> list[str]:
    """The claims of k8s/storage.yaml."""
    return [claim["metadata"]["name"] for claim in read((K8S / "storage.yaml").read_text())]


def container_of(job: Document) -> dict[str, Any]:
    """The one container of a Job."""
    found: dict[str, Any] = job["spec"]["template"]["spec"]["containers"][0]
    return found
