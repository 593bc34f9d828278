"""Means of scores and their bootstrap intervals, for eval and for comparisons."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
"""Scores in 0..1, a row for each sample and a column for each metric; NaN where a sample lacks a metric."""

Figures = dict[str, dict[str, Any]]
"""By metric: `value`, perhaps `low` and `high` (percent), `n` and `failed` in samples (those counted together: 1)."""


def cluster_bootstrap(values: Values, groups: Sequence[str], resamples: int, seed: int) -> Values:
    """95% percentile intervals of the columns' means. `values` (rows, columns) -> (2, columns): low, high.

    It draws whole groups with replacement, not rows: questions on one document share its pages and are right or wrong
    together, so an interval from rows would be too narrow (Field and Welsh 2007, 'Bootstrapping clustered data'). With
    a single group it draws rows. All columns share the draws. NaN is left out of a mean.
    """
    codes = np.unique(groups, return_inverse=True)[1]
    if codes.max() == 0:
        codes = np.arange(len(values))
    count = int(codes.max()) + 1
    width = values.shape[1]
    totals = np.zeros((count, 2 * width))  # of each group: the sums of its scores, then their numbers
    np.add.at(totals, codes, np.hstack([np.nan_to_num(values), ~np.isnan(values)]))
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, width))
    step = max(1, 1_000_000 // count)  # draws held at once: 8 MB
    for first in range(0, resamples, step):
        rows = min(step, resamples - first)
        drawn = generator.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)
        drawn_totals = times @ totals
        with np.errstate(invalid="ignore"):  # 0/0: a draw without any sample that has the metric
            means[first : first + rows] = drawn_totals[:, :width] / drawn_totals[:, width:]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        return np.asarray(np.nanpercentile(means, [2.5, 97.5], axis=0))
