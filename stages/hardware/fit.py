"""Finds a way to train an adapter that fits the GPUs: the recipe's own, or one with the same result in less memory.

Micro-batch, gradient checkpointing and sharding change memory and speed, not the result: the plan changes those on its
own. A base in 4 bits, fewer pixels and shorter samples change the result: the plan only suggests them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from stages.contract.recipe import Train
from stages.hardware.batch import BatchPlan, plan_batch
from stages.hardware.memory import Estimate, Lengths, estimate, trained_parameters
from stages.models.shape import ModelShape

UNSURE = 0.03
"""Share by which an estimate may be too low: up to 2.3% in the measurements (docs/measurements.md)."""
SHORT = 64
"""Tokens of a very short sample: hardly any job has only samples of that length."""
MOST_GPUS = 8
"""Most GPUs that one machine usually has."""
LEAST_PIXELS = 200_000
"""Pixels of a picture on which a reader can just distinguish a page's text from its drawing."""


@dataclass(frozen=True)
class Way:
    """One way to train."""

    settings: Train
    batch: BatchPlan
    sharding: str
    """`none`, `zero2` or `zero3`."""
    dtype: str
    estimate: Estimate
    changes: tuple[str, ...] = ()
    """Differences from the recipe, as `key=value for the recipe's value`."""

    def fits(self, memory: int | None) -> bool:
        return memory is None or self.estimate.total <= memory

    def tight(self, memory: int | None) -> bool:
        """Whether it fits, but with less room than an estimate may be too low by."""
        return memory is not None and self.fits(memory) and self.estimate.total > (1 - UNSURE) * memory


def plan_training(
    shape: ModelShape, settings: Train, processes: int, dtype: str, memory: int | None, lengths: Lengths | None = None
) -> Way:
    """The first way that fits in `memory` bytes on each GPU (None: no limit, as on a CPU), else the one that takes
    least memory.

    `lengths` are those of the samples; without them every sample and its answer count as max_length tokens.
    """
    lengths = lengths or Lengths(settings.max_length, settings.max_length)
    ways = list(_ways(shape, settings, processes, dtype, lengths))
    leanest = min(ways, key=lambda way: way.estimate.total)
    return next((way for way in ways if way.fits(memory)), leanest)


def unestimated_way(settings: Train, processes: int, dtype: str) -> Way:
    """The recipe's own way, for a model whose memory cannot be estimated."""
    sharding = "none" if settings.sharding == "auto" else settings.sharding
    batch = plan_batch(settings.effective_batch, settings.micro_batch, processes)
    return Way(settings, batch, sharding, dtype, Estimate(*[0] * 8))


def most_gpus(settings: Train) -> int:
    """The most GPUs with which a step has no more samples than the recipe's effective batch, in both phases."""
    return min(_effective_batches(settings))


def makes_exact_batches(settings: Train, gpus: int) -> bool:
    """Whether train.exact_batch allows this number of GPUs: it must divide the effective batches of both phases."""
    return not settings.exact_batch or all(batch % gpus == 0 for batch in _effective_batches(settings))


def _effective_batches(settings: Train) -> list[int]:
    first = [settings.connector.effective_batch] if settings.connector else []
    return [settings.effective_batch, *first]


def recipe_way(shape: ModelShape, settings: Train, processes: int, dtype: str, lengths: Lengths) -> Way:
    """The recipe's own way; without sharding if the recipe has sharding `auto`."""
    return next(_ways(shape, settings, processes, dtype, lengths))


