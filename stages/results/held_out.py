"""Figures of held-out losses: loss and perplexity per token of base and adapters on the same tokens, and how often an
adapter has a lower loss of a sample than base.

A sample's loss is the sum of the cross entropies of its tokens that count, in nats. The mean over all tokens is a ratio
of sums, whose interval counts groups of samples, such as conversations (stages/results/intervals.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.contract.records import BASE
from stages.results.intervals import holm_p_values, intervals_from_totals, mean_figures

TIE = 1e-3
"""Largest difference, in nats per token, at which two losses of a sample count as equal: 16 bits round by about as
much."""


@dataclass(frozen=True)
class Loss:
    """A model's loss of one sample."""

    nats: float
    tokens: int

    @property
    def per_token(self) -> float:
        """Mean cross entropy of a token, in nats."""
        return self.nats / self.tokens


Losses = Mapping[str, Loss]
"""One model's losses by sample id."""


def held_out_figures(losses: Mapping[str, Losses], groups: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The figures of each model, as in losses.json. `losses` has those of BASE and adapters, `groups` the group of each
    sample by id.

    `loss` (nats per token) and `perplexity` have `value`, `low` and `high`; `n` samples with `tokens` in `groups`.
    Those of an adapter have `over_base`, the result of `loss_comparisons`. Leaves out models without a loss.
    """
    figures = {name: loss_figures(found, groups) for name, found in losses.items() if found}
    base = losses.get(BASE, {})
    compared = loss_comparisons({name: losses[name] for name in figures if name != BASE}, base, groups)
    return {
        name: {**own, **({"over_base": compared[name]} if name in compared else {})} for name, own in figures.items()
    }


def loss_figures(losses: Losses, groups: Mapping[str, str]) -> dict[str, Any]:
    """The figures of one model, which has a loss, without a comparison."""
    mean = _token_mean([one.nats for one in losses.values()], losses, groups)
    loss = {key: mean[key] for key in ("value", "low", "high")}
    perplexity = {key: None if value is None else math.exp(min(value, 700.0)) for key, value in loss.items()}
    tokens = sum(one.tokens for one in losses.values())
    counts = {"n": len(losses), "tokens": tokens, "groups": mean["groups"]}
    return {"loss": _rounded(loss), "perplexity": _rounded(perplexity), **counts}


def loss_comparisons(
    models: Mapping[str, Losses], beside: Losses, groups: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The comparison of each model with the losses `beside`, on the samples that both have a loss of. Leaves out models
    that share none.

    `loss` has the difference in nats per token, below 0 if the model is better, with its interval and `p`, corrected
    for all models; `beside` has the figures of the other model on these samples; `n`, `tokens` and `groups` count them.
    `wins`, `ties` and `losses` count samples by their loss per token (see TIE), and `win_rate` has the percentage of
    wins, with half of the ties, and its interval.
    """
    found: dict[str, dict[str, Any]] = {}
    tests = []
    for name, losses in models.items():
        both = {one: loss for one, loss in losses.items() if one in beside}
        if not both:
            continue
        others = {one: beside[one] for one in both}
        gaps = [both[one].per_token - others[one].per_token for one in both]
        mean = _token_mean([both[one].nats - others[one].nats for one in both], both, groups)
        wins, losing = sum(gap < -TIE for gap in gaps), sum(gap > TIE for gap in gaps)
        rates = np.array([[1.0 if gap < -TIE else 0.0 if gap > TIE else 0.5] for gap in gaps])
        (rate,) = mean_figures(rates, [groups[one] for one in both])
        found[name] = {
            "loss": _rounded({key: mean[key] for key in ("value", "low", "high")}),
            "beside": loss_figures(others, groups),
            "n": len(both),
            "tokens": sum(one.tokens for one in both.values()),
            "groups": mean["groups"],
            "wins": wins,
            "ties": len(gaps) - wins - losing,
            "losses": losing,
            "win_rate": {key: rate[key] for key in ("value", "low", "high")},
        }
        tests.append(math.nan if mean["p"] is None else mean["p"])
    for one, p in zip(found.values(), holm_p_values(tests), strict=True):
        one["loss"]["p"] = None if math.isnan(p) else round(p, 6)
    return found


def _token_mean(nats: Sequence[float], losses: Losses, groups: Mapping[str, str]) -> dict[str, Any]:
    """The mean per token of `nats`, one for each sample of `losses`: `value`, `low`, `high`, the two-sided `p` for a
    mean of 0, and the number of `groups`. With too few groups, `low`, `high` and `p` are None."""
    codes = np.unique([groups[name] for name in losses], return_inverse=True)[1]
    sums, sizes = np.zeros((2, int(codes.max()) + 1, 1))
    np.add.at(sums, codes, np.array(nats)[:, None])
    np.add.at(sizes, codes, np.array([one.tokens for one in losses.values()], dtype=float)[:, None])
    found = intervals_from_totals(sums, sizes, None)
    columns = {"low": found.low, "high": found.high, "p": found.p}
    ends = {name: None if np.isnan(column[0]) else float(column[0]) for name, column in columns.items()}
    return {"value": math.fsum(nats) / float(sizes.sum()), **ends, "groups": int(found.groups[0])}


def _rounded(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Values rounded to six decimals."""
    return {key: None if value is None else round(value, 6) + 0.0 for key, value in values.items()}  # no -0.0
