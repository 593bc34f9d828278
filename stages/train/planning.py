"""How a phase of the training runs on this machine: GPUs, precision, tokens of a pass, sharding; or why it cannot."""

import importlib.util
from dataclasses import dataclass
from typing import Any

from stages.contract.errors import DoesNotFitError
from stages.contract.part import Node
from stages.contract.recipe import CONNECTOR, Train
from stages.contract.stage import Stage
from stages.hardware.fit import Offers, Way, least_memory, plan_training, smallest_changes, unestimated_way
from stages.hardware.memory import Lengths, gap_in_estimate
from stages.hardware.peaks import share_of_peak
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
from stages.models.gptq import quantisation_method
from stages.models.shape import ModelShape, UnknownShapeError, read_shape
from stages.train.ladder import Attempt
from stages.train.lengths import read_lengths
from stages.train.sharding import check_sharding

GIB = 1024**3

OF_A_NODE = 0.95
"""Share of a GPU's memory for which nodes that train together plan."""


@dataclass(frozen=True)
class Plan:
    """How one phase trains on this machine."""

    target: Target
    way: Way
    gpus: tuple[Gpu, ...]
    """This machine's GPUs; empty on a CPU."""
    longest: int
    """Tokens of the longest training sample; train.max_length if the model's shape is unknown."""
    shape: ModelShape | None = None
    """The base's shape; None if Lorry does not know it."""

    @property
    def processes_here(self) -> int:
        """Training processes on this machine."""
        return max(len(self.gpus), 1)

    @property
    def first_attempt(self) -> Attempt:
        """The settings of the first attempt, before any rung of the ladder."""
        layers = self.shape.layers if self.shape else 0
        return Attempt(self.way.settings, self.way.step, self.way.step.pass_tokens, self.longest, layers)

    def share_of_peak(self, tokens_per_second: float) -> float | None:
        """The share of the GPUs' peak speed that training reaches; None if it is unknown."""
        if self.shape is None:
            return None
        return share_of_peak(self.gpus, self.shape, tokens_per_second, self.way.step.processes)


def make_plan(stage: Stage, node: Node | None, settings: Train | None = None) -> Plan:
    """Plan the training on the GPUs of this machine and of the other nodes, and check the plan. Returns it.

    Raises DoesNotFitError if the training does not fit the GPUs, or they do not fit the image. Raises UsageError if the
    sharding or the quantisation is impossible here. `settings` defaults to the recipe's.
    """
    settings = settings or stage.run.recipe.train
    plan = _unchecked_plan(stage, settings, node)
    model = stage.run.model(stage.run.recipe.model.path, "model.path")
    check_sharding(plan.way.sharding, use_cpu=not plan.gpus, quantisation=quantisation_method(model))
    return plan


def _unchecked_plan(stage: Stage, settings: Train, node: Node | None) -> Plan:
    """Plan the training, and add the decisions to the stage. Returns the plan, which `make_plan` checks further.

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
        decide("effective batch", str(way.step), settings.full_key("effective_batch"))
        return Plan(target, way, gpus, settings.max_length)
    refuse_base_without_kernels(model, shape.quantisation, target)
    if settings.load_in_4bit:
        refuse_4bit_twice(model, shape.quantisation)
    samples = stage.run.path("preprocess", "samples", "train.jsonl")
    lengths = read_lengths(samples, model, settings, stage.run.folder)
    known = [gpu for gpu in gpus if gpu.memory_total]  # some GPUs do not report their memory
    fullest = min(known, key=lambda gpu: gpu.memory_free, default=None)
    memory = _memory_to_plan_for(known, node)
    way = plan_training(shape, settings, processes, dtype, memory, lengths)
    if fullest:
        if least_memory(shape, settings, processes, dtype) > fullest.memory_free:
            raise _memory_error(shape, settings, processes, dtype, lengths, fullest, offers)
        free = f"{fullest.memory_free / GIB:.1f} GiB free on {fullest}, {fullest.uuid[:12]}"
        largest = lengths.largest_pass(way.step)
        needed = f"{way.estimate.total / GIB:.1f} GiB estimated for the largest passes ({largest:,} tokens)"
        decide("memory", needed, free if way.fits(fullest.memory_free) else f"only {free}; it may run out")
    if left_out := gap_in_estimate(shape, settings):
        decide("memory not estimated", left_out, "it must fit in the remaining memory")
    for change in way.changes:
        why = "the fastest that fits the memory" if way.fits(memory) else "takes the least memory"
        decide("fit", change, f"{why}; the result stays the same")
    if settings.sharding == "zero3":
        decide("sharding", settings.sharding, "train.sharding")
    decide("effective batch", str(way.step), settings.full_key("effective_batch"))
    stage.facts[f"{label}estimate".replace(" ", "_")] = {**way.estimate.parts(), "total": way.estimate.total}
    return Plan(target, way, gpus, lengths.longest, shape)


def _memory_to_plan_for(gpus: list[Gpu], node: Node | None) -> int | None:
    """Bytes on each GPU that training may take; None without GPUs, or if they do not report their memory."""
    if node is None:
        return min((gpu.memory_free for gpu in gpus), default=None)
    # nodes that train together need the same plan, but their free memory differs
    return min((int(OF_A_NODE * gpu.memory_total) for gpu in gpus), default=None)


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
