"""What each stage's pod needs on a target's cards: GPUs and memory, by the plan."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.contract.errors import DoesNotFitError, UsageError
from stages.hardware.fit import most_gpus
from stages.hardware.pick import Wish, parse_wish
from stages.hardware.targets import Target
from stages.host.cards import inference_bytes, preprocess_weights
from stages.host.needs import stages_on_gpus
from stages.host.planning import inference_fits, planned_gpus, training_fits
from stages.models.shape import ModelShape, planned_shape

if TYPE_CHECKING:
    from stages.contract.run import Run

GIB = 1024**3

COUNTS = (1, 2, 4, 8)
"""The numbers of GPUs that are tried: those over which a model's heads can be split, up to the GPUs of a node."""

PREPROCESS_GIB = 8
"""Memory of preprocess beside the weights that pass through it to the GPU."""


@dataclass(frozen=True)
class PodNeeds:
    """What the pods of a launch ask for."""

    gpus: dict[str, int]
    """The number of GPUs of each stage that computes on them."""
    preprocess_gib: int | None = None
    """Memory for preprocess to request, in GiB; None: that of k8s/."""
    notes: tuple[str, ...] = ()
    """Lines to print about it."""


def pod_needs(run: "Run", card: Target, stages: tuple[str, ...], gpus: str | None, own: dict[str, int]) -> PodNeeds:
    """What the pods of these stages need on a target's cards.

    `gpus` is the value of GPUS: `auto` or None for the fewest GPUs that fit, `auto:4` for a training on exactly four,
    or a preprocess if that is the last stage. infer gets the fewest that fit, preprocess otherwise one. `own` has the
    GPUs of the target's overlay, by stage: they are taken if the base is not in the models folder here, so that
    nothing can be planned. Raises UsageError for GPUs by name, and DoesNotFitError for a stage that fits on none of
    COUNTS GPUs, or not on those asked for.
    """
    wish = _parse_count(gpus, card)
    if card.capability is None:
        return PodNeeds({})
    computing = stages_on_gpus(run, stages)
    if not computing:
        if wish and wish.count:
            raise UsageError(f"GPUS={gpus}: {' and '.join(stages)} of this recipe need no GPU; leave GPUS out")
        return PodNeeds({})
    counts = {stage: own.get(stage, 1) for stage in computing}
    asked = {computing[-1] if "train" not in computing else "train": wish.count} if wish and wish.count else {}
    notes = []
    try:
        shape, _ = planned_shape(run.model(run.recipe.model.path, "model.path", needs_weights=False))
    except UsageError as error:
        names = ", ".join(f"{stage} {counts[stage]}" for stage in computing)
        reason = str(error).partition(";")[0]
        notes.append(f"nothing is planned ({reason}); GPUs as in k8s/overlays: {names}")
    else:
        if "train" in computing:
            counts["train"] = _least_for_training(run, shape, card, asked.get("train"))
        if "infer" in computing:
            counts["infer"] = _least_for_inference(run, shape, card)
    memory = _preprocess_memory(run, card) if "preprocess" in computing else None
    return PodNeeds({**counts, **{stage: count for stage, count in asked.items() if count}}, memory, tuple(notes))


def _parse_count(gpus: str | None, card: Target) -> Wish | None:
    """The parsed GPUS; None if it is not set. Raises UsageError for GPUs by name, or with a target without GPUs."""
    if not gpus or not gpus.strip():
        return None
    wish = parse_wish(gpus)
    if card.capability is None:
        raise UsageError(f"GPUS={wish.text}: target {card.name} has no GPUs; leave GPUS out, or set another TARGET")
    if not wish.auto:
        raise UsageError(
            f"GPUS={wish.text}: names GPUs of a machine, but Kubernetes gives out numbers of them; write"
            f" auto:{len(wish.names)}, or auto for the fewest that fit"
        )
    return wish


def _least_for_training(run: "Run", shape: ModelShape, card: Target, asked: int | None) -> int:
    """The fewest of COUNTS GPUs that training fits on; `asked` if it fits on those.

    Raises DoesNotFitError if it does not, and UsageError if training cannot use so many.
    """
    train = run.recipe.train
    if asked and asked > most_gpus(train):
        raise UsageError(
            f"GPUS=auto:{asked}: train can use {most_gpus(train)} GPUs at most (train.effective_batch); ask for fewer"
        )
    for count in [asked] if asked else [count for count in COUNTS if count <= most_gpus(train)]:
        if training_fits(run.recipe, shape, planned_gpus(card.name, count, None, train.precision)):
            return count
    most = asked or min(COUNTS[-1], most_gpus(train))
    raise DoesNotFitError(
        f"train: {run.recipe.model.path} does not fit on {most} x {card.name}; `lorry plan` with these options and"
        f" --gpus {most} lists the changes that do"
    )


def _least_for_inference(run: "Run", shape: ModelShape, card: Target) -> int:
    """The fewest of COUNTS GPUs that inference fits on. Raises DoesNotFitError if it fits on none."""
    for count in COUNTS:
        if inference_fits(run.recipe.infer, shape, planned_gpus(card.name, count, None, run.recipe.train.precision)):
            return count
    raise DoesNotFitError(
        f"infer: {run.recipe.model.path} does not fit on {COUNTS[-1]} x {card.name}; `lorry plan` says why"
    )


def _preprocess_memory(run: "Run", card: Target) -> int | None:
    """Memory for preprocess to request, in GiB: a model's weights pass through it to the GPU. None: not known here.

    Raises DoesNotFitError if its largest model does not fit on one GPU.
    """
    try:
        weights = preprocess_weights(run)
    except UsageError:
        return None
    room = planned_gpus(card.name, 1, None, run.recipe.train.precision).memory
    if room is not None and inference_bytes(weights) > room:
        raise DoesNotFitError(
            f"preprocess: its largest model takes {inference_bytes(weights) / GIB:.1f} of {room / GIB:.1f} GiB on a"
            f" {card.name}; `lorry plan` names it"
        )
    return math.ceil((weights / GIB + PREPROCESS_GIB) / 8) * 8 if weights else None
