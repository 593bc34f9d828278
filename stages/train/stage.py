"""train: one LoRA adapter for each entry of `train.adapters`, each trained in a process of its own.

The process is ended with its memory before anything else is tried on the card, and a crash of it is not ours. When a
card's memory runs out, the next one begins a rung lower on the ladder (`ladder.py`), from the newest checkpoint.

With `train.connector` there is a phase before, trained in the same way: what stands between vision tower and language
model. The adapters are trained on the base with it, and belong to it: another connector, other adapters.
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
    place_same,
    read_json,
    read_jsonl,
    remove,
    visible_files,
    write_json,
    write_jsonl,
)
from stages.contract.mixes import mixed, shown, validated
from stages.contract.part import Node
from stages.contract.recipe import CONNECTOR, ONLY_ROOM, Adapter, Train
from stages.contract.run import CONTRACT_VERSION
from stages.contract.stage import Stage
from stages.hardware.batch import refuse_inexact
from stages.hardware.fit import Offers, Way, least_memory, plan_training, smallest_changes, unplanned
from stages.hardware.memory import Lengths, not_estimated
from stages.hardware.probe import Gpu, probe
from stages.hardware.targets import (
    Target,
    load_targets,
    precision_of,
    refuse_4bit_twice,
    refuse_4bit_without_kernels,
    refuse_base_without_kernels,
    working_target,
)
from stages.models.connector import FILE as CONNECTOR_FILE
from stages.models.connector import check_connector, trained_connector
from stages.models.gptq import stored_as
from stages.models.shape import ModelShape, UnknownShapeError, read_shape
from stages.results.summary import SUMMARY, dataset_result, summary_of_data_sets, training_facts
from stages.train.job import Job
from stages.train.ladder import Footing, Ladder, MemoryRanOutError, by_hand, next_rung, what_would_help
from stages.train.lengths import read_lengths
from stages.train.nodes import adapters_announced_by_the_first, announced, place_of
from stages.train.sharding import check_sharding
from stages.train.torchrun import train_adapter

GIB = 1024**3

MEMORY_SLACK = 256 * 1024**2
"""Bytes by which a card's free memory may be less than before: neighbours breathe."""

MEMORY_PATIENCE = 60.0
"""Seconds that a dead process's memory may take to come back."""


LEARNT = set(Train.model_fields) - {*ONLY_ROOM, "adapters", "adapter_for_each_source", "lora_config", "connector"}
"""What of `train` every adapter depends on."""


def work(stage: Stage) -> None:
    """The stage's work, for `run_stage`."""
    recipe = stage.run.recipe
    node = stage.part if isinstance(stage.part, Node) else None
    if node is not None and node.rank > 0:
        _help(stage, node)
        return
    if stage.nothing_to_do(len(recipe.train.adapters), "adapters"):
        return
    log: list[dict[str, Any]] = []
    adapters = [adapter for number, adapter in enumerate(recipe.train.adapters) if stage.has(number)]
    mixes, failures = _mixes_of(stage, adapters)
    connector = None
    plan: _Plan | None = None  # only once something is to be trained: taking over what is there needs no card
    if recipe.train.connector is not None:
        connector, plan = _train_connector(stage, node, log)
    else:
        remove(stage.path(*place_of(CONNECTOR)))  # of a recipe that had one
    keys = _keep_what_fits(stage, mixes, connector)
    results = _results_of(stage, [adapter for adapter in adapters if adapter.name not in failures])
    for adapter in adapters:
        name = adapter.name
        folder = stage.path("adapters", name)
        if name in failures:
            stage.events.say(f"train {name}: {failures[name]}")
            _note_result(stage, results, adapter, {"error": str(failures[name])})
            continue
        if not folder.is_dir():
            _take_over(stage, name)
        if not folder.is_dir():
            plan = plan or _plan(stage, node)
            try:
                with announced(stage, name, node):
                    _train(stage, adapter, keys[name], plan, node, connector)
            except LorryError as error:
                # a stop, a lost card or another node's trouble is no matter of this adapter alone
                if isinstance(error, InterruptedRunError) or node is not None:
                    raise
                failures[name] = error
                if len(recipe.train.adapters) > 1:  # of one alone the end tells
                    stage.events.say(f"train {name}: {error}")
                _note_result(stage, results, adapter, {"error": str(error)})
                continue
        _note_result(stage, results, adapter, {"training": training_facts(stage.run, adapter, folder)})
        log += _hand_on(stage, name, ("adapter_model.safetensors", "adapter_config.json"))
        stage.stop.check()
    _settle_failures(stage, failures, len(adapters))
    stage.outputs["metrics.jsonl"] = write_jsonl(stage.path("metrics.jsonl"), log)
    _remove_checkpoints(stage, failures)


