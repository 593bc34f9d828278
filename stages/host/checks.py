"""Finds the mistakes that recipe, folders and machine show before a stage runs.

A job of hours must not end with a mistake that its first second could have shown. Each check below calls the function
that knows the fact, which the stage itself may call again.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from stages.contract.errors import DoesNotFitError, LorryError, UsageError
from stages.contract.machine_errors import machine_error
from stages.contract.run import Run
from stages.engines import engine_kind, refuse_unserved_model, refuse_unserved_pictures, refuse_unserved_rank
from stages.hardware.pick import allowed_gpus
from stages.hardware.probe import Machine, probe
from stages.hardware.serve import plan_serving
from stages.hardware.targets import (
    Target,
    base_dtype,
    load_targets,
    named_target,
    refuse_4bit_twice,
    refuse_4bit_without_kernels,
    refuse_base_without_kernels,
    working_target,
)
from stages.host.needs import EMBEDDER, preprocess_models, refuse_missing_libraries, stages_on_gpus
from stages.models.merge import refuse_merging_quantised, refuse_unserved_vision
from stages.models.remote_code import refuse_remote_code
from stages.models.shape import ModelShape, UnknownShapeError, read_shape

Check = Callable[[], object]
"""Raises a LorryError, or an OSError that `machine_error` explains, if it finds a mistake."""


def refuse_mistakes(run: Run, stages: Sequence[str], machine: bool = True) -> None:
    """Raise a LorryError with a line for each mistake that would end one of these stages of a run.

    Without `machine`, only recipe and folders are checked: the stages have GPUs, target and libraries of their own, as
    in containers. The error has the exit code of the first mistake.
    """
    checks = [*_folder_checks(run, stages), *(_machine_checks(run, stages) if machine else ())]
    mistakes: dict[str, LorryError] = {}
    for check in checks:
        try:
            check()
        except (LorryError, OSError) as error:
            explained = error if isinstance(error, LorryError) else machine_error(error)
            if explained is None:
                raise
            mistakes.setdefault(str(explained), explained)  # several checks may find the same missing folder
    if mistakes:
        together = LorryError("\n".join(mistakes))
        together.exit_code = next(iter(mistakes.values())).exit_code
        raise together


# -- recipe and folders --------------------------------------------------------------------------------------------


def _folder_checks(run: Run, stages: Sequence[str]) -> Iterator[Check]:
    """Yield the checks of the mounts, the data folder and the model folders."""
    recipe = run.recipe
    yield run.roots.refuse_unwritable_runs
    if "preprocess" in stages:
        yield partial(_check_data, run)
        if recipe.preprocess.retrieval is not None:
            yield partial(run.model, recipe.preprocess.retrieval.embedder, "preprocess.retrieval.embedder")
        juicer = recipe.preprocess.data_juicer
        for key, weights in juicer.weight_folders().items() if juicer else ():
            yield partial(run.model, weights, key)
    asks = "preprocess" in stages and recipe.preprocess.classifier == "model"
    if asks or "train" in stages or "infer" in stages:
        yield partial(_base_shape, run)
        if not recipe.model.trust_remote_code:
            yield partial(_check_remote_code, run)
    if "train" in stages:
        yield partial(_check_swift_names, run)
        yield partial(_check_training, run)
    if "infer" in stages:
        yield partial(_check_serving, run)


def _base(run: Run) -> Path:
    """The folder of the base. Raises UsageError if it is missing or no model folder."""
    return run.model(run.recipe.model.path, "model.path")


def _base_shape(run: Run) -> ModelShape | None:
    """The shape of the base; None if Lorry cannot read it from the config. Raises UsageError if the folder is missing
    or damaged."""
    try:
        return read_shape(_base(run))
    except UnknownShapeError:  # train says so itself, and goes on
        return None


def _check_remote_code(run: Run) -> None:
    """Raise UsageError if Python files in the base's folder would have to run."""
    refuse_remote_code(_base(run), "set model.trust_remote_code to true if you trust them")


def _check_data(run: Run) -> None:
    """Raise UsageError or DataError if the data folder lacks files that the task needs, or a data set of a mix."""
    from stages.tasks import load_task, refuse_file
    from stages.tasks.task import reads_documents, reads_records

    folder, task, train = run.data, load_task(run.recipe.task), run.recipe.train
    refuse_file(task, run.recipe, folder)
    if reads_documents(task):
        task.find_documents(folder)
    if reads_records(task):
        task.records(folder)
    known = task.sources(folder)
    mixes = {f"the data mix of {adapter.name}": adapter.data for adapter in train.adapters}
    if train.keep_going:  # train leaves out such an adapter
        mixes = {}
    if train.connector is not None:
        mixes["train.connector.data"] = train.connector.data
    for mix, parts in mixes.items():
        for part in parts:
            if part.source not in known:
                raise UsageError(
                    f"train.adapters: {mix} names {part.source!r}, which {folder} lacks; name a data set that is there:"
                    f" {', '.join(known)}"
                )


