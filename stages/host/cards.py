"""Which cards `lorry launch` gives its stages: GPUS and LORRY_GPU_DENY, what NVML shows, and what the job needs."""

import os
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from stages.contract.errors import DoesNotFitError, LorryError, UsageError
from stages.hardware.holds import Holds
from stages.hardware.pick import (
    GIB,
    Bytes,
    Capability,
    Need,
    Wish,
    denied_cards,
    hold_named,
    named_cards,
    parse_wish,
    pick_cards,
    refuse_unusable,
)
from stages.hardware.probe import Cards, Gpu, Machine
from stages.hardware.targets import Target, load_targets, named_target, target_of
from stages.host.needs import ON_CARDS
from stages.host.runs import open_run

if TYPE_CHECKING:
    from stages.contract.recipe import Recipe, Train

DEFAULT = "GPUS is not given, which means GPU 0"
"""As plain Compose does: not every card of a box that others share."""


@dataclass(frozen=True)
class Chosen:
    """The cards of a launch."""

    cards: tuple[Gpu, ...] = ()
    names: tuple[str, ...] = ()
    """As they were given, where NVML shows no cards to compare them with."""
    auto: bool = False
    lines: tuple[str, ...] = ()
    """What is to be told of the choice."""

    def cards_of(self, stage: str) -> tuple[Gpu, ...]:
        """infer computes on one card: of several that `auto` took, it sees the first alone. A list stays a list."""
        return self.cards[:1] if self.auto and stage == "infer" else self.cards

    def devices(self, stage: str) -> list[str]:
        """As a container gets them."""
        return [gpu.uuid for gpu in self.cards_of(stage)] or list(self.names)

    def numbers(self, stage: str) -> str:
        """As CUDA_VISIBLE_DEVICES of a local process: libraries read them as integers and break on UUIDs."""
        return ",".join([str(gpu.index) for gpu in self.cards_of(stage)] or self.names)


def choose_cards(
    text: str | None, target: str | None, stages: tuple[str, ...], options: dict[str, Any], found: Cards, holds: Holds
) -> Chosen:
    """The cards for these stages, held where one of them computes on cards.

    Raises what is wrong with the list, UsageError for the target `cpu` with cards, InterruptedRunError for cards that
    another lorry has for itself, DoesNotFitError where `auto` finds too few, or NVML cannot be asked.
    """
    wish = parse_wish(text) if text and text.strip() else None
    on_cards = tuple(stage for stage in stages if stage in ON_CARDS)
    named = named_target(target, load_targets()) if target else None
    if named is not None and named.capability is None:
        if wish is not None:
            raise UsageError(f"target {named.name} takes no GPUs: leave GPUS out, or name the cards' target")
        return Chosen()
    if found.problem and (on_cards or named is None):
        raise DoesNotFitError(f"{found.problem}; or take TARGET=cpu")
    if not found.gpus and not (wish and wish.auto):
        return _unseen(wish, named is not None and bool(on_cards))
    denied = denied_cards(os.environ.get("LORRY_GPU_DENY"), found.gpus)
    if wish is not None and wish.auto:
        if not on_cards:
            return Chosen(auto=True)
        need, told = needed(on_cards, options), ""
        if "train" not in on_cards and (wish.count or 1) > 1:
            wish, told = replace(wish, count=1), f"infer computes on one card: GPUS={wish.text} takes one"
        if wish.count is not None:
            _refuse_unusable_number(on_cards, options, wish.count)
        pick = pick_cards(wish, need, found.gpus, denied, holds, _oldest(named))
        return Chosen(pick.cards, auto=True, lines=(*pick.lines, *([told] if told else [])))
    cards = named_cards(wish, found.gpus, denied) if wish else _default(found.gpus, denied, bool(on_cards))
    if on_cards:
        hold_named(cards, f"GPUS={wish.text}" if wish else DEFAULT, holds)
    return Chosen(cards)


def choose_target(name: str | None, chosen: Chosen, gpus: tuple[Gpu, ...]) -> Target:
    """The target that was named, or that of the chosen cards. Where none is needed, that of the first in the machine:
    it says which images there are."""
    targets = load_targets()
    if name:
        return named_target(name, targets)
    if chosen.names:
        raise UsageError(f"NVML shows no cards here: name their target, TARGET= one of {', '.join(targets)}")
    cards = chosen.cards or tuple(gpu for gpu in gpus if not gpu.lost)[:1]
    return target_of(Machine(cpus=0, memory_bytes=0, gpus=cards), targets)


