"""Does the work of `lorry plan`: estimates whether training a recipe fits the GPUs, which need not be here."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.contract.errors import DoesNotFitError, Exit, UsageError
from stages.contract.files import read_jsonl
from stages.contract.mixes import training_samples
from stages.contract.recipe import Infer, Recipe, Train
from stages.engines import engine_kind, refuse_unserved_pictures, refuse_unserved_rank
from stages.hardware.fit import Offers, Way, disk_bytes, plan_training, recipe_way, smallest_changes
from stages.hardware.memory import Lengths, gap_in_estimate, max_lengths, trained_parameters
from stages.hardware.pick import denied_cards, describe_memory, reason_to_skip, shown_gpus
from stages.hardware.probe import Gpu, Machine, read_cards
from stages.hardware.serve import plan_serving
from stages.hardware.speed import ExpectedSpeed, Workload, expected_speed
from stages.hardware.targets import (
    Target,
    base_dtype,
    load_targets,
    machine_target,
    named_target,
    refuse_4bit_twice,
    refuse_4bit_without_kernels,
    refuse_base_without_kernels,
)
from stages.host.cards import preprocess_bytes
from stages.host.needs import preprocess_models
from stages.host.outcome import Lines
from stages.models.shape import ModelShape, planned_shape

if TYPE_CHECKING:
    from stages.contract.run import Run

GIB = 1024**3

USABLE = 0.985
"""The share of a card's nominal memory that CUDA can use: 23.63 of 24 GiB on an RTX 4090."""


def plan(run: "Run", target: str | None, count: int, memory: float | None, workload: Workload | None = None) -> Lines:
    """Plan the training of a run's recipe. Yields lines on memory, disk, time and inference. The model's config.json
    will do: one plans before a download.

    Returns 0, or 4 if training does not fit memory or disk. `target` is a target's name; None: this machine's GPUs.
    `count` is the number of GPUs. `memory` is the memory of a GPU in GiB; None: that of the target or machine.
    `workload` is what is learnt from; None: the run's samples, if preprocess has made them. Raises the errors of
    `planned_gpus`, those with which train would refuse the recipe, and UnknownShapeError for a model whose memory Lorry
    cannot estimate; at last UsageError if infer's engine cannot serve the model or its adapters.
    """
    train = run.recipe.train
    model = run.model(run.recipe.model.path, "model.path", needs_weights=False)
    shape, made = planned_shape(model)
    gpus = planned_gpus(target, count, memory, train.precision)
    train = _allowed_settings(train, gpus.target)
    refuse_base_without_kernels(model, shape.quantisation, gpus.target)
    if train.load_in_4bit:
        refuse_4bit_twice(model, shape.quantisation)
    yield f"{run.name}: {model.name}, {shape.parameters / 1e9:.2f} billion parameters, on {gpus.text}"
    if made:
        yield f"{made}: the plan takes the model's tensors from its config.json"
    fits = True
    if train.connector is not None:
        first = _plan_phase(run.recipe, shape, train.connector_settings(), gpus)
        yield from _phase_lines(first)
        fits, lines = _verdict(first)
        yield from lines
    phase = _plan_phase(run.recipe, shape, train, gpus)
    yield from _phase_lines(phase)
    enough_disk, line = _disk_verdict(run, shape)
    yield f"\n{line}"
    yield _preprocess_line(run, gpus)
    yield from _time_lines(run, model, phase, workload)
    yield f"{_inference_line(run.recipe.infer, shape, gpus)}\n"
    last_fits, lines = _verdict(phase)
    yield from lines
    _refuse_unserved(run.recipe, model, gpus.target)
    return Exit.DONE if fits and last_fits and enough_disk else Exit.DOES_NOT_FIT


