"""train: one LoRA adapter for each entry of `train.adapters`, each trained in processes of its own.

The processes end and free their memory before the next adapter starts. If training one adapter fails, Lorry still
trains the others, except after a lost GPU or on several nodes. If a GPU's memory runs out, new processes start from the
newest checkpoint with settings that need less memory (`ladder.py`).

With `train.connector`, a first phase trains the connector in the same way. The adapters are then trained on the base
with that connector. If the connector changes, Lorry trains the adapters again.

An adapter or connector stays in its place until the one that replaces it is complete, and then in `superseded/`.
"""

import importlib.util
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.contract.errors import DoesNotFitError, InterruptedRunError, LorryError, UsageError
from stages.contract.files import (
    FileHashes,
    digest_of,
    link_or_copy,
    read_json,
    read_jsonl,
    remove,
    visible_files,
    write_json,
    write_jsonl,
)
from stages.contract.mixes import samples_with_pictures, training_samples, validation_samples
from stages.contract.part import Node
from stages.contract.recipe import CONNECTOR, RESULT_NEUTRAL, Adapter, Train
from stages.contract.run import CONTRACT_VERSION
from stages.contract.stage import Stage
from stages.contract.superseded import publish, put_back, remove_other_checkpoints, set_aside, trained_key
from stages.engines import engine_kind, refuse_unserved_rank
from stages.hardware.batch import refuse_inexact_batch
from stages.hardware.fit import Offers, Way, least_memory, plan_training, smallest_changes, unestimated_way
from stages.hardware.memory import Lengths, gap_in_estimate
from stages.hardware.probe import Gpu, probe
from stages.hardware.targets import (
    Target,
    base_dtype,
    load_targets,
    refuse_4bit_twice,
    refuse_4bit_without_kernels,
    refuse_base_without_kernels,
    working_target,
)
from stages.models.chat_settings import chat_settings
from stages.models.connector import FILE as CONNECTOR_FILE
from stages.models.connector import check_connector, refuse_quantised_connector, trained_connector
from stages.models.control_words import said_note
from stages.models.gptq import quantisation_method
from stages.models.remote_code import settle_base
from stages.models.rendering import check_samples, checked_renderer
from stages.models.shape import ModelShape, UnknownShapeError, read_shape
from stages.results.summary import SUMMARY, build_summary, dataset_result, training_facts
from stages.train.job import TEMPLATE_FILE, Job
from stages.train.ladder import Attempt, Ladder, MemoryRanOutError, change_as_options, memory_advice, next_rung
from stages.train.lengths import read_lengths
from stages.train.nodes import announce_training, announced_adapters, folder_parts
from stages.train.sharding import check_sharding
from stages.train.torchrun import train_adapter

GIB = 1024**3

MEMORY_SLACK = 256 * 1024**2
"""Bytes by which a GPU's free memory may stay below its earlier value: what other programs use varies."""

MEMORY_PATIENCE = 60.0
"""Seconds to wait until the driver frees the memory of a process that has ended."""


LEARNT = set(Train.model_fields) - {*RESULT_NEUTRAL, "adapters", "adapter_for_each_source", "lora_config", "connector"}
"""Fields of `train` that every adapter depends on."""


