"""Watches a Job of a cluster to its end: its pods' lines, why nothing starts, and the stage's exit code."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

from stages.contract.errors import Exit, UsageError
from stages.host.kubernetes.cluster import TIMEOUT, explained
from stages.host.kubernetes.reasons import (
    CONTAINER,
    QUEUE,
    Document,
    Reason,
    Seen,
    condition,
    has_started,
    job_end,
    lost_node,
    pod_end,
    why_waiting,
)
from stages.host.outcome import Lines, Note, Problem

POLL = 2.0
"""Seconds between two looks."""

SETTLING = 10.0
"""Seconds for which a reason must hold before it is printed: a cluster needs some for a pod that starts well."""

PATIENCE = 300.0
"""Seconds without an answer after which the watch ends: an upgrade of the control plane takes minutes."""

LOOKS = 3
"""Looks at the log of a pod that has ended, if it cannot be read."""

STAMP = re.compile(r"\d{4}-\d\d-\d\dT\S+")
"""The time before a line of a log."""

FIRST_LINES = 1000
"""Lines of a pod's log at the first look: a watch that begins late shows no more."""


def watch_job(api: Any, namespace: str, name: str) -> Lines:
    """Watch a Job to its end. Yields the lines of its pods and those on what is in the way; returns the exit code.

    That is 0, or the code of the stage in the last pod that failed, or that of the reason why no pod ran. The watch
    ends before the Job if waiting does not help. A Job that is deleted meanwhile, and a cluster that no longer answers,
    end it with 75. `api` is an `ApiClient` of Kubernetes' client. Raises UsageError if there is no such Job, and as
    `explained` does if the cluster refuses a request.
    """
    eyes, watch = _Eyes(api, namespace, name), _Watch(name, _Logs(api, namespace))
    answered = time.monotonic()
    while True:
        try:
            seen = eyes.look()
        except _UnansweredError as error:
            if time.monotonic() - answered > PATIENCE:
                yield Problem(f"job/{name}: the cluster no longer answers ({error}); run the same command again")
                return Exit.INTERRUPTED
        else:
            answered = time.monotonic()
            if seen is None and watch.uid is None:
                raise UsageError(f"job/{name}: no such Job in namespace {namespace}; name one of `kubectl get jobs`")
            if seen is None or watch.uid not in (None, seen.job["metadata"]["uid"]):
                yield Problem(f"job/{name}: was deleted while it was watched; run the same command again")
                return Exit.INTERRUPTED
            code = yield from watch.news(seen)
            if code is not None:
                return code
        time.sleep(POLL)


def cannot_start(api: Any, namespace: str, name: str) -> bool:
    """Whether a Job has no pod that runs, for a reason that waiting does not change by itself. Raises UsageError as
    `explained` does if the cluster refuses a request."""
    try:
        seen = _Eyes(api, namespace, name).look()
    except _UnansweredError:
        return False
    found = why_waiting(seen) if seen is not None else None
    return found is not None and found.is_final


class _Watch:
    """What one watch has seen and said so far."""

    def __init__(self, name: str, logs: "_Logs") -> None:
        self.uid: str | None = None
        """Of the Job; None before it has been seen."""
        self._name, self._logs = name, logs
        self._ends: dict[str, Reason | None] = {}  # how pods ended, by name; None: well
        self._started = False
        self._waiting: Reason | None = None
        self._said, self._since = "", 0.0  # the kind of the reason said last; when the present one came up

    def news(self, seen: Seen) -> Generator[str, None, int | None]:
        """Yield what is new at a look. Returns the exit code if the watch is over."""
        self.uid = seen.job["metadata"]["uid"]
        is_one_of_many = seen.job["spec"].get("completions", 1) > 1
        job_has_ended = any(condition(seen.job, kind) for kind in ("Complete", "Failed"))
        for pod in seen.pods:
            yield from self._pod_news(pod, is_one_of_many, job_has_ended)
        ends = [end for end in self._ends.values() if end is not None]
        ended = job_end(seen, ends, self._started, self._waiting)
        if ended is not None:
            yield Note(ended.text) if ended.code == Exit.DONE else Problem(ended.text)
            return ended.code
        found = why_waiting(seen) or next(filter(None, map(lost_node, seen.pods)), None)
        if found is None or self._waiting is None or found.kind != self._waiting.kind:
            self._since = time.monotonic()
        self._waiting = found or (None if self._started else self._waiting)
        if found is None:
            self._said = ""
        elif found.kind != self._said and time.monotonic() - self._since >= SETTLING:
            self._said = found.kind
            yield Problem(f"job/{self._name}: {found.text}")
            if found.is_final:
                return found.code
        return None

    def _pod_news(self, pod: Document, is_one_of_many: bool, job_has_ended: bool) -> Generator[str, None, None]:
        """Yield a pod's new lines, and how it ended."""
        name, phase = pod["metadata"]["name"], pod.get("status", {}).get("phase")
        if name in self._ends:
            return
        if has_started(pod):
            self._started = True
            lines = self._logs.new_lines(name)
            yield from (Note(f"[{name}] {line}" if is_one_of_many else line) for line in lines or ())
            if lines is None and self._logs.may_come(name) and not job_has_ended:
                return  # its end is said after its last lines; that of the Job needs it now
        end = pod_end(pod)
        if end is not None or phase == "Succeeded":
            self._ends[name] = end
        if end is not None:
            yield Problem(end.text)


