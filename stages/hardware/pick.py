"""Which cards a job gets: those named one by one, or the freest that it fits on (`auto`)."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from stages.contract.errors import DoesNotFitError, InterruptedRunError, UsageError
from stages.hardware.holds import Holds
from stages.hardware.probe import Gpu, read_cards, visible

GIB = 2**30

Capability = tuple[int, int]

Bytes = Callable[[int, Capability], int]
"""What a card must have free, as a function of the number of cards and their compute capability."""


@dataclass(frozen=True)
class Need:
    """What a job needs of each card."""

    asked: Bytes
    """As the recipe asks."""
    least: Bytes
    """In the leanest way that gives the same result; taken where not enough cards have what is asked."""
    most: int
    """Cards that it can use."""
    usable: Callable[[int], bool] = lambda _number: True
    """Whether it can use just so many."""

    @staticmethod
    def of(amount: int, most: int = 1) -> "Need":
        """The same on any number of cards."""
        return Need(lambda _number, _capability: amount, lambda _number, _capability: amount, most)


@dataclass(frozen=True)
class Wish:
    """What GPUS says: names of cards, or `auto` with or without a number."""

    text: str
    names: tuple[str, ...] = ()
    auto: bool = False
    count: int | None = None


@dataclass(frozen=True)
class Pick:
    """The cards that `auto` took, by index, and a line on each."""

    cards: tuple[Gpu, ...]
    lines: tuple[str, ...]


def parse_wish(text: str) -> Wish:
    """Read GPUS. Raises UsageError for what is neither a list of cards nor `auto` with a number from 1 on."""
    text = text.strip()
    if re.match(r"auto\b", text):
        found = re.fullmatch(r"auto(?::([1-9][0-9]*))?", text)
        if not found:
            raise UsageError(f"GPUS={text}: write auto, or auto:4 for exactly four cards; a list of cards has no auto")
        return Wish(text, auto=True, count=int(found[1]) if found[1] else None)
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise UsageError(f"GPUS={text}: has an empty element; write it as 0,2")
    return Wish(text, names)


# -- cards by name -------------------------------------------------------------------------------------------------


def denied_cards(text: str | None, gpus: tuple[Gpu, ...]) -> frozenset[int]:
    """Indexes of the cards that LORRY_GPU_DENY keeps lorry from. Raises UsageError for an entry that is no card: a
    list with a slip in it must not be half obeyed."""
    if not text or not text.strip():
        return frozenset()
    where, denied = f"LORRY_GPU_DENY={text.strip()}", set()
    for name in (name.strip() for name in text.split(",")):
        if _may_be_a_lost_one(name, gpus):
            continue
        denied.add(_find(name, gpus, where).index)
    return frozenset(denied)


def hide_denied_cards(needs_one: bool = True) -> None:
    """Have CUDA_VISIBLE_DEVICES show this process, and those that it starts, no card in LORRY_GPU_DENY.

    For a stage that is started by itself, without a launcher that chose its cards. Raises UsageError for an entry that
    is no card, and DoesNotFitError where no card is left and the stage needs one: it would take hours on a CPU.
    """
    text = os.environ.get("LORRY_GPU_DENY", "").strip()
    gpus = read_cards().gpus if text and os.environ.get("LORRY_TARGET") != "cpu" else ()
    shown = visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not shown:
        return
    denied = denied_cards(text, gpus)
    left = [gpu for gpu in shown if gpu.index not in denied]
    if not left and needs_one:
        raise DoesNotFitError(
            f"LORRY_GPU_DENY={text}: no other card is left here ({_listed(shown)}); LORRY_TARGET=cpu computes without"
        )
    if len(left) < len(shown):  # NVML counts the cards by their place on the bus
        numbers = ",".join(str(gpu.index) for gpu in left)
        os.environ |= {"CUDA_VISIBLE_DEVICES": numbers, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def named_cards(wish: Wish, gpus: tuple[Gpu, ...], denied: frozenset[int]) -> tuple[Gpu, ...]:
    """The cards of a list, in its order. Raises UsageError for one that is not there, stands twice, is denied or in
    MIG mode, and DoesNotFitError for one that no longer answers."""
    where, chosen = f"GPUS={wish.text}", []
    for name in wish.names:
        gpu = _find(name, gpus, where)
        if gpu in chosen:
            raise UsageError(f"{where}: names a GPU twice, {gpu}; this machine has: {_listed(gpus)}")
        refuse_unusable(gpu, where, denied)
        chosen.append(gpu)
    return tuple(chosen)


def refuse_unusable(gpu: Gpu, where: str, denied: frozenset[int]) -> None:
    """Raise what keeps a card that is there from being taken."""
    if gpu.index in denied:
        raise UsageError(f"{where}: {gpu} is not to be taken: it is in LORRY_GPU_DENY; name other cards, or GPUS=auto")
    if gpu.lost:
        raise DoesNotFitError(
            f"{where}: {gpu} no longer answers (NVML: {gpu.lost}): see `dmesg | grep Xid`, reset it (nvidia-smi"
            f" --gpu-reset -i {gpu.index}) or reboot; or name other cards"
        )
    if gpu.mig:
        raise UsageError(
            f"{where}: {gpu} is in MIG mode, and Lorry binds whole cards: turn it off (sudo nvidia-smi -i {gpu.index}"
            " -mig 0), or name another card"
        )


def _find(name: str, gpus: tuple[Gpu, ...], where: str) -> Gpu:
    """The card of an index, a UUID or a beginning of one that no other card has."""
    here = f"this machine has: {_listed(gpus)}"
    if name.upper().startswith("MIG-"):
        raise UsageError(f"{where}: {name} is a MIG slice, and Lorry binds whole cards: name one; {here}")
    if name.upper().startswith("GPU-"):
        found = [gpu for gpu in gpus if gpu.uuid.lower().startswith(name.lower())]
        if len(found) > 1:
            which = ", ".join(f"{gpu.index} {gpu.uuid}" for gpu in found)
            raise UsageError(f"{where}: {len(found)} GPUs begin with {name}: {which}; write more of the UUID")
        if not found:
            uuids = ", ".join(f"{gpu.index} {gpu.uuid}" for gpu in gpus)
            raise UsageError(f"{where}: no GPU's UUID begins with {name}; this machine has: {uuids}")
        return found[0]
    if not name.isdecimal() or not name.isascii():
        raise UsageError(f"{where}: {name!r} is not a GPU's number or UUID, as in 0,2 or GPU-8f5e; {here}")
    for gpu in gpus:
        if gpu.index == int(name):
            return gpu
    raise UsageError(f"{where}: there is no GPU {int(name)}; {here}")


def _may_be_a_lost_one(name: str, gpus: tuple[Gpu, ...]) -> bool:
    """Whether a UUID that no card has may be that of a card which no longer tells its own."""
    known = any(gpu.uuid.lower().startswith(name.lower()) for gpu in gpus if gpu.uuid)
    return name.upper().startswith("GPU-") and not known and any(not gpu.uuid for gpu in gpus)


def _listed(gpus: tuple[Gpu, ...]) -> str:
    return "; ".join(f"{gpu.index} {gpu.name or 'lost'}" for gpu in gpus) or "none that NVML shows"


def hold_named(cards: tuple[Gpu, ...], where: str, holds: Holds) -> None:
    """Hold cards that were named, which several jobs may share. Raises InterruptedRunError where `auto` has one."""
    with holds.choosing():
        for gpu in cards:
            if not holds.take(gpu.uuid, exclusive=False):
                holder = next(iter(holds.holders(gpu.uuid)), "another lorry")
                raise InterruptedRunError(
                    f"{where}: {gpu} is held by {holder}, whose GPUS=auto has it for itself: wait for it, or name"
                    " other cards"
                )


# -- auto ----------------------------------------------------------------------------------------------------------


def pick_cards(
    wish: Wish, need: Need, gpus: tuple[Gpu, ...], denied: frozenset[int], holds: Holds, oldest: Capability = (0, 0)
) -> Pick:
    """The cards for `auto`, held for this process alone: of one compute capability, not below `oldest`, those with the
    most free memory; as many as the wish says, or all that the job fits on and can use.

    Raises DoesNotFitError, with what is in the way on each card, where there are not enough.
    """
    with holds.choosing():
        free, reasons = [], {}
        for gpu in sorted(gpus, key=lambda gpu: (-gpu.memory_free, gpu.index)):
            reason = out_of_question(gpu, denied, oldest)
            if not reason and not holds.take(gpu.uuid, exclusive=True):
                holder = next(iter(holds.holders(gpu.uuid)), "another lorry")
                reason = f"held by {holder}"
            if reason:
                reasons[gpu.index] = reason
            else:
                free.append(gpu)
        for amount in (need.asked, need.least):
            taken = _best(free, wish.count, need, amount)
            if taken:
                break
        for gpu in free:
            if gpu not in taken:
                holds.release(gpu.uuid)
    if not taken:
        raise DoesNotFitError(_refusal(wish, need, gpus, free, reasons))
    return Pick(taken, tuple(_lines(taken, need)))


def out_of_question(gpu: Gpu, denied: frozenset[int], oldest: Capability = (0, 0)) -> str:
    """Why a card is not to be taken, however much of it is free."""
    if gpu.index in denied:
        return "in LORRY_GPU_DENY"
    if gpu.lost:
        return f"no longer answers ({gpu.lost})"
    if gpu.mig:
        return "in MIG mode"
    if gpu.capability < oldest:
        return f"older than the target ({_dotted(gpu.capability)} < {_dotted(oldest)})"
    return ""


def _best(free: list[Gpu], count: int | None, need: Need, amount: Bytes) -> tuple[Gpu, ...]:
    """The cards to take, by index; none where too few fit. `free` has those with the most free memory first.

    Of several kinds of card, that with the most cards that fit, then the newer.
    """
    found: list[tuple[int, Capability, list[Gpu]]] = []
    kinds = sorted(free, key=lambda gpu: gpu.capability)
    for capability, group in groupby(kinds, key=lambda gpu: gpu.capability):
        cards = list(group)
        for number in [count] if count else filter(need.usable, range(min(len(cards), need.most), 0, -1)):
            fitting = [gpu for gpu in cards if gpu.memory_free >= amount(number, capability)]
            if len(fitting) >= number:
                found.append((len(fitting), capability, fitting[:number]))
                break
    chosen = max(found, key=lambda one: one[:2], default=(0, (0, 0), []))[2]
    return tuple(sorted(chosen, key=lambda gpu: gpu.index))


def _lines(taken: tuple[Gpu, ...], need: Need) -> list[str]:
    number, capability = len(taken), taken[0].capability
    asked = need.asked(number, capability)
    lines = [
        f"{gpu}: taken, {gib(gpu.memory_free)} GiB free of {gib(gpu.memory_total)}, {gib(asked)} asked for"
        for gpu in taken
    ]
    if min(gpu.memory_free for gpu in taken) < asked:
        least = gib(need.least(number, capability))
        lines.append(f"no {number} cards have that free: the same result in less memory, down to {least} GiB a card")
    return lines


def _refusal(wish: Wish, need: Need, gpus: tuple[Gpu, ...], free: list[Gpu], reasons: dict[int, str]) -> str:
    if not gpus:
        return f"GPUS={wish.text}: NVML shows no cards here to choose from: name them, or take TARGET=cpu"
    newest = max(gpu.capability for gpu in free or gpus)
    possible = filter(need.usable, range(1, max(min(len(free), need.most), 1) + 1))
    number = wish.count or min(possible, key=lambda number: need.least(number, newest))
    asked, least = need.asked(number, newest), need.least(number, newest)
    lean = f" ({gib(least)} at the least)" if least < asked else ""
    told = []
    for gpu in gpus:
        fits = gpu.memory_free >= need.least(number, gpu.capability) if gpu in free else False
        what = reasons.get(gpu.index) or ("would do" if fits else occupied(gpu))
        told.append(f"GPU {gpu.index}: {what}")
    cards = f"no {number} cards of one kind have" if number > 1 else "no card has"
    return (
        f"GPUS={wish.text}: {cards} {gib(asked)} GiB free{lean}: {'; '.join(told)}; wait"
        f"{', take fewer' if (wish.count or 0) > 1 else ''}, or see `lorry plan` for what needs less"
    )


def occupied(gpu: Gpu) -> str:
    """How much of a card is free, and who has the rest."""
    largest = [f"{holder} {gib(holder.memory)}" if holder.memory else str(holder) for holder in gpu.processes[:2]]
    more = f" and {len(gpu.processes) - 2} more" if len(gpu.processes) > 2 else ""
    held = f", held by {', '.join(largest)}{more}" if largest else ""
    return f"{gib(gpu.memory_free)} GiB free of {gib(gpu.memory_total)}{held}"


def gib(amount: int) -> str:
    """Bytes in GiB, with one decimal."""
    return f"{amount / GIB:.1f}"


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
