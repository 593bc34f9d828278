"""Chooses a job's GPUs: the named ones, or with `auto` those with the most free memory on which the job fits."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from stages.contract.errors import DoesNotFitError, InterruptedRunError, UsageError
from stages.hardware.holds import Holds
from stages.hardware.probe import Gpu, read_cards, visible_gpus

GIB = 2**30

Capability = tuple[int, int]

Bytes = Callable[[int, Capability], int]
"""Bytes that must be free on each GPU, as a function of the number of GPUs and their compute capability."""


@dataclass(frozen=True)
class Need:
    """The memory that a job needs on each GPU, and the numbers of GPUs that it can use."""

    asked: Bytes
    """Memory for the job as the recipe asks."""
    least: Bytes
    """Least memory for the same result; it decides if too few GPUs have `asked` free."""
    most: int
    """The largest number of GPUs that the job can use."""
    usable: Callable[[int], bool] = lambda _number: True
    """Whether the job can use exactly this number of GPUs."""

    @staticmethod
    def per_gpu(amount: int, most: int = 1) -> "Need":
        """The need of a job that takes `amount` bytes on each of its GPUs, and can use at most `most` GPUs."""
        return Need(lambda _number, _capability: amount, lambda _number, _capability: amount, most)


@dataclass(frozen=True)
class Wish:
    """The parsed value of GPUS: names of GPUs, or `auto` with or without a number."""

    text: str
    names: tuple[str, ...] = ()
    auto: bool = False
    count: int | None = None
    """The number in `auto:4`; None: as many as the job can use."""


@dataclass(frozen=True)
class Pick:
    """The GPUs that `auto` took, sorted by index, and the lines to print about them."""

    cards: tuple[Gpu, ...]
    lines: tuple[str, ...]


def parse_wish(text: str) -> Wish:
    """Parse the value of GPUS. Raises UsageError if it is neither a list of GPUs, nor `auto`, nor `auto:N`."""
    text = text.strip()
    if re.match(r"auto\b", text):
        found = re.fullmatch(r"auto(?::([1-9][0-9]*))?", text)
        if not found:
            raise UsageError(
                f"GPUS={text}: not a list of GPUs, nor auto; write 0,2 or auto, or auto:4 for exactly four GPUs"
            )
        return Wish(text, auto=True, count=int(found[1]) if found[1] else None)
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise UsageError(f"GPUS={text}: has an empty element; write it as 0,2")
    return Wish(text, names)


# -- GPUs by name --------------------------------------------------------------------------------------------------


def denied_cards(text: str | None, gpus: tuple[Gpu, ...]) -> frozenset[int]:
    """Indexes of the GPUs that LORRY_GPU_DENY denies; `text` is its value.

    Raises UsageError for an entry that is not a GPU: a typing error must not let a job use a denied GPU. Ignores a UUID
    that may be that of a lost GPU.
    """
    if not text or not text.strip():
        return frozenset()
    where, denied = f"LORRY_GPU_DENY={text.strip()}", set()
    for name in (name.strip() for name in text.split(",")):
        if _may_be_lost(name, gpus):
            continue
        denied.add(_find_gpu(name, gpus, where).index)
    return frozenset(denied)


def hide_denied_cards(needs_one: bool = True) -> None:
    """Remove the GPUs in LORRY_GPU_DENY from CUDA_VISIBLE_DEVICES, for this process and those that it starts.

    Also sets CUDA_DEVICE_ORDER, so that CUDA numbers GPUs as NVML does. A stage that `lorry launch` did not start needs
    this. Does nothing without visible GPUs, and with LORRY_TARGET=cpu. Raises UsageError for an entry that is not a
    GPU, and DoesNotFitError if no GPU is left and `needs_one`, as the stage would take hours on a CPU.
    """
    shown, left = allowed_gpus(needs_one)
    if len(left) < len(shown):  # NVML numbers GPUs by their place on the bus
        numbers = ",".join(str(gpu.index) for gpu in left)
        os.environ |= {"CUDA_VISIBLE_DEVICES": numbers, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def allowed_gpus(needs_one: bool) -> tuple[tuple[Gpu, ...], tuple[Gpu, ...]]:
    """The visible GPUs, and those of them that LORRY_GPU_DENY does not name. Both are empty if it names none.

    Raises the errors of `hide_denied_cards`.
    """
    text = os.environ.get("LORRY_GPU_DENY", "").strip()
    gpus = read_cards().gpus if text and os.environ.get("LORRY_TARGET") != "cpu" else ()
    shown = visible_gpus(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not shown:
        return (), ()
    denied = denied_cards(text, gpus)
    left = tuple(gpu for gpu in shown if gpu.index not in denied)
    if not left and needs_one:
        raise DoesNotFitError(
            f"LORRY_GPU_DENY={text}: denies every GPU here ({_gpu_names(shown)}); allow one, or set LORRY_TARGET=cpu"
        )
    return shown, left


def named_cards(wish: Wish, gpus: tuple[Gpu, ...], denied: frozenset[int]) -> tuple[Gpu, ...]:
    """The GPUs that the user named, in that order.

    Raises UsageError for a GPU that does not exist, is named twice, is denied or in MIG mode, and DoesNotFitError for
    one that no longer answers.
    """
    where, chosen = f"GPUS={wish.text}", []
    for name in wish.names:
        gpu = _find_gpu(name, gpus, where)
        if gpu in chosen:
            raise UsageError(f"{where}: names {gpu} twice; name each GPU once; this machine has: {_gpu_names(gpus)}")
        refuse_unusable_gpu(gpu, where, denied)
        chosen.append(gpu)
    return tuple(chosen)


def refuse_unusable_gpu(gpu: Gpu, where: str, denied: frozenset[int]) -> None:
    """Raise UsageError if a GPU is denied or in MIG mode, and DoesNotFitError if it no longer answers.

    `where` begins the message.
    """
    if gpu.index in denied:
        raise UsageError(f"{where}: {gpu} is denied by LORRY_GPU_DENY; name other GPUs, or GPUS=auto")
    if gpu.lost:
        raise DoesNotFitError(
            f"{where}: {gpu} no longer answers (NVML: {gpu.lost}); see `dmesg | grep Xid`, reset it (nvidia-smi"
            f" --gpu-reset -i {gpu.index}) or reboot, or name other GPUs"
        )
    if gpu.mig:
        raise UsageError(
            f"{where}: {gpu} is in MIG mode, and Lorry binds whole GPUs; turn it off (sudo nvidia-smi -i {gpu.index}"
            " -mig 0), or name another GPU"
        )


def _find_gpu(name: str, gpus: tuple[Gpu, ...], where: str) -> Gpu:
    """The GPU with the index `name`, or the only GPU whose UUID begins with it.

    Raises UsageError if there is none or more than one, and for a MIG slice.
    """
    here = f"this machine has: {_gpu_names(gpus)}"
    if name.upper().startswith("MIG-"):
        raise UsageError(f"{where}: {name} is a MIG slice, and Lorry binds whole GPUs; name one; {here}")
    if name.upper().startswith("GPU-"):
        found = [gpu for gpu in gpus if gpu.uuid.lower().startswith(name.lower())]
        if len(found) > 1:
            which = ", ".join(f"{gpu.index} {gpu.uuid}" for gpu in found)
            raise UsageError(f"{where}: {len(found)} UUIDs begin with {name}: {which}; write more of the UUID")
        if not found:
            uuids = ", ".join(f"{gpu.index} {gpu.uuid}" for gpu in gpus)
            raise UsageError(f"{where}: no GPU's UUID begins with {name}; this machine has: {uuids}")
        return found[0]
    if not name.isdecimal() or not name.isascii():
        raise UsageError(f"{where}: {name!r} is not a GPU's number or UUID, as in 0,2 or GPU-8f5e; {here}")
    for gpu in gpus:
        if gpu.index == int(name):
            return gpu
    raise UsageError(f"{where}: no GPU {int(name)}; {here}")


def _may_be_lost(name: str, gpus: tuple[Gpu, ...]) -> bool:
    """Whether a UUID, or the beginning of one, is unknown here, but may be that of a GPU that no longer reports it."""
    known = any(gpu.uuid.lower().startswith(name.lower()) for gpu in gpus if gpu.uuid)
    return name.upper().startswith("GPU-") and not known and any(not gpu.uuid for gpu in gpus)


def _gpu_names(gpus: tuple[Gpu, ...]) -> str:
    """Index and name of each GPU as text, for messages; also says so if there are no GPUs."""
    return "; ".join(f"{gpu.index} {gpu.name or 'lost'}" for gpu in gpus) or "none that NVML shows"


def hold_named_cards(cards: tuple[Gpu, ...], where: str, holds: Holds) -> None:
    """Hold the GPUs that the user named, which several jobs may share.

    Raises InterruptedRunError if another process holds one of them exclusively, as GPUS=auto does, and the errors of
    `Holds.choice_lock`. `where` begins the message.
    """
    with holds.choice_lock():
        for gpu in cards:
            if not holds.take(gpu.uuid, exclusive=False):
                holder = next(iter(holds.holders(gpu.uuid)), "another Lorry process")
                raise InterruptedRunError(
                    f"{where}: {gpu} is held by {holder}, whose GPUS=auto does not share it; wait until that ends, or"
                    " name other GPUs"
                )


# -- auto ----------------------------------------------------------------------------------------------------------


def pick_cards(
    wish: Wish, need: Need, gpus: tuple[Gpu, ...], denied: frozenset[int], holds: Holds, oldest: Capability = (0, 0)
) -> Pick:
    """Choose the GPUs for `auto` and hold them for this process alone.

    It takes those with the most free memory, all of one compute capability that is not below `oldest`: as many as the
    wish says, or as many as the job can use. Raises DoesNotFitError, with the state of each GPU, if too few have enough
    free memory, and the errors of `Holds.choice_lock`.
    """
    with holds.choice_lock():
        free, reasons = [], {}
        for gpu in sorted(gpus, key=lambda gpu: (-gpu.memory_free, gpu.index)):
            reason = reason_to_skip(gpu, denied, oldest)
            if not reason and not holds.take(gpu.uuid, exclusive=True):
                holder = next(iter(holds.holders(gpu.uuid)), "another Lorry process")
                reason = f"held by {holder}"
            if reason:
                reasons[gpu.index] = reason
            else:
                free.append(gpu)
        for amount in (need.asked, need.least):
            taken = _best_gpus(free, wish.count, need, amount)
            if taken:
                break
        for gpu in free:
            if gpu not in taken:
                holds.release(gpu.uuid)
    if not taken:
        raise DoesNotFitError(_refusal_text(wish, need, gpus, free, reasons))
    return Pick(taken, tuple(_choice_lines(taken, need)))


def reason_to_skip(gpu: Gpu, denied: frozenset[int], oldest: Capability = (0, 0)) -> str:
    """Why `auto` cannot take a GPU, as text; empty if it can. Memory and other processes' holds are not considered."""
    if gpu.index in denied:
        return "in LORRY_GPU_DENY"
    if gpu.lost:
        return f"no longer answers ({gpu.lost})"
    if gpu.mig:
        return "in MIG mode"
    if gpu.capability < oldest:
        return f"older than the target ({_version_text(gpu.capability)} < {_version_text(oldest)})"
    return ""


