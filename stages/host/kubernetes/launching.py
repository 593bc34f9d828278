"""Does the work of `lorry launch --on kubernetes`: renders a run's Jobs, applies one after the other and watches it."""

import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from stages.contract.errors import Exit, InterruptedRunError, UsageError
from stages.contract.events import say
from stages.hardware.targets import Target, load_targets, named_target
from stages.host.kubernetes.cluster import Cluster, connect
from stages.host.kubernetes.jobs import (
    FINGERPRINT,
    QUEUE,
    job_name,
    overlay_gpus,
    recipe_map,
    render_job,
    render_load_pod,
    to_yaml,
)
from stages.host.kubernetes.manifests import Document
from stages.host.kubernetes.needs import pod_needs
from stages.host.kubernetes.settings import Settings, load_settings
from stages.host.kubernetes.watch import cannot_start, watch_job
from stages.host.needs import STAGES
from stages.host.outcome import Lines, Note, Problem
from stages.host.runs import recipe_path

if TYPE_CHECKING:
    from stages.contract.run import Run

DATA = PurePosixPath("/data")
"""Where pods find the claim of the input data."""

LOAD_SECONDS = 300.0
"""Seconds in which the load pod must start."""

POLL = 2.0
"""Seconds between two looks at the load pod."""

ENDED = ("Complete", "Failed")
"""The conditions of a Job that has ended."""


@dataclass(frozen=True)
class Place:
    """Where on a cluster a run is launched."""

    namespace: str | None = None
    """None: that of the current context."""
    registry: str | None = None
    """Prefix of the images' names."""
    settings: str | None = None
    """Path of the settings file."""
    dry_run: bool = False
    """Whether to print the Jobs and start nothing."""


def launch(
    stage: str, options: dict[str, Any], gpus: str | None, target: str | None, force: bool, place: Place
) -> Lines:
    """Run the stages that a stage needs, then the stage itself, as Jobs. Yields lines to print; returns the exit code.

    The first stage that does not exit with 0 ends the launch. A Job of the run that does the same and has not ended is
    watched, and the stages before it are not started. `options` name the run as for `open_run`, but `data` is a path
    below the claim of the input data. Raises the errors of `cluster_run`, `pod_needs`, `load_settings` and `connect`;
    UsageError without a target or claims; InterruptedRunError if another Job of the run still runs, or after Ctrl-C.
    """
    card = _card(target)
    settings = load_settings(place.settings)
    run = cluster_run(options)
    stages = STAGES[: STAGES.index(stage) + 1]
    documents, notes = _render(run, stages, card, gpus, settings, force, place)
    yield from map(Note, notes)
    if place.dry_run:
        yield to_yaml(documents).rstrip("\n")
        return Exit.DONE
    cluster = connect(place.namespace)
    yield from map(Note, _refuse_missing_claims(cluster, settings))
    recipe, *jobs = documents
    begin = _first_to_start(cluster, jobs)
    _refuse_later_jobs(cluster, run.name, stages)
    for warning in cluster.apply(recipe):
        yield Problem(warning)
    for name, job in list(zip(stages, jobs, strict=True))[begin:]:
        yield from _start(cluster, name, job)
        code = yield from _watch(cluster, name, job)
        if code != Exit.DONE:
            return code
    yield f"results: /runs/{run.name} on the claim {settings.claims.runs}; copy it through `lorry launch load`"
    return Exit.DONE


def load(target: str | None, place: Place) -> Lines:
    """Start the pod through which data and models are copied to the claims. Yields lines to print.

    A pod that is there already stays. Raises the errors of `load_settings` and `connect`; UsageError without a target
    or claims, and if the pod does not start within LOAD_SECONDS.
    """
    settings = load_settings(place.settings)
    pod = render_load_pod(_card(target), settings, _version(), place.registry or "", place.namespace)
    if place.dry_run:
        yield to_yaml([pod]).rstrip("\n")
        return Exit.DONE
    cluster = connect(place.namespace)
    yield from map(Note, _refuse_missing_claims(cluster, settings))
    name = pod["metadata"]["name"]
    if cluster.pod(name) is None:
        yield from map(Problem, cluster.apply(pod))
        yield Note(f"pod/{name} is created")
    end = time.monotonic() + LOAD_SECONDS
    while not _is_ready(found := cluster.pod(name)):
        if found is None or time.monotonic() > end:
            raise UsageError(
                f"pod/{name}: {_reason_to_wait(found)}; mend that, and delete it: kubectl --namespace"
                f" {cluster.namespace} delete pod {name}"
            )
        time.sleep(POLL)
    yield f"pod/{name} is ready: kubectl --namespace {cluster.namespace} cp FOLDER {name}:/data/NAME, or /models/NAME"
    return Exit.DONE


