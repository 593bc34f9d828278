"""Means of scores and of paired differences with their intervals, for eval and for comparisons of runs.

The document is the unit, not the sample: samples of one document share its pages and are right or wrong together. The
interval is a t interval with the cluster-robust variance CR2 (Bell and McCaffrey 2002), and degrees of freedom from the
effective number of documents (Carter, Schnepel and Steigerwald 2017). For scores, pseudo-observations at both ends of
the range are added first: two and two for a mean in 0..1 ("plus four", Agresti and Coull 1998), one and one for a
paired difference in -1..1 (Bonett and Price 2012). They keep the interval from shrinking to a point if the scores
hardly differ, for example if all answers are right. Each weighs as many samples as carry the information of one
independent sample: the design effect of Kish (1965), for CORRELATION within a document. Losses have no range.

`python -m benchmarks.intervals` measures how often the interval covers the true mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.results.uncertainty import LEAST_GROUPS, LEVEL

Values = NDArray[np.float64]
"""Scores in 0..1, a row for each sample and a column for each metric; NaN where a sample lacks a metric."""

Figures = dict[str, dict[str, Any]]
"""By metric: `value`, perhaps `low` and `high` (percent; None with too few documents), `n` and `failed` in samples
(those counted together: 1), `empty`, the number of answers without text, and `groups`, the number of documents.
Differences have no `failed` and `empty` but `p`: two-sided, after Holm's correction over all models compared; None with
too few documents."""

CORRELATION = 1 / 3
"""Assumed within a document, for the weight of a pseudo-observation. A lower value lets coverage fall below 93% if
scores correlate by 0.5; a higher one widens intervals of few documents."""


@dataclass(frozen=True)
class Intervals:
    """95% intervals of several means; entry i of every field belongs to column i."""

    low: Values
    """NaN with fewer than LEAST_GROUPS documents; so are `high` and `p`."""
    high: Values
    p: Values
    """Two-sided, for a mean of 0: below LEVEL if and only if the interval excludes 0."""
    groups: NDArray[np.int64]
    """Documents with a score."""


def mean_intervals(values: Values, groups: Sequence[str], least: float = 0.0) -> Intervals:
    """The intervals of the columns' means. `values` has shape (rows, columns) and lies in `least`..1; `least` is 0 for
    scores, -1 for paired differences. NaN is left out. `groups` names each row's document."""
    codes = np.unique(groups, return_inverse=True)[1]
    sums, sizes = np.zeros((2, int(codes.max()) + 1, values.shape[1]))
    np.add.at(sums, codes, np.nan_to_num(values))
    np.add.at(sizes, codes, ~np.isnan(values))
    return intervals_from_totals(sums, sizes, least)


def intervals_from_totals(sums: Values, sizes: Values, least: float | None = 0.0) -> Intervals:
    """The intervals of the columns' means, from each document's sum and number of scores, both of shape (documents,
    columns). `least` is that of `mean_intervals`; None: the values have no ends, and so no pseudo-observations."""
    if least is None:
        each, least, most = 0, -math.inf, math.inf
    else:
        each, most = 2 if least == 0 else 1, 1.0  # pseudo-observations at either end
    n = sizes.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0/0 in a column without scores
        effective = n**2 / (sizes**2).sum(0)
        weight = 1 + (n / effective - 1) * CORRELATION
        total = n + 2 * each * weight
        center = (sums.sum(0) + (each * weight * (least + most) if each else 0)) / total
        observed = ((sums - sizes * center) ** 2 / (1 - sizes / total)).sum(0)
        pseudo = each * weight**2 * ((least - center) ** 2 + (most - center) ** 2) / (1 - weight / total) if each else 0
        error = np.sqrt(observed + pseudo) / total
    groups = (sizes > 0).sum(0)
    enough = groups >= LEAST_GROUPS
    freedom = np.where(enough, np.maximum(effective - 1, 1), 1)
    reach = student_quantile(freedom) * error
    low, high = np.maximum(center - reach, least), np.minimum(center + reach, most)
    with np.errstate(divide="ignore", invalid="ignore"):  # an error of 0, where all values are equal
        p = student_tails(np.nan_to_num(np.abs(center) / error), freedom)
    low, high, p = (np.where(enough, column, np.nan) for column in (low, high, p))
    return Intervals(low, high, p, groups)