def _best_gpus(free: list[Gpu], count: int | None, need: Need, amount: Bytes) -> tuple[Gpu, ...]:
    """The GPUs to take, sorted by index; empty if the job fits on too few. `free` is sorted by free memory, most first.

    All have one compute capability: the one with the most GPUs on which the job fits; of equals, the newest.
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


def _choice_lines(taken: tuple[Gpu, ...], need: Need) -> list[str]:
    """A line on each GPU in `taken`, and one more if some have less free memory than the recipe asks for."""
    number, capability = len(taken), taken[0].capability
    asked = need.asked(number, capability)
    lines = [
        f"{gpu}: taken, {gib_text(gpu.memory_free)} GiB free of {gib_text(gpu.memory_total)},"
        f" {gib_text(asked)} asked for"
        for gpu in taken
    ]
    if min(gpu.memory_free for gpu in taken) < asked:
        least = gib_text(need.least(number, capability))
        lines.append(
            f"some have less free than asked for; train reaches the same result with down to {least} GiB per GPU"
        )
    return lines


def _refusal_text(wish: Wish, need: Need, gpus: tuple[Gpu, ...], free: list[Gpu], reasons: dict[int, str]) -> str:
    """Why `auto` finds too few GPUs: the memory needed, the state of each GPU, and what to do."""
    if not gpus:
        return f"GPUS={wish.text}: NVML shows no GPU on this machine; name GPUs, or use TARGET=cpu"
    newest = max(gpu.capability for gpu in free or gpus)
    possible = filter(need.usable, range(1, max(min(len(free), need.most), 1) + 1))
    number = wish.count or min(possible, key=lambda number: need.least(number, newest))
    asked, least = need.asked(number, newest), need.least(number, newest)
    lean = f" ({gib_text(least)} at least)" if least < asked else ""
    states = []
    for gpu in gpus:
        fits = gpu.memory_free >= need.least(number, gpu.capability) if gpu in free else False
        state = reasons.get(gpu.index) or ("fits" if fits else describe_memory(gpu))
        states.append(f"GPU {gpu.index}: {state}")
    too_few = f"no {number} GPUs of one kind have" if number > 1 else "no GPU has"
    return (
        f"GPUS={wish.text}: {too_few} {gib_text(asked)} GiB free{lean}: {'; '.join(states)}; wait"
        f"{', use fewer GPUs' if (wish.count or 0) > 1 else ''}, or see `lorry plan` for settings that need less"
    )


def describe_memory(gpu: Gpu) -> str:
    """How much memory of a GPU is free, and which processes hold most of the rest, as text."""
    largest = [f"{holder} {gib_text(holder.memory)}" if holder.memory else str(holder) for holder in gpu.processes[:2]]
    more = f" and {len(gpu.processes) - 2} more" if len(gpu.processes) > 2 else ""
    held = f", held by {', '.join(largest)}{more}" if largest else ""
    return f"{gib_text(gpu.memory_free)} GiB free of {gib_text(gpu.memory_total)}{held}"


def gib_text(amount: int) -> str:
    """Bytes as a number of GiB with one decimal, without the unit."""
    return f"{amount / GIB:.1f}"


def _version_text(capability: Capability) -> str:
    """A compute capability as NVIDIA writes it, such as 8.0."""
    return f"{capability[0]}.{capability[1]}"