def _is_ready(pod: Any | None) -> bool:
    """Whether a pod's containers run."""
    conditions = pod.status.conditions or [] if pod is not None else []
    return any(one.type == "Ready" and one.status == "True" for one in conditions)


def _reason_to_wait(pod: Any | None) -> str:
    """Why a pod does not run: its container's reason, or else the scheduler's message."""
    if pod is None:
        return "somebody deleted it"
    states = [status.state for status in pod.status.container_statuses or [] if status.state]
    waiting = [state.waiting.message or state.waiting.reason for state in states if state.waiting]
    ended = ["it has ended" for state in states if state.terminated]
    unmet = [one.message or one.type for one in pod.status.conditions or [] if one.status != "True"]
    return next(iter([*waiting, *ended, *unmet]), "it does not start")


def cluster_run(options: dict[str, Any]) -> "Run":
    """The run that the options name, whose data are on the cluster: the models here, if any, only serve to plan.

    Settings of the task are checked, unless they depend on the data. Raises UsageError without a recipe, for one that
    is wrong, a run's name that is no folder's, and data that are not below /data.
    """
    from stages.contract.recipe import load_recipe
    from stages.contract.roots import Roots
    from stages.contract.run import Run
    from stages.engines import engine_kind
    from stages.tasks import settle_recipe

    if not options["recipe"]:
        raise UsageError("RECIPE: not given, and a cluster's runs are not here; name a RECIPE")
    path = recipe_path(options["recipe"])
    data = (f"data.path={json.dumps(_data_on_claim(options['data']))}",) if options["data"] else ()
    recipe = load_recipe(path, options["profile"], (*data, *options["overrides"]))
    engine_kind(recipe.infer.engine)
    roots = Roots.from_environment()
    if not recipe.train.adapter_for_each_source and recipe.train.lora_config is None:
        settle_recipe(recipe, str(path), roots.data)
    name = options["run_name"] or path.stem
    if name in (".", "..") or "/" in name:
        raise UsageError(
            f"--run {name}: not a name for one folder; choose a name with letters or digits and without '/'"
        )
    return Run(name, recipe, roots)


def _data_on_claim(data: str) -> str:
    """The path of the data as pods see it. Raises UsageError for a path of this machine."""
    path = DATA / data
    if not path.is_relative_to(DATA) or ".." in path.parts:
        raise UsageError(
            f"--data {data}: not on the cluster; copy it to the claim of the data (`lorry launch load`), and give its"
            " path below /data"
        )
    return str(path)


def _version() -> str:
    """The version of the images."""
    return os.environ.get("LORRY_VERSION") or importlib.metadata.version("lorry")


def _card(target: str | None) -> Target:
    """The target of that name. Raises UsageError without one: this machine's cards are not the cluster's."""
    targets = load_targets()
    if not target:
        raise UsageError(f"--target: not given; name the kind of card in the cluster, one of {', '.join(targets)}")
    return named_target(target, targets)


def _render(
    run: "Run",
    stages: tuple[str, ...],
    card: Target,
    gpus: str | None,
    settings: Settings,
    force: bool,
    place: Place,
) -> tuple[list[Document], tuple[str, ...]]:
    """The recipe's ConfigMap and the Job of each stage, and lines on what was planned."""
    needs = pod_needs(run, card, stages, gpus, overlay_gpus(stages, card))
    version = _version()
    jobs = [
        render_job(
            run,
            stage,
            card,
            needs,
            settings,
            version,
            place.registry or "",
            place.namespace,
            force and stage == stages[-1],
        )
        for stage in stages
    ]
    asked = ", ".join(f"{stage} {count}" for stage, count in needs.gpus.items())
    notes = (*needs.notes, *([f"GPUs ({card.name}): {asked}"] if asked else []))
    return [recipe_map(run, place.namespace), *jobs], notes


