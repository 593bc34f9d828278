"""The held-out losses that infer wrote: read, compared, and the samples for which tuning changed most."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.contract.errors import DataError
from stages.contract.files import digest_of, read_jsonl
from stages.contract.records import BASE, Sample
from stages.contract.run import Run
from stages.results.held_out import Loss, held_out_figures


@dataclass(frozen=True)
class HeldOut:
    """The held-out losses of all models."""

    samples: list[Sample]
    """All test samples, also those without a reference."""
    losses: dict[str, dict[str, Loss]]
    """By model, BASE first, and by sample id."""
    missing: dict[str, str]
    """Why a sample has no loss, by its id."""
    figures: dict[str, dict[str, Any]]
    """losses.json: the result of `held_out.held_out_figures`."""

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that are compared with base."""
        return [name for name, figure in self.figures.items() if "over_base" in figure]

    def missing_notes(self) -> list[str]:
        """A note on the samples without a loss, if there are any."""
        if not self.missing:
            return []
        name, why = next(iter(self.missing.items()))
        return [f"{len(self.missing)} of {len(self.samples)} test samples have no loss, such as {name}: {why}"]


def read_held_out(run: Run, samples: Sequence[Sample], order: Sequence[str]) -> HeldOut | None:
    """Return the losses that infer wrote, of the models in `order` first; None if it wrote none (`infer.losses`).

    Raises DataError if a loss is not of a test sample, or not of the same tokens as base's.
    """
    folder = run.path("infer", "losses")
    paths = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    groups = {sample["id"]: str(sample["meta"].get("group", sample["id"])) for sample in samples}
    losses: dict[str, dict[str, Loss]] = {}
    missing: dict[str, str] = {}
    for name in [name for name in dict.fromkeys([BASE, *order, *paths]) if name in paths]:
        losses[name] = {}
        for row in read_jsonl(paths[name]):
            if row["id"] not in groups:
                raise DataError(f"{paths[name]}: {row['id']!r} is not a test sample; run infer again")
            if "error" in row:
                missing[row["id"]] = row["error"]
                continue
            losses[name][row["id"]] = Loss(row["loss"], row["tokens"])
            other = losses[BASE].get(row["id"]) if BASE in losses else None
            if other is not None and other.tokens != row["tokens"]:
                raise DataError(
                    f"{paths[name]}: {row['id']!r} has {row['tokens']} tokens, but {other.tokens} for base; run infer"
                    " again"
                )
    if not losses:
        return None
    return HeldOut(list(samples), losses, missing, held_out_figures(losses, groups))


def loss_lines(held_out: HeldOut) -> list[dict[str, Any]]:
    """Return each sample with every model's loss (nats) and tokens: the lines of losses.jsonl, which `lorry compare`
    reads.

    `content` is a digest of the sample without its id and notes. Samples without a loss are left out.
    """
    lines = []
    for sample in held_out.samples:
        own = {name: losses[sample["id"]] for name, losses in held_out.losses.items() if sample["id"] in losses}
        if own:
            content = {key: value for key, value in sample.items() if key not in ("id", "meta")}
            meta = sample["meta"]
            lines.append(
                {
                    "id": sample["id"],
                    "group": str(meta.get("group", sample["id"])),
                    "content": digest_of([content, meta.get("answer"), meta.get("target")]),
                    "models": {name: {"loss": loss.nats, "tokens": loss.tokens} for name, loss in own.items()},
                }
            )
    return lines


def changed_most(held_out: HeldOut, adapter: str, count: int) -> tuple[list[Sample], list[Sample]]:
    """Return the samples whose loss per token an adapter lowered most, and those whose loss it raised most, each at
    most `count`, the largest change first; at equal changes by sample id."""
    base, tuned = held_out.losses[BASE], held_out.losses[adapter]
    change = {
        sample["id"]: tuned[sample["id"]].per_token - base[sample["id"]].per_token
        for sample in held_out.samples
        if sample["id"] in base and sample["id"] in tuned
    }
    by_id = {sample["id"]: sample for sample in held_out.samples}
    gained = sorted((name for name, gap in change.items() if gap < 0), key=lambda name: (change[name], name))
    lost = sorted((name for name, gap in change.items() if gap > 0), key=lambda name: (-change[name], name))
    return [by_id[name] for name in gained[:count]], [by_id[name] for name in lost[:count]]