def work(stage: Stage) -> None:
    """Train the connector, if the recipe has one, and then the adapters. `run_stage` calls this.

    A shard trains only its own adapters. A node other than node 0 joins the trainings that node 0 announces.
    """
    recipe = stage.run.recipe
    node = stage.part if isinstance(stage.part, Node) else None
    if node is not None and node.rank > 0:
        _train_with_node_0(stage, node)
        return
    if stage.has_nothing_to_do(len(recipe.train.adapters), "adapters"):
        return
    _check_model(stage)
    log: list[dict[str, Any]] = []
    adapters = [adapter for number, adapter in enumerate(recipe.train.adapters) if stage.does_piece(number)]
    renderer = checked_renderer(stage)
    mixes, failures = _read_mixes(stage, adapters)
    check_samples(stage.run, renderer, (sample for parts in mixes.values() for part in parts for sample in part))
    connector = None
    plan: _Plan | None = None  # made when something has to be trained: existing adapters need no GPU
    if recipe.train.connector is not None:
        connector, plan = _train_connector(stage, node, log)
    trained = _Trained(stage, _adapter_keys(stage, mixes, connector))
    trained.put_back()
    results = _earlier_results(stage, [adapter for adapter in adapters if trained.has(adapter.name)])
    for adapter in adapters:
        name = adapter.name
        folder = stage.path("adapters", name)
        if name in failures:
            stage.events.say(f"train {name}: {failures[name]}")
            _note_result(stage, results, adapter, {"error": str(failures[name])})
            continue
        if not trained.has(name):
            _copy_from_shard(stage, name)
        if not trained.has(name):
            plan = plan or _plan(stage, node)
            try:
                with announce_training(stage, name, trained.keys[name], node):
                    _train(stage, adapter, trained.keys[name], plan, node, connector)
            except LorryError as error:
                # a stop, a lost GPU or a failure of another node concerns more than this adapter
                if isinstance(error, InterruptedRunError) or node is not None:
                    raise
                failures[name] = error
                if len(recipe.train.adapters) > 1:  # a single adapter's error ends the stage
                    stage.events.say(f"train {name}: {error}")
                _note_result(stage, results, adapter, {"error": str(error)})
                continue
        _note_result(stage, results, adapter, {"training": training_facts(stage.run, adapter, folder)})
        files = ("adapter_model.safetensors", "adapter_config.json", TEMPLATE_FILE)
        log += _add_outputs(stage, name, tuple(file for file in files if (folder / file).is_file()))
        stage.stop.check()
    _raise_or_report_failures(stage, failures, len(adapters))
    stage.outputs["metrics.jsonl"] = write_jsonl(stage.path("metrics.jsonl"), log)
    trained.set_others_aside()
    _remove_checkpoints(stage, failures)


def _check_model(stage: Stage) -> None:
    """Settle whether the base's Python files run, before anything loads it.

    Raises UsageError if they would have to run and may not, and if infer's engine could not serve the adapters.
    """
    settle_base(stage)
    recipe = stage.run.recipe
    if not recipe.infer.merged:
        refuse_unserved_rank(engine_kind(recipe.infer.engine), recipe.train.rank)


def _train_with_node_0(stage: Stage, node: Node) -> None:
    """Train the connector and the adapters that node 0 announces, together with node 0 and the other nodes."""
    recipe = stage.run.recipe
    by_name = {adapter.name: adapter for adapter in recipe.train.adapters}
    plans: dict[bool, _Plan] = {}
    for name in announced_adapters(stage):
        first_phase = name == CONNECTOR
        settings = recipe.train.connector_settings() if first_phase else recipe.train
        # plan the second phase too: it must not turn out impossible only after the first
        for phase in (True, False) if first_phase else (False,):
            plans[phase] = plans.get(phase) or _plan(stage, node, settings if phase else None)
        adapter = settings.adapters[0] if first_phase else by_name[name]
        _train(stage, adapter, "", plans[first_phase], node, None if first_phase else trained_connector(stage.run))


def _add_outputs(stage: Stage, name: str, files: tuple[str, ...]) -> list[dict[str, Any]]:
    """Add a trained adapter or connector to the stage's outputs, counts and decisions. Returns its rows of
    metrics.jsonl."""
    place = folder_parts(name)
    training = read_json(stage.path(*place, "training.json"))
    stage.counts[f"{name} samples"] = training["samples"]["train"]
    stage.counts[f"{name} steps"] = training["steps"]
    if "skipped_steps" in training:
        stage.counts[f"{name} steps skipped by the loss scale"] = training["skipped_steps"]
    _add_training_facts(stage, name, training)
    for file in (*files, "training.json"):
        stage.outputs["/".join((*place, file))] = None
    return [{"adapter": name, **entry} for entry in training["log"]]