# -- figures -----------------------------------------------------------------------------------------------------


def mean_figures(values: Values, groups: Sequence[str]) -> list[dict[str, Any]]:
    """The figures of each column of scores: `value`, `low` and `high` in percent, and `groups`."""
    if not values.shape[1]:  # no sample, and so no metric
        return []
    found = mean_intervals(values, groups)
    columns = zip(_column_means(values), found.low, found.high, found.groups, strict=True)
    return [
        {"value": percent(value), "low": _percent_or_none(low), "high": _percent_or_none(high), "groups": int(count)}
        for value, low, high, count in columns
    ]


def difference_figures(differences: Sequence[tuple[Values, Sequence[str]]]) -> list[dict[str, Any]]:
    """The figures of each compared model: `value`, `low` and `high` in points, `groups`, `n` pairs, and `p`.

    `differences` has the paired differences of each model by one metric, of shape (rows,), and the rows' documents.
    `p` is corrected for all models.
    """
    figures, tests = [], []
    for values, groups in differences:
        found = mean_intervals(values[:, None], groups, least=-1.0)
        ends = {"low": _percent_or_none(found.low[0]), "high": _percent_or_none(found.high[0])}
        counts = {"groups": int(found.groups[0]), "n": int((~np.isnan(values)).sum())}
        figures.append({"value": percent(_column_means(values[:, None])[0]), **ends, **counts})
        tests.append(float(found.p[0]))
    corrected = (None if math.isnan(p) else round(p, 6) for p in holm_p_values(tests))
    return [{**figure, "p": p} for figure, p in zip(figures, corrected, strict=True)]


def holm_p_values(tests: Sequence[float]) -> list[float]:
    """The p values, corrected for the number of tests (Holm 1979). NaN stands for no test and stays NaN."""
    corrected = [math.nan] * len(tests)
    order = sorted((p, place) for place, p in enumerate(tests) if not math.isnan(p))
    least = 0.0
    for done, (p, place) in enumerate(order):
        least = max(least, min(1.0, (len(order) - done) * p))
        corrected[place] = least
    return corrected


def percent(value: float) -> float:
    """A score or difference of scores as percent, rounded to four decimals."""
    return round(100 * float(value), 4) + 0.0  # -0.0 becomes 0.0


def _percent_or_none(value: float) -> float | None:
    """A score or difference of scores as percent, rounded to four decimals; None for NaN."""
    return None if math.isnan(value) else percent(value)


def _column_means(values: Values) -> Values:
    """The mean of each column, ignoring NaN; NaN for a column without scores."""
    with np.errstate(invalid="ignore"):  # 0/0 in a column without scores
        return np.asarray(np.nansum(values, axis=0) / (~np.isnan(values)).sum(0))


# -- Student's t -------------------------------------------------------------------------------------------------

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)


def student_tails(t: Values, freedom: Values) -> Values:
    """P(|T| > t) of Student's t, for t >= 0 and freedom >= 1, accurate to 1e-9. scipy has it, but hosts lack scipy.

    With t = sqrt(freedom) tan(angle), the density becomes cos(angle)^(freedom - 1); Gauss-Legendre integrates it.
    """
    angle = np.arctan(t / np.sqrt(freedom))
    heights = np.cos(angle[..., None] * (_NODES + 1) / 2) ** (freedom[..., None] - 1)
    return np.asarray(np.clip(1 - _density_at_zero(freedom) * np.sqrt(freedom) * angle * (heights @ _WEIGHTS), 0, 1))


def student_quantile(freedom: Values) -> Values:
    """The t with P(|T| > t) = LEVEL, by Newton's method. The iteration starts below the result, because the tail is
    convex in t."""
    t, peak = np.full(freedom.shape, 1.9599), _density_at_zero(freedom)
    for _ in range(20):
        density = peak * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
        step = (student_tails(t, freedom) - LEVEL) / (2 * density)
        t += step
        if np.abs(step).max(initial=0) < 1e-9:
            break
    return t


def _density_at_zero(freedom: Values) -> Values:
    """The density of Student's t at 0, for these degrees of freedom."""
    log_gamma = np.vectorize(math.lgamma, otypes=[float])
    return np.asarray(np.exp(log_gamma((freedom + 1) / 2) - log_gamma(freedom / 2)) / np.sqrt(np.pi * freedom))