def _help(stage: Stage, node: Node) -> None:
    """Train what node 0 announces, with it and the others."""
    recipe = stage.run.recipe
    by_name = {adapter.name: adapter for adapter in recipe.train.adapters}
    plans: dict[bool, _Plan] = {}
    for name in adapters_announced_by_the_first(stage):
        first_phase = name == CONNECTOR
        settings = recipe.train.of_connector() if first_phase else recipe.train
        # the second phase's too: what refuses that must not be found after the first
        for phase in (True, False) if first_phase else (False,):
            plans[phase] = plans.get(phase) or _plan(stage, node, settings if phase else None)
        adapter = settings.adapters[0] if first_phase else by_name[name]
        _train(stage, adapter, "", plans[first_phase], node, None if first_phase else trained_connector(stage.run))


def _hand_on(stage: Stage, name: str, files: tuple[str, ...]) -> list[dict[str, Any]]:
    """Note what was trained among the stage's outputs, and how that went. Returns its part of metrics.jsonl."""
    place = place_of(name)
    training = read_json(stage.path(*place, "training.json"))
    stage.counts[f"{name} samples"] = training["samples"]["train"]
    stage.counts[f"{name} steps"] = training["steps"]
    _tell_of(stage, name, training)
    for file in (*files, "training.json"):
        stage.outputs["/".join((*place, file))] = None
    return [{"adapter": name, **entry} for entry in training["log"]]


def _train_connector(
    stage: Stage, node: Node | None, log: list[dict[str, Any]]
) -> tuple[tuple[Path, str], "_Plan | None"]:
    """The first phase, or what an earlier start has left of it. Returns the connector and its sha256; and, where it had
    to be trained, the second phase's plan: what refuses that must not be found after hours.

    Raises UsageError where the file is not as it was trained.
    """
    if stage.shard is not None:
        raise UsageError(
            "train.connector: shards would each train a connector of their own; train without --shard, on the GPUs of"
            " one machine or with nodes"
        )
    settings = stage.run.recipe.train.of_connector()
    model = stage.run.model(stage.run.recipe.model.path, "model.path")
    if stored_as(model) is not None:
        raise UsageError(
            f"{model}: train.connector: it is trained beside a base in 16 bits or more, not a quantised one"
        )
    mix, folder = settings.adapters[0], stage.path(*place_of(CONNECTOR))
    key = _key_of_connector(stage, settings)
    second: _Plan | None = None
    if (read_json(folder / "made.json") or {}).get("key") != key:
        first, second = _plan(stage, node, settings), _plan(stage, node)
        remove(folder)
        with announced(stage, CONNECTOR, node):
            _train(stage, mix, key, first, node, None)
    sha256 = str(read_json(folder / "made.json")["files"][CONNECTOR_FILE])
    check_connector(folder / CONNECTOR_FILE, sha256)
    log += _hand_on(stage, CONNECTOR, (CONNECTOR_FILE,))
    stage.facts["connector"] = {"sha256": sha256, "data": mix.mix}
    unused = read_json(folder / "training.json")
    for why in ("without_picture", "beyond_most_samples"):
        stage.counts[f"{CONNECTOR} samples {why.replace('_', ' ')}"] = unused[why]
    return (folder / CONNECTOR_FILE, sha256), second