def _train_connector(
    stage: Stage, node: Node | None, log: list[dict[str, Any]]
) -> tuple[tuple[Path, str], "_Plan | None"]:
    """Train the connector, unless an earlier start trained it. Returns ((file, sha256), plan of the second phase).

    The plan is None if this start trained no connector. Otherwise it is made before the connector is trained: the
    second phase must not turn out impossible after hours of training. Adds the connector's rows of metrics.jsonl to
    `log`. Raises UsageError if the connector's file has changed since it was trained, and for a shard or a quantised
    base.
    """
    if stage.shard is not None:
        raise UsageError(
            "train.connector: cannot be used with --shard, since each shard would train its own connector; leave out"
            " --shard, or train on several nodes"
        )
    settings = stage.run.recipe.train.connector_settings()
    refuse_quantised_connector(stage.run.model(stage.run.recipe.model.path, "model.path"))
    mix, folder = settings.adapters[0], stage.path(*folder_parts(CONNECTOR))
    key = _connector_key(stage, settings)
    second: _Plan | None = None
    if (read_json(folder / "made.json") or {}).get("key") != key and not stage.forced:
        put_back(folder, stage.folder, key)
    if (read_json(folder / "made.json") or {}).get("key") != key:
        first, second = _plan(stage, node, settings), _plan(stage, node)
        with announce_training(stage, CONNECTOR, key, node):
            _train(stage, mix, key, first, node, None)
    sha256 = str(read_json(folder / "made.json")["files"][CONNECTOR_FILE])
    check_connector(folder / CONNECTOR_FILE, sha256)
    log += _add_outputs(stage, CONNECTOR, (CONNECTOR_FILE,))
    stage.facts["connector"] = {"sha256": sha256, "data": mix.mix}
    unused = read_json(folder / "training.json")
    for why in ("without_picture", "beyond_most_samples"):
        stage.counts[f"{CONNECTOR} samples {why.replace('_', ' ')}"] = unused[why]
    return (folder / CONNECTOR_FILE, sha256), second


def _connector_key(stage: Stage, settings: Train) -> str:
    """Digest of everything that the connector depends on, which excludes the adapters' own settings and mixes."""
    run = stage.run
    assert settings.connector is not None
    train, validation = _read_samples(stage)
    mix = settings.adapters[0]
    samples, _ = samples_with_pictures(
        training_samples(train, mix, run.recipe.seed), settings.connector.most_samples, run.recipe.seed
    )
    validated_on = samples_with_pictures(
        validation_samples(validation, mix), settings.connector.most_samples, run.recipe.seed
    )[0]
    learnt = settings.model_dump(mode="json", include=LEARNT - LORAS_OWN)
    hashes = FileHashes(stage.path(".hashes.json"))  # has model and pictures from hashing the stage's inputs
    pictures = _picture_hashes(stage, [samples, validated_on], hashes)
    model, recipe = _model_digest(stage, hashes), run.recipe.digest("seed", "model")
    parts = [CONTRACT_VERSION, recipe, learnt, model, samples, validated_on, pictures]
    chat = chat_settings(run).facts
    return digest_of([*parts, chat] if chat else parts)


LORAS_OWN = {"rank", "alpha", "dropout", "target_modules", "lora_plus_ratio", "freeze_vision", "load_in_4bit"}
"""Fields of `train` that a connector does not depend on."""


def _remove_checkpoints(stage: Stage, failures: Collection[str]) -> None:
    """Remove the checkpoints of trained adapters, and if none failed, those of trainings with other settings too. The
    next start resumes from those of failed adapters."""
    for path in stage.path("checkpoints").glob("*"):
        if path.name not in failures:
            remove(path)
    if not failures:
        remove(stage.path("checkpoints"))
        remove_other_checkpoints(stage.folder)