def _refuse_missing_claims(cluster: Cluster, settings: Settings) -> list[str]:
    """A line on where the run goes. Raises UsageError if a volume claim is not there: its data would be missing too."""
    missing = cluster.missing_claims(list(settings.claims.model_dump().values()))
    if missing:
        raise UsageError(
            f"namespace {cluster.namespace}: no volume claim {', '.join(missing)}; create the claims with `kubectl"
            f" --namespace {cluster.namespace} apply -f k8s/storage.yaml`, and fill them through `lorry launch load`"
        )
    return [f"namespace {cluster.namespace}"]


def _first_to_start(cluster: Cluster, jobs: list[Document]) -> int:
    """The number of the stage to begin with: the last whose Job is under way and does the same, or else 0.

    Raises the error of `_refuse_other`.
    """
    begin = 0
    for number, job in enumerate(jobs):
        found = cluster.job(job["metadata"]["name"])
        _refuse_other(cluster, found, job)
        if found is not None and _is_under_way(found) and _does_the_same(found, job):
            begin = number
    return begin


def _refuse_other(cluster: Cluster, found: Any | None, job: Document) -> None:
    """Raise InterruptedRunError if the Job that was found under a Job's name has other settings and a pod that has
    started: two would meet in one folder."""
    if found is None or not _is_under_way(found) or _does_the_same(found, job) or not cluster.has_started(found):
        return
    name = found.metadata.name
    raise InterruptedRunError(
        f"job/{name}: runs with other settings; wait until it ends, choose another --run, or stop it (it saves"
        f" its state): kubectl --namespace {cluster.namespace} delete job {name}"
    )


def _refuse_later_jobs(cluster: Cluster, run_name: str, stages: tuple[str, ...]) -> None:
    """Raise InterruptedRunError if a stage after these is under way: it reads what these write, and their recipe."""
    for stage in STAGES[len(stages) :]:
        found = cluster.job(name := job_name(run_name, stage))
        if found is not None and _is_under_way(found):
            raise InterruptedRunError(
                f"job/{name}: a later stage of this run is under way; wait until it ends, choose another --run, or stop"
                f" it (it saves its state): kubectl --namespace {cluster.namespace} delete job {name}"
            )


def _is_under_way(job: Any) -> bool:
    """Whether a Job has not ended, is not being deleted, and is not suspended unless by Kueue, where it has its place
    in a queue."""
    if job.metadata.deletion_timestamp is not None:
        return False
    conditions = [one.type for one in job.status.conditions or [] if one.status == "True"]
    queued = QUEUE in (job.metadata.labels or {})
    return not set(ENDED) & set(conditions) and (queued or not job.spec.suspend)


def _does_the_same(found: Any, job: Document) -> bool:
    """Whether the Job of the cluster was applied with the same settings, recipe and image."""
    there: str | None = (found.metadata.annotations or {}).get(FINGERPRINT)
    return there == str(job["metadata"]["annotations"][FINGERPRINT])


def _start(cluster: Cluster, stage: str, job: Document) -> Lines:
    """Apply a stage's Job, in place of an earlier one.

    One that is under way and does the same stays as it is, unless its pod cannot start: it would try again minutes
    after the cause was mended. Raises the error of `_refuse_other`.
    """
    name = job["metadata"]["name"]
    found = cluster.job(name)
    # the look at the start may be hours old
    _refuse_other(cluster, found, job)
    goes_on = found is not None and _is_under_way(found) and _does_the_same(found, job)
    if goes_on and not cannot_start(cluster.api, cluster.namespace, name):
        yield Note(f"{stage}: job/{name} is under way; goes on with it")
        return None
    if found is not None:  # a Job's template cannot be changed
        cluster.delete_job(found, _sayer(stage))
    for warning in cluster.apply(job):
        yield Problem(f"{stage}: {warning}")
    yield Note(f"{stage}: job/{name} is created")
    return None


def _watch(cluster: Cluster, stage: str, job: Document) -> Lines:
    """Watch a stage's Job to its end. Yields its lines; returns the stage's exit code.

    Raises InterruptedRunError after Ctrl-C: the Job goes on.
    """
    name = job["metadata"]["name"]
    try:
        return (yield from watch_job(cluster.api, cluster.namespace, name))
    except KeyboardInterrupt as error:
        raise InterruptedRunError(
            f"{stage}: job/{name} goes on in the cluster; run the same command again to watch it, or stop it (it saves"
            f" its state): kubectl --namespace {cluster.namespace} delete job {name}"
        ) from error


def _sayer(stage: str) -> Callable[[str], None]:
    """A function that prints a line about a stage at once."""
    return lambda text: say(stage, text)
