"""Finds a way to train that fits the GPUs: as the recipe says, or with the same result in less memory.

The tokens of a pass, gradient checkpointing and sharding change memory and speed, but not the result, so Lorry chooses
them on its own. A base in 4 bits, smaller pictures and shorter samples change the result, so Lorry only suggests them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from stages.contract.recipe import Train
from stages.hardware.memory import Estimate, Lengths, estimate_memory, trained_parameters
from stages.hardware.step import StepPlan
from stages.models.shape import ModelShape

UNSURE = 0.03
"""Share by which an estimate may be too low: up to 2.1% in docs/measurements.md."""
MOST_TOKENS = 16_384
"""Most tokens of a pass: longer ones are hardly faster (`relative_time`)."""
PLAIN_TOKENS = 2_048
"""Most tokens of a pass where no memory limit is known, as on a CPU, whose passes are no faster if they are longer."""
SHORT = 64
"""Tokens of a very short sample: almost every job has longer ones."""
MOST_GPUS = 8
"""The number of GPUs up to which Lorry suggests more: one machine rarely has more."""
LEAST_PIXELS = 200_000
"""Pixels of the smallest picture to suggest: at this size one can just distinguish text and drawing of a page."""


@dataclass(frozen=True)
class Way:
    """One way to train: settings, passes, sharding and data type, with the memory that they take."""

    settings: Train
    step: StepPlan
    sharding: str
    """`none` or `zero3`."""
    dtype: str
    """Data type that the frozen base computes in."""
    estimate: Estimate
    changes: tuple[str, ...] = ()
    """Differences from the fastest way of the same kind, or from the recipe, as text."""

    def fits(self, memory: int | None) -> bool:
        """Whether the peak fits in `memory` bytes on each GPU; None: no limit."""
        return memory is None or self.estimate.total <= memory

    def is_tight(self, memory: int | None) -> bool:
        """Whether the peak fits in `memory` bytes, but would not if the estimate were too low by UNSURE."""
        return memory is not None and self.fits(memory) and self.estimate.total > (1 - UNSURE) * memory


def plan_training(
    shape: ModelShape, settings: Train, processes: int, dtype: str, memory: int | None, lengths: Lengths | None = None
) -> Way:
    """The fastest way that fits in `memory` bytes on each GPU; if none fits, the one that takes the least memory.

    `processes` is the number of GPUs. `memory` None means no limit, as on a CPU. Without `lengths`, every sample and
    its answer count as max_length tokens.
    """
    lengths = lengths or Lengths(settings.max_length, settings.max_length)
    ways = list(_ways(shape, settings, processes, dtype, memory, lengths))
    leanest = min(ways, key=lambda way: way.estimate.total)
    return next((way for way in ways if way.fits(memory)), leanest)


def unestimated_way(settings: Train, processes: int, dtype: str) -> Way:
    """The way that the recipe asks for, with an estimate of 0, for a model whose memory cannot be estimated.

    Its number of layers is unknown: train.gradient_checkpointing decides whether all of them are checkpointed.
    """
    sharding = "none" if settings.sharding == "auto" else settings.sharding
    step = StepPlan(settings.effective_batch, processes, max(PLAIN_TOKENS, settings.max_length))
    return Way(settings, step, sharding, dtype, Estimate(*[0] * 8))


def most_gpus(settings: Train) -> int:
    """The largest number of GPUs that training can use: with more, some would get no sample in a step of some phase."""
    return min(_effective_batches(settings))


def _effective_batches(settings: Train) -> list[int]:
    """The effective batch of each phase, in samples."""
    first = [settings.connector.effective_batch] if settings.connector else []
    return [settings.effective_batch, *first]


def recipe_way(
    shape: ModelShape, settings: Train, processes: int, dtype: str, lengths: Lengths, memory: int | None = None
) -> Way:
    """The fastest way, whether it fits or not. If sharding is `auto`, it does not shard.

    `memory` as in `plan_training`.
    """
    return next(_ways(shape, settings, processes, dtype, memory, lengths))


def least_memory(shape: ModelShape, settings: Train, processes: int, dtype: str) -> int:
    """The fewest bytes that training takes on each GPU: those of the leanest way, with very short samples."""
    lengths = Lengths(SHORT, SHORT // 4)
    return min(way.estimate.total for way in _ways(shape, settings, processes, dtype, None, lengths))


def _ways(
    shape: ModelShape, settings: Train, processes: int, dtype: str, memory: int | None, lengths: Lengths
) -> Iterator[Way]:
    """Yield all ways with the same result: those without sharding first, and of each sharding the fastest first."""
    # ZeRO-3 cannot shard a quantised base
    whole = processes == 1 or settings.load_in_4bit or shape.quantisation is not None
    shardings = ["none"] if whole else ["none", "zero3"]
    if settings.sharding != "auto":
        shardings = [settings.sharding]
    steps = _steps(shape, settings, processes, memory, lengths)
    for sharding in shardings:
        for step in steps:
            found = estimate_memory(shape, settings, step, dtype, sharding, lengths)
            changes = (*_step_changes(steps[0], step), *_sharding_change(settings, sharding))
            yield Way(settings, step, sharding, dtype, found, changes)


def _steps(shape: ModelShape, settings: Train, processes: int, memory: int | None, lengths: Lengths) -> list[StepPlan]:
    """The ways to compute a step, the fastest first.

    The tokens of a pass are halved down to the longest sample, from what one process's samples of a step have at most.
    No layer is checkpointed, or a fourth, and so on up to all; all if the recipe says so.
    """
    one = StepPlan(settings.effective_batch, processes, PLAIN_TOKENS if memory is None else MOST_TOKENS)
    most = max(lengths.longest, min(one.pass_tokens, lengths.of_a_step(one)))
    quarters = (4,) if settings.gradient_checkpointing else range(5)
    found = [
        replace(one, pass_tokens=tokens, checkpointed_layers=ceil(shape.layers * quarter / 4))
        for tokens in _halves(most, lengths.longest)
        for quarter in quarters
    ]
    return sorted(found, key=lambda step: relative_time(step, shape.layers))


def relative_time(step: StepPlan, layers: int) -> float:
    """The estimated time per token. Checkpointing repeats the forward pass, a third of the work; and each pass takes
    about as much time for its launches as for 400 tokens."""
    return (1 + step.checkpointed_layers / layers / 3) * (1 + 400 / step.pass_tokens)


def _halves(most: int, least: int) -> list[int]:
    """`most`, its half, the half of that and so on, rounded down, and `least` at the end."""
    found = []
    while most > least:
        found.append(most)
        most //= 2
    return [*found, least]


def _step_changes(fastest: StepPlan, step: StepPlan) -> tuple[str, ...]:
    """In what a step is computed otherwise than in the fastest way, as text for `Way.changes`."""
    found = []
    if step.pass_tokens != fastest.pass_tokens:
        found.append(f"passes of at most {step.pass_tokens:,} tokens for {fastest.pass_tokens:,}")
    if step.checkpointed_layers != fastest.checkpointed_layers:
        found.append(f"{step.checkpointed_layers} checkpointed layers")
    return tuple(found)


def _sharding_change(asked: Train, sharding: str) -> tuple[str, ...]:
    """The sharding as text for `Way.changes`, if it differs from the recipe's."""
    return (
        () if sharding == ("none" if asked.sharding == "auto" else asked.sharding) else (f"train.sharding={sharding}",)
    )