class _UnansweredError(Exception):
    """The cluster does not answer for now."""


class _Eyes:
    """Reads a Job and what belongs to it, as plain dicts."""

    def __init__(self, api: Any, namespace: str, name: str) -> None:
        from kubernetes import client

        self._core, self._batch = client.CoreV1Api(api), client.BatchV1Api(api)
        self._custom = client.CustomObjectsApi(api)
        self._namespace, self._name = namespace, name

    def look(self) -> Seen | None:
        """The Job and its pods; while one of them is wanted and does not run, also what may be in the way. None if
        there is no such Job.

        Raises _UnansweredError if the cluster does not answer for now, and UsageError as `explained` does.
        """
        job = self._read(f"job/{self._name}", self._batch.read_namespaced_job, self._name)
        if job is None:
            return None
        selector = f"batch.kubernetes.io/job-name={self._name}"
        found = self._items(f"pods of job/{self._name}", self._core.list_namespaced_pod, label_selector=selector)
        uid = job["metadata"]["uid"]
        pods = [
            pod
            for pod in found or []
            if any(one.get("uid") == uid for one in pod["metadata"].get("ownerReferences") or [])
        ]
        pods.sort(key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
        running = [pod for pod in pods if pod.get("status", {}).get("phase") == "Running"]
        wanted = job["spec"].get("parallelism", 1) - job.get("status", {}).get("succeeded", 0)
        if len(running) >= wanted:
            return Seen(job, pods)
        events = self._items("events", self._core.list_namespaced_event, is_optional=True) or []
        claims = self._items("claims", self._core.list_namespaced_persistent_volume_claim, is_optional=True)
        queued = QUEUE in job["metadata"].get("labels", {})
        return Seen(job, pods, _in_order(events), claims, self._workloads() if queued else None)

    def _workloads(self) -> list[Document] | None:
        """Kueue's Workloads; None without Kueue, or without the right to see them."""
        for version in ("v1beta2", "v1beta1"):
            found = self._read(
                "workloads",
                self._custom.list_namespaced_custom_object,
                "kueue.x-k8s.io",
                version,
                namespace=self._namespace,
                plural="workloads",
                is_optional=True,
            )
            if found is not None:
                return list(found["items"])
        return None

    def _items(self, what: str, request: Callable[..., Any], is_optional: bool = False, **named: Any) -> Any:
        found = self._read(what, request, is_optional=is_optional, **named)
        return None if found is None else found["items"]

    def _read(
        self, what: str, request: Callable[..., Any], *given: Any, is_optional: bool = False, **named: Any
    ) -> Any | None:
        """The answer to a request as a dict; None for what is not there, and for an optional one that is forbidden."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        named.setdefault("namespace", self._namespace)
        with explained(what):
            try:
                answer = request(*given, **named, _preload_content=False, _request_timeout=TIMEOUT)
                return json.loads(answer.data)
            except ApiException as error:
                if error.status == 404 or (error.status == 403 and is_optional):
                    return None
                if error.status == 429 or error.status >= 500:
                    raise _UnansweredError(f"{error.status} {error.reason}") from error
                raise
            except (HTTPError, OSError, ValueError) as error:
                raise _UnansweredError(" ".join(str(getattr(error, "reason", None) or error).split())) from error


class _Logs:
    """The lines of pods that have not been shown yet.

    Each look asks for the lines since the one before and a few seconds, and leaves out those that were shown, by the
    time to the nanosecond that the node gave them: no line is lost with a connection.
    """

    def __init__(self, api: Any, namespace: str) -> None:
        from kubernetes import client

        self._core: Any = client.CoreV1Api(api)  # its types do not know an answer that is not preloaded
        self._namespace = namespace
        self._failed: Counter[str] = Counter()  # by pod: looks in a row at which its log could not be read
        self._last: dict[str, tuple[float, str]] = {}  # by pod: when it was read, and the time of its last line

    def may_come(self, pod: str) -> bool:
        """Whether a log that could not be read may be read at a later look."""
        return self._failed[pod] < LOOKS

    def new_lines(self, pod: str) -> list[str] | None:
        """The new lines of a pod; None if its log cannot be read for now, as that of a pod whose node is lost."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        read, last = self._last.get(pod, (None, ""))
        begin = time.monotonic()
        window = {"tail_lines": FIRST_LINES} if read is None else {"since_seconds": int(begin - read) + 5}
        try:
            answer = self._core.read_namespaced_pod_log(
                pod,
                self._namespace,
                container=CONTAINER,
                timestamps=True,
                _preload_content=False,
                _request_timeout=TIMEOUT,
                **window,
            )
            log = answer.data.decode("utf-8", "replace")  # read only here
        except (ApiException, HTTPError, OSError):
            self._failed[pod] += 1
            return None
        self._failed[pod] = 0
        lines = []
        for line in log.split("\n"):
            stamp, _, text = line.partition(" ")
            if STAMP.fullmatch(stamp) and stamp > last:  # a node's own words on a log have no time
                lines.append((stamp, text.rstrip("\r").rpartition("\r")[2]))
        self._last[pod] = (begin, lines[-1][0] if lines else last)
        return [text for _, text in lines]


def _in_order(events: list[Document]) -> list[Document]:
    """Events, the oldest first."""

    def last_time(event: Document) -> str:
        return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"])

    return sorted(events, key=last_time)
