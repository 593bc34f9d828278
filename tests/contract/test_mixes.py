"""Data mixes: which samples an adapter is trained on, the same ones in any mix and order."""

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.contract.errors import UsageError
from stages.contract.mixes import samples_with_pictures, training_samples, validation_samples
from stages.contract.recipe import Adapter, Source

SOURCES = {"train": 40, "more": 10, "guessed": 5}
SAMPLES: list[dict[str, Any]] = [
    {"id": f"{source}/{n}", "meta": {"source": source}} for source, count in SOURCES.items() for n in range(count)
]


def adapter(*parts: Any, name: str = "a") -> Adapter:
    return Adapter.model_validate({"name": name, "data": list(parts)})


def ids(*parts: Any, seed: int = 42, samples: Any = None) -> list[str]:
    return [sample["id"] for sample in training_samples(SAMPLES if samples is None else samples, adapter(*parts), seed)]


def of(source: str) -> list[str]:
    return [f"{source}/{n}" for n in range(SOURCES[source])]


def test_without_a_mix_it_is_all_there_is() -> None:
    assert ids() == [sample["id"] for sample in SAMPLES]
    assert adapter().mix == "all"


def test_a_name_is_all_of_a_data_set_and_parts_follow_in_turn() -> None:
    assert ids("guessed", "train") == of("guessed") + of("train")


def test_a_number_is_so_many_each_at_most_once_in_the_datas_order() -> None:
    drawn = ids("train#15")
    assert len(drawn) == 15 == len(set(drawn))
    assert drawn == [name for name in of("train") if name in drawn], "in the data's order"
    assert drawn != of("train")[:15], "drawn, not the first"
    assert drawn == ids({"source": "train", "count": 15}), "the same said at length"


def test_a_fraction_is_a_share_of_the_data_set() -> None:
    assert len(ids({"source": "train", "fraction": 0.8})) == 32
    assert len(ids({"source": "more", "fraction": 0.25})) == 2
    assert ids({"source": "guessed", "fraction": 0.01}) != [], "never nothing"
    assert ids({"source": "train", "fraction": 1.0}) == of("train")


def test_the_first_are_the_first() -> None:
    assert ids({"source": "train", "count": 3, "draw": "first"}) == of("train")[:3]
    assert ids({"source": "more", "fraction": 0.5, "draw": "first"}) == of("more")[:5]


@pytest.mark.parametrize("draw", ["first", "random"])
@pytest.mark.parametrize(("amount", "count"), [({"count": 13}, 13), ({"fraction": 2.6}, 13), ({"count": 5}, 5)])
def test_more_than_there_are_come_again_as_evenly_as_can_be(draw: str, amount: dict[str, Any], count: int) -> None:
    drawn = Counter(ids({"source": "guessed", "draw": draw, **amount}))
    assert drawn.total() == count and set(drawn) == set(of("guessed"))
    assert max(drawn.values()) - min(drawn.values()) <= 1
    if draw == "first" and count == 13:
        assert [drawn[name] for name in of("guessed")] == [3, 3, 3, 2, 2]


def test_the_seed_decides_the_draw_and_a_parts_own_wins() -> None:
    assert ids("train#15", seed=1) == ids("train#15", seed=1) != ids("train#15", seed=2)
    own = {"source": "train", "count": 15, "seed": 7}
    assert ids(own, seed=1) == ids(own, seed=2) == ids("train#15", seed=7)


def test_mixes_with_seeds_of_their_own_differ_and_those_without_share() -> None:
    drawn = [ids({"source": "train", "fraction": 0.5, "seed": seed}) for seed in range(5)]
    assert len({tuple(each) for each in drawn}) == 5
    first, second = (training_samples(SAMPLES, adapter("train#15", name=name), 42) for name in ("one", "two"))
    assert first == second, "the name of an adapter draws nothing"


@given(st.permutations(["train#15", "more#3", {"source": "guessed", "fraction": 0.6}]))
def test_no_other_part_and_no_order_of_them_changes_a_draw(parts: list[Any]) -> None:
    assert sorted(ids(*parts)) == sorted(ids("train#15") + ids("more#3") + ids({"source": "guessed", "fraction": 0.6}))


@given(st.randoms(use_true_random=False))
def test_other_data_sets_around_it_change_no_draw(chance: random.Random) -> None:
    train = [sample for sample in SAMPLES if sample["meta"]["source"] == "train"]
    others = [sample for sample in SAMPLES if sample["meta"]["source"] != "train"]
    places = sorted(chance.sample(range(len(SAMPLES)), len(train)))
    own, rest = iter(train), iter(others)
    among = [next(own) if place in places else next(rest) for place in range(len(SAMPLES))]
    assert ids("train#15", samples=among) == ids("train#15") == ids("train#15", samples=train)


def test_a_data_set_without_samples_is_named_with_those_that_there_are() -> None:
    with pytest.raises(UsageError) as caught:
        training_samples(SAMPLES, adapter("train", "mroe#3", name="mix-3"), 42)
    message = (
        "train.adapters: the data mix of mix-3 names 'mroe', which has no training samples; name a data set that has: "
    )
    assert str(caught.value) == message + "guessed, more, train"


def test_it_is_validated_on_its_own_data_sets_or_on_all_where_these_have_none() -> None:
    compared = [sample for sample in SAMPLES if sample["meta"]["source"] != "guessed"]
    assert validation_samples(compared, adapter()) == compared
    assert {sample["meta"]["source"] for sample in validation_samples(compared, adapter("more#2", "guessed"))} == {
        "more"
    }
    assert validation_samples(compared, adapter("guessed")) == compared
    assert validation_samples([], adapter("more")) == []


def test_a_connectors_samples_have_pictures_and_are_drawn_by_the_seed() -> None:
    samples: list[dict[str, Any]] = [{"id": str(i), "images": ["x"] if i % 2 else []} for i in range(40)]
    kept, left_out = samples_with_pictures(samples, 7, 42)
    assert len(kept) == 7 and left_out == {"without_picture": 20, "beyond_most_samples": 13}
    assert kept == sorted(kept, key=lambda sample: int(sample["id"])) and all(sample["images"] for sample in kept)
    assert samples_with_pictures(samples, 7, 42)[0] == kept != samples_with_pictures(samples, 7, 43)[0]


@pytest.mark.parametrize(("most", "beyond"), [(1, 19), (19, 1), (20, 0), (21, 0), (200, 0)])
def test_samples_beyond_the_most_are_counted_and_never_fewer_than_none(most: int, beyond: int) -> None:
    samples: list[dict[str, Any]] = [{"id": str(i), "images": ["x"] if i % 2 else []} for i in range(40)]
    kept, left_out = samples_with_pictures(samples, most, 42)
    assert left_out == {"without_picture": 20, "beyond_most_samples": beyond}
    assert len(kept) == 20 - beyond
    if not beyond:
        assert kept == samples[1::2]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("train", "train"),
        ("train#100", "train#100"),
        ({"source": "train", "fraction": 0.8, "seed": 5}, "train x 0.8 (seed 5)"),
        ({"source": "train", "count": 9, "draw": "first"}, "train#9 (the first)"),
        ({"source": "train", "seed": 5}, "train"),
        ({"source": "a#b", "count": 2}, "a#b#2"),
    ],
)
def test_a_part_in_words(part: Any, words: str) -> None:
    assert str(Source.model_validate(part)) == words
    assert adapter(part, "more").mix == f"{words}, more"