@dataclass(frozen=True)
class Offers:
    """Which libraries the train image has. Lorry suggests no way that needs a missing one."""

    bitsandbytes: bool = True
    """Whether it has kernels for a base in 4 bits."""
    deepspeed: bool = True
    """Whether it has DeepSpeed, which ZeRO-3 needs."""


def smallest_changes(
    shape: ModelShape,
    settings: Train,
    processes: int,
    dtype: str,
    memory: int,
    lengths: Lengths,
    offers: Offers = Offers(),
) -> list[Way]:
    """Ways that fit in `memory` bytes on each GPU, at most one of each kind, the smallest change first.

    Kinds with the same result: what Lorry chooses on its own, another sharding, another number of GPUs. Kinds with
    another result: a base in 4 bits, smaller pictures, shorter samples. Of these, the changes name only what the recipe
    or the command has to say. Empty if no way fits.
    """
    kinds: list[Iterator[Way]] = [
        iter([plan_training(shape, settings, processes, dtype, memory, lengths)]),
        _ways_with_other_sharding(shape, settings, processes, dtype, memory, lengths, offers),
        _ways_on_other_gpus(shape, settings, processes, dtype, memory, lengths, offers),
        _ways_in_4bit(shape, settings, processes, dtype, memory, lengths) if offers.bitsandbytes else iter(()),
        _ways_with_smaller_pictures(shape, settings, processes, dtype, memory, lengths),
        _ways_with_shorter_samples(shape, settings, processes, dtype, memory, lengths),
    ]
    first_of_each = (next((way for way in kind if way.fits(memory)), None) for kind in kinds)
    return [way for way in first_of_each if way is not None]


