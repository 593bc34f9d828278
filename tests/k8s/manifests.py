"""Reads the manifests of k8s/: files as they are, and overlays as `kubectl kustomize` builds them."""

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
K8S = REPOSITORY / "k8s"

Document = dict[str, Any]


class StrictLoader(yaml.SafeLoader):
    """Refuses a key given twice, as the API server does; PyYAML would keep the last one and say nothing."""


def _mapping(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"given twice: {', '.join(twice)}", node.start_mark)
    return loader.construct_mapping(node, deep=True)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read(text: str) -> list[Document]:
    """The documents of a manifest."""
    return [document for document in yaml.load_all(text, StrictLoader) if document is not None]


def manifest_files() -> list[Path]:
    """Every manifest that is applied as a file; what belongs to kustomize alone is left out, and links are."""
    return sorted(path for path in K8S.rglob("*.yaml") if path.name != "kustomization.yaml" and not path.is_symlink())


def overlay_names() -> list[str]:
    return sorted(path.name for path in (K8S / "overlays").iterdir())


def real_kubectl() -> str:
    """Fails, and does not skip, where kubectl is missing: unbuilt overlays must not pass for good ones."""
    found = shutil.which("kubectl")
    assert found, "kubectl is not on the PATH: install kubectl 1.29 or newer"
    return found


def build(folder: Path) -> list[Document]:
    """What `kubectl apply -k folder` would send."""
    built = subprocess.run([real_kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return read(built.stdout)


@cache
def built_overlay(name: str) -> list[Document]:
    return build(K8S / "overlays" / name)


def jobs(documents: list[Document]) -> Iterator[Document]:
    """The Jobs among the documents, those that a JobSet would make included."""
    for document in documents:
        if document["kind"] == "Job":
            yield document
        elif document["kind"] == "JobSet":
            yield from children(document)


def children(jobset: Document) -> Iterator[Document]:
    """The Jobs that a JobSet makes, named as it names them."""
    for replicated in jobset["spec"]["replicatedJobs"]:
        name = f"{jobset['metadata']['name']}-{replicated['name']}-0"
        metadata = {**replicated["template"].get("metadata", {}), "name": name}
        yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": replicated["template"]["spec"]}
