"""Renders a run for a cluster: a ConfigMap with its recipe, and the Job of each stage, named by the run."""

import math
import re
from typing import TYPE_CHECKING, Any

import yaml

from stages.contract.files import digest_of
from stages.contract.recipe import dump_recipe
from stages.hardware.targets import Target
from stages.host.containers import image_name
from stages.host.kubernetes.manifests import K8S, Document, base_job, merge, stage_job
from stages.host.kubernetes.needs import PodNeeds
from stages.host.kubernetes.settings import Resources, Settings

if TYPE_CHECKING:
    from stages.contract.run import Run

GPU = "nvidia.com/gpu"
INSTANCE = "app.kubernetes.io/instance"
QUEUE = "kueue.x-k8s.io/queue-name"

FINGERPRINT = "lorry-settings"
"""The annotation of a Job with a digest of all that it does: a second launch goes on with a Job that does the same."""

RECIPE_FOLDER = "/recipe"


def run_label(name: str) -> str:
    """A run's name as a part of its objects' names: a DNS label of at most 40 characters.

    It is the name itself if that is one. Otherwise lower-case letters, digits and dashes of it stay, with a digest of
    the name, so that two runs never have the same.
    """
    if re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", name):
        return name
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:31].strip("-")
    return f"{readable or 'run'}-{digest_of(name)[:8]}"


def job_name(run_name: str, stage: str) -> str:
    """The name of a stage's Job."""
    return f"lorry-{run_label(run_name)}-{stage}"


def overlay_gpus(stages: tuple[str, ...], card: Target) -> dict[str, int]:
    """The GPUs that the overlay of a target gives to each stage; those without are left out."""
    found = {stage: _container(stage_job(stage, _overlay(card), True))["resources"]["limits"] for stage in stages}
    return {stage: int(limits[GPU]) for stage, limits in found.items() if GPU in limits}


def recipe_map(run: "Run", namespace: str | None) -> Document:
    """The ConfigMap with the run's recipe, in which profile, data folder and overrides are resolved."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": f"lorry-{run_label(run.name)}-recipe",
            **({"namespace": namespace} if namespace else {}),
            "labels": _run_labels(run),
        },
        "data": {"recipe.yaml": dump_recipe(run.recipe)},
    }


def render_job(
    run: "Run",
    stage: str,
    card: Target,
    needs: PodNeeds,
    settings: Settings,
    version: str,
    registry: str,
    namespace: str | None,
    force: bool,
) -> Document:
    """The Job of a stage of a run: that of k8s/ for the target, with what the plan and the cluster's settings change.

    `version` is that of the images, `registry` the prefix of their names. `force`: it starts again from nothing. Raises
    UsageError as `stage_job` does.
    """
    gpus = needs.gpus.get(stage, 0)
    job = stage_job(stage, _overlay(card), gpus > 0)
    image = image_name(stage, version, card, registry)
    labels = {**_run_labels(run), "app.kubernetes.io/component": stage, "app.kubernetes.io/version": version}
    job = merge(
        job,
        {
            "metadata": {
                "name": job_name(run.name, stage),
                **({"namespace": namespace} if namespace else {}),
                "labels": {**labels, **({QUEUE: settings.queue} if settings.queue else {})},
            },
            "spec": {"template": {"metadata": {"labels": labels}, "spec": _pod(run)}},
        },
    )
    container = _container(job)
    container["image"] = image
    if force:
        container["args"] = ["--force"]
    container["resources"] = _resources(container["resources"], stage, gpus, needs, settings.resources.get(stage))
    job["spec"]["template"]["spec"] = with_settings(job["spec"]["template"]["spec"], settings)
    digest = digest_of([job, dump_recipe(run.recipe)])[:16]
    return dict(merge(job, {"metadata": {"annotations": {FINGERPRINT: digest}}}))


def render_load_pod(card: Target, settings: Settings, version: str, registry: str, namespace: str | None) -> Document:
    """The pod of k8s/load-pod.yaml, which copies files, near the cards of a target: volumes may be where it runs.

    The arguments are those of `render_job`.
    """
    pod: Document = yaml.safe_load((K8S / "load-pod.yaml").read_text(encoding="utf-8"))
    cards = stage_job("train", _overlay(card), True)["spec"]["template"]["spec"].get("affinity")
    if cards is None:
        pod["spec"] = merge(pod["spec"], {"affinity": None, "tolerations": None})
    else:
        (term,) = cards["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        pod["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"][0]["preference"] = (
            term
        )
    pod["spec"]["containers"][0]["image"] = image_name("eval", version, card, registry)
    pod["spec"] = with_settings(pod["spec"], settings)
    labels = {"app.kubernetes.io/version": version}
    return dict(merge(pod, {"metadata": {"labels": labels, **({"namespace": namespace} if namespace else {})}}))


def to_yaml(documents: list[Document]) -> str:
    """The documents as one YAML text, as `kubectl apply -f -` reads it. A recipe in it stays readable."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and a value that comes twice twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _overlay(card: Target) -> str:
    """The name of the overlay of a target: a variant has that of the target of its card."""
    return card.variant_of or card.name