def training_fits(recipe: Recipe, shape: ModelShape, gpus: "PlannedGpus") -> bool:
    """Whether each phase of training fits the memory of these GPUs, as `plan` says it.

    Raises the errors with which train would refuse the recipe's settings on the target.
    """
    train = _allowed_settings(recipe.train, gpus.target)
    phases = [_plan_phase(recipe, shape, settings, gpus) for settings in train.phases]
    return all(phase.way.fits(gpus.memory) for phase in phases)


def inference_fits(settings: Infer, shape: ModelShape, gpus: "PlannedGpus") -> bool:
    """Whether inference fits these GPUs, or its memory is not estimated, as `plan` says it."""
    if gpus.memory is None or not engine_kind(settings.engine).shares_weights:
        return True
    try:
        plan_serving(
            shape, [gpus.memory] * gpus.count, settings.tensor_parallel, gpus.target.dtype, settings.max_length
        )
    except (DoesNotFitError, UsageError):  # with more GPUs it may fit, or be split as asked
        return False
    return True


# -- the GPUs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedGpus:
    """The GPUs to plan for."""

    count: int
    text: str
    """The GPUs in words."""
    memory: int | None
    """Free bytes on each; None on a CPU."""
    dtype: str
    """Data type that the frozen base computes in."""
    target: Target
    fullest: Gpu | None = None
    """The GPU with the least free memory; None for GPUs that are not here."""

    @property
    def product(self) -> str:
        """NVIDIA's name for the GPUs, with dashes or blanks; empty for a CPU."""
        return self.fullest.name if self.fullest else self.target.node_label or ""


def planned_gpus(target: str | None, count: int, memory: float | None, precision: str) -> PlannedGpus:
    """The GPUs to plan for: `count` of a target; without a target, those with the most free memory here.

    `memory`, in GiB, is taken as the memory of each; the number of GPUs here is then not checked. Raises UsageError for
    an unknown target, for several GPUs or `memory` with the target cpu, and if too few GPUs are here; DoesNotFitError
    if Lorry may use none, or if the target does not have the precision.
    """
    targets = load_targets()
    here = () if target else usable_gpus()
    try:
        card = named_target(target, targets) if target else machine_target(Machine(0, 0, here), targets)
    except UsageError as error:
        raise error if target else UsageError(f"{error}, or name a --target") from error
    dtype = base_dtype(precision, card)
    if card.capability is None:
        if count > 1 or memory:
            option = f"--memory {memory:g}" if memory else f"--gpus {count}"
            raise UsageError(f"{option}: target {card.name} has no GPUs; leave it out, or name the GPUs' --target")
        return PlannedGpus(1, "a CPU", None, dtype, card)
    name = f"{count} x {card.name}" if count > 1 else card.name
    if memory:
        return PlannedGpus(count, f"{name} of {memory:g} GiB, in {dtype}", round(memory * USABLE * GIB), dtype, card)
    if target:
        nominal = card.memory_gib or 0
        return PlannedGpus(count, f"{name} of {nominal} GiB, in {dtype}", round(nominal * USABLE * GIB), dtype, card)
    freest = sorted((gpu for gpu in here if gpu.memory_total), key=lambda gpu: (-gpu.memory_free, gpu.index))
    if len(freest) < count:
        raise UsageError(
            f"--gpus {count}: this machine has {len(freest)} that Lorry may use; ask for fewer, or name a --target"
        )
    chosen = freest[:count]
    text = f"the {count} freest GPUs of this machine" if count > 1 else "the freest GPU of this machine"
    numbers = ",".join(str(gpu.index) for gpu in chosen)
    text = f"{text}, GPU {numbers} ({card.name}), in {dtype}"
    return PlannedGpus(count, text, chosen[-1].memory_free, dtype, card, chosen[-1])


