"""Which samples make a step, and how they are packed."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from stages.train.packing import Steps, level, pack

LENGTHS = st.lists(st.integers(1, 5000), max_size=60)


@given(lengths=LENGTHS, budget=st.integers(1, 6000), processes=st.integers(1, 9))
def test_every_sample_is_in_one_pass_of_one_process_within_the_budget(
    lengths: list[int], budget: int, processes: int
) -> None:
    shares = pack(lengths, budget, processes)
    assert len(shares) == processes
    assert sorted(sample for passes in shares for one in passes for sample in one) == list(range(len(lengths)))
    for one in (one for passes in shares for one in passes):
        assert one and (len(one) == 1 or sum(lengths[sample] for sample in one) <= budget)


@given(lengths=LENGTHS, budget=st.integers(5000, 20_000), processes=st.integers(1, 9))
def test_processes_get_alike_many_tokens_and_few_passes(lengths: list[int], budget: int, processes: int) -> None:
    shares = pack(lengths, budget, processes)
    tokens = [sum(lengths[sample] for one in passes for sample in one) for passes in shares]
    assert max(tokens) - min(tokens) <= max(lengths, default=0), "the longest sample decides how far they may differ"
    for passes, total in zip(shares, tokens, strict=True):
        halves = [sum(lengths[sample] for sample in one) for one in passes]
        assert sum(2 * half <= budget for half in halves) <= 1, "two passes that fit in one are one"
        assert len(passes) <= 2 * -(-total // budget), "first fit never takes twice as many as needed"


@given(samples=st.lists(st.tuples(st.integers(1, 5000), st.booleans()), max_size=40), processes=st.integers(1, 5))
def test_with_a_sharded_base_all_processes_make_passes_of_the_same_kinds(
    samples: list[tuple[int, bool]], processes: int
) -> None:
    lengths, seeing = [length for length, _ in samples], [sees for _, sees in samples]
    shares = pack(lengths, 6000, processes)
    leveled = level(shares, lengths, seeing)
    kinds = {tuple(any(seeing[sample] for sample in one) for one, _ in passes) for passes in leveled}
    assert len(kinds) == 1 and list(kinds.pop()) == sorted(any(seeing[s] for s in one) for one, _ in leveled[0])[::-1]
    for passes, mine in zip(shares, leveled, strict=True):
        assert sorted(one for one, counts in mine if counts) == sorted(passes)
        assert all(len(one) == 1 for one, counts in mine if not counts)
    assert all(any(mine[place][1] for mine in leveled) for place in range(len(leveled[0]))), "none is for nothing"


@given(samples=st.integers(1, 300), batch=st.integers(1, 64), epochs=st.floats(0.1, 3), seed=st.integers(0, 2**31))
def test_an_epoch_has_each_sample_once_and_only_its_last_step_is_smaller(
    samples: int, batch: int, epochs: float, seed: int
) -> None:
    steps = Steps(samples, batch, epochs, seed)
    first = [steps.samples_of(step) for step in range(steps.in_epoch)]
    assert Counter(sample for step in first for sample in step) == Counter(range(samples))
    assert all(len(step) == batch for step in first[:-1]) and 1 <= len(first[-1]) <= batch
    assert steps.total - 1 < max(steps.in_epoch * epochs, 1) <= steps.total
    assert steps.samples_of(steps.in_epoch) == Steps(samples, batch, 9, seed).samples_of(steps.in_epoch)


def test_each_epoch_and_each_seed_has_an_order_of_its_own() -> None:
    orders = {
        tuple(
            sample for step in range(epoch * 10, epoch * 10 + 10) for sample in Steps(100, 10, 3, seed).samples_of(step)
        )
        for epoch in range(3)
        for seed in range(3)
    }
    assert len(orders) == 9
