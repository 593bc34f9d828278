"""Simulate how often a 95% interval covers the true mean, and how often a star is false, with few documents.

    python -m benchmarks.intervals [--draws 4000]

One draw is a test set of 5, 8, 10 or 20 documents with 2 to 20 or 20 to 60 questions each, or 1 to 80 and mostly few.
Scores are right or wrong, or like token F1: 0, 1 or between. The true mean of a model is known, as is that of base and
tuned on the same questions. Two scores of one document correlate by 0 to 0.5, simulated in two ways: `shared`, a score
is the document's own with some probability and independent otherwise; `beta`, each document has its own chance of a
right answer, from a beta distribution.

`before` is the percentile bootstrap that Lorry used first: 2,000 resamples of whole documents. `now` is
stages/results/intervals.py. Widths are in points. A star means that the interval of the difference excludes 0; it is
false if base and tuned have the same true mean. Needs five minutes of one core.
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.rows import write_rows
from stages.results.intervals import intervals_from_totals

Array = NDArray[np.float64]

DOCUMENTS = (5, 8, 10, 20)
CORRELATIONS = (0.0, 0.1, 0.25, 0.5)
MEANS = (0.5, 0.95, 0.1)
PAIRS = ((0.5, 0.5), (0.95, 0.95), (0.1, 0.1), (0.5, 0.95), (0.1, 0.5))
"""Pairs of true means: base, tuned."""
AGREE = 0.5
"""Share of the questions, and of the documents, for which base and tuned get the same random number."""
KINDS = (("right or wrong", "shared"), ("right or wrong", "beta"), ("F1", "shared"))
DESIGNS = (*product(KINDS, ("2 to 20", "1 to 80, skewed")), (KINDS[0], "20 to 60"))
"""Pairs of a kind (the scores, and how they correlate) and the range of questions per document."""
RESAMPLES = 2000


def score_function(scores: str, mean: float) -> Callable[[Array], Array]:
    """Return a function that turns uniform numbers in 0..1 into scores of the kind `scores` with about this mean.

    For `F1`, the mean has to be one of MEANS.
    """
    if scores == "right or wrong":
        return lambda luck: (luck > 1 - mean).astype(np.float64)
    # the shares of scores 0 and 1, and the ends of the range in which the others are uniform
    zeros, ones, first, last = {
        0.5: (0.3, 0.3, 0.1, 0.9),
        0.95: (0.02, 0.88, 0.45, 0.95),
        0.1: (0.7, 0.02, 0.05, 11 / 21 - 0.0025),
    }[mean]
    middle = 1 - zeros - ones

    def score(luck: Array) -> Array:
        """Turn uniform numbers into scores, of the same shape."""
        between = first + (last - first) * (luck - zeros) / middle
        return np.where(luck < zeros, 0.0, np.where(luck > 1 - ones, 1.0, between))

    return score


def true_mean(scores: str, mean: float) -> float:
    """Return the true mean of the scores that `score_function` gives, accurate to 1e-5."""
    return float(score_function(scores, mean)((np.arange(100_000) + 0.5) / 100_000).mean())


def random_sizes(generator: np.random.Generator, sizes: str, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Return random numbers of questions per document, in an array of this shape.

    `sizes` is the range as text, such as `2 to 20`, drawn uniformly; `1 to 80, skewed` is log-normal.
    """
    if sizes != "1 to 80, skewed":
        first, last = map(int, sizes.split(" to "))
        return generator.integers(first, last + 1, shape)
    return np.clip(np.exp(generator.normal(1.8, 0.9, shape)).round(), 1, 80).astype(np.int64)


class Luck:
    """The uniform random numbers behind a model's scores: `own` for each question, `shared` for each document.

    Shapes: `own` (draws, documents, questions), `shared` (draws, documents, 1). With `like`, each number is that of the
    other model with probability AGREE.
    """

    def __init__(self, generator: np.random.Generator, shape: tuple[int, int, int], like: "Luck | None" = None) -> None:
        self.shared, self.own = generator.random((*shape[:2], 1)), generator.random(shape)
        if like is not None:
            self.shared = np.where(generator.random(self.shared.shape) < AGREE, like.shared, self.shared)
            self.own = np.where(generator.random(shape) < AGREE, like.own, self.own)

    def scores(self, scores: str, mean: float, alike: NDArray[np.bool_], chances: Array | None) -> Array:
        """Return the scores, of shape (draws, documents, questions).

        `alike` marks the questions that get their document's shared score. `chances` is each document's own chance of a
        right answer, of shape (draws, documents, 1); unless it is None, the other arguments are ignored.
        """
        if chances is not None:
            return (self.own > 1 - chances).astype(np.float64)
        return score_function(scores, mean)(np.where(alike, self.shared, self.own))