def _key_of_connector(stage: Stage, settings: Train) -> str:
    """A digest of all that it depends on. What an adapter is trained on, and how, is not among that."""
    run = stage.run
    assert settings.connector is not None
    train, validation = _samples(stage)
    mix = settings.adapters[0]
    samples, _ = shown(mixed(train, mix, run.recipe.seed), settings.connector.most_samples, run.recipe.seed)
    validated_on = shown(validated(validation, mix), settings.connector.most_samples, run.recipe.seed)[0]
    learnt = settings.model_dump(mode="json", include=LEARNT - LORAS_OWN)
    hashes = FileHashes(stage.path(".hashes.json"))  # knows model and pictures from when the stage's inputs were hashed
    pictures = _pictures_of(stage, [samples, validated_on], hashes)
    model, recipe = _model_digest(stage, hashes), run.recipe.digest("seed", "model")
    return digest_of([CONTRACT_VERSION, recipe, learnt, model, samples, validated_on, pictures])


LORAS_OWN = {"rank", "alpha", "dropout", "target_modules", "lora_plus_ratio", "freeze_vision", "load_in_4bit"}
"""What of `train` a connector does not depend on."""


def _remove_checkpoints(stage: Stage, failures: Collection[str]) -> None:
    """All of them that is used from here on is in the adapters; those that failed are tried again."""
    for path in stage.path("checkpoints").glob("*"):
        if path.name not in failures:
            remove(path)
    if not failures:
        remove(stage.path("checkpoints"))


