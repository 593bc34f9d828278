"""Data mixes: the samples that an adapter is trained and validated on."""

import random
from typing import Any

from stages.contract.errors import UsageError
from stages.contract.recipe import Adapter, Source

Samples = list[dict[str, Any]]


def training_samples(samples: Samples, adapter: Adapter, seed: int) -> Samples:
    """The samples that an adapter trains on: those of its data mix, or all of `samples` if it has no mix.

    `samples` are the training samples of all data sets; `seed` is for parts without a seed of their own. The result has
    the parts in the mix's order. If a part asks for more samples than its data set has, samples repeat. Raises
    UsageError for a part whose data set has no training samples.
    """
    if not adapter.data:
        return samples
    return [sample for part in adapter.data for sample in _draw_samples(samples, part, adapter.name, seed)]


def samples_with_pictures(samples: Samples, most: int, seed: int) -> tuple[Samples, dict[str, int]]:
    """At most `most` of a connector's samples, all with pictures, and the number left out for each reason.

    If more than `most` have pictures, the seed decides which stay; the order does not change. A connector learns
    nothing from a sample without a picture.
    """
    seen = [sample for sample in samples if sample.get("images")]
    left_out = {"without_picture": len(samples) - len(seen), "beyond_most_samples": max(len(seen) - most, 0)}
    chosen = sorted(random.Random(f"{seed}:connector").sample(range(len(seen)), min(most, len(seen))))
    return [seen[place] for place in chosen], left_out


def validation_samples(samples: Samples, adapter: Adapter) -> Samples:
    """The validation samples of the data sets in an adapter's data mix; all of them if those data sets have none."""
    return [sample for sample in samples if adapter.covers(sample["meta"]["source"])] or samples


def _draw_samples(samples: Samples, part: Source, adapter: str, seed: int) -> Samples:
    """The samples of one part of a data mix, at least one. Raises UsageError if its data set has no training samples.

    `adapter` is the name of the mix's adapter, for the message.
    """
    own = [sample for sample in samples if sample["meta"]["source"] == part.source]
    if not own:
        known = ", ".join(sorted({str(sample["meta"]["source"]) for sample in samples}))
        raise UsageError(
            f"train.adapters: the data mix of {adapter} names {part.source!r}, which has no training samples; name a"
            f" data set that has: {known}"
        )
    count = part.count if part.count is not None else round((part.fraction or 1.0) * len(own))
    whole, rest = divmod(max(count, 1), len(own))
    if part.draw == "first":
        return own * whole + own[:rest]
    # the data set's name is part of the seed, so that a part does not depend on the other parts or their order
    order = random.Random(f"{seed if part.seed is None else part.seed}:{part.source}")
    chosen = sorted(order.sample(range(len(own)), rest))
    return own * whole + [own[place] for place in chosen]