def _read_samples(stage: Stage) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the training samples and the validation samples of all data sets."""
    train, validation = (
        read_jsonl(stage.run.path("preprocess", "samples", f"{name}.jsonl")) for name in ("train", "validation")
    )
    return train, validation


def _model_digest(stage: Stage, hashes: FileHashes) -> str:
    """Digest of all files of the base."""
    return hashes.tree_digest(stage.run.model(stage.run.recipe.model.path, "model.path"))[0]


def _picture_hashes(stage: Stage, samples: list[list[dict[str, Any]]], hashes: FileHashes) -> Any:
    """The hashes of the samples' pictures, as part of a key; None if the samples have no pictures.

    They cover the whole folder `pages/`, but in `pictures/`, which also holds test sets, only the samples' own files.
    """
    names = {name for part in samples for sample in part for name in sample["images"]}
    if not names:
        return None
    outputs = (stage.run.manifest("preprocess") or {}).get("outputs") or {}
    pages = outputs.get("pages/", {}).get("sha256")
    if "pictures/" not in outputs:
        return pages
    files = {name: stage.run.folder / name for name in names if name.startswith("preprocess/pictures/")}
    # training reports a missing file
    return {
        "pages/": pages,
        "pictures/": {name: hashes.file_digest(path) for name, path in files.items() if path.is_file()},
    }


Mixes = dict[str, list[list[dict[str, Any]]]]
"""By adapter name: its training samples and its validation samples."""


def _read_mixes(stage: Stage, adapters: list[Adapter]) -> tuple[Mixes, dict[str, LorryError]]:
    """Return two dicts by adapter name: its samples, or an error if its mix names a data set without samples.

    Raises the error instead, a UsageError, if `adapters` has only one entry or train.keep_going is not set.
    """
    train, validation = _read_samples(stage)
    mixes: Mixes = {}
    failures: dict[str, LorryError] = {}
    for adapter in adapters:
        try:
            mixes[adapter.name] = [
                training_samples(train, adapter, stage.run.recipe.seed),
                validation_samples(validation, adapter),
            ]
        except UsageError as error:
            if len(adapters) == 1 or not stage.run.recipe.train.keep_going:  # report a mistyped name before training
                raise
            failures[adapter.name] = error
    return mixes, failures


def _adapter_keys(stage: Stage, mixes: Mixes, connector: tuple[Path, str] | None) -> dict[str, str]:
    """The key of each adapter in `mixes`, by name: a digest of everything that the adapter depends on.

    If one data mix changes, one adapter is trained again; if the connector changes, all are.
    """
    run = stage.run
    hashes = FileHashes(stage.path(".hashes.json"))
    model = _model_digest(stage, hashes)
    recipe = run.recipe.digest("seed", "model", *(f"train.{name}" for name in Train.model_fields if name in LEARNT))
    keys: dict[str, str] = {}
    chat = chat_settings(run).facts
    for name, samples in mixes.items():
        parts = [CONTRACT_VERSION, recipe, model, samples, _picture_hashes(stage, samples, hashes)]
        parts += [connector[1]] if connector else []
        keys[name] = digest_of([*parts, chat] if chat else parts)
    return keys


class _Trained:
    """The finished adapters in the stage's folder."""

    def __init__(self, stage: Stage, keys: dict[str, str]) -> None:
        """`keys` has the keys of the adapters that the recipe wants, by name."""
        self.keys = keys
        self._stage, self._hashes = stage, FileHashes(stage.path(".hashes.json"))

    def has(self, name: str) -> bool:
        """Whether an adapter is there, intact and what the recipe says."""
        folder = self._stage.path("adapters", name)
        return name in self.keys and trained_key(folder, self._hashes) == self.keys[name]

    def put_back(self) -> None:
        """Put back the adapters that a training with other settings replaced and that the recipe wants again. A forced
        start does not use them."""
        for name, key in self.keys.items():
            if not self._stage.forced and not self.has(name):
                put_back(self._stage.path("adapters", name), self._stage.folder, key)

    def set_others_aside(self) -> None:
        """Set aside the adapters that are not what the recipe says, and the connector if the recipe has none."""
        for folder in self._stage.path("adapters").glob("*/"):
            if not folder.name.startswith(".") and not self.has(folder.name):
                set_aside(folder, self._stage.folder)
        if self._stage.run.recipe.train.connector is None:
            set_aside(self._stage.path(*folder_parts(CONNECTOR)), self._stage.folder)


def _earlier_results(stage: Stage, adapters: list[Adapter]) -> dict[str, dict[str, Any]]:
    """The results of the adapters that earlier starts trained, by name, for this start's summaries."""
    folders = {adapter.name: stage.path("adapters", adapter.name) for adapter in adapters}
    return {
        adapter.name: dataset_result(
            stage.run, adapter, {"training": training_facts(stage.run, adapter, folders[adapter.name])}
        )
        for adapter in adapters
        if folders[adapter.name].is_dir()
    }