def _samples(stage: Stage) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those to train and to validate on."""
    train, validation = (
        read_jsonl(stage.run.path("preprocess", "samples", f"{name}.jsonl")) for name in ("train", "validation")
    )
    return train, validation


def _model_digest(stage: Stage, hashes: FileHashes) -> str:
    return hashes.tree(stage.run.model(stage.run.recipe.model.path, "model.path"))[0]


def _pictures_of(stage: Stage, samples: list[list[dict[str, Any]]], hashes: FileHashes) -> Any:
    """A digest of the pictures that samples show; None where they show none.

    All pages count, and of `pictures/`, which holds those of test sets too, only what these samples name.
    """
    names = {name for part in samples for sample in part for name in sample["images"]}
    if not names:
        return None
    outputs = (stage.run.manifest("preprocess") or {}).get("outputs") or {}
    pages = outputs.get("pages/", {}).get("sha256")
    if "pictures/" not in outputs:
        return pages
    files = {name: stage.run.folder / name for name in names if name.startswith("preprocess/pictures/")}
    # one that is missing is told where it is read
    return {"pages/": pages, "pictures/": {name: hashes.file(path) for name, path in files.items() if path.is_file()}}


Mixes = dict[str, list[list[dict[str, Any]]]]
"""By adapter: what it is trained on, and what it is validated on."""


def _mixes_of(stage: Stage, adapters: list[Adapter]) -> tuple[Mixes, dict[str, LorryError]]:
    """The mixes of the adapters, and what is wrong with those of some."""
    train, validation = _samples(stage)
    mixes: Mixes = {}
    failures: dict[str, LorryError] = {}
    for adapter in adapters:
        try:
            mixes[adapter.name] = [mixed(train, adapter, stage.run.recipe.seed), validated(validation, adapter)]
        except UsageError as error:
            if len(adapters) == 1 or not stage.run.recipe.train.keep_going:  # a name mistyped must not cost hours first
                raise
            failures[adapter.name] = error
    return mixes, failures


def _keep_what_fits(stage: Stage, mixes: Mixes, connector: tuple[Path, str] | None) -> dict[str, str]:
    """The key of each adapter, by its name: a digest of all that it depends on.

    What earlier starts left of adapters with other keys, or of other names, is removed: a change of one data mix costs
    the training of one adapter, another connector that of all.
    """
    run = stage.run
    hashes = FileHashes(stage.path(".hashes.json"))
    model = _model_digest(stage, hashes)
    recipe = run.recipe.digest("seed", "model", *(f"train.{name}" for name in Train.model_fields if name in LEARNT))
    keys: dict[str, str] = {}
    for name, samples in mixes.items():
        parts = [CONTRACT_VERSION, recipe, model, samples, _pictures_of(stage, samples, hashes)]
        keys[name] = digest_of(parts if connector is None else [*parts, connector[1]])
    for path in stage.path("adapters").glob("*/"):
        made = read_json(path / "made.json") or {}
        whole = all(
            (path / name).is_file() and hashes.file(path / name) == digest
            for name, digest in made.get("files", {}).items()
        )
        if made.get("key") != keys.get(path.name, "") or not whole:
            remove(path)
    return keys


def _results_of(stage: Stage, adapters: list[Adapter]) -> dict[str, dict[str, Any]]:
    """Of those that earlier starts have trained: a summary that is written while one before them is trained again has
    them, too."""
    folders = {adapter.name: stage.path("adapters", adapter.name) for adapter in adapters}
    return {
        adapter.name: dataset_result(
            stage.run, adapter, {"training": training_facts(stage.run, adapter, folders[adapter.name])}
        )
        for adapter in adapters
        if folders[adapter.name].is_dir()
    }


def _note_result(stage: Stage, results: dict[str, dict[str, Any]], adapter: Adapter, result: dict[str, Any]) -> None:
    """Write the summary of the adapters so far, so that it is there whatever becomes of the others."""
    results[adapter.name] = dataset_result(stage.run, adapter, result)
    so_far = sorted(results.values(), key=lambda one: one["dataset_index"])
    write_json(stage.path(SUMMARY), summary_of_data_sets(stage.run, so_far, stage.starts[0]))


def _settle_failures(stage: Stage, failures: dict[str, LorryError], adapters: int) -> None:
    """Raise for adapters that could not be trained, unless the recipe goes on without them and there are others."""
    if not failures:
        return
    if len(stage.run.recipe.train.adapters) == 1:  # there are no others to speak of
        raise next(iter(failures.values()))
    told = "; ".join(f"{name}: {error}" for name, error in failures.items())
    if len(failures) == adapters or not stage.run.recipe.train.keep_going:
        others = (
            ""
            if len(failures) == adapters
            else (
                "; the others are kept: run the same command again to try only these, or go on without them with"
                " --set train.keep_going=true"
            )
        )
        failure = LorryError(f"{len(failures)} of {adapters} adapters could not be trained: {told}{others}")
        failure.exit_code = next(iter(failures.values())).exit_code
        raise failure
    stage.facts["untrained"] = {name: str(error) for name, error in failures.items()}
    stage.counts["untrained"] = len(failures)
    stage.events.say(f"{len(failures)} of {adapters} adapters could not be trained: the next run tries them again")


def _tell_of(stage: Stage, name: str, training: dict[str, Any]) -> None:
    """What the manifest says of one adapter, from its training.json: this start may not be the one that trained it."""
    settings, what = stage.run.recipe.train, f"adapter {name}"
    if name == CONNECTOR:
        settings, what = settings.of_connector(), name
    wanted, used = settings.max_length, training["max_length"]
    reason = f"longer than {settings.key_of('max_length')}" + (
        "" if used == wanted else f", which memory brought down to {used}"
    )
    for split, samples in training["left_out"].items():
        for sample in samples:
            stage.skip(sample, reason, f"{split}, {what}")
    if "memory" in training:
        stage.facts.setdefault("gpu_memory", {})[name] = training["memory"]
    for rung in training.get("out_of_memory", []):
        # a shard's decisions are there already, with the shard's name behind
        if not any(made["value"] == rung["value"] and made["why"].startswith(rung["why"]) for made in stage.decisions):
            stage.decisions.append(rung)


def _take_over(stage: Stage, name: str) -> None:
    """Take an adapter that a shard has trained; it appears once it is whole."""
    for shard in stage.finished_shards:
        source = shard / "adapters" / name
        if source.is_dir():
            partial = stage.path("adapters", f".{name}")
            remove(partial)
            for path in visible_files(source):
                place_same(path, partial / path.relative_to(source))
            partial.rename(stage.path("adapters", name))
            return


@dataclass(frozen=True)
class _Plan:
    target: Target
    way: Way
    gpus: tuple[Gpu, ...]
    """This machine's; none on a CPU."""

    @property
    def here(self) -> int:
        """Training processes on this machine."""
        return max(len(self.gpus), 1)

    @property
    def footing(self) -> Footing:
        return Footing(self.way.settings, self.way.batch, eval_micro_batch=self.way.batch.micro_batch)


