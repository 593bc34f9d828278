"""`lorry plan`: whether training a recipe fits the cards, before anything runs; works for cards that are not here."""

import os
import shutil
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from entrypoints.common import one_line_errors, recipe_options
from stages.host.runs import open_run

if TYPE_CHECKING:
    from stages.hardware.probe import Gpu
    from stages.hardware.targets import Target

GIB = 1024**3

USABLE = 0.985
"""Of the memory that a card is sold with, what CUDA can hand out: 23.63 of 24 GiB on an RTX 4090."""


@dataclass(frozen=True)
class _Cards:
    """The cards to plan for."""

    count: int
    what: str
    memory: int | None
    """Bytes free on each; None on a CPU."""
    dtype: str
    target: "Target"
    fullest: "Gpu | None" = None
    """Of cards that are here, the one with the least free memory."""


@click.command()
@recipe_options
@click.option("--target", metavar="NAME", help="Kind of card, which need not be here; default: this machine's cards.")
@click.option("--gpus", "count", type=click.IntRange(min=1), help="How many; default: 1.")
@click.option("--memory", type=click.FloatRange(min=0, min_open=True), help="GiB of a card, instead of the target's.")
@one_line_errors
def plan(target: str | None, count: int | None, memory: float | None, **options: Any) -> None:
    """Estimate what training RECIPE takes on each GPU and say whether it fits; if not, the smallest change that does.
    Where a connector is trained first, either phase is estimated.

    Reads the model's config.json and the headers of its weights, and starts nothing. Exits with 4 when training does
    not fit; how inference fits the same cards is told beside it.
    """
    from stages.hardware.targets import refuse_4bit_twice, refuse_base_without_kernels
    from stages.models.shape import read_shape

    run = open_run(**options)
    train = run.recipe.train
    model = run.model(run.recipe.model.path, "model.path")
    shape = read_shape(model)
    cards = _cards(target, count or 1, memory, train.precision)
    train = _as_the_software_allows(train, cards.target)
    refuse_base_without_kernels(model, shape.quantisation, cards.target)
    if train.load_in_4bit:
        refuse_4bit_twice(model, shape.quantisation)
    click.echo(f"{run.name}: {model.name}, {shape.parameters / 1e9:.2f} billion parameters, on {cards.what}")
    fits = True
    if train.connector is not None:
        first = train.of_connector()
        fits = _verdict(shape, first, cards, *_phase(run.recipe, shape, first, cards))
    phase = _phase(run.recipe, shape, train, cards)
    enough_disk = _disk(run, shape)
    _inference(run.recipe.infer, shape, cards)
    click.echo()
    fits = _verdict(shape, train, cards, *phase) and fits
    sys.exit(0 if fits and enough_disk else 4)


def _phase(recipe: Any, shape: Any, train: Any, cards: _Cards) -> tuple[Any, Any, Any]:
    """Tell what one phase of training takes. Returns the way that the recipe asks for, the one that train would take,
    and how long samples may be."""
    from stages.hardware.batch import refuse_inexact
    from stages.hardware.fit import as_asked, plan_training
    from stages.hardware.memory import lengths_at_most, not_estimated, trained_parameters

    if train.connector is not None:
        what = "phase 1, the connector alone" if train.trains_connector else "\nphase 2, LoRA on the base with it"
        click.echo(f"{what}: {trained_parameters(shape, train) / 1e6:.1f} million parameters are trained")
    lengths = lengths_at_most(recipe.model_copy(update={"train": train}))
    asked = as_asked(shape, train, cards.count, cards.dtype, lengths)
    way = plan_training(shape, train, cards.count, cards.dtype, cards.memory, lengths)
    click.echo(
        f"samples of {lengths.longest} tokens ({train.key_of('max_length')}), {lengths.answer} of them the answer"
        " (infer.max_new_tokens)"
    )
    if train.micro_batch > 1:
        alike = as_asked(shape, train, cards.count, cards.dtype, replace(lengths, shortest_prompt=None))
        click.echo(
            f"of a micro-batch of several, one with next to no prompt: the worst case; were all alike,"
            f" {alike.estimate.total / GIB:.2f} GiB as asked. train plans again with the real samples"
        )
    if train.exact_batch:
        refuse_inexact(way.batch, train.key_of("effective_batch"))
    click.echo(f"effective batch: {way.batch}\n")
    _table(asked, way)
    left_out = not_estimated(shape, train)
    if left_out:
        click.echo(f"not in the estimate: {left_out}")
    return asked, way, lengths