def _note_result(stage: Stage, results: dict[str, dict[str, Any]], adapter: Adapter, result: dict[str, Any]) -> None:
    """Add an adapter's result and write the summary of all results so far, in case a later adapter fails."""
    results[adapter.name] = dataset_result(stage.run, adapter, result)
    so_far = sorted(results.values(), key=lambda one: one["dataset_index"])
    write_json(stage.path(SUMMARY), build_summary(stage.run, so_far, stage.starts[0]))


def _raise_or_report_failures(stage: Stage, failures: dict[str, LorryError], adapters: int) -> None:
    """Raise LorryError if an adapter failed, with the exit code of the first failure.

    `adapters` is the number of adapters that this process trains. If train.keep_going is set and one of them was
    trained, records and prints the failures instead.
    """
    if not failures:
        return
    if len(stage.run.recipe.train.adapters) == 1:
        raise next(iter(failures.values()))
    errors = "; ".join(f"{name}: {error}" for name, error in failures.items())
    if len(failures) == adapters or not stage.run.recipe.train.keep_going:
        others = (
            ""
            if len(failures) == adapters
            else (
                "; the others are finished; run the same command again to train only these, or continue without them"
                " with --set train.keep_going=true"
            )
        )
        failure = LorryError(f"train.adapters: {len(failures)} of {adapters} failed: {errors}{others}")
        failure.exit_code = next(iter(failures.values())).exit_code
        raise failure
    stage.facts["untrained"] = {name: str(error) for name, error in failures.items()}
    stage.counts["untrained"] = len(failures)
    stage.events.say(f"{len(failures)} of {adapters} adapters failed; run the same command again to retry them")


def _add_training_facts(stage: Stage, name: str, training: dict[str, Any]) -> None:
    """Add the facts in the training.json of an adapter or the connector to the manifest: samples that were too long,
    control words, GPU memory, and what changed when memory ran out. Also prints the control words.

    An earlier start or a shard may have written the file.
    """
    settings, what = stage.run.recipe.train, f"adapter {name}"
    if name == CONNECTOR:
        settings, what = settings.connector_settings(), name
    wanted, used = settings.max_length, training["max_length"]
    reason = f"longer than {settings.full_key('max_length')}" + (
        "" if used == wanted else f", which was lowered to {used} to fit the memory"
    )
    for split, samples in training["left_out"].items():
        for sample in samples:
            stage.skip(sample, reason, f"{split}, {what}")
    if "control_words" in training:
        stage.facts.setdefault("control_words", {})[name] = training["control_words"]
        stage.events.say(f"{what}: {said_note(training['control_words'])}")
    if "memory" in training:
        stage.facts.setdefault("gpu_memory", {})[name] = training["memory"]
    for rung in training.get("out_of_memory", []):
        # the list already has a shard's decisions, whose `why` ends with the shard's name
        if not any(made["value"] == rung["value"] and made["why"].startswith(rung["why"]) for made in stage.decisions):
            stage.decisions.append(rung)


def _copy_from_shard(stage: Stage, name: str) -> None:
    """Copy an adapter's folder from the shard that trained it. Does nothing if no finished shard has it.

    The copy appears only when it is complete.
    """
    for shard in stage.finished_shards:
        source = shard / "adapters" / name
        if source.is_dir():
            partial = stage.path("adapters", f".{name}")
            remove(partial)
            for path in visible_files(source):
                link_or_copy(path, partial / path.relative_to(source))
            publish(partial, stage.path("adapters", name), stage.folder)
            return


@dataclass(frozen=True)
class _Plan:
    """How one phase trains on this machine."""

    target: Target
    way: Way
    gpus: tuple[Gpu, ...]
    """This machine's GPUs; empty on a CPU."""

    @property
    def processes_here(self) -> int:
        """Training processes on this machine."""
        return max(len(self.gpus), 1)

    @property
    def first_attempt(self) -> Attempt:
        """The settings of the first attempt, before any rung of the ladder."""
        return Attempt(self.way.settings, self.way.batch, eval_micro_batch=self.way.batch.micro_batch)