def least_memory(shape: ModelShape, settings: Train, processes: int, dtype: str) -> int:
    """The least bytes on each GPU that training takes with the same result, even with very short samples."""
    lengths = Lengths(SHORT, SHORT // 4)
    return min(way.estimate.total for way in _ways(shape, settings, processes, dtype, lengths))


def _ways(shape: ModelShape, settings: Train, processes: int, dtype: str, lengths: Lengths) -> Iterator[Way]:
    """Every way with the same result, the fastest first: smaller micro-batches, checkpointing, then sharding."""
    shardings = ["none", "zero2", "zero3"] if processes > 1 else ["none"]
    if settings.load_in_4bit or shape.quantisation is not None:
        shardings = shardings[:2]  # ZeRO-3 cannot shard a quantised base
    if settings.sharding != "auto":
        shardings = [settings.sharding]
    for sharding in shardings:
        for checkpointing in sorted({settings.gradient_checkpointing, True}):
            for micro_batch in _halves(settings.micro_batch):
                changed = settings.model_copy(
                    update={"micro_batch": micro_batch, "gradient_checkpointing": checkpointing}
                )
                batch = plan_batch(settings.effective_batch, micro_batch, processes)
                found = estimate(shape, changed, batch, dtype, sharding, lengths)
                yield Way(changed, batch, sharding, dtype, found, _changes(settings, changed, sharding))


def _halves(most: int) -> list[int]:
    found = [most]
    while found[-1] > 1:
        found.append(found[-1] // 2)
    return found


def _changes(asked: Train, changed: Train, sharding: str) -> tuple[str, ...]:
    found = []
    if changed.micro_batch != asked.micro_batch:
        found.append(f"{asked.key_of('micro_batch')}={changed.micro_batch} for {asked.micro_batch}")
    if changed.gradient_checkpointing != asked.gradient_checkpointing:
        found.append("train.gradient_checkpointing=true")
    if sharding != ("none" if asked.sharding == "auto" else asked.sharding):
        found.append(f"train.sharding={sharding}")
    return tuple(found)


@dataclass(frozen=True)
class Offers:
    """Libraries of the image: a way that needs a missing one is not suggested."""

    bitsandbytes: bool = True
    """Whether there are kernels for a base in 4 bits."""
    deepspeed: bool = True
    """Whether there is ZeRO."""


def smallest_changes(
    shape: ModelShape,
    settings: Train,
    processes: int,
    dtype: str,
    memory: int,
    lengths: Lengths,
    offers: Offers = Offers(),
) -> list[Way]:
    """Ways to fit, the smallest change first, one of each kind. Empty if no known way fits.

    The first three kinds keep the result; the others change it, as their changes say.
    """
    kinds: list[Iterator[Way]] = [
        iter([plan_training(shape, settings, processes, dtype, memory, lengths)]),
        _with_other_sharding(shape, settings, processes, dtype, memory, lengths, offers),
        _on_other_gpus(shape, settings, processes, dtype, memory, lengths, offers),
        _in_4bit(shape, settings, processes, dtype, memory, lengths) if offers.bitsandbytes else iter(()),
        _fewer_pixels(shape, settings, processes, dtype, memory, lengths),
        _shorter(shape, settings, processes, dtype, memory, lengths),
    ]
    first_of_each = (next((way for way in kind if way.fits(memory)), None) for kind in kinds)
    return [way for way in first_of_each if way is not None]


def _with_other_sharding(
    shape: ModelShape, settings: Train, processes: int, dtype: str, memory: int, lengths: Lengths, offers: Offers
) -> Iterator[Way]:
    """On the same number of GPUs, with another sharding than the recipe's."""
    if settings.sharding != "auto":
        free = settings.model_copy(update={"sharding": "auto" if offers.deepspeed else "none"})
        way = plan_training(shape, free, processes, dtype, memory, lengths)
        yield replace(way, changes=_changes(settings, way.settings, way.sharding))


def _on_other_gpus(
    shape: ModelShape, settings: Train, processes: int, dtype: str, memory: int, lengths: Lengths, offers: Offers
) -> Iterator[Way]:
    """On fewer GPUs, which need no NCCL or split the batch differently, or on more, with which each gets a smaller part
    of the base under ZeRO-3; the nearest number first."""
    free = settings.model_copy(update={"sharding": "auto" if offers.deepspeed else "none"})
    most = min(MOST_GPUS, most_gpus(settings))
    others = [gpus for gpus in range(1, most + 1) if gpus != processes and makes_exact_batches(settings, gpus)]
    for gpus in sorted(others, key=lambda gpus: (abs(gpus - processes), gpus)):
        for each in (settings, free) if settings.sharding != "auto" else (free,):
            way = plan_training(shape, each, gpus, dtype, memory, lengths)
            count = f"{gpus} GPU{'s' if gpus > 1 else ''}"
            yield replace(way, changes=(count, *_changes(settings, way.settings, way.sharding)))


def _in_4bit(
    shape: ModelShape, settings: Train, processes: int, dtype: str, memory: int, lengths: Lengths
) -> Iterator[Way]:
    """With the frozen base in 4 bits, which ZeRO-3 cannot share out."""
    if shape.quantisation is None and not settings.load_in_4bit and settings.sharding != "zero3":
        changed = settings.model_copy(update={"load_in_4bit": True, "sharding": "none"})
        way = plan_training(shape, changed, processes, dtype, memory, lengths)
        yield replace(way, changes=("train.load_in_4bit=true", *way.changes))


def _fewer_pixels(
    shape: ModelShape, settings: Train, processes: int, dtype: str, memory: int, lengths: Lengths
) -> Iterator[Way]:
    """With smaller pictures: a sample with one gets shorter by the tokens that the picture loses."""
    if shape.vision is None or settings.max_pixels is None:
        return
    side = int(shape.vision.get("patch_size", 14)) * int(shape.vision.get("spatial_merge_size", 1))
    pixels = settings.max_pixels
    while (pixels := pixels * 2 // 3) >= LEAST_PIXELS:
        length = max(lengths.longest - (settings.max_pixels - pixels) // side**2, lengths.answer)
        changed = settings.model_copy(update={"max_pixels": pixels})
        way = plan_training(shape, changed, processes, dtype, memory, replace(lengths, longest=length))
        yield replace(way, changes=(f"train.max_pixels={pixels} for {settings.max_pixels}", *way.changes))


def _shorter(
    shape: ModelShape, settings: Train, processes: int, dtype: str, memory: int, lengths: Lengths
) -> Iterator[Way]:
    """With shorter samples; longer ones would be left out."""
    length = lengths.longest
    while (length := length * 3 // 4) >= SHORT:
        shorter = replace(lengths, longest=length, answer=min(lengths.answer, length))
        changed = settings.model_copy(update={"max_length": length})
        way = plan_training(shape, changed, processes, dtype, memory, shorter)
        yield replace(way, changes=(f"{settings.key_of('max_length')}={length}, longer samples left out", *way.changes))


def disk_bytes(shape: ModelShape, settings: Train) -> int:
    """Bytes that training writes: each adapter, and the checkpoints of one at a time, with the optimizer's two moments;
    the same for the connector."""
    adapter = 4 * trained_parameters(shape, settings)
    checkpoints = (settings.keep_checkpoints + 1) * 4 * adapter  # weights, master copy under ZeRO, two moments
    first = settings.connector is not None and not settings.trains_connector
    return (
        len(settings.adapters) * adapter
        + checkpoints
        + (disk_bytes(shape, settings.connector_settings()) if first else 0)
    )
