"""Chooses a job's GPUs: the named ones, or with `auto` those with the most free memory on which the job fits."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from stages.contract.errors import DoesNotFitError, InterruptedRunError, UsageError
from stages.hardware.holds import Holds
from stages.hardware.probe import Gpu, gpus_named, read_cards
from stages.hardware.targets import gpu_target, load_targets

GIB = 2**30

VISIBLE = "CUDA_VISIBLE_DEVICES"
NVML_ORDER = "PCI_BUS_ID"
"""The value of CUDA_DEVICE_ORDER with which CUDA numbers GPUs by their place on the bus, as NVML and nvidia-smi do."""

Capability = tuple[int, int]

Bytes = Callable[[int, Capability], int]
"""Bytes that must be free on each GPU, as a function of the number of GPUs and their compute capability."""


@dataclass(frozen=True)
class Need:
    """The memory that a job needs on each GPU, and the numbers of GPUs that it can use."""

    asked: Bytes
    """Memory with which the job is fast."""
    least: Bytes
    """Least memory for the same result; it decides if too few GPUs have `asked` free."""
    most: int
    """The largest number of GPUs that the job can use."""

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


def hide_unusable_gpus(needs_one: bool = True) -> list[str]:
    """Set CUDA_VISIBLE_DEVICES to the GPUs that a stage may use, for this process and those that it starts.

    They are those of `allowed_gpus`. The variable gets NVML's numbers, as libraries read it as integers, and
    CUDA_DEVICE_ORDER is set, so that CUDA numbers GPUs as NVML does. Returns lines to print, on GPUs that are left out.
    Raises the errors of `allowed_gpus`.
    """
    shown, left = allowed_gpus(needs_one)
    setting, on_cpu = os.environ.get(VISIBLE), os.environ.get("LORRY_TARGET") == "cpu"
    hides_one = any(gpu not in left and not gpu.lost for gpu in shown)
    os.environ["CUDA_DEVICE_ORDER"] = NVML_ORDER
    if on_cpu or hides_one or setting is not None:
        os.environ[VISIBLE] = ",".join(str(gpu.index) for gpu in left)
    if setting and not left and not on_cpu:
        return [f"{VISIBLE}={setting}: leaves no GPU, so this stage computes on the CPU"]
    return [f"{gpu} is left out: {reason_to_skip(gpu, frozenset())}" for gpu in shown if gpu.lost or gpu.mig]


def allowed_gpus(needs_one: bool) -> tuple[tuple[Gpu, ...], tuple[Gpu, ...]]:
    """The GPUs of `shown_gpus`, and those of them that a stage may use: not denied, not lost, not in MIG mode.

    Both are empty with LORRY_TARGET=cpu. Raises the errors of `denied_cards` and `shown_gpus`. With `needs_one`, raises
    DoesNotFitError if the driver does not answer or no GPU may be used, as the stage would take hours on a CPU.
    """
    if os.environ.get("LORRY_TARGET") == "cpu":
        return (), ()
    found, text = read_cards(), os.environ.get("LORRY_GPU_DENY", "").strip()
    if found.problem:
        if needs_one:
            raise DoesNotFitError(f"{found.problem}, or set LORRY_TARGET=cpu to compute without GPUs")
        return (), ()
    denied = denied_cards(text, found.gpus) if found.gpus else frozenset()
    shown = shown_gpus(found.gpus)
    reasons = {gpu: reason_to_skip(gpu, denied) for gpu in shown}
    left = tuple(gpu for gpu, reason in reasons.items() if not reason)
    if shown and not left and needs_one:
        raise DoesNotFitError(_none_left_text(text, reasons))
    return shown, left


def shown_gpus(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES shows, in its order; all of `gpus` if it is not set. `-1` ends the list.

    Where CUDA would hide GPUs without a word, and a stage would compute on the CPU, an error says so. Raises UsageError
    for an entry that is not a GPU, for a GPU that is named twice or in MIG mode, and for a CUDA_DEVICE_ORDER that is
    not NVML's; DoesNotFitError for a named GPU that no longer answers.
    """
    setting = os.environ.get(VISIBLE)
    refuse_other_order(gpus)
    if not setting:
        return gpus if setting is None else ()
    where, chosen = f"{VISIBLE}={setting}", []
    for name in map(str.strip, setting.split(",")):
        if name == "-1":
            break
        if not gpus:
            raise UsageError(
                f"{where}: names a GPU, but NVML shows none on this machine; unset it, or set LORRY_TARGET=cpu"
            )
        gpu = _find_gpu(name, gpus, where)
        if gpu in chosen:
            raise UsageError(f"{where}: names {gpu} twice, and CUDA then shows none; name each GPU once")
        refuse_unusable_gpu(gpu, where, frozenset())
        chosen.append(gpu)
    return tuple(chosen)