def _as_the_software_allows(train: Any, target: "Target") -> Any:
    """The settings as training on the target would take them. Raises what it would raise."""
    from stages.contract.errors import UsageError
    from stages.hardware.targets import refuse_4bit_without_kernels

    if train.load_in_4bit:
        refuse_4bit_without_kernels(target)
    if target.deepspeed or train.sharding == "none":
        return train
    if train.sharding != "auto":
        raise UsageError(
            f"train.sharding is {train.sharding}, and target {target.name} has no DeepSpeed; set it to auto"
        )
    return train.model_copy(update={"sharding": "none"})


def _cards(target: str | None, count: int, memory: float | None, precision: str) -> _Cards:
    from stages.contract.errors import UsageError
    from stages.hardware.targets import load_targets, named_target, precision_of, target_of

    targets = load_targets()
    here = () if target else _free_to_take()
    try:
        card = named_target(target, targets) if target else target_of(_machine_of(here), targets)
    except UsageError as error:
        raise error if target else UsageError(f"{error}, or name a --target") from error
    dtype = precision_of(precision, card)
    if card.capability is None:
        if count > 1 or memory:
            raise UsageError("--gpus and --memory are for cards: name their --target")
        return _Cards(1, "a CPU", None, dtype, card)
    where = f"{count} x {card.name}" if count > 1 else card.name
    if memory:
        return _Cards(count, f"{where} of {memory:g} GiB, in {dtype}", round(memory * USABLE * GIB), dtype, card)
    if not target:
        freest = sorted((gpu for gpu in here if gpu.memory_total), key=lambda gpu: (-gpu.memory_free, gpu.index))
        if len(freest) < count:
            raise UsageError(f"--gpus {count}: this machine has {len(freest)} to take; name a --target")
        taken = freest[:count]
        what = f"the {count} freest cards of this machine" if count > 1 else "the freest card of this machine"
        numbers = ",".join(str(gpu.index) for gpu in taken)
        what = f"{what}, GPU {numbers} ({card.name}), in {dtype}"
        return _Cards(count, what, taken[-1].memory_free, dtype, card, taken[-1])
    what = f"{where} of {card.memory_gib} GiB, in {dtype}"
    return _Cards(count, what, round((card.memory_gib or 0) * USABLE * GIB), dtype, card)


