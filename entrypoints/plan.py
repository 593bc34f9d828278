"""`lorry plan`: whether training a recipe fits the cards, before anything runs; works for cards that are not here."""

import shutil
import sys
from dataclasses import dataclass
from typing import Any

import click

from entrypoints.common import one_line_errors, open_run, recipe_options

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


@click.command()
@recipe_options
@click.option("--target", metavar="NAME", help="Kind of card, which need not be here; default: this machine's cards.")
@click.option("--gpus", "count", type=click.IntRange(min=1), help="How many; default: 1.")
@click.option("--memory", type=click.FloatRange(min=0, min_open=True), help="GiB of a card, instead of the target's.")
@one_line_errors
def plan(target: str | None, count: int | None, memory: float | None, **options: Any) -> None:
    """Estimate what training RECIPE takes on each GPU and say whether it fits; if not, the smallest change that does.

    Reads the model's config.json and the headers of its weights, and starts nothing. Exits with 4 when it does not fit.
    """
    from stages.hardware.fit import as_asked, plan_training
    from stages.hardware.memory import lengths_at_most
    from stages.hardware.shape import read_shape

    run = open_run(**options)
    train = run.recipe.train
    model = run.model(run.recipe.model.path, "model.path")
    shape = read_shape(model)
    cards = _cards(target, count or 1, memory, train.precision)
    lengths = lengths_at_most(run.recipe)
    asked = as_asked(shape, train, cards.count, cards.dtype, lengths)
    way = plan_training(shape, train, cards.count, cards.dtype, cards.memory, lengths)
    click.echo(f"{run.name}: {model.name}, {shape.parameters / 1e9:.2f} billion parameters, on {cards.what}")
    click.echo(
        f"samples of {lengths.longest} tokens (train.max_length), {lengths.answer} of them the answer"
        " (infer.max_new_tokens)"
    )
    click.echo(f"effective batch: {way.batch}\n")
    _table(asked, way)
    enough_disk = _disk(run, shape)
    click.echo()
    fits = _verdict(shape, train, cards, asked, way, lengths)
    sys.exit(0 if fits and enough_disk else 4)


def _cards(target: str | None, count: int, memory: float | None, precision: str) -> _Cards:
    from stages.contract.errors import DoesNotFitError, UsageError
    from stages.hardware.probe import probe
    from stages.hardware.targets import load_targets, named_target, precision_of, target_of

    targets, machine = load_targets(), probe()
    if machine.problem and not target:
        raise DoesNotFitError(f"{machine.problem}; name a --target to plan for other cards")
    card = named_target(target, targets) if target else target_of(machine, targets)
    dtype = precision_of(precision, card)
    if card.capability is None:
        if count > 1 or memory:
            raise UsageError("--gpus and --memory are for cards: name their --target")
        return _Cards(1, "a CPU", None, dtype)
    where = f"{count} x {card.name}" if count > 1 else card.name
    if memory:
        return _Cards(count, f"{where} of {memory:g} GiB, in {dtype}", round(memory * USABLE * GIB), dtype)
    if not target:  # the cards that are here, the freest first
        free = sorted((gpu.memory_free for gpu in machine.gpus if gpu.memory_total), reverse=True)
        if len(free) < count:
            raise UsageError(f"--gpus {count}: this machine has {len(free)} that tell their memory; name a --target")
        what = f"the {count} freest cards of this machine" if count > 1 else "the freest card of this machine"
        return _Cards(count, f"{what} ({card.name}), in {dtype}", free[count - 1], dtype)
    return _Cards(
        count, f"{where} of {card.memory_gib} GiB, in {dtype}", round((card.memory_gib or 0) * USABLE * GIB), dtype
    )


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


def _verdict(shape: Any, train: Any, cards: _Cards, asked: Any, way: Any, lengths: Any) -> bool:
    from stages.hardware.fit import smallest_changes

    if cards.memory is None:
        click.echo("fits: no limit is known for a CPU")
        return True
    room = f"{cards.memory / GIB:.1f} GiB"
    if asked.fits(cards.memory):
        click.echo(f"fits: {asked.estimate.total / GIB:.1f} of {room} on each GPU")
        return True
    click.echo(f"as asked it does not fit: {asked.estimate.total / GIB:.1f} of {room} on each GPU")
    if way.fits(cards.memory):
        click.echo(
            f"fits with {' and '.join(way.changes)}, which train does by itself and which keeps the result:"
            f" {way.estimate.total / GIB:.1f} of {room}"
        )
        return True
    found = smallest_changes(shape, train, cards.count, cards.dtype, cards.memory, lengths)
    for number, each in enumerate(found):
        head = "the smallest change that fits" if number == 0 else "or"
        click.echo(f"{head}: {' and '.join(each.changes)} ({each.estimate.total / GIB:.1f} of {room})")
    if not found:
        click.echo("nothing that we know of makes it fit: take a smaller model or a larger card")
    return False