def _plan(stage: Stage, node: Node | None, settings: Train | None = None) -> _Plan:
    """How to train on this machine's cards, and with the other machines'; they must fit the image. `settings` are the
    recipe's own where none are given.

    Raises DoesNotFitError where no way of training can fit, and UsageError for a sharding that cannot be done here,
    before any process starts.
    """
    settings = settings or stage.run.recipe.train
    plan = _planned(stage, settings, node)
    model = stage.run.model(stage.run.recipe.model.path, "model.path")
    check_sharding(plan.way.sharding, use_cpu=not plan.gpus, stored_as=stored_as(model))
    if settings.exact_batch:
        refuse_inexact(plan.way.batch, settings.key_of("effective_batch"))
    return plan


def _planned(stage: Stage, settings: Train, node: Node | None) -> _Plan:
    machine, recipe = probe(), stage.run.recipe
    gpus = machine.gpus
    label = f"{CONNECTOR} " if settings.trains_connector else ""

    def decide(what: str, value: Any, why: str) -> None:
        stage.decide(f"{label}{what}", value, why)

    target = working_target(machine, load_targets())
    dtype = precision_of(settings.precision, target)
    decide("precision", dtype, f"target {target.name}" if settings.precision == "auto" else "train.precision")
    if settings.load_in_4bit:
        refuse_4bit_without_kernels(target)
    here = max(len(gpus), 1)
    processes = here * (node.count if node else 1)
    if processes > 1:
        where = f"{node.count} nodes with {here} each, meeting at {node.rendezvous}" if node else "one for each GPU"
        decide("training processes", processes, where)
    offers = _offers(settings, target)
    if settings.sharding == "auto" and not offers.deepspeed:
        settings = settings.model_copy(update={"sharding": "none"})
    model = stage.run.model(recipe.model.path, "model.path")
    try:
        shape = read_shape(model)
    except UnknownShapeError as error:
        decide("memory", "not estimated", str(error))
        way = unplanned(settings, processes, dtype)
        decide("effective batch", str(way.batch), f"{settings.key_of('effective_batch')} is {settings.effective_batch}")
        return _Plan(target, way, gpus)
    refuse_base_without_kernels(model, shape.quantisation, target)
    if settings.load_in_4bit:
        refuse_4bit_twice(model, shape.quantisation)
    samples = stage.run.path("preprocess", "samples", "train.jsonl")
    lengths = read_lengths(samples, model, settings, stage.run.folder)
    telling = [gpu for gpu in gpus if gpu.memory_total]  # some cards do not tell their memory
    fullest = min(telling, key=lambda gpu: gpu.memory_free, default=None)
    # machines that train together must go the same way, and have not the same memory free
    memory = fullest.memory_free if fullest and node is None else None
    way = plan_training(shape, settings, processes, dtype, memory, lengths)
    if fullest:
        if least_memory(shape, settings, processes, dtype) > fullest.memory_free:
            raise _cannot_fit(shape, settings, processes, dtype, lengths, fullest, offers)
        free = f"{fullest.memory_free / GIB:.1f} GiB free on {fullest}, {fullest.uuid[:12]}"
        needed = f"{way.estimate.total / GIB:.1f} GiB estimated for the longest samples ({lengths.longest} tokens)"
        decide("memory", needed, free if way.fits(fullest.memory_free) else f"only {free}: it may run out")
    left_out = not_estimated(shape, settings)
    if left_out:
        decide("memory not estimated", left_out, "what is left has to hold it")
    for change in way.changes:
        why = "so that it fits" if way.fits(memory) else "the least there is"
        decide("fit", change, f"{why}; the result is the same")
    if settings.sharding in ("zero2", "zero3"):
        decide("sharding", settings.sharding, "train.sharding")
    decide("effective batch", str(way.batch), f"{settings.key_of('effective_batch')} is {settings.effective_batch}")
    stage.facts[f"{label}estimate".replace(" ", "_")] = {**way.estimate.parts(), "total": way.estimate.total}
    return _Plan(target, way, gpus)