def _free_to_take() -> "tuple[Gpu, ...]":
    """This machine's cards, without those that no launch would take. Raises DoesNotFitError where none is left."""
    from stages.contract.errors import DoesNotFitError
    from stages.hardware.pick import denied_cards, out_of_question
    from stages.hardware.probe import read_cards, visible

    if os.environ.get("LORRY_TARGET") == "cpu":
        return ()
    found = read_cards()
    if found.problem:
        raise DoesNotFitError(f"{found.problem}; name a --target to plan for other cards")
    denied = denied_cards(os.environ.get("LORRY_GPU_DENY"), found.gpus) if found.gpus else frozenset()
    shown = visible(found.gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    reasons = {gpu: out_of_question(gpu, denied) for gpu in shown}
    if shown and all(reasons.values()):
        told = "; ".join(f"GPU {gpu.index}: {reason}" for gpu, reason in reasons.items())
        raise DoesNotFitError(f"no card here is to be taken: {told}; name a --target to plan for others")
    return tuple(gpu for gpu, reason in reasons.items() if not reason)


def _machine_of(gpus: "tuple[Gpu, ...]") -> Any:
    from stages.hardware.probe import Machine

    return Machine(cpus=0, memory_bytes=0, gpus=gpus)


def _table(asked: Any, way: Any) -> None:
    """Components and total in GiB: of the recipe's own way and, where it differs, of the one that train would take."""
    ways = [asked] if asked == way else [asked, way]
    click.echo(
        "".join([f"{'peak on each GPU, GiB':<24}", *(f"{head:>12}" for head in ("as asked", "changed")[: len(ways)])])
    )
    rows = [*asked.estimate.parts(), "total"]
    for name in rows:
        values = [{**each.estimate.parts(), "total": each.estimate.total}[name] for each in ways]
        click.echo("".join([f"{name:<24}", *(f"{value / GIB:>12.2f}" for value in values)]))


def _disk(run: Any, shape: Any) -> bool:
    """Tell what training writes, and whether there is room for it."""
    from stages.hardware.fit import disk_bytes

    needed = disk_bytes(shape, run.recipe.train)
    place = run.roots.runs
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    short = "" if needed <= free else ": too little"
    click.echo(f"\ndisk: {needed / GIB:.2f} GiB below {run.roots.runs}, {free / GIB:.1f} GiB free{short}")
    return needed <= free


def _inference(settings: Any, shape: Any, cards: _Cards) -> None:
    """Tell how inference is served on the same cards. The exit code is training's: inference may have others."""
    from stages.contract.errors import DoesNotFitError, UsageError
    from stages.engines import engine_kind
    from stages.hardware.serve import plan_serving

    if cards.memory is None or not engine_kind(settings.engine).shares_weights:
        click.echo(f"inference: by {settings.engine}{'' if cards.memory else ' on a CPU'}; its memory is not estimated")
        return
    free = [cards.memory] * cards.count
    try:
        plan = plan_serving(shape, free, settings.tensor_parallel, cards.target.dtype, settings.max_length)
    except DoesNotFitError as error:
        click.echo(f"inference does not fit: it {str(error).removeprefix('inference ')}")
        return
    except UsageError as error:
        click.echo(f"inference cannot be shared out so: {error}")
        return
    click.echo(
        f"inference fits: tensor parallel {plan.tensor_parallel} ({plan.why}),"
        f" {plan.weights / GIB:.1f} GiB of weights on each, in {cards.target.dtype},"
        f" infer.max_length {settings.max_length}"
    )


def _verdict(shape: Any, train: Any, cards: _Cards, asked: Any, way: Any, lengths: Any) -> bool:
    from stages.hardware.fit import Offers, smallest_changes
    from stages.hardware.pick import occupied

    if cards.memory is None:
        click.echo("fits: no limit is known for a CPU")
        return True
    room = f"{cards.memory / GIB:.1f} GiB"
    if asked.fits(cards.memory):
        click.echo(
            f"fits: {asked.estimate.total / GIB:.1f} of {room} on each GPU{_tightly(asked, cards, explained=True)}"
        )
        return True
    click.echo(f"as asked it does not fit: {asked.estimate.total / GIB:.1f} of {room} on each GPU")
    if way.fits(cards.memory):
        click.echo(
            f"fits with {' and '.join(way.changes)}, which train does by itself and which keeps the result:"
            f" {way.estimate.total / GIB:.1f} of {room}{_tightly(way, cards, explained=True)}"
        )
        return True
    offers = Offers("bitsandbytes" in cards.target.quantisation, cards.target.deepspeed)
    if train.trains_connector:  # neither is done in the first phase
        offers = Offers(bitsandbytes=False, deepspeed=False)
    found = smallest_changes(shape, train, cards.count, cards.dtype, cards.memory, lengths, offers)
    freed = cards.fullest is not None and way.fits(int(cards.fullest.memory_total * USABLE))
    if cards.fullest is not None and freed:
        click.echo(
            f"it would fit on a card that is free: {way.estimate.total / GIB:.1f} of"
            f" {cards.fullest.memory_total / GIB:.1f} GiB; {cards.fullest}: {occupied(cards.fullest)}"
        )
    for number, each in enumerate(found):
        head = "the smallest change that fits" if number == 0 else "or"
        total = f"{each.estimate.total / GIB:.1f} of {room}{_tightly(each, cards)}"
        click.echo(f"{head}: {' and '.join(each.changes)} ({total})")
    if not found and not freed:
        click.echo("nothing that we know of makes it fit: take a smaller model or a larger card")
    return False


def _tightly(way: Any, cards: _Cards, explained: bool = False) -> str:
    """A warning where an estimate that is a little too low would not fit."""
    if not way.tight(cards.memory):
        return ""
    return ": tight" + (
        "; estimates were up to 2.3 % too low; out of memory, train goes on with less" if explained else ""
    )
