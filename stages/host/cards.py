"""Chooses the GPUs of the stages that `lorry launch` starts, by GPUS, LORRY_GPU_DENY, NVML, and the job's needs."""

import os
import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from stages.contract.errors import DoesNotFitError, LorryError, UsageError
from stages.hardware.holds import Holds
from stages.hardware.pick import (
    GIB,
    VISIBLE,
    Bytes,
    Capability,
    Need,
    Wish,
    denied_cards,
    hold_named_cards,
    named_cards,
    parse_wish,
    pick_cards,
    refuse_other_order,
    refuse_unusable_gpu,
)
from stages.hardware.probe import Cards, Gpu, Machine
from stages.hardware.targets import Target, load_targets, machine_target, named_target
from stages.host.needs import CLASSIFIER, EMBEDDER, GPU_STAGES, preprocess_models, stages_on_gpus
from stages.host.runs import open_run
from stages.models.embedder import reads_pictures, weights_bytes

if TYPE_CHECKING:
    from stages.contract.recipe import Recipe
    from stages.contract.run import Run
    from stages.models.shape import ModelShape

DEFAULT = "GPUS is not set (default: 0)"
"""Beginning of errors about the default: GPU 0, as in plain Compose, because others may share the machine's GPUs."""


@dataclass(frozen=True)
class CardChoice:
    """The GPUs that a launch gives to its stages."""

    cards: tuple[Gpu, ...] = ()
    names: tuple[str, ...] = ()
    """GPUs as the user named them, if NVML shows none to compare with."""
    auto: bool = False
    """Whether `auto` chose them."""
    lines: tuple[str, ...] = ()
    """Lines to print about the choice."""
    computing: tuple[str, ...] = ()
    """The stages that compute on GPUs; none with the target `cpu`."""

    def stage_cards(self, stage: str) -> tuple[Gpu, ...]:
        """The GPUs of one stage. infer computes on one GPU, so it gets only the first of those that `auto` took."""
        return self.cards[:1] if self.auto and stage == "infer" else self.cards

    def devices(self, stage: str) -> list[str]:
        """UUIDs of a stage's GPUs, as a container gets them; the user's names if NVML shows no GPUs."""
        return [gpu.uuid for gpu in self.stage_cards(stage)] or list(self.names)

    def visible_devices(self, stage: str) -> str:
        """The value of CUDA_VISIBLE_DEVICES for a stage that runs as a local process, such as `0,2`."""
        # not UUIDs: libraries read it as integers
        return ",".join([str(gpu.index) for gpu in self.stage_cards(stage)] or self.names)


def choose_cards(
    text: str | None, target: str | None, stages: tuple[str, ...], options: dict[str, Any], found: Cards, holds: Holds
) -> CardChoice:
    """Choose the GPUs for these stages, and hold them if one of the stages computes on GPUs.

    `text` is the value of GPUS, `target` a target's name, and `options` name the run (`open_run`), whose recipe says
    whether preprocess computes on GPUs. If NVML shows no GPUs, nothing is held. Raises UsageError for an unknown
    target, a wrong GPUS or LORRY_GPU_DENY, a CUDA_DEVICE_ORDER that is not NVML's, GPUS with the target `cpu`, and lock
    files that cannot be used; InterruptedRunError if another Lorry process holds the GPUs exclusively, or is still
    choosing; DoesNotFitError if `auto` finds too few GPUs, if a named GPU no longer answers, or if NVML does not
    answer. Also raises the errors of `open_run` for preprocess, and with `auto` those of `job_need`.
    """
    wish = parse_wish(text) if text and text.strip() else None
    named = named_target(target, load_targets()) if target else None
    if named is not None and named.capability is None:
        if wish is not None:
            raise UsageError(
                f"GPUS={wish.text}: target {named.name} has no GPUs; leave GPUS out, or set another TARGET"
            )
        return CardChoice()
    if found.problem and named is None:
        raise DoesNotFitError(f"{found.problem}, or set TARGET=cpu")
    refuse_other_order(found.gpus)
    if not found.gpus and named is None and wish is None:  # the target is cpu
        return CardChoice()
    computing = _computing_stages(stages, options)
    if found.problem and computing:
        raise DoesNotFitError(f"{found.problem}, or set TARGET=cpu")
    return replace(_choose_for(computing, wish, named, options, found, holds), computing=computing)


def _computing_stages(stages: tuple[str, ...], options: dict[str, Any]) -> tuple[str, ...]:
    """Those of the stages that compute on GPUs. Raises the errors of `open_run` if preprocess is one of the stages."""
    if "preprocess" in stages:
        return stages_on_gpus(open_run(**options), stages)
    return tuple(stage for stage in stages if stage in GPU_STAGES)