def usable_gpus() -> tuple[Gpu, ...]:
    """The GPUs here that a launch could take; empty without GPUs, and with LORRY_TARGET=cpu.

    Raises DoesNotFitError if there are GPUs but a launch could take none, or if the driver does not answer, UsageError
    if LORRY_GPU_DENY is wrong, and the errors of `shown_gpus`.
    """
    if os.environ.get("LORRY_TARGET") == "cpu":
        return ()
    found = read_cards()
    if found.problem:
        raise DoesNotFitError(f"{found.problem}; to plan for other GPUs, name a --target")
    denied = denied_cards(os.environ.get("LORRY_GPU_DENY"), found.gpus) if found.gpus else frozenset()
    shown = shown_gpus(found.gpus)
    reasons = {gpu: reason_to_skip(gpu, denied) for gpu in shown}
    if shown and all(reasons.values()):
        texts = "; ".join(f"GPU {gpu.index}: {reason}" for gpu, reason in reasons.items())
        raise DoesNotFitError(f"this machine's GPUs: Lorry may use none ({texts}); to plan for others, name a --target")
    return tuple(gpu for gpu, reason in reasons.items() if not reason)


def _allowed_settings(train: Train, target: Target) -> Train:
    """The settings as train uses them on the target: sharding `auto` becomes `none` if the target has no DeepSpeed.

    Raises the error with which train would refuse them.
    """
    if train.load_in_4bit:
        refuse_4bit_without_kernels(target)
    if target.deepspeed or train.sharding == "none":
        return train
    if train.sharding != "auto":
        raise UsageError(f"train.sharding {train.sharding}: target {target.name} has no DeepSpeed; set it to auto")
    return train.model_copy(update={"sharding": "none"})


def _refuse_unserved(recipe: Recipe, model: Path, target: Target) -> None:
    """Raise UsageError if infer's engine cannot serve the model or its adapters on a target."""
    kind = engine_kind(recipe.infer.engine)
    if target.capability is None:
        refuse_unserved_pictures(kind, model)
    if not recipe.infer.merged:
        refuse_unserved_rank(kind, recipe.train.rank)


# -- training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Phase:
    """The plan of one phase of training: that of the connector or that of the adapters."""

    shape: ModelShape
    train: Train
    gpus: PlannedGpus
    lengths: Lengths
    fastest: Way
    """The fastest way, whether it fits or not."""
    way: Way
    """The way that train would choose."""


def _plan_phase(recipe: Recipe, shape: ModelShape, train: Train, gpus: PlannedGpus) -> _Phase:
    """The plan of the phase whose settings are `train`."""
    lengths = max_lengths(recipe.model_copy(update={"train": train}))
    fastest = recipe_way(shape, train, gpus.count, gpus.dtype, lengths, gpus.memory)
    way = plan_training(shape, train, gpus.count, gpus.dtype, gpus.memory, lengths)
    return _Phase(shape, train, gpus, lengths, fastest, way)


def _phase_lines(phase: _Phase) -> Iterator[str]:
    """Yield lines on a phase: its parameters, samples, steps and memory."""
    shape, train, lengths = phase.shape, phase.train, phase.lengths
    if train.connector is not None:
        title = (
            "phase 1, the connector alone"
            if train.trains_connector
            else "\nphase 2, LoRA on the base with that connector"
        )
        yield f"{title}: trains {trained_parameters(shape, train) / 1e6:.1f} million parameters"
    yield (
        f"samples of {lengths.longest} tokens ({train.full_key('max_length')}), {lengths.answer} of them the answer"
        " (infer.max_new_tokens)"
    )
    yield f"effective batch: {phase.way.step}; train plans again with the real samples\n"
    yield from _memory_table(phase)
    left_out = gap_in_estimate(shape, train)
    if left_out:
        yield f"not in the estimate: {left_out}"


def _memory_table(phase: _Phase) -> Iterator[str]:
    """Yield the lines of a table of peak memory by component, in GiB, of the fastest way and of the chosen one."""
    ways = [phase.fastest] if phase.fastest == phase.way else [phase.fastest, phase.way]
    heads = ("fastest", "chosen")[: len(ways)]
    yield "".join([f"{'peak on each GPU, GiB':<24}", *(f"{head:>12}" for head in heads)])
    for name in [*phase.fastest.estimate.parts(), "total"]:
        values = [{**way.estimate.parts(), "total": way.estimate.total}[name] for way in ways]
        yield "".join([f"{name:<24}", *(f"{value / GIB:>12.2f}" for value in values)])