def _ways_with_other_sharding(
    shape: ModelShape, settings: Train, processes: int, dtype: str, memory: int, lengths: Lengths, offers: Offers
) -> Iterator[Way]:
    """Yield the way on the same number of GPUs with sharding `auto`, or `none` without DeepSpeed.

    Yields nothing if the recipe leaves the choice to Lorry already.
    """
    if settings.sharding != "auto":
        free = settings.model_copy(update={"sharding": "auto" if offers.deepspeed else "none"})
        way = plan_training(shape, free, processes, dtype, memory, lengths)
        yield replace(way, changes=_sharding_change(settings, way.sharding))


def _ways_on_other_gpus(
    shape: ModelShape, settings: Train, processes: int, dtype: str, memory: int, lengths: Lengths, offers: Offers
) -> Iterator[Way]:
    """Yield ways on fewer or more GPUs, the nearest number first.

    For each number, the recipe's sharding comes first, then `auto`, or `none` without DeepSpeed. Fewer GPUs may fit, as
    one GPU needs no NCCL. More may fit, as ZeRO-3 then puts a smaller part of the base on each.
    """
    free = settings.model_copy(update={"sharding": "auto" if offers.deepspeed else "none"})
    most = min(MOST_GPUS, most_gpus(settings))
    others = [gpus for gpus in range(1, most + 1) if gpus != processes]
    for gpus in sorted(others, key=lambda gpus: (abs(gpus - processes), gpus)):
        for each in (settings, free) if settings.sharding != "auto" else (free,):
            way = plan_training(shape, each, gpus, dtype, memory, lengths)
            count = f"{gpus} GPU{'s' if gpus > 1 else ''}"
            yield replace(way, changes=(count, *_sharding_change(settings, way.sharding)))


def _ways_in_4bit(
    shape: ModelShape, settings: Train, processes: int, dtype: str, memory: int, lengths: Lengths
) -> Iterator[Way]:
    """Yield the way with the frozen base in 4 bits, without sharding.

    Yields nothing if the base is quantised or in 4 bits already, or if the recipe sets zero3, which cannot shard such a
    base.
    """
    if shape.quantisation is None and not settings.load_in_4bit and settings.sharding != "zero3":
        changed = settings.model_copy(update={"load_in_4bit": True, "sharding": "none"})
        way = plan_training(shape, changed, processes, dtype, memory, lengths)
        yield replace(way, changes=("train.load_in_4bit=true",))


def _ways_with_smaller_pictures(
    shape: ModelShape, settings: Train, processes: int, dtype: str, memory: int, lengths: Lengths
) -> Iterator[Way]:
    """Yield ways with smaller pictures, the largest first. A sample gets shorter by the tokens that its picture loses.

    Yields nothing for a model without a vision tower, or if train.max_pixels is null.
    """
    if shape.vision is None or settings.max_pixels is None:
        return
    side = int(shape.vision.get("patch_size", 14)) * int(shape.vision.get("spatial_merge_size", 1))
    pixels = settings.max_pixels
    while (pixels := pixels * 2 // 3) >= LEAST_PIXELS:
        length = max(lengths.longest - (settings.max_pixels - pixels) // side**2, lengths.answer)
        changed = settings.model_copy(update={"max_pixels": pixels})
        way = plan_training(shape, changed, processes, dtype, memory, replace(lengths, longest=length))
        yield replace(
            way,
            changes=(f"train.max_pixels={pixels} for {settings.max_pixels}", *_sharding_change(settings, way.sharding)),
        )


def _ways_with_shorter_samples(
    shape: ModelShape, settings: Train, processes: int, dtype: str, memory: int, lengths: Lengths
) -> Iterator[Way]:
    """Yield ways with a lower train.max_length, the longest first; training leaves out the longer samples."""
    length = lengths.longest
    while (length := length * 3 // 4) >= SHORT:
        shorter = replace(lengths, longest=length, answer=min(lengths.answer, length))
        changed = settings.model_copy(update={"max_length": length})
        way = plan_training(shape, changed, processes, dtype, memory, shorter)
        change = f"{settings.full_key('max_length')}={length}, longer samples left out"
        yield replace(way, changes=(change, *_sharding_change(settings, way.sharding)))


def disk_bytes(shape: ModelShape, settings: Train) -> int:
    """The maximum number of bytes that training keeps on disk.

    This counts all adapters, and the checkpoints of one adapter at a time, each with its optimizer state. If a
    connector is trained first, its weights and checkpoints are added.
    """
    adapter = 4 * trained_parameters(shape, settings)
    checkpoints = (settings.keep_checkpoints + 1) * 3 * adapter  # each has weights and two moments
    first = settings.connector is not None and not settings.trains_connector
    return (
        len(settings.adapters) * adapter
        + checkpoints
        + (disk_bytes(shape, settings.connector_settings()) if first else 0)
    )