def _choose_for(
    computing: tuple[str, ...],
    wish: Wish | None,
    target: Target | None,
    options: dict[str, Any],
    found: Cards,
    holds: Holds,
) -> CardChoice:
    """Choose the GPUs for the stages that compute on them, as `choose_cards` does, and hold them."""
    if not found.gpus and not (wish and wish.auto):
        return _cards_by_name(wish, target is not None and bool(computing))
    denied = denied_cards(os.environ.get("LORRY_GPU_DENY"), found.gpus)
    if wish is not None and wish.auto:
        return _pick_and_hold(wish, computing, options, found, denied, holds, target)
    cards = named_cards(wish, found.gpus, denied) if wish else _default_cards(found.gpus, denied, bool(computing))
    if computing:
        hold_named_cards(cards, f"GPUS={wish.text}" if wish else DEFAULT, holds)
    setting = os.environ.get(VISIBLE)
    ignored = f"{VISIBLE}={setting}: not read here; GPUS names the GPUs of a launch (default: 0)"
    return CardChoice(cards, lines=(ignored,) if setting and cards and wish is None else ())


def choose_target(name: str | None, choice: CardChoice, gpus: tuple[Gpu, ...]) -> Target:
    """The target called `name`; None: the target of the chosen GPUs.

    If no GPU was chosen, it is that of the machine's first working GPU, for which the images were built, or `cpu` if
    there is none. Raises UsageError for an unknown target, for named GPUs that NVML does not show, and for GPUs that
    differ in compute capability or are older than every target.
    """
    targets = load_targets()
    if name:
        return named_target(name, targets)
    if choice.names:
        known = ", ".join(targets)
        raise UsageError(f"GPUS={','.join(choice.names)}: NVML shows no GPUs here; set TARGET, to one of {known}")
    cards = choice.cards or tuple(gpu for gpu in gpus if not gpu.lost)[:1]
    return machine_target(Machine(cpus=0, memory_bytes=0, gpus=cards), targets)


def _pick_and_hold(
    wish: Wish,
    gpu_stages: tuple[str, ...],
    options: dict[str, Any],
    found: Cards,
    denied: frozenset[int],
    holds: Holds,
    target: Target | None,
) -> CardChoice:
    """Choose and hold the GPUs for `auto`; no GPUs if no stage computes on GPUs.

    For infer alone, it takes one GPU, whatever the number in GPUS. Raises the errors of `job_need` and `pick_cards`.
    """
    if not gpu_stages:
        return CardChoice(auto=True)
    need, note = job_need(gpu_stages, options), []
    if gpu_stages == ("infer",) and (wish.count or 1) > 1:
        wish, note = replace(wish, count=1), [f"GPUS={wish.text}: takes one GPU, as infer computes on one"]
    pick = pick_cards(wish, need, found.gpus, denied, holds, _oldest_capability(target))
    return CardChoice(pick.cards, auto=True, lines=(*pick.lines, *note))


def _cards_by_name(wish: Wish | None, needs_gpu: bool) -> CardChoice:
    """The GPUs as the user named them, if NVML shows none here, as when the Docker engine runs on another machine.

    No GPUs if GPUS is not set (`wish` is None). Raises UsageError for a name that is not a GPU's number or UUID, comes
    twice or is denied. Also raises it if GPUS is not set, a stage needs a GPU, and GPU 0 is denied.
    """
    denied = [name.strip() for name in os.environ.get("LORRY_GPU_DENY", "").split(",")]
    if wish is None:
        if needs_gpu and "0" in denied:
            raise UsageError(f"{DEFAULT}: GPU 0 is denied by LORRY_GPU_DENY; name others")
        return CardChoice()
    for name in wish.names:
        if not (name.isdecimal() and name.isascii()) and not name.upper().startswith("GPU-"):
            named_cards(wish, (), frozenset())  # raises UsageError with the reason
    if len(set(wish.names)) < len(wish.names):
        raise UsageError(f"GPUS={wish.text}: names a GPU twice; name each GPU once")
    for name in wish.names:
        if name in denied:
            raise UsageError(f"GPUS={wish.text}: GPU {name} is denied by LORRY_GPU_DENY; name others")
    return CardChoice(names=wish.names)


def _default_cards(gpus: tuple[Gpu, ...], denied: frozenset[int], needs_gpu: bool) -> tuple[Gpu, ...]:
    """GPU 0; no GPU if it is unusable and no stage needs one.

    Raises the errors of `refuse_unusable_gpu` if GPU 0 is unusable and a stage needs a GPU.
    """
    try:
        refuse_unusable_gpu(gpus[0], DEFAULT, denied)
    except LorryError:
        if needs_gpu:
            raise
        return ()
    return gpus[:1]