def _check_swift_names(run: Run) -> None:
    """Raise UsageError if ms-swift does not know the recipe's model type or template, or the type is not the base's.

    Nothing is checked for a base whose pictures Lorry reads itself: the names are not used.
    """
    from stages.models.pictures import family_rules
    from stages.train.swift_names import refuse_wrong_names

    base = run.roots.models / run.recipe.model.path
    if family_rules(base) is None:
        refuse_wrong_names(run.recipe.model, base if base.is_dir() else None)


def _check_training(run: Run) -> None:
    """Raise the errors with which train would refuse the base, whatever the GPUs."""
    from stages.models.connector import refuse_quantised_connector

    shape, train = _base_shape(run), run.recipe.train
    if train.load_in_4bit and shape is not None:
        refuse_4bit_twice(_base(run), shape.quantisation)
    if train.connector is not None:
        refuse_quantised_connector(_base(run))


def _check_serving(run: Run) -> None:
    """Raise the errors with which infer would refuse the base, or adapters trained as the recipe says."""
    infer, train, model = run.recipe.infer, run.recipe.train, _base(run)
    kind = engine_kind(infer.engine)
    refuse_unserved_model(kind, model)
    if infer.merged:
        refuse_merging_quantised(model)
    else:
        refuse_unserved_rank(kind, train.rank)
    adapts_vision = not train.freeze_vision and "all-linear" in train.target_modules
    if adapts_vision and not (infer.merged or kind.serves_adapted_vision):
        refuse_unserved_vision(model, kind.name)


# -- GPUs, target and libraries ------------------------------------------------------------------------------------


def _machine_checks(run: Run, stages: Sequence[str]) -> Iterator[Check]:
    """Yield the checks of what these stages need of this machine."""
    for stage in stages:
        yield partial(refuse_missing_libraries, run.recipe, stage)
    computing = [stage for stage in stages_on_gpus(run, stages) if _must_compute(run, stage)]
    if computing == ["preprocess"]:
        yield partial(_check_gpu_of_preprocess, run)
    elif computing:
        yield partial(_check_gpus, run, computing)
    elif "preprocess" in stages and (name := os.environ.get("LORRY_TARGET")):
        yield partial(named_target, name, load_targets())


def _must_compute(run: Run, stage: str) -> bool:
    """Whether a stage that computes on GPUs has work for them left, unless it finds that something is outdated.

    train has none if the run has all its adapters, and no stage has any if all its shards are done and it merges them;
    but preprocess still classifies then. Pages that were embedded once need no GPU either.
    """
    if stage == "train" and all(
        run.path("train", "adapters", adapter.name, "made.json").is_file() for adapter in run.recipe.train.adapters
    ):
        return False
    if _has_all_shards(run, stage) or (stage == "preprocess" and run.path(stage, "vectors.npy").is_file()):
        return stage == "preprocess" and bool(preprocess_models(run).keys() - {EMBEDDER})
    return True


def _has_all_shards(run: Run, stage: str) -> bool:
    """Whether a stage is done in shards, all of them finished, and maybe left to merge."""
    done = Counter(shard.count for shard in run.shards(stage) if run.manifest(stage, shard))
    return any(number == count for count, number in done.items())


def _check_gpu_of_preprocess(run: Run) -> None:
    """Raise the errors with which preprocess would refuse target and GPUs, once it has rendered all pages."""
    try:
        _check_gpus(run, ["preprocess"])
    except DoesNotFitError as error:
        needed = ", ".join(f"{key} ({name})" for key, name in preprocess_models(run).items())
        raise DoesNotFitError(f"{needed}: {error}") from error


def _check_gpus(run: Run, stages: Sequence[str]) -> None:
    """Raise the errors with which these stages would refuse target and GPUs."""
    shown, allowed = allowed_gpus(needs_one=True)
    machine = replace(probe(), gpus=allowed) if shown else probe()
    target = working_target(machine, load_targets())
    shape = _base_shape(run) if {"train", "infer"} & {*stages} else None
    if "train" in stages:
        _check_training_on(run, target, machine, shape)
    if "infer" in stages and not machine.gpus:
        refuse_unserved_pictures(engine_kind(run.recipe.infer.engine), _base(run))
    if "infer" in stages and shape is not None and machine.gpus and engine_kind(run.recipe.infer.engine).shares_weights:
        infer = run.recipe.infer
        unknown = [0] * len(machine.gpus)  # free memory is another matter: it changes until then
        plan_serving(shape, unknown, infer.tensor_parallel, target.dtype, infer.max_length)


def _check_training_on(run: Run, target: Target, machine: Machine, shape: ModelShape | None) -> None:
    """Raise the errors with which train would refuse the recipe on this target. `shape` None: not known."""
    from stages.train.sharding import check_sharding

    train, model = run.recipe.train, _base(run)
    base_dtype(train.precision, target)
    if train.load_in_4bit:
        refuse_4bit_without_kernels(target)
    quantisation = shape.quantisation if shape else None
    refuse_base_without_kernels(model, quantisation, target)
    check_sharding(train.sharding, use_cpu=not machine.gpus, quantisation=quantisation)
