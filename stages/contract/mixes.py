"""Data mixes: which samples an adapter is trained and validated on."""

import random
from typing import Any

from stages.contract.errors import UsageError
from stages.contract.recipe import Adapter, Source

Samples = list[dict[str, Any]]


def mixed(samples: Samples, adapter: Adapter, seed: int) -> Samples:
    """What an adapter is trained on, of all samples to train on; part by part of its mix, each in the data's order.

    Raises UsageError for a part whose data set has none.
    """
    if not adapter.data:
        return samples
    return [sample for part in adapter.data for sample in _drawn(samples, part, adapter.name, seed)]


def shown(samples: Samples, most: int, seed: int) -> tuple[Samples, dict[str, int]]:
    """What a connector is trained on, of its mix: samples with pictures, at most so many, drawn by the seed; and how
    many are left out for either reason. A sample without a picture gives it nothing to learn."""
    seen = [sample for sample in samples if sample.get("images")]
    left_out = {"without_picture": len(samples) - len(seen), "beyond_most_samples": max(len(seen) - most, 0)}
    if len(seen) <= most:
        return seen, left_out
    chosen = sorted(random.Random(f"{seed}:connector").sample(range(len(seen)), most))
    return [seen[place] for place in chosen], left_out


def validated(samples: Samples, adapter: Adapter) -> Samples:
    """What it is validated on: the samples of its data sets, or all where these have none."""
    return [sample for sample in samples if adapter.covers(sample["meta"]["source"])] or samples


def _drawn(samples: Samples, part: Source, adapter: str, seed: int) -> Samples:
    own = [sample for sample in samples if sample["meta"]["source"] == part.source]
    if not own:
        there = ", ".join(sorted({str(sample["meta"]["source"]) for sample in samples}))
        raise UsageError(
            f"train.adapters: the mix of {adapter} names {part.source!r}, which has no sample to train on; there are:"
            f" {there}"
        )
    count = part.count if part.count is not None else round((part.fraction or 1.0) * len(own))
    whole, rest = divmod(max(count, 1), len(own))
    if part.draw == "first":
        return own * whole + own[:rest]
    # by the seed and the name: another part of the mix, or another order of them, draws no differently
    order = random.Random(f"{seed if part.seed is None else part.seed}:{part.source}")
    chosen = sorted(order.sample(range(len(own)), rest))
    return own * whole + [own[place] for place in chosen]
