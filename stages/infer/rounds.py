"""Step 1 of infer: decide which model answers which samples, and find those that are still unanswered.

A round is a set of samples that are answered together. The first round has all samples. The second round of a vote has
those without a majority.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from stages.contract.files import read_jsonl
from stages.contract.records import Sample, is_asked
from stages.contract.run import Run
from stages.engines.weights import trained_adapters


@dataclass(frozen=True)
class Variant:
    """One way to answer samples: a model, with or without one of the task's components."""

    adapter: str | None
    """None: base."""
    without: str | None = None
    """The component of the task that is left out; None: the whole task."""
    asks: Literal["test", "validation", "second round"] = "test"
    """The samples it answers: the test set, the validation samples, or those of a vote's second round."""

    @property
    def name(self) -> str:
        """Its name in files, console and report."""
        if self.asks != "test":
            return f"{self.adapter or 'base'}, {self.asks}"
        return f"without {self.without}" if self.without else self.adapter or "base"

    @property
    def left_out_components(self) -> tuple[str, ...]:
        """The components of the task that are left out: one or none."""
        return (self.without,) if self.without else ()

    @property
    def output(self) -> str:
        """The file of its predictions, relative to the stage's folder."""
        if self.asks != "test":
            return f"{self.asks.replace(' ', '_')}/{self.adapter or 'base'}.jsonl"
        return f"ablations/{self.without}.jsonl" if self.without else f"predictions/{self.name}.jsonl"

    @property
    def losses(self) -> str:
        """The file of its losses, relative to the stage's folder."""
        return f"losses/{self.name}.jsonl"

    @property
    def submission(self) -> str:
        """The file of its submission, relative to the stage's folder."""
        return f"submission/{self.name}.jsonl"


Chunk = tuple[Variant, list[Sample]]
"""Samples that are submitted to the engine together."""


@dataclass(frozen=True)
class Round:
    """The samples that this process answers together, or whose losses it computes."""

    samples: dict[Variant, list[Sample]]
    """The samples whose predictions or losses this process writes, in the order of preprocess's file."""
    chunks: dict[Variant, list[list[Sample]]]
    """This process's chunks that finished shards have not answered completely."""
    from_shards: dict[Variant, dict[str, Any]]
    """Predictions or losses of finished shards, by sample id."""

    def unanswered_by_shards(self, variant: Variant) -> list[Sample]:
        """The variant's samples that no finished shard has answered."""
        return [sample for sample in self.samples[variant] if sample["id"] not in self.from_shards[variant]]


def list_variants(run: Run) -> list[Variant]:
    """List all variants of a run: base, each trained adapter, and the first adapter without each component in
    `infer.ablate`. With a vote, also each trained adapter on the validation samples.

    The component `adapter` adds no variant, because leaving it out gives base.
    """
    infer = run.recipe.infer
    names = [adapter.name for adapter in trained_adapters(run)]
    left_out = [name for name in infer.ablate if name != "adapter"]
    variants = [Variant(None), *map(Variant, names), *(Variant(names[0], without) for without in left_out)]
    return variants + [Variant(name, asks="validation") for name in names if infer.vote is not None]


def samples_by_variant(run: Run) -> dict[Variant, list[Sample]]:
    """The samples that each variant answers, in the order of `list_variants`: those that are asked."""
    return {variant: [sample for sample in found if is_asked(sample)] for variant, found in _all_samples(run).items()}


def samples_for_losses(run: Run) -> dict[Variant, list[Sample]]:
    """The samples whose loss each variant has, also those that are not asked. Empty without `infer.losses`."""
    if not run.recipe.infer.losses:
        return {}
    found = _all_samples(run).items()
    return {variant: members for variant, members in found if variant.asks == "test" and variant.without is None}


def _all_samples(run: Run) -> dict[Variant, list[Sample]]:
    """The samples of each variant, in the order of `list_variants`."""

    def read_samples(name: str) -> list[Sample]:
        """Return the samples in a file that preprocess wrote. `name` is its name without `.jsonl`."""
        return cast(list[Sample], read_jsonl(run.path("preprocess", "samples", f"{name}.jsonl")))

    tested = read_samples("test")
    compared = read_samples("validation_asked") if run.recipe.infer.vote is not None else []
    adapters = {adapter.name: adapter for adapter in run.recipe.train.adapters}

    def select_samples(variant: Variant) -> list[Sample]:
        """Return the samples that one variant answers."""
        if variant.asks == "validation":
            return [sample for sample in compared if sample["references"]]
        if run.recipe.infer.answers == "all" or variant.adapter is None:
            return tested
        return [sample for sample in tested if adapters[variant.adapter].covers(sample["meta"]["source"])]

    return {variant: select_samples(variant) for variant in list_variants(run)}


def cut_into_chunks(samples: Mapping[Variant, list[Sample]], size: int) -> list[Chunk]:
    """Cut the samples of each variant into chunks of at most `size`. Returns the chunks of all variants.

    Samples that are answered already or belong to another shard are included, so that the same samples always share a
    batch: in another batch, sums are rounded differently, which can change a greedy completion at a near tie.
    """
    return [(v, members[at : at + size]) for v, members in samples.items() for at in range(0, len(members), size)]


def first_round(
    samples: Mapping[Variant, list[Sample]],
    chunks: Sequence[Chunk],
    is_mine: Callable[[int], bool],
    finished_shards: Sequence[Path],
    output: Callable[[Variant], str] = lambda variant: variant.output,
) -> Round:
    """This process's first round: its own chunks, and the predictions in the folders `finished_shards`.

    `is_mine` returns whether this process answers the chunk with a given number, counted from 0. `output` names the
    file of a variant: that of its predictions, or of its losses.
    """
    from_shards = {variant: _read_records(finished_shards, output(variant)) for variant in samples}
    mine = [chunk for number, chunk in enumerate(chunks) if is_mine(number)]
    missing: dict[Variant, list[list[Sample]]] = {variant: [] for variant in samples}
    for variant, members in mine:
        if any(sample["id"] not in from_shards[variant] for sample in members):
            missing[variant].append(members)
    own = {variant: [s for who, members in mine if who == variant for s in members] for variant in samples}
    return Round(own, missing, from_shards)


def second_round(voters: Sequence[str], samples: list[Sample], size: int) -> Round:
    """The second round of a vote: every voter answers the same samples, in chunks of `size`. Empty without samples."""
    asked = {Variant(name, asks="second round"): samples for name in sorted(voters)} if samples else {}
    missing: dict[Variant, list[list[Sample]]] = {variant: [] for variant in asked}
    for variant, members in cut_into_chunks(asked, size):
        missing[variant].append(members)
    return Round(asked, missing, {variant: {} for variant in asked})


def _read_records(folders: Sequence[Path], name: str) -> dict[str, Any]:
    """Return the records in the file `name` of each of these folders, by sample id."""
    paths = [folder / name for folder in folders]
    rows = [row for path in paths if path.is_file() for row in read_jsonl(path)]  # a shard without chunks has no file
    return {row["id"]: row for row in rows}