def _verdict(phase: _Phase) -> tuple[bool, list[str]]:
    """Whether a phase fits, and lines that say why; if it does not, also the smallest changes that fit."""
    fastest, way, gpus = phase.fastest, phase.way, phase.gpus
    if gpus.memory is None:
        return True, ["fits: Lorry knows no memory limit for a CPU"]
    room = f"{gpus.memory / GIB:.1f} GiB"
    if way.fits(gpus.memory):
        total = f"{way.estimate.total / GIB:.1f} of {room} on each GPU{_tight_note(way, gpus, explained=True)}"
        if way == fastest:
            return True, [f"fits: {total}"]
        return True, [
            f"the fastest way does not fit: {fastest.estimate.total / GIB:.1f} of {room} on each GPU",
            f"fits with {' and '.join(way.changes)}, which train chooses on its own and which does not affect the"
            f" result: {total}",
        ]
    lines = [f"does not fit: at least {way.estimate.total / GIB:.1f} of {room} on each GPU"]
    changes = _fitting_changes(phase)
    freed = gpus.fullest is not None and way.fits(int(gpus.fullest.memory_total * USABLE))
    if gpus.fullest is not None and freed:
        lines.append(
            f"fits on a free GPU: {way.estimate.total / GIB:.1f} of"
            f" {gpus.fullest.memory_total / GIB:.1f} GiB; {gpus.fullest}: {describe_memory(gpus.fullest)}"
        )
    for number, each in enumerate(changes):
        head = "the smallest change that fits" if number == 0 else "or"
        total = f"{each.estimate.total / GIB:.1f} of {room}{_tight_note(each, gpus)}"
        lines.append(f"{head}: {' and '.join(each.changes)} ({total})")
    if not changes and not freed:
        lines.append("no change that Lorry knows makes it fit; choose a smaller model or a larger GPU")
    return False, lines


def _fitting_changes(phase: _Phase) -> list[Way]:
    """Ways that fit after a change to the recipe or the number of GPUs, the smallest change first."""
    gpus = phase.gpus
    assert gpus.memory is not None
    offers = Offers("bitsandbytes" in gpus.target.quantisation, gpus.target.deepspeed)
    if phase.train.trains_connector:  # the first phase uses neither 4 bits nor ZeRO-3
        offers = Offers(bitsandbytes=False, deepspeed=False)
    return smallest_changes(phase.shape, phase.train, gpus.count, gpus.dtype, gpus.memory, phase.lengths, offers)


def _tight_note(way: Way, gpus: PlannedGpus, explained: bool = False) -> str:
    """A warning if the way fits, but might not, as estimates can be slightly too low; else empty.

    `explained` adds the reason for the warning.
    """
    if not way.is_tight(gpus.memory):
        return ""
    return ": tight" + (
        "; estimates may be up to 3 % too low; if memory runs out, train resumes with less" if explained else ""
    )


# -- time ----------------------------------------------------------------------------------------------------------


def _time_lines(run: "Run", model: Path, phase: _Phase, workload: Workload | None) -> Iterator[str]:
    """Yield a line on the speed to expect, and one on how long all adapters take. Yields nothing if no training like
    it was measured."""

    def expect(tokens: float) -> ExpectedSpeed | None:
        """The speed with samples of so many tokens in the mean."""
        return expected_speed(phase.shape, phase.way, phase.gpus.product, tokens)

    if (speed := expect(phase.lengths.longest)) is None:
        return
    if workload := workload or _known_workload(run, model, phase.train):
        speed = expect(workload.tokens) or speed
    peak = "their peak" if phase.gpus.count > 1 else "the peak"
    yield f"speed: about {speed.tokens_per_second:,.0f} tokens/s, {speed.share_of_peak:.0%} of {peak}: {speed.why}"
    if workload is None:
        yield "training time: not known before preprocess; run it, then plan again"
        return
    seconds = phase.train.epochs * workload.samples * workload.tokens / speed.tokens_per_second
    count, adapters = f"{workload.samples:,} samples", len(phase.train.adapters)
    of_all = f" of {adapters} adapters" if adapters > 1 else ""
    of_phase = " of phase 2" if phase.train.connector else ""
    yield (
        f"training time{of_phase}: about {_time_text(seconds)}, an estimate: {phase.train.epochs:g}"
        f" {'epoch' if phase.train.epochs == 1 else 'epochs'} of {count}{of_all}, {workload.tokens:,.0f} tokens each in"
        " the mean"
    )