def _offers(settings: Train, target: Target) -> Offers:
    """What the software here has; nothing of it is made use of in the first phase."""
    if settings.trains_connector:
        return Offers(bitsandbytes=False, deepspeed=False)
    return Offers("bitsandbytes" in target.quantisation, importlib.util.find_spec("deepspeed") is not None)


def _cannot_fit(
    shape: ModelShape, settings: Train, processes: int, dtype: str, lengths: Lengths, gpu: Gpu, offers: Offers
) -> DoesNotFitError:
    """The error where the least that training takes is more than a card has free, with what cures it."""
    least, free = least_memory(shape, settings, processes, dtype), gpu.memory_free
    holders = f" (held by {', '.join(map(str, gpu.processes))})" if gpu.processes else ""
    cures = ["free that card or take another (make: GPUS=...)"] if least <= gpu.memory_total else []
    for way in smallest_changes(shape, settings, processes, dtype, free, lengths, offers):
        cures.append("with " + " and ".join(way.changes))
    return DoesNotFitError(
        f"training takes {least / GIB:.1f} GiB at the very least on each GPU, and {gpu}, {gpu.uuid[:12]}, has"
        f" {free / GIB:.1f} of {gpu.memory_total / GIB:.1f} GiB free{holders};"
        f" what fits: {', or '.join(cures) or 'only a smaller model'}"
    )


def _train(
    stage: Stage,
    adapter: Adapter,
    key: str,
    plan: _Plan,
    node: Node | None,
    connector: tuple[Path, str] | None,
) -> None:
    """Train one adapter, on the base with a connector where there is one, or the connector itself; a rung lower each
    time that memory runs out. Raises DoesNotFitError below the last."""
    name = adapter.name
    # with several machines, checkpoints and adapter are node 0's
    work = stage.run.path("train", "checkpoints", name) if node else stage.path("checkpoints", name)
    ladder = Ladder.of(work, min((gpu.memory_total for gpu in plan.gpus), default=0))
    footing = ladder.descended(plan.footing)
    for made in ladder.decisions:
        stage.events.say(f"train {name}: out of memory in an earlier start: {made['value']}")
    with _timed(work, stage.path(*place_of(name)), node):
        while True:
            before = probe().gpus if plan.gpus else ()
            try:
                job = _job(stage, adapter, key, plan, footing, node, connector)
                speed = train_adapter(stage, job, plan.here, node, plan.target.environment)
            except MemoryRanOutError as error:
                footing = _one_rung_lower(stage, name, ladder, footing, error, node)
                _wait_for_memory(stage, before, error.processes)
                continue
            if speed is not None:
                stage.facts.setdefault("tokens_per_second", {})[name] = round(speed, 1)
            return