def refuse_other_order(gpus: tuple[Gpu, ...]) -> None:
    """Raise UsageError if CUDA_DEVICE_ORDER makes CUDA number several GPUs otherwise than NVML does."""
    order = os.environ.get("CUDA_DEVICE_ORDER") or NVML_ORDER
    if order != NVML_ORDER and len(gpus) > 1:
        raise UsageError(
            f"CUDA_DEVICE_ORDER={order}: Lorry numbers GPUs as nvidia-smi does; unset it, or set it to {NVML_ORDER}"
        )


def _none_left_text(deny: str, reasons: dict[Gpu, str]) -> str:
    """The error for GPUs of which a stage may use none, for these reasons. `deny` is the value of LORRY_GPU_DENY."""
    if len({*reasons.values()}) == 1 and deny and "LORRY_GPU_DENY" in next(iter(reasons.values())):
        names = _gpu_names(tuple(reasons))
        return f"LORRY_GPU_DENY={deny}: denies every GPU here ({names}); allow one, or set LORRY_TARGET=cpu"
    texts = "; ".join(f"{gpu}: {reason}" for gpu, reason in reasons.items())
    mig = " (sudo nvidia-smi -i N -mig 0 turns MIG mode off)" if any(gpu.mig for gpu in reasons) else ""
    return f"GPUs here: Lorry may use none ({texts}); make one usable{mig}, or set LORRY_TARGET=cpu"


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
    found = gpus_named(name, gpus)
    if name.upper().startswith("GPU-"):
        if len(found) > 1:
            which = ", ".join(f"{gpu.index} {gpu.uuid}" for gpu in found)
            raise UsageError(f"{where}: {len(found)} UUIDs begin with {name}: {which}; write more of the UUID")
        if not found:
            uuids = ", ".join(f"{gpu.index} {gpu.uuid}" for gpu in gpus)
            raise UsageError(f"{where}: no GPU's UUID begins with {name}; this machine has: {uuids}")
        return found[0]
    if not name.isdecimal() or not name.isascii():
        raise UsageError(f"{where}: {name!r} is not a GPU's number or UUID, as in 0,2 or GPU-8f5e; {here}")
    if not found:
        raise UsageError(f"{where}: no GPU {int(name)}; {here}")
    return found[0]


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

    It takes those with the most free memory, all of one target and of one compute capability that is not below
    `oldest`: as many as the wish says, or as many as the job can use. Raises DoesNotFitError, with the state of each
    GPU, if too few have enough free memory, and the errors of `Holds.choice_lock`.
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

    All have one compute capability and one target: the ones with the most GPUs on which the job fits; of equals, the
    newest.
    """
    found: list[tuple[int, Capability, list[Gpu]]] = []
    targets = load_targets()

    def kind(gpu: Gpu) -> tuple[Capability, str]:
        target = gpu_target(gpu, targets)
        return gpu.capability, target.name if target else ""

    for (capability, _), group in groupby(sorted(free, key=kind), key=kind):
        cards = list(group)
        for number in [count] if count else range(min(len(cards), need.most), 0, -1):
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
    possible = range(1, max(min(len(free), need.most), 1) + 1)
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