def _plan(stage: Stage, node: Node | None, settings: Train | None = None) -> _Plan:
    """Plan the training on the GPUs of this machine and of the other nodes, and check the plan. Returns it.

    Raises DoesNotFitError if the training does not fit the GPUs, they do not fit the image, or they cannot reach
    effective_batch exactly although train.exact_batch is set. Raises UsageError if the sharding or the quantisation is
    impossible here. `settings` defaults to the recipe's.
    """
    settings = settings or stage.run.recipe.train
    plan = _unchecked_plan(stage, settings, node)
    model = stage.run.model(stage.run.recipe.model.path, "model.path")
    check_sharding(plan.way.sharding, use_cpu=not plan.gpus, quantisation=quantisation_method(model))
    if settings.exact_batch:
        refuse_inexact_batch(plan.way.batch, settings.full_key("effective_batch"))
    return plan


def _unchecked_plan(stage: Stage, settings: Train, node: Node | None) -> _Plan:
    """Plan the training, and add the decisions to the stage. Returns the plan, which `_plan` checks further.

    Raises DoesNotFitError if the training does not fit the GPUs, or they do not fit the image or the base. Raises
    UsageError for train.load_in_4bit with a quantised base, and for a damaged model folder.
    """
    machine, recipe = probe(), stage.run.recipe
    gpus = machine.gpus
    label = f"{CONNECTOR} " if settings.trains_connector else ""

    def decide(what: str, value: Any, why: str) -> None:
        stage.decide(f"{label}{what}", value, why)

    target = working_target(machine, load_targets())
    dtype = base_dtype(settings.precision, target)
    decide("precision", dtype, f"target {target.name}" if settings.precision == "auto" else "train.precision")
    if settings.load_in_4bit:
        refuse_4bit_without_kernels(target)
    here = max(len(gpus), 1)
    processes = here * (node.count if node else 1)
    if processes > 1:
        where = f"{node.count} nodes with {here} each, meeting at {node.rendezvous}" if node else "one for each GPU"
        decide("training processes", processes, where)
    offers = _usable_libraries(settings, target)
    if settings.sharding == "auto" and not offers.deepspeed:
        settings = settings.model_copy(update={"sharding": "none"})
    model = stage.run.model(recipe.model.path, "model.path")
    try:
        shape = read_shape(model)
    except UnknownShapeError as error:
        decide("memory", "not estimated", str(error))
        way = unestimated_way(settings, processes, dtype)
        decide(
            "effective batch", str(way.batch), f"{settings.full_key('effective_batch')} is {settings.effective_batch}"
        )
        return _Plan(target, way, gpus)
    refuse_base_without_kernels(model, shape.quantisation, target)
    if settings.load_in_4bit:
        refuse_4bit_twice(model, shape.quantisation)
    samples = stage.run.path("preprocess", "samples", "train.jsonl")
    lengths = read_lengths(samples, model, settings, stage.run.folder)
    known = [gpu for gpu in gpus if gpu.memory_total]  # some GPUs do not report their memory
    fullest = min(known, key=lambda gpu: gpu.memory_free, default=None)
    # nodes that train together need the same plan, but their free memory differs
    memory = fullest.memory_free if fullest and node is None else None
    way = plan_training(shape, settings, processes, dtype, memory, lengths)
    if fullest:
        if least_memory(shape, settings, processes, dtype) > fullest.memory_free:
            raise _memory_error(shape, settings, processes, dtype, lengths, fullest, offers)
        free = f"{fullest.memory_free / GIB:.1f} GiB free on {fullest}, {fullest.uuid[:12]}"
        needed = f"{way.estimate.total / GIB:.1f} GiB estimated for the longest samples ({lengths.longest} tokens)"
        decide("memory", needed, free if way.fits(fullest.memory_free) else f"only {free}; it may run out")
    left_out = gap_in_estimate(shape, settings)
    if left_out:
        decide("memory not estimated", left_out, "it must fit in the remaining memory")
    for change in way.changes:
        why = "to fit the memory" if way.fits(memory) else "takes the least memory"
        decide("fit", change, f"{why}; the result stays the same")
    if settings.sharding in ("zero2", "zero3"):
        decide("sharding", settings.sharding, "train.sharding")
    decide("effective batch", str(way.batch), f"{settings.full_key('effective_batch')} is {settings.effective_batch}")
    stage.facts[f"{label}estimate".replace(" ", "_")] = {**way.estimate.parts(), "total": way.estimate.total}
    return _Plan(target, way, gpus)