@contextmanager
def _timed(work: Path, adapter: Path, node: Node | None) -> Iterator[None]:
    """Keep how many seconds an adapter took, over all starts but those that were killed; beside it once it is there.

    Of several machines node 0 does that: it removes `work`, which is its own, when all is done.
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


def _one_rung_lower(
    stage: Stage, name: str, ladder: Ladder, footing: Footing, error: MemoryRanOutError, node: Node | None
) -> Footing:
    shortage = error.shortage
    change = next_rung(footing, shortage.during)
    if change is None:
        tried = "" if shortage.during == "loading" else ", and nothing is left to make smaller"
        raise DoesNotFitError(
            f"training {name}: out of memory {shortage}{tried}; {what_would_help(footing)}; log:"
            f" {stage.path('log.txt')}"
        )
    if node is not None:  # another number of processes waits in each machine, and none may begin alone
        raise DoesNotFitError(
            f"training {name}: out of memory {shortage}; start all {node.count} nodes again with"
            f" {by_hand(change, footing.settings)}"
        )
    after = ladder.take(name, shortage, change, footing)
    made = ladder.decisions[-1]  # training.json brings it into the manifest
    stage.events.emit("decision", **made)
    stage.events.say(f"{made['what']}: {made['value']} ({made['why']})")
    return after


def _wait_for_memory(stage: Stage, before: tuple[Gpu, ...], processes: tuple[int, ...]) -> None:
    """Wait until the cards no longer know these processes; where that cannot be seen, until the memory is back."""
    if not before:
        return
    began = time.monotonic()
    free_before = {gpu.uuid: gpu.memory_free - MEMORY_SLACK for gpu in before}
    while True:
        stage.stop.check()
        held = [gpu for gpu in probe().gpus if _still_held(gpu, processes, free_before.get(gpu.uuid, 0))]
        waited = time.monotonic() - began
        if not held:
            stage.events.say(f"the GPUs' memory is free again after {waited:.1f} s")
            return
        if waited > MEMORY_PATIENCE:
            cards = ", ".join(f"{gpu}: {gpu.memory_free / GIB:.1f} GiB free" for gpu in held)
            stage.events.say(f"not all memory came back in {waited:.0f} s ({cards}); trying all the same")
            return
        time.sleep(0.5)


def _still_held(gpu: Gpu, processes: tuple[int, ...], free_before: int) -> bool:
    if any(one.pid in processes for one in gpu.processes):
        return True
    # in a container the driver names the processes by other numbers, or not at all; where it names each one, what is
    # missing has been taken by others
    others_are_known = bool(gpu.processes) and all(one.name != "?" for one in gpu.processes)
    return gpu.memory_free < free_before and not others_are_known


def _job(
    stage: Stage,
    adapter: Adapter,
    key: str,
    plan: _Plan,
    footing: Footing,
    node: Node | None,
    connector: tuple[Path, str] | None,
) -> Job:
    """With several machines, this one's part of it: checkpoints and adapter are node 0's."""
    run, recipe, name = stage.run, stage.run.recipe, adapter.name
    own = stage.path("checkpoints", name)
    return Job(
        model=run.model(recipe.model.path, "model.path"),
        work=run.path("train", "checkpoints", name) if node else own,
        scratch=own / "scratch",
        adapter=run.path("train", *place_of(name)) if node else stage.path(*place_of(name)),
        run=run.folder,
        key=key,
        mix=adapter,
        train=[run.path("preprocess", "samples", "train.jsonl")],
        validation=[run.path("preprocess", "samples", "validation.jsonl")],
        seed=recipe.seed,
        dtype=plan.way.dtype,
        sharding=plan.way.sharding,
        micro_batch=footing.batch.micro_batch,
        accumulation=footing.batch.accumulation,
        processes=footing.batch.gpus,
        eval_micro_batch=footing.eval_micro_batch,
        evaluate=footing.evaluate,
        use_cpu=not plan.gpus,
        cards=[f"{gpu}, {gpu.uuid}" for gpu in plan.gpus],
        model_settings=recipe.model,
        settings=footing.settings,
        progress=-1,
        connector=connector,
    )
