"""Each process's part of an optimizer's state under ZeRO, put together and taken apart again: two processes played by
two threads, with weights laid out as DeepSpeed lays them out (runtime/zero/stage_1_and_2.py and stage3.py,
utils/mixed_precision_linkage.py). That DeepSpeed itself is read so is shown on GPUs, by `benchmarks.zero`."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from stages.train import optimizer_state
from stages.train.optimizer_state import TorchStates, ZeroStates

SHAPES = [{"a": (3, 5), "b": (2,), "c": (7, 3)}, {"d": (1,), "e": (4, 4), "f": (10,)}]
"""Of two groups, as LoRA+ has them. Few divide by two: weights begin and end in the middle of a process's part, and
parts are filled up."""
RATES = (0.01, 0.04)
RANKS = 2


class Group:
    """torch.distributed for threads, each a rank."""

    def __init__(self) -> None:
        self._rank, self._barrier, self._sent = threading.local(), threading.Barrier(RANKS), [torch.empty(0)] * RANKS

    def get_rank(self) -> int:
        rank: int = self._rank.value
        return rank

    def all_reduce(self, tensor: Tensor) -> None:
        self._sent[self.get_rank()] = tensor.clone()
        self._barrier.wait(10)
        tensor.copy_(torch.stack(self._sent).sum(0))
        self._barrier.wait(10)

    def on_each(self, work: Callable[[int], Any]) -> list[Any]:
        """What every rank makes of it, at the same time."""

        def ranked(rank: int) -> Any:
            self._rank.value = rank
            return work(rank)

        with ThreadPoolExecutor(RANKS) as pool:
            return list(pool.map(ranked, range(RANKS)))


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    made = Group()
    monkeypatch.setattr(optimizer_state, "dist", made)
    return made


def values(seed: int) -> dict[str, Tensor]:
    """Weights, or their gradients of a step."""
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for shapes in SHAPES for name, shape in shapes.items()}


class Whole:
    """Without ZeRO."""

    def __init__(self) -> None:
        self.weights = {name: Parameter(value) for name, value in values(0).items()}
        groups = [{"params": [self.weights[name] for name in shapes]} for shapes in SHAPES]
        self.optimizer = torch.optim.AdamW(
            [{**one, "lr": rate} for one, rate in zip(groups, RATES, strict=True)], weight_decay=0.1
        )
        self.states = TorchStates(self.optimizer, {value: name for name, value in self.weights.items()})

    def step(self, number: int) -> None:
        for name, gradient in values(number).items():
            self.weights[name].grad = gradient
        self.optimizer.step()


class Zero:
    """One rank's part. `flats` are what its optimizer knows."""

    def __init__(self, rank: int, stage: int) -> None:
        self._rank, self._stage = rank, stage
        self.weights = {name: Parameter(torch.zeros(value.shape)) for name, value in values(0).items()}
        # ZeRO-3 makes sub-groups of a group where it is large: here of the first
        self._parts = [["a", "b"], ["c"], ["d", "e", "f"]] if stage == 3 else [list(shapes) for shapes in SHAPES]
        groups = [0, 0, 1] if stage == 3 else [0, 1]
        self.flats = [flat.requires_grad_() for flat in self._flat(values(0))]
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [flat for flat, group in zip(self.flats, groups, strict=True) if group == number],
                    "lr": rate,
                }
                for number, rate in enumerate(RATES)
            ],
            weight_decay=0.1,
        )
        parts = [[self.weights[name] for name in part] for part in self._parts]
        zero: dict[str, Any] = {"optimizer": self.optimizer}
        if stage == 2:
            zero |= {"single_partition_of_fp32_groups": self.flats, "bit16_groups": parts}
            self._map_2()
        else:
            ids = {parameter: number for number, parameter in enumerate(self.weights.values())}
            zero |= {"fp32_partitioned_groups_flat": self.flats, "fp16_groups": parts}
            zero |= {"sub_group_to_group_id": dict(enumerate(groups)), "get_param_id": ids.__getitem__}
            zero |= {"grad_position": self._positions(ids)}
        self.states = ZeroStates(SimpleNamespace(**zero), {value: name for name, value in self.weights.items()})

    def _flat(self, of: dict[str, Tensor]) -> list[Tensor]:
        """This rank's part of each group. ZeRO-2 lays the weights end to end, fills up, and cuts into as many parts as
        there are ranks; ZeRO-3 cuts each weight so, and lays the parts end to end."""

        def part(tensor: Tensor) -> Tensor:
            filled = torch.nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % RANKS))
            return filled.chunk(RANKS)[self._rank]

        if self._stage == 2:
            return [part(torch.cat([of[name].flatten() for name in names])).clone() for names in self._parts]
        return [torch.cat([part(of[name]) for name in names]) for names in self._parts]

    def _map_2(self) -> None:
        for names, flat in zip(self._parts, self.flats, strict=True):
            mine, at = range(self._rank * flat.numel(), (self._rank + 1) * flat.numel()), 0
            for name in names:
                weight: Any = self.weights[name]
                first, last = max(at, mine.start), min(at + weight.numel(), mine.stop)
                weight._hp_mapping = None
                if first < last:
                    weight._hp_mapping = SimpleNamespace(
                        lp_fragment_address=SimpleNamespace(start=first - at, numel=last - first),
                        hp_fragment_address=SimpleNamespace(start=first - mine.start, numel=last - first),
                    )
                at += weight.numel()

    def _positions(self, ids: dict[Parameter, int]) -> dict[int, list[int]]:
        found = {}
        for number, names in enumerate(self._parts):
            at = 0
            for name in names:
                weight: Any = self.weights[name]
                weight.ds_shape, weight.ds_numel = weight.shape, weight.numel()
                size = -(-weight.numel() // RANKS)
                found[ids[weight]] = [number, at, size]
                at += size
                weight.data = torch.empty(0)  # elsewhere
        return found

    def step(self, number: int) -> None:
        for flat, gradient in zip(self.flats, self._flat(values(number)), strict=True):
            flat.grad = gradient
        self.optimizer.step()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name].detach()) for name in one)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_two_processes_have_in_parts_is_read_whole(group: Group, stage: int) -> None:
    whole = Whole()

    def work(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        zero = Zero(rank, stage)
        before = zero.states.read()
        for number in (1, 2):
            zero.step(number)
        return before, zero.states.read(), zero.states.gather_weights()

    found = group.on_each(work)
    for number in (1, 2):
        whole.step(number)
    for before, states, weights in found:
        assert before == {}, "never trained"
        assert same(whole.states.read(), states)
        assert same(dict(whole.weights), weights)


@pytest.mark.parametrize(("first", "second"), [(0, 2), (0, 3), (2, 3), (3, 2), (2, 0), (3, 0), (2, 2), (3, 3)])
def test_training_goes_on_in_another_way_as_if_nothing_had_been(group: Group, first: int, second: int) -> None:
    """0: without ZeRO."""
    undisturbed = Whole()
    for number in (1, 2, 3, 4):
        undisturbed.step(number)

    def begin(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        trained = Zero(rank, first) if first else Whole()
        for number in (1, 2):
            trained.step(number)
        weights = trained.states.gather_weights() if isinstance(trained, Zero) else trained.weights
        return trained.states.read(), {name: value.detach().clone() for name, value in weights.items()}

    saved = group.on_each(begin)[0]  # the first process writes it

    def go_on(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        states, weights = deepcopy(saved)  # read from a file by each
        trained = Zero(rank, second) if second else Whole()
        trained.states.write(states)
        if isinstance(trained, Zero):
            trained.states.write_weights(weights.__getitem__)
        else:
            for name, value in trained.weights.items():
                value.data.copy_(weights[name])
        again = trained.states.read()
        assert same(states, again)
        for number in (3, 4):
            trained.step(number)
        return trained.states.read(), trained.states.gather_weights() if isinstance(trained, Zero) else trained.weights

    for states, weights in group.on_each(go_on):
        assert same(undisturbed.states.read(), states)
        assert same(dict(undisturbed.weights), weights)
