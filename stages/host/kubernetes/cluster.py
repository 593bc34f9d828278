"""Talks to a cluster's API through Kubernetes' own client: server-side apply, and the Jobs that are there."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.contract.errors import InterruptedRunError, UsageError
from stages.host.kubernetes.manifests import Document

MANAGER = "lorry"
"""The field manager: the fields that Lorry applies are its own, all others stay as somebody set them."""

TIMEOUT = 30
"""Seconds until a request counts as unanswered."""

GONE = 900
"""Seconds in which a deleted Job's pods must end; training may take 600 to save a checkpoint."""

OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Cluster:
    """One namespace of a cluster."""

    def __init__(self, api: Any, namespace: str) -> None:
        from kubernetes import client

        self.api = api
        """The `ApiClient` of Kubernetes' client."""
        self.namespace = namespace
        # the client's types allow None where a server always answers
        self._core: Any = client.CoreV1Api(api)
        self._batch: Any = client.BatchV1Api(api)

    def missing_claims(self, names: list[str]) -> list[str]:
        """Those of the volume claims that are not in the namespace. Raises UsageError as `explained` does."""
        with explained(f"claims in namespace {self.namespace}"):
            found = self._core.list_namespaced_persistent_volume_claim(self.namespace, _request_timeout=TIMEOUT)
        known = {claim.metadata.name for claim in found.items}
        return [name for name in names if name not in known]

    def job(self, name: str) -> Any | None:
        """A Job; None if there is none of this name. Raises UsageError as `explained` does."""
        from kubernetes.client.exceptions import ApiException

        with explained(f"job/{name}"):
            try:
                return self._batch.read_namespaced_job(name, self.namespace, _request_timeout=TIMEOUT)
            except ApiException as error:
                if error.status == 404:
                    return None
                raise

    def pod(self, name: str) -> Any | None:
        """A pod; None if there is none of this name. Raises UsageError as `explained` does."""
        from kubernetes.client.exceptions import ApiException

        with explained(f"pod/{name}"):
            try:
                return self._core.read_namespaced_pod(name, self.namespace, _request_timeout=TIMEOUT)
            except ApiException as error:
                if error.status == 404:
                    return None
                raise

    def has_started(self, job: Any) -> bool:
        """Whether a container of one of a Job's pods has ever started. Raises the errors of `explained`."""
        name, uid = job.metadata.name, job.metadata.uid
        with explained(f"pods of job/{name}"):
            pods = self._core.list_namespaced_pod(
                self.namespace, label_selector=f"batch.kubernetes.io/job-name={name}", _request_timeout=TIMEOUT
            )
        own = [pod for pod in pods.items if any(one.uid == uid for one in pod.metadata.owner_references or [])]
        states = [status.state for pod in own for status in pod.status.container_statuses or []]
        # of pods that are gone, a Job counts those that failed, but not those that were drained
        return bool(job.status.failed) or any(state.running or state.terminated for state in states if state)

    def apply(self, document: Document) -> list[str]:
        """Apply a ConfigMap, a Job or a Pod by server-side apply, where unknown fields are refused.

        Returns the server's warnings. Raises UsageError as `explained` does.
        """
        name = document["metadata"]["name"]
        patches = {
            "ConfigMap": self._core.patch_namespaced_config_map_with_http_info,
            "Job": self._batch.patch_namespaced_job_with_http_info,
            "Pod": self._core.patch_namespaced_pod_with_http_info,
        }
        with explained(f"{document['kind'].lower()}/{name}"):
            _, _, headers = patches[document["kind"]](
                name,
                self.namespace,
                document,
                field_manager=MANAGER,
                field_validation="Strict",
                force=True,
                _content_type="application/apply-patch+yaml",
                _request_timeout=TIMEOUT,
            )
        warnings = headers.get("Warning")
        return [warnings] if warnings else []

    def delete_job(self, job: Any, say: Callable[[str], None], poll: float = 2) -> None:
        """Delete this very Job and wait until its pods, which lock the run, are gone. `poll` are seconds between two
        looks.

        Raises the errors of `explained`, and InterruptedRunError if they are still there after GONE seconds.
        """
        from kubernetes import client
        from kubernetes.client.exceptions import ApiException

        name = job.metadata.name
        options = client.V1DeleteOptions(
            propagation_policy="Foreground", preconditions=client.V1Preconditions(uid=job.metadata.uid)
        )
        with explained(f"job/{name}"):
            try:
                self._batch.delete_namespaced_job(name, self.namespace, body=options, _request_timeout=TIMEOUT)
            except ApiException as error:
                if error.status != 404:
                    raise
        end, said = time.monotonic() + GONE, False
        while self.job(name) is not None:
            if time.monotonic() > end:
                raise InterruptedRunError(f"job/{name}: its pods do not end; see `kubectl describe job {name}`")
            if not said:
                say(f"waits until the pods of the earlier job/{name} are gone")
                said = True
            time.sleep(poll)


def connect(namespace: str | None) -> Cluster:
    """The cluster of the current context of KUBECONFIG or ~/.kube/config, or the one that this process runs in.

    `namespace` None: that of the context, or else `default`. Raises UsageError if the client is not installed, and
    without a configuration.
    """
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise UsageError("kubernetes: Python's client is not installed here; run `make setup`") from error
    try:
        files = os.environ.get("KUBECONFIG") or "~/.kube/config"  # several, with colons between them, are one
        api = config.new_client_from_config(files)
        _, active = config.list_kube_config_contexts(files)
        own = (active or {}).get("context", {}).get("namespace")
    except config.ConfigException as error:
        try:
            config.load_incluster_config()
        except config.ConfigException:
            raise UsageError(
                f"KUBECONFIG: no cluster to talk to ({' '.join(str(error).split())}); set KUBECONFIG, or write"
                " ~/.kube/config"
            ) from error
        api = client.ApiClient()
        own = OWN_NAMESPACE.read_text(encoding="utf-8").strip() if OWN_NAMESPACE.is_file() else None
    return Cluster(api, namespace or own or "default")


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn the errors of a request about `what` into one line with the server's own reason: an InterruptedRunError if
    the same request may succeed later, else a UsageError."""
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        if error.status == 401:
            cure = "log in to the cluster again, or name another context in KUBECONFIG"
        elif error.status == 403:
            cure = "ask the cluster's admin for this right, or name another --namespace"
        elif error.status in (400, 422) or "field not declared in schema" in _reason(error):  # some servers say 500
            cure = "correct that field in --kubernetes FILE or k8s/"
        elif error.status in (409, 429) or error.status >= 500:
            again = f"{what}: the cluster refused it ({_reason(error)}); run the same command again"
            raise InterruptedRunError(again) from error
        else:
            cure = "correct --namespace, --kubernetes FILE or the cluster in KUBECONFIG"
        raise UsageError(f"{what}: the cluster refused it ({_reason(error)}); {cure}") from error
    except (HTTPError, OSError) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise UsageError(f"{what}: no cluster answers ({reason}); set KUBECONFIG or its current context") from error


def _reason(error: Any) -> str:
    """The message in a refusal's body; without one, its status."""
    try:
        return " ".join(str(json.loads(error.body)["message"]).split())
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"
