"""Reads the Job of a stage from k8s/: its base, and what the overlay of a target changes in it.

The overlays are kustomize's. Only what they use is read here: strategic merge patches of Jobs, by name. Tests compare
the result with what `kubectl kustomize` builds.
"""

import copy
import re
from pathlib import Path
from typing import Any

import yaml

from stages.contract.errors import UsageError

K8S = Path(__file__).parents[3] / "k8s"

Document = dict[str, Any]

NAMES = {
    "containers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "imagePullSecrets": "name",
}
"""The key by which elements of a list are merged, by the name of the list. Other lists are replaced."""


def base_job(stage: str) -> Document:
    """The Job of a stage in k8s/base. Raises UsageError without a checkout."""
    if not (K8S / "base").is_dir():  # installed from a wheel
        raise UsageError(f"{K8S.parent}: no k8s/ here; launch on Kubernetes from a checkout")
    job: Document = yaml.safe_load((K8S / "base" / f"{stage}-job.yaml").read_text(encoding="utf-8"))
    return job


def stage_job(stage: str, overlay: str, on_gpu: bool) -> Document:
    """The Job of a stage on the cards of an overlay, as in k8s/base and k8s/overlays, ready to start.

    `on_gpu` says whether it asks for a GPU: preprocess of k8s/base does, and the component `preprocess-without-gpu`
    says how it is without. Raises UsageError without a checkout, or if there is no such overlay.
    """
    folder, job = K8S / "overlays" / overlay, base_job(stage)
    if not folder.is_dir():
        known = ", ".join(sorted(path.name for path in folder.parent.iterdir()))
        raise UsageError(f"{folder}: no overlay for this target; add one (docs/add-a-card.md), or use one of {known}")
    without = [K8S / "components" / "preprocess-without-gpu"] if stage == "preprocess" and not on_gpu else []
    for each in (*without, folder):
        for patch in _patches(each, job):
            job = merge(job, patch)
    return job


def _patches(folder: Path, job: Document) -> list[Document]:
    """The patches of a kustomization that are for this Job."""
    found = []
    for patch in yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))["patches"]:
        target = patch["target"]
        if target["kind"] == job["kind"] and re.fullmatch(target.get("name", ".*"), job["metadata"]["name"]):
            content = yaml.safe_load(patch["patch"])
            content.pop("metadata")  # kustomize wants a name there, and does not use it
            found.append(content)
    return found


def merge(base: Any, patch: Any, name: str = "") -> Any:
    """`base` with a strategic merge patch: mappings key by key, where None removes the key; lists by NAMES.

    `name` is the key that the values have. Changes neither of them.
    """
    if isinstance(base, dict) and isinstance(patch, dict):
        merged = {key: value for key, value in base.items() if key not in patch}
        changed = {key: merge(base.get(key), value, key) for key, value in patch.items() if value is not None}
        order = [*base, *(key for key in patch if key not in base)]
        both = {**merged, **changed}
        return {key: copy.deepcopy(both[key]) for key in order if key in both}
    if isinstance(base, list) and isinstance(patch, list) and name in NAMES:
        key = NAMES[name]
        changes = {element[key]: element for element in patch}
        kept = [merge(element, changes.pop(element[key], {})) for element in base]
        return [*kept, *(merge({}, element) for element in changes.values())]
    return merge({}, patch) if isinstance(patch, dict) else copy.deepcopy(patch)