def draw_scores(
    generator: np.random.Generator,
    kind: tuple[str, str],
    sizes: str,
    shape: tuple[int, int],
    correlation: float,
    means: tuple[float, ...],
) -> tuple[Array, Array]:
    """Return the sum and the number of each document's simulated scores, both of shape (documents, draws).

    `kind` and `sizes` are as in DESIGNS, and `shape` is (draws, documents). With two means, base and tuned, the scores
    are differences: tuned minus base.
    """
    scores, way = kind
    count = random_sizes(generator, sizes, shape)
    cells = (*shape, int(count.max()))
    asked = np.arange(cells[2]) < count[..., None]
    alike = generator.random(cells) < np.sqrt(correlation)
    first = Luck(generator, cells)
    lucks = [first] if len(means) == 1 else [first, Luck(generator, cells, first)]
    found = []
    for luck, mean in zip(lucks, means, strict=True):
        chances = None
        if way == "beta" and correlation > 0:
            spread = 1 / correlation - 1
            chances = generator.beta(mean * spread, (1 - mean) * spread, (*shape, 1))
        elif way == "beta":
            chances = np.full((*shape, 1), mean)
        found.append(luck.scores(scores, mean, alike, chances))
    values = found[0] if len(found) == 1 else found[1] - found[0]
    return np.where(asked, values, 0.0).sum(2).T, count.T.astype(np.float64)


def bootstrap_intervals(sums: Array, sizes: Array) -> tuple[Array, Array]:
    """Return the low and high ends of the percentile intervals, both of shape (draws,).

    `sums` and `sizes` are of shape (documents, draws). All draws share the resamples, as all runs of Lorry with the
    same seed and number of documents did.
    """
    documents = len(sums)
    times = np.random.default_rng(0).multinomial(documents, np.full(documents, 1 / documents), RESAMPLES).astype(float)
    # nearest ranks: interpolating between them changes a fraction of a point
    ranks = [round(0.025 * (RESAMPLES - 1)), round(0.975 * (RESAMPLES - 1))]
    means = np.partition((sums.T @ times.T) / (sizes.T @ times.T), ranks, axis=1)
    return means[:, ranks[0]], means[:, ranks[1]]


def interval_figures(low: Array, high: Array, true: float) -> dict[str, float]:
    """Return three figures of the draws' intervals, by name.

    `coverage` is the percentage of intervals that cover the true mean, `width` their mean width in points, and `stars`
    the percentage of intervals that exclude 0.
    """
    holds = (low <= true + 1e-9) & (true - 1e-9 <= high)
    return {
        "coverage": round(100 * float(holds.mean()), 2),
        "width": round(100 * float((high - low).mean()), 1),
        "stars": round(100 * float(((low > 0) | (high < 0)).mean()), 2),
    }


def simulated_rows(draws: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each combination of a design, a true mean or pair of means, and a correlation.

    Each figure of a row is a list with one value for each number in DOCUMENTS.
    """
    for number, ((kind, sizes), means, correlation) in enumerate(
        product(DESIGNS, [*((mean,) for mean in MEANS), *PAIRS], CORRELATIONS)
    ):
        paired = len(means) == 2
        truths = [true_mean(kind[0], mean) for mean in means]
        true = truths[-1] - truths[0] if paired else truths[0]
        row: dict[str, Any] = {
            "of": "tuned less base" if paired else "mean",
            "scores": kind[0],
            "correlated": kind[1],
            "questions a document": sizes,
            "true": list(means),
            "correlation": correlation,
            "documents": list(DOCUMENTS),
        }
        found: dict[str, list[float]] = {}
        for documents in DOCUMENTS:
            generator = np.random.default_rng([number, documents])
            sums, counts = draw_scores(generator, kind, sizes, (draws, documents), correlation, means)
            now = intervals_from_totals(sums, counts, -1.0 if paired else 0.0)
            results = {
                "before": interval_figures(*bootstrap_intervals(sums, counts), true),
                "now": interval_figures(now.low, now.high, true),
            }
            for name, when in product(("coverage", "width", "stars") if paired else ("coverage", "width"), results):
                found.setdefault(f"{name} {when}", []).append(results[when][name])
        yield {**row, **found}


def extreme_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return four rows: two with the least coverage in `rows`, one with the most false stars, one with low ends.

    Coverage has one row for a model's mean and one for differences. The low ends are those of intervals if all answers
    are right. Each figure is a list with one value, in percent, for each number in DOCUMENTS.
    """
    found = []
    for of in ("mean", "tuned less base"):
        those = [row for row in rows if row["of"] == of]
        worst = {
            f"least coverage {when}": [
                min(row[f"coverage {when}"][at] for row in those) for at in range(len(DOCUMENTS))
            ]
            for when in ("before", "now")
        }
        found.append({"of": of, "documents": list(DOCUMENTS), **worst})
    same = [row for row in rows if row["of"] == "tuned less base" and row["true"][0] == row["true"][1]]
    false = {
        f"most false stars {when}": [max(row[f"stars {when}"][at] for row in same) for at in range(len(DOCUMENTS))]
        for when in ("before", "now")
    }
    found.append({"of": "stars where base and tuned have the same mean", "documents": list(DOCUMENTS), **false})
    right = [intervals_from_totals(np.full((count, 1), 8.0), np.full((count, 1), 8.0)) for count in DOCUMENTS]
    lows = [round(100 * float(interval.low[0]), 1) for interval in right]
    found.append(
        {
            "of": "every answer right, 8 questions a document",
            "documents": list(DOCUMENTS),
            "low before": [100.0] * len(DOCUMENTS),
            "low now": lows,
        }
    )
    return found


def main() -> None:
    """Simulate all combinations of design, true mean and correlation, and write their rows after the extreme ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000, help="Number of test sets of each kind. Default: 4000.")
    arguments = parser.parse_args()
    rows = list(simulated_rows(arguments.draws))
    for row in rows:
        row["draws"] = arguments.draws
    write_rows("intervals", [*extreme_rows(rows), *rows], "python -m benchmarks.intervals")


if __name__ == "__main__":
    main()