def _known_workload(run: "Run", model: Path, train: Train) -> Workload | None:
    """What the run's adapters learn from; None if preprocess is not done, or tokens cannot be counted here."""
    if not run.path("preprocess", "manifest.json").is_file() or importlib.util.find_spec("tokenizers") is None:
        return None
    from stages.train.lengths import measure_lengths

    samples = read_jsonl(run.path("preprocess", "samples", "train.jsonl"))
    mean = measure_lengths(samples, model, train, run.folder).mean
    number = sum(len(training_samples(samples, adapter, run.recipe.seed)) for adapter in train.adapters)
    return Workload(number, mean) if mean and number else None


def _time_text(seconds: float) -> str:
    """A duration in words."""
    if seconds < 90 * 60:
        minutes = max(round(seconds / 60), 1)
        return f"{minutes} minute{'' if minutes == 1 else 's'}"
    return f"{seconds / 3600:.1f} hours"


# -- disk, preprocess and inference --------------------------------------------------------------------------------


def _disk_verdict(run: "Run", shape: ModelShape) -> tuple[bool, str]:
    """Whether the disk has room for the files that training writes, and a line that says so."""
    needed = disk_bytes(shape, run.recipe.train)
    place = run.roots.runs
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    short = "" if needed <= free else ": too little; free some, or set LORRY_RUNS to a folder on another disk"
    return needed <= free, f"disk: {needed / GIB:.2f} GiB below {run.roots.runs}, {free / GIB:.1f} GiB free{short}"


def _preprocess_line(run: "Run", gpus: PlannedGpus) -> str:
    """A line on whether preprocess needs a GPU, and fits one of these. It does not change the exit code."""
    if gpus.memory is None:
        return "preprocess: on a CPU; its memory is not estimated"
    try:
        total = preprocess_bytes(run)
    except UsageError as error:
        return f"preprocess: its memory is not estimated ({error})"
    if not total:
        return "preprocess needs no GPU"
    needed = ", ".join(f"{key} ({name})" for key, name in preprocess_models(run).items())
    verdict = "fits" if total <= gpus.memory else "does not fit"
    return f"preprocess {verdict}: {total / GIB:.1f} of {gpus.memory / GIB:.1f} GiB on a GPU for {needed}"


def _inference_line(settings: Infer, shape: ModelShape, gpus: PlannedGpus) -> str:
    """A line on whether inference fits the same GPUs. It does not change the exit code, as infer may run on others."""
    if gpus.memory is None or not engine_kind(settings.engine).shares_weights:
        where = "" if gpus.memory else " on a CPU"
        return f"inference: by {settings.engine}{where}; its memory is not estimated"
    free = [gpus.memory] * gpus.count
    try:
        serving = plan_serving(shape, free, settings.tensor_parallel, gpus.target.dtype, settings.max_length)
    except DoesNotFitError as error:
        return f"inference does not fit: {error}"
    except UsageError as error:
        return f"inference cannot be split like this: {error}"
    return (
        f"inference fits: tensor parallel {serving.tensor_parallel} ({serving.why}),"
        f" {serving.weights / GIB:.1f} GiB of weights on each GPU, in {gpus.target.dtype},"
        f" infer.max_length {settings.max_length}"
    )