def _usable_libraries(settings: Train, target: Target) -> Offers:
    """The optional libraries that this image has and this phase can use. The connector's phase can use none."""
    if settings.trains_connector:
        return Offers(bitsandbytes=False, deepspeed=False)
    return Offers("bitsandbytes" in target.quantisation, importlib.util.find_spec("deepspeed") is not None)


def _memory_error(
    shape: ModelShape, settings: Train, processes: int, dtype: str, lengths: Lengths, gpu: Gpu, offers: Offers
) -> DoesNotFitError:
    """The error for a GPU whose free memory is below the least that training needs. It lists changes that would fit."""
    least, free = least_memory(shape, settings, processes, dtype), gpu.memory_free
    holders = f" (held by {', '.join(map(str, gpu.processes))})" if gpu.processes else ""
    cures = ["free that GPU or use another (GPUS=...)"] if least <= gpu.memory_total else []
    for way in smallest_changes(shape, settings, processes, dtype, free, lengths, offers):
        cures.append("use " + " and ".join(way.changes))
    return DoesNotFitError(
        f"{gpu}, {gpu.uuid[:12]}: has only {free / GIB:.1f} of {gpu.memory_total / GIB:.1f} GiB free{holders}, but"
        f" training needs at least {least / GIB:.1f} GiB on each GPU;"
        f" {', or '.join(cures) or 'use a smaller model'}"
    )


def _train(
    stage: Stage,
    adapter: Adapter,
    key: str,
    plan: _Plan,
    node: Node | None,
    connector: tuple[Path, str] | None,
) -> None:
    """Train one adapter or the connector. Each time memory runs out, try again with the ladder's next change.

    The result replaces an earlier one when it is complete. `key` is a digest of everything that it depends on; nodes
    other than node 0 write no result and need none. `connector` is the file and sha256 of the connector that an adapter
    is trained with; None: the base's own. Raises DoesNotFitError if memory runs out and no change is left, or several
    nodes train together, and the errors of `train_adapter` for any other failure.
    """
    name = adapter.name
    # with several nodes, checkpoints and adapter are in node 0's folder
    work = stage.run.path("train", "checkpoints", name) if node else stage.path("checkpoints", name)
    ladder = Ladder.read(work, min((gpu.memory_total for gpu in plan.gpus), default=0))
    attempt = ladder.apply_rungs(plan.first_attempt)
    for made in ladder.decisions:
        stage.events.say(f"train {name}: an earlier start ran out of memory; its change was {made['value']}")
    with _record_seconds(work, stage.path(*folder_parts(name)), node):
        writes = node is None or node.rank == 0
        finished = work / "finished" / name
        trained = writes and trained_key(finished) == key  # a kill came just before it was moved to its place
        if writes and not trained:
            remove(finished.parent)
        while not trained:
            before = probe().gpus if plan.gpus else ()
            try:
                job = _job(stage, adapter, key, plan, attempt, node, connector)
                speed = train_adapter(stage, job, plan.processes_here, node, plan.target.environment)
            except MemoryRanOutError as error:
                attempt = _next_attempt(stage, name, ladder, attempt, error, node)
                _wait_for_memory(stage, before, error.processes)
                continue
            if speed is not None:
                stage.facts.setdefault("tokens_per_second", {})[name] = round(speed, 1)
            trained = True
        if writes:
            publish(finished, stage.path(*folder_parts(name)), stage.folder)


@contextmanager
def _record_seconds(work: Path, adapter: Path, node: Node | None) -> Iterator[None]:
    """Add the seconds that this context takes to those of an adapter's earlier starts. A killed start adds none.

    The sum is in `work`/seconds.json and, once the adapter is finished, in `adapter`/timing.json. With several nodes,
    only node 0 records it: it owns `work` and removes it at the end.
    """
    if node is not None and node.rank > 0:
        yield
        return
    file, began = work / "seconds.json", time.monotonic()
    try:
        yield
    finally:
        seconds = (read_json(file) or {"seconds": 0.0})["seconds"] + time.monotonic() - began
        write_json(file, {"seconds": round(seconds, 3)})
    write_json(adapter / "timing.json", {**(read_json(adapter / "timing.json") or {}), "seconds": round(seconds, 3)})