def _oldest_capability(target: Target | None) -> Capability:
    """The lowest compute capability that a target's images have code for; None or cpu: the lowest of all targets."""
    known = [each.capability for each in load_targets().values() if each.capability]
    least: Capability = (target.capability if target and target.capability else min(known))[:2]  # type: ignore[assignment]
    return least


# -- what a job needs ----------------------------------------------------------------------------------------------


def job_need(stages: tuple[str, ...], options: dict[str, Any]) -> Need:
    """The memory that these stages need on each GPU, and the numbers of GPUs that they can use.

    `stages` are among preprocess, train and infer. Raises the errors of `open_run`, and UsageError if a model does not
    exist, is damaged, or has a shape whose memory Lorry cannot estimate.
    """
    from stages.hardware.fit import most_gpus
    from stages.models.shape import read_shape

    run = open_run(**options)
    others = preprocess_bytes(run) if "preprocess" in stages else 0
    if "train" not in stages and "infer" not in stages:
        return Need.per_gpu(others, most=sys.maxsize)  # each GPU embeds a share of the pages
    shape = read_shape(run.model(run.recipe.model.path, "model.path"))
    if "infer" in stages:
        others = max(others, inference_bytes(shape.served_bytes))
    if "train" not in stages:
        return Need.per_gpu(others)
    asked, least = _training_bytes(shape, run.recipe)
    return Need(
        asked=lambda number, capability: max(asked(number, capability), others),
        least=lambda number, capability: max(least(number, capability), others),
        most=most_gpus(run.recipe.train),
    )


def preprocess_bytes(run: "Run") -> int:
    """Bytes that preprocess takes on one GPU, by a rule of thumb (`inference_bytes`): those of its largest model, as
    it loads one after the other. 0 if it computes on none. Raises UsageError as `preprocess_weights` does."""
    largest = preprocess_weights(run)
    return inference_bytes(largest) if largest else 0


def preprocess_weights(run: "Run") -> int:
    """Bytes of the weights of the largest model that preprocess computes on a GPU; 0 if it computes on none.

    Weights may be missing: config.json will do for the base, and for an embedder that reads pictures. Raises UsageError
    if a model does not exist, is damaged, or has a shape whose memory Lorry cannot estimate.
    """
    from stages.models.shape import planned_shape

    largest = 0
    for key, name in preprocess_models(run).items():
        folder = run.model(name, "model.path" if key == CLASSIFIER else key, needs_weights=False)
        if key == CLASSIFIER or (key == EMBEDDER and reads_pictures(folder)):
            shape, _ = planned_shape(folder)
            largest = max(largest, shape.served_bytes)
        else:
            largest = max(largest, weights_bytes(folder))
    return largest


def inference_bytes(weights: int) -> int:
    """Bytes that inference takes on one GPU, by a rule of thumb, for a model with `weights` bytes of weights.

    Activations and the KV cache add a fifth of the weights; CUDA, its graphs and the adapters add 2 GiB.
    """
    return int(weights * 1.2) + 2 * GIB


def _training_bytes(shape: "ModelShape", recipe: "Recipe") -> tuple[Bytes, Bytes]:
    """Two functions that return the bytes training takes on each GPU: in short passes, and with the least memory.

    The bytes are those that `lorry plan` estimates. Of two phases, the one that takes more counts.
    """
    from stages.hardware.fit import plan_training
    from stages.hardware.memory import max_lengths

    phases = [
        (settings, max_lengths(recipe.model_copy(update={"train": settings}))) for settings in recipe.train.phases
    ]

    @cache
    def planned_bytes(number: int, capability: Capability, memory: int | None) -> int:
        """Bytes on each GPU in the larger phase, planned for `memory` bytes of a GPU; None: in short passes."""
        dtype = machine_target(_machine_with_capability(capability), load_targets()).dtype
        dtype = dtype if recipe.train.precision == "auto" else recipe.train.precision
        ways = [plan_training(shape, settings, number, dtype, memory, lengths) for settings, lengths in phases]
        return int(max(way.estimate.total for way in ways))

    # nothing fits in a single byte, so the plan is then the way that takes least memory
    return (lambda number, capability: planned_bytes(number, capability, None)), (
        lambda number, capability: planned_bytes(number, capability, 1)
    )


def _machine_with_capability(capability: Capability) -> Machine:
    """A machine with one GPU of this compute capability, to look up its target."""
    return Machine(cpus=0, memory_bytes=0, gpus=(Gpu(0, "", "", capability, 0, 0, ""),))
