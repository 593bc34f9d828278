"""What only a cluster has, such as claims and pull secrets: the settings file of `lorry launch --kubernetes FILE`."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from stages.contract.errors import UsageError
from stages.contract.recipe import Section, problem_text
from stages.host.kubernetes.manifests import NAMES
from stages.host.needs import STAGES


class Claims(Section):
    """The names of the volume claims."""

    data: str = Field("lorry-data", description="Claim of the input data, at /data")
    models: str = Field("lorry-models", description="Claim of the models, at /models")
    runs: str = Field("lorry-runs", description="Claim of the runs, at /runs")
    caches: str = Field("lorry-caches", description="Claim of the caches, at /caches")


class Resources(Section):
    """The processor cores and memory of a stage's pod, in place of those that Lorry plans."""

    cpu: str | None = Field(None, description='Cores to request, such as "8"; null: as planned')
    memory: str | None = Field(None, description="Memory to request and its limit, such as 200Gi; null: as planned")


class Settings(Section):
    """What a cluster wants of every pod. An empty file is right for most clusters."""

    pull_secrets: list[str] = Field([], description="Secrets with which the nodes pull the images")
    service_account: str | None = Field(None, description="Service account of the pods; null: the namespace's default")
    priority_class: str | None = Field(None, description="Priority class of the pods; null: the cluster's default")
    queue: str | None = Field(None, description="Kueue's LocalQueue that the Jobs wait in; null: no Kueue")
    node_selector: dict[str, str] = Field({}, description="Labels that a node must have, such as those of a node pool")
    tolerations: list[dict[str, Any]] = Field([], description="Taints to tolerate, beside nvidia.com/gpu")
    environment: dict[str, str] = Field({}, description="Further environment variables of the stages")
    claims: Claims = Field(Claims(), description="Names of the volume claims")
    limit_cpu: bool = Field(False, description="Limit cores to those requested, where a quota demands limits.cpu")
    arbitrary_uid: bool = Field(False, description="Leave user and group of the pods to the cluster, as OpenShift does")
    resources: dict[str, Resources] = Field({}, description="Cores and memory, by stage")
    pod: dict[str, Any] = Field(
        {},
        description="All else of a pod's spec, merged into it as kustomize does, such as runtimeClassName or affinity",
    )


def load_settings(path: str | None) -> Settings:
    """The settings in a YAML file; the defaults if `path` is None.

    Raises UsageError, with the file's name, for a file that cannot be read, an unknown key and a wrong value.
    """
    if path is None:
        return Settings()
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read the settings ({error}); name a readable text file") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML ({' '.join(str(error).split())}); correct that line") from error
    try:
        found = Settings.model_validate({} if values is None else values)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(map(str, detail["loc"]))
        if detail["type"] == "extra_forbidden":
            known = ", ".join(Settings.model_fields)
            raise UsageError(f"{path}: unknown key {key!r}; known keys: {known}") from error
        raise UsageError(f"{path}: {problem_text(detail, key)}") from error
    unknown = [stage for stage in found.resources if stage not in STAGES]
    if unknown:
        raise UsageError(f"{path}: resources.{unknown[0]}: no such stage; use {', '.join(STAGES)}")
    if nameless := _nameless(found.pod):
        raise UsageError(f"{path}: pod: {nameless}; add it, so that it is known what it is merged into")
    return found


def _nameless(value: Any, key: str = "") -> str | None:
    """An element of one of NAMES' lists without its name, in words; None if each has one. `value` is that of `key`."""
    if isinstance(value, dict):
        return next(filter(None, (_nameless(one, name) for name, one in value.items())), None)
    if not isinstance(value, list) or key not in NAMES:
        return None
    if any(not isinstance(one, dict) or NAMES[key] not in one for one in value):
        return f"an element of {key} has no {NAMES[key]}"
    return next(filter(None, map(_nameless, value)), None)