def _next_attempt(
    stage: Stage, name: str, ladder: Ladder, attempt: Attempt, error: MemoryRanOutError, node: Node | None
) -> Attempt:
    """Add the ladder's next change to ladder.json and print it, after memory ran out. Returns the next attempt.

    Raises DoesNotFitError if no change is left, or if several nodes train together.
    """
    shortage = error.shortage
    change = next_rung(attempt, shortage.during)
    if change is None:
        last = "" if shortage.during == "loading" else ", and nothing is left to reduce"
        raise DoesNotFitError(
            f"training {name}: out of memory {shortage}{last}; {memory_advice(attempt)}; log: {stage.path('log.txt')}"
        )
    if node is not None:  # all nodes must start the next attempt together
        raise DoesNotFitError(
            f"training {name}: out of memory {shortage}; start all {node.count} nodes again with"
            f" {change_as_options(change, attempt.settings)}"
        )
    after = ladder.add_rung(name, shortage, change, attempt)
    made = ladder.decisions[-1]  # the manifest takes it from training.json
    stage.events.emit("decision", **made)
    stage.events.say(f"{made['what']}: {made['value']} ({made['why']})")
    return after


def _wait_for_memory(stage: Stage, before: tuple[Gpu, ...], processes: tuple[int, ...]) -> None:
    """Wait until the GPUs have freed the memory of these ended processes, at most MEMORY_PATIENCE seconds.

    Prints how long it waited. `before` are the GPUs as they were before these processes started; without any, does not
    wait. Raises InterruptedRunError if the stage is asked to stop.
    """
    if not before:
        return
    began = time.monotonic()
    free_before = {gpu.uuid: gpu.memory_free - MEMORY_SLACK for gpu in before}
    while True:
        stage.stop.check()
        held = [gpu for gpu in probe().gpus if _is_still_held(gpu, processes, free_before.get(gpu.uuid, 0))]
        waited = time.monotonic() - began
        if not held:
            stage.events.say(f"GPU memory is free again after {waited:.1f} s")
            return
        if waited > MEMORY_PATIENCE:
            cards = ", ".join(f"{gpu}: {gpu.memory_free / GIB:.1f} GiB free" for gpu in held)
            stage.events.say(f"GPU memory is still held after {waited:.0f} s ({cards}); training continues anyway")
            return
        time.sleep(0.5)


def _is_still_held(gpu: Gpu, processes: tuple[int, ...], free_before: int) -> bool:
    """Whether ended processes still hold a GPU's memory: the driver lists them, or less than `free_before` bytes are
    free and no other process explains it."""
    if any(one.pid in processes for one in gpu.processes):
        return True
    # in a container, the driver may list processes with other ids or none at all; if it lists and names every process,
    # other programs hold the missing memory
    others_are_known = bool(gpu.processes) and all(one.name != "?" for one in gpu.processes)
    return gpu.memory_free < free_before and not others_are_known


def _job(
    stage: Stage,
    adapter: Adapter,
    key: str,
    plan: _Plan,
    attempt: Attempt,
    node: Node | None,
    connector: tuple[Path, str] | None,
) -> Job:
    """The job of this machine's training processes. With several nodes, checkpoints and results are in node 0's
    folder."""
    run, recipe, name = stage.run, stage.run.recipe, adapter.name
    own = stage.path("checkpoints", name)
    work = run.path("train", "checkpoints", name) if node else own
    return Job(
        model=run.model(recipe.model.path, "model.path"),
        work=work,
        scratch=own / "scratch",
        adapter=work / "finished" / name,
        run=run.folder,
        key=key,
        mix=adapter,
        train=[run.path("preprocess", "samples", "train.jsonl")],
        validation=[run.path("preprocess", "samples", "validation.jsonl")],
        seed=recipe.seed,
        dtype=plan.way.dtype,
        sharding=plan.way.sharding,
        micro_batch=attempt.batch.micro_batch,
        accumulation=attempt.batch.accumulation,
        processes=attempt.batch.gpus,
        eval_micro_batch=attempt.eval_micro_batch,
        evaluate=attempt.evaluate,
        use_cpu=not plan.gpus,
        cards=[f"{gpu}, {gpu.uuid}" for gpu in plan.gpus],
        model_settings=recipe.model,
        settings=attempt.settings,
        progress=-1,
        connector=connector,
        chat=chat_settings(run),
    )
