"""Figures of held-out losses: by hand, and whether their intervals cover the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from stages.results.held_out import TIE, Loss, held_out_figures, loss_comparisons, loss_figures


def losses(*pairs: tuple[float, int]) -> dict[str, Loss]:
    return {f"s{number}": Loss(*pair) for number, pair in enumerate(pairs)}


def alone(count: int) -> dict[str, str]:
    """Each sample a group of its own."""
    return {f"s{number}": f"g{number}" for number in range(count)}


def test_perplexity_by_hand() -> None:
    """Tokens count alike, not samples: (2 + 12 + 4) / (1 + 4 + 5) nats."""
    figure = loss_figures(losses((2.0, 1), (12.0, 4), (4.0, 5)), alone(3))
    assert figure["loss"] == {"value": 1.8, "low": None, "high": None}
    assert figure["perplexity"] == {"value": pytest.approx(math.exp(1.8), abs=1e-6), "low": None, "high": None}
    assert (figure["n"], figure["tokens"], figure["groups"]) == (3, 10, 3)
    # a model that gives every token the probability 1/8
    uniform = loss_figures(losses(*[(length * math.log(8), length) for length in (3, 5, 2, 9, 4)]), alone(5))
    assert uniform["perplexity"] == {"value": 8.0, "low": 8.0, "high": 8.0}


def test_the_interval_by_hand_counts_groups() -> None:
    nats, tokens = [3.0, 8.0, 2.0, 9.0, 1.0, 12.0, 5.0, 4.0], [2, 6, 1, 5, 2, 7, 3, 3]
    names = [0, 0, 1, 2, 2, 3, 4, 5]
    groups = {f"s{place}": f"conversation {name}" for place, name in enumerate(names)}
    sums, sizes = np.zeros(6), np.zeros(6)
    np.add.at(sums, names, nats)
    np.add.at(sizes, names, tokens)
    total, mean = sizes.sum(), sums.sum() / sizes.sum()
    error = math.sqrt((((sums - mean * sizes) ** 2) / (1 - sizes / total)).sum()) / total
    half = stats.t.ppf(0.975, total**2 / (sizes**2).sum() - 1) * error
    figure = loss_figures(losses(*zip(nats, tokens, strict=True)), groups)
    ends = [figure["loss"][key] for key in ("value", "low", "high")]
    assert ends == pytest.approx([mean, mean - half, mean + half], abs=1e-6)
    assert [figure["perplexity"][key] for key in ("low", "high")] == pytest.approx(
        [math.exp(mean - half), math.exp(mean + half)], rel=1e-5
    )
    assert figure["groups"] == 6


def test_wins_ties_and_losses_count_samples_by_loss_per_token() -> None:
    base = losses((10.0, 10), (10.0, 10), (10.0, 10), (10.0, 100), (7.0, 10))
    tuned = losses((8.0, 10), (10.0 + 9 * TIE, 10), (11.0, 10), (10.0 + 110 * TIE, 100), (6.9, 10))
    compared = loss_comparisons({"tuned": tuned}, base, alone(5))["tuned"]
    assert (compared["wins"], compared["ties"], compared["losses"]) == (2, 1, 2)
    assert compared["win_rate"]["value"] == 50.0
    assert 0 <= compared["win_rate"]["low"] < 50 < compared["win_rate"]["high"] <= 100
    assert compared["loss"]["value"] == pytest.approx((8 - 10 + 0.009 + 1 + 0.11 - 0.1) / 140, abs=1e-6)


def test_a_model_is_compared_on_the_samples_that_it_has() -> None:
    base = losses((10.0, 10), (30.0, 10), (20.0, 10))
    figures = held_out_figures({"base": base, "tuned": {"s1": Loss(20.0, 10)}, "none": {}}, alone(3))
    assert list(figures) == ["base", "tuned"]
    compared = figures["tuned"]["over_base"]
    assert (compared["n"], compared["tokens"], compared["loss"]["value"]) == (1, 10, -1.0)
    assert compared["beside"]["loss"]["value"] == 3.0
    assert figures["base"]["loss"]["value"] == 2.0


def test_an_adapter_that_changes_nothing_is_no_better() -> None:
    base = losses(*[(3.0 + number, 4) for number in range(8)])
    compared = loss_comparisons({"tuned": dict(base)}, base, alone(8))["tuned"]
    assert compared["loss"] == {"value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    assert (compared["wins"], compared["ties"], compared["losses"]) == (0, 8, 0)
    assert compared["win_rate"]["value"] == 50.0


def test_the_same_gain_everywhere_is_clear() -> None:
    base = losses(*[(3.0 + number, 4) for number in range(8)])
    tuned = {name: Loss(loss.nats - 0.4, loss.tokens) for name, loss in base.items()}
    compared = loss_comparisons({"tuned": tuned}, base, alone(8))["tuned"]
    assert compared["loss"]["value"] == -0.1 and compared["loss"]["p"] < 1e-6
    assert compared["wins"] == 8 and compared["win_rate"]["low"] > 50


def test_several_adapters_are_corrected_together() -> None:
    generator = np.random.default_rng(0)
    base = losses(*[(value, 10) for value in generator.normal(20, 3, 12)])
    models = {
        f"a{number}": {name: Loss(one.nats + generator.normal(-0.7, 1), 10) for name, one in base.items()}
        for number in range(3)
    }
    groups = alone(12)
    single = [loss_comparisons({name: own}, base, groups)[name]["loss"]["p"] for name, own in models.items()]
    together = [one["loss"]["p"] for one in loss_comparisons(models, base, groups).values()]
    assert min(together) == pytest.approx(3 * min(single), rel=1e-3)


@pytest.mark.parametrize(("conversations", "turns"), [(10, 1), (20, 4)])
def test_intervals_cover_the_true_loss_and_difference(conversations: int, turns: int) -> None:
    """Losses per token are skewed, differ between conversations, and long answers have another loss than short ones."""
    generator = np.random.default_rng(conversations + turns)
    covered = {"loss": 0, "difference": 0}
    trials = 400

    def draw(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, nats of base and nats of the adapter, for `turns` samples of each conversation."""
        level = np.repeat(generator.gamma(8, 0.25, count), turns)
        gain = np.repeat(generator.normal(0.3, 0.2, count), turns)
        tokens = np.ceil(generator.lognormal(3.5, 0.6, count * turns))
        per_token = level * (40 / tokens) ** 0.1 + generator.gamma(2, 0.2, count * turns)
        return tokens, tokens * per_token, tokens * (per_token - gain)

    tokens, base, tuned = draw(200_000)
    truth, true_difference = base.sum() / tokens.sum(), (tuned - base).sum() / tokens.sum()
    groups = {f"s{number}": f"g{number // turns}" for number in range(conversations * turns)}
    for _ in range(trials):
        tokens, base, tuned = draw(conversations)
        mine, theirs = (losses(*zip(nats, map(int, tokens), strict=True)) for nats in (base, tuned))
        found = loss_figures(mine, groups)["loss"]
        covered["loss"] += found["low"] <= truth <= found["high"]
        found = loss_comparisons({"a": theirs}, mine, groups)["a"]["loss"]
        covered["difference"] += found["low"] <= true_difference <= found["high"]
    assert min(covered.values()) >= 0.92 * trials, covered