def _container(job: Document) -> Document:
    """The one container of a Job."""
    found: Document = job["spec"]["template"]["spec"]["containers"][0]
    return found


def _run_labels(run: "Run") -> dict[str, str]:
    """The labels of all that belongs to a run."""
    return {
        "app.kubernetes.io/name": "lorry",
        "app.kubernetes.io/part-of": "lorry",
        "app.kubernetes.io/managed-by": "lorry",
        INSTANCE: run_label(run.name),
    }


def _pod(run: "Run") -> Document:
    """What a run changes in a pod, as a merge patch."""
    name = {"name": "LORRY_RUN", "value": run.name, "valueFrom": None}  # a label cannot have every run's name
    return {
        "containers": [
            {
                "name": "lorry",
                "env": [
                    {"name": "LORRY_RECIPE", "value": f"{RECIPE_FOLDER}/recipe.yaml"},
                    {"name": "LORRY_PROFILE", "value": ""},  # resolved in the recipe
                    {"name": "LORRY_SET", "value": ""},
                    *([name] if run.name != run_label(run.name) else []),
                ],
                "volumeMounts": [{"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True}],
            }
        ],
        "volumes": [{"name": "recipe", "configMap": {"name": f"lorry-{run_label(run.name)}-recipe"}}],
    }


def with_settings(pod: Document, settings: Settings) -> Document:
    """A pod's spec with a cluster's settings, without those for a stage."""
    claims = settings.claims.model_dump()
    mounted = {volume["name"] for volume in pod["volumes"]}
    environment = [{"name": key, "value": value} for key, value in settings.environment.items()]
    tolerations = [*pod.get("tolerations", []), *settings.tolerations]
    changes: Document = {
        "containers": [{"name": "lorry", "env": environment}],
        "volumes": [
            {"name": key, "persistentVolumeClaim": {"claimName": claim}}
            for key, claim in claims.items()
            if key in mounted
        ],
        "imagePullSecrets": [{"name": secret} for secret in settings.pull_secrets],
        "serviceAccountName": settings.service_account,
        "priorityClassName": settings.priority_class,
        "nodeSelector": settings.node_selector,
        "tolerations": tolerations,
    }
    pod = merge(pod, {key: value for key, value in changes.items() if value})
    if settings.limit_cpu:
        resources = pod["containers"][0]["resources"]
        pod = merge(
            pod, {"containers": [{"name": "lorry", "resources": {"limits": {"cpu": resources["requests"]["cpu"]}}}]}
        )
    if settings.arbitrary_uid:
        pod = merge(
            pod, {"securityContext": dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy"))}
        )
    return dict(merge(pod, settings.pod))


def _resources(given: Document, stage: str, gpus: int, needs: PodNeeds, own: Resources | None) -> Document:
    """The resources of a stage's container: those of its overlay for each GPU, times its GPUs, but no fewer cores than
    in k8s/base; preprocess' memory as its models need it; cores and memory of the settings in place of these."""
    requests, limits = dict(given["requests"]), dict(given["limits"])
    if gpus:
        had = int(limits.get(GPU, 1))
        least = int(_container(base_job(stage))["resources"]["requests"]["cpu"])
        requests = {key: _scaled(str(value), gpus, had) for key, value in requests.items() if key != GPU}
        limits = {key: _scaled(str(value), gpus, had) for key, value in limits.items() if key != GPU}
        if stage == "preprocess" and needs.preprocess_gib:
            requests["memory"] = f"{needs.preprocess_gib}Gi"
            limits["memory"] = f"{needs.preprocess_gib * 4 // 3}Gi"
        requests["cpu"] = str(max(least, int(requests["cpu"])))
        requests[GPU] = limits[GPU] = gpus
    if own is not None and own.cpu:
        requests["cpu"] = own.cpu
    if own is not None and own.memory:
        requests["memory"] = limits["memory"] = own.memory
    return {"requests": requests, "limits": limits}


def _scaled(quantity: str, gpus: int, had: int) -> str:
    """A quantity of k8s/, such as `32Gi` for `had` GPUs, for another number of GPUs, rounded up."""
    number = re.match(r"\d+", quantity)
    assert number is not None, quantity
    return f"{math.ceil(int(number[0]) * gpus / had)}{quantity[number.end() :]}"