def _unseen(wish: Wish | None, needed_now: bool) -> Chosen:
    """Cards that NVML does not show, as on an engine's host that is not this one: they go by the names given."""
    denied = [name.strip() for name in os.environ.get("LORRY_GPU_DENY", "").split(",")]
    if wish is None:
        if needed_now and "0" in denied:
            raise UsageError(f"{DEFAULT}, and that is in LORRY_GPU_DENY: name others")
        return Chosen()
    for name in wish.names:
        if not (name.isdecimal() and name.isascii()) and not name.upper().startswith("GPU-"):
            named_cards(wish, (), frozenset())  # says what is wrong with it
    if len(set(wish.names)) < len(wish.names):
        raise UsageError(f"GPUS={wish.text}: names a GPU twice; this machine has: none that NVML shows")
    for name in wish.names:
        if name in denied:
            raise UsageError(f"GPUS={wish.text}: GPU {name} is not to be taken: it is in LORRY_GPU_DENY")
    return Chosen(names=wish.names)


def _default(gpus: tuple[Gpu, ...], denied: frozenset[int], needed_now: bool) -> tuple[Gpu, ...]:
    """GPU 0, or the reason why not. Stages that take no card do without it."""
    try:
        refuse_unusable(gpus[0], DEFAULT, denied)
    except LorryError:
        if needed_now:
            raise
        return ()
    return gpus[:1]


def _oldest(named: Target | None) -> Capability:
    """The least compute capability that there is an image for."""
    known = [target.capability for target in load_targets().values() if target.capability]
    least: Capability = (named.capability if named and named.capability else min(known))[:2]  # type: ignore[assignment]
    return least


# -- what a job needs ----------------------------------------------------------------------------------------------


def to_do(stages: tuple[str, ...], last: str, force: bool, options: dict[str, Any]) -> tuple[str, ...]:
    """The stages from the first on that is not done and unchanged: only they can need a card."""
    from stages.contract.files import FileHashes

    run = open_run(**options)
    for number, stage in enumerate(stages):
        hashes = FileHashes(run.stage_folder(stage) / ".hashes.json")
        try:
            done = run.manifest(stage) is not None and run.is_done(stage, hashes) and not (force and stage == last)
        except (LorryError, OSError):  # the stage itself says what is wrong
            done = False
        hashes.save()
        if not done:
            return stages[number:]
    return ()


def needed(stages: tuple[str, ...], options: dict[str, Any]) -> Need:
    """What these stages need of each card. Raises UsageError where the recipe or the model is not there."""
    from stages.hardware.fit import makes_exact_batches, most_gpus
    from stages.models.shape import read_shape

    run = open_run(**options)
    settings = run.recipe.train
    shape = read_shape(run.model(run.recipe.model.path, "model.path"))
    answering = answering_bytes(shape.disk_bytes if shape.quantisation else shape.parameters * 2)
    if "train" not in stages:
        return Need.of(answering)
    least_answering = answering if "infer" in stages else 0
    asked, least = _training(shape, run.recipe)
    return Need(
        asked=lambda number, capability: max(asked(number, capability), least_answering),
        least=lambda number, capability: max(least(number, capability), least_answering),
        most=most_gpus(settings),
        usable=lambda number: makes_exact_batches(settings, number),
    )


def _refuse_unusable_number(stages: tuple[str, ...], options: dict[str, Any], number: int) -> None:
    """Raise DoesNotFitError where exactly so many cards are wanted, and training would refuse them."""
    from stages.hardware.batch import plan_batch, refuse_inexact

    settings = open_run(**options).recipe.train
    if "train" not in stages or not settings.exact_batch:
        return
    for phase in _phases(settings):
        batch = plan_batch(phase.effective_batch, phase.micro_batch, number)
        refuse_inexact(batch, phase.key_of("effective_batch"))


def _phases(settings: "Train") -> "list[Train]":
    """The settings of each phase of training: of the connector, where there is one, and of the adapters."""
    return [settings] if settings.connector is None else [settings.of_connector(), settings]


def answering_bytes(weights: int) -> int:
    """A rule of thumb: the weights in half precision, a fifth more for activations and the cache of keys and values,
    and 2 GiB for CUDA, its graphs and the adapters."""
    return int(weights * 1.2) + 2 * GIB


def _training(shape: Any, recipe: "Recipe") -> tuple[Bytes, Bytes]:
    """Bytes for training on each of a number of cards, as `lorry plan` has them: as asked, and in the leanest way. Of
    two phases, what the larger takes."""
    from stages.hardware.fit import plan_training
    from stages.hardware.memory import lengths_at_most

    phases = [
        (settings, lengths_at_most(recipe.model_copy(update={"train": settings}))) for settings in _phases(recipe.train)
    ]

    @cache
    def planned(number: int, capability: Capability, memory: int | None) -> int:
        dtype = target_of(_machine_of(capability), load_targets()).dtype
        dtype = dtype if recipe.train.precision == "auto" else recipe.train.precision
        ways = [plan_training(shape, settings, number, dtype, memory, lengths) for settings, lengths in phases]
        return int(max(way.estimate.total for way in ways))

    # with a single byte to fit in, the plan goes down to the leanest way
    return (lambda number, capability: planned(number, capability, None)), (
        lambda number, capability: planned(number, capability, 1)
    )


def _machine_of(capability: Capability) -> Machine:
    return Machine(cpus=0, memory_bytes=0, gpus=(Gpu(0, "", "", capability, 0, 0, ""),))
