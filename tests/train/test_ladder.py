"""The ladder alone: which rung comes next, what it leaves as it is, what is remembered, what counts as a shortage."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.contract.files import write_json
from stages.contract.recipe import Adapter, Connector, Train
from stages.hardware.step import StepPlan
from stages.train.ladder import (
    Attempt,
    During,
    Ladder,
    Shortage,
    describe_change,
    find_shortage,
    lost_gpu_message,
    lowered_attempt,
    memory_advice,
    next_rung,
)
from tests.train.hungry_worker import SAID

SHORT = Shortage("training", 3, "asked for 2.00 GiB, 1.94 MiB of 23.65 GiB free")


def attempt(gpus: int = 1, tokens: int = 2048, longest: int = 600, layers: int = 30, **settings: Any) -> Attempt:
    train = Train(adapters=[Adapter(name="tuned")], **settings)
    step = StepPlan(train.effective_batch, gpus, tokens, layers if train.gradient_checkpointing else 0)
    return Attempt(train, step, tokens, longest, layers)


def descent(start: Attempt, during: During) -> list[tuple[str, Any]]:
    """Every rung down to the last."""
    rungs: list[tuple[str, Any]] = []
    while (change := next_rung(start, during)) is not None:
        rungs += change.items()
        start = lowered_attempt(start, change)
    return rungs


def test_training_goes_down_rung_by_rung_and_takes_length_only_where_it_is_allowed() -> None:
    assert descent(attempt(), "training") == [
        ("pass_tokens", 1024),
        ("pass_tokens", 600),
        ("checkpointed_layers", 8),
        ("checkpointed_layers", 15),
        ("checkpointed_layers", 23),
        ("checkpointed_layers", 30),
    ]
    some = replace(attempt(tokens=600), step=StepPlan(16, 1, 600, checkpointed_layers=15))
    assert descent(some, "training") == [("checkpointed_layers", 23), ("checkpointed_layers", 30)]
    assert descent(attempt(tokens=600, layers=0), "training") == [("gradient_checkpointing", True)], "layers not known"
    allowed = attempt(
        tokens=2048,
        longest=2048,
        gradient_checkpointing=True,
        max_pixels=1_000_000,
        least_max_pixels=500_000,
        max_length=2048,
        least_max_length=600,
    )
    assert descent(allowed, "training") == [
        ("max_pixels", 666_666),
        ("max_pixels", 500_000),
        ("max_length", 1024),
        ("max_length", 600),
    ]


@pytest.mark.parametrize("gpus", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("effective", [1, 7, 16, 20, 128])
@pytest.mark.parametrize("tokens", [64, 600, 4000, 16_384])
def test_the_effective_batch_is_the_same_on_every_rung(gpus: int, effective: int, tokens: int) -> None:
    start = now = attempt(gpus, tokens, effective_batch=effective)
    while (change := next_rung(now, "training")) is not None:
        now = lowered_attempt(now, change)
        assert now.step.effective_batch == start.step.effective_batch == effective
        assert now.step.processes == gpus
        assert now.evaluation_tokens == start.evaluation_tokens
    assert now.step.pass_tokens == min(tokens, 600)
    assert now.step.checkpointed_layers == 30


def test_with_shorter_samples_a_pass_has_no_more_tokens_than_the_longest() -> None:
    start = attempt(tokens=2048, longest=2048, max_length=2048, least_max_length=600, gradient_checkpointing=True)
    shorter = lowered_attempt(start, {"max_length": 1024})
    assert (shorter.longest, shorter.step.pass_tokens, shorter.settings.max_length) == (1024, 1024, 1024)


def test_an_evaluation_changes_only_the_evaluation() -> None:
    start = attempt()
    assert descent(start, "evaluation") == [
        ("evaluation_tokens", 1024),
        ("evaluation_tokens", 600),
        ("evaluate", False),
    ]
    last = lowered_attempt(lowered_attempt(start, {"evaluation_tokens": 600}), {"evaluate": False})
    assert replace(last, evaluation_tokens=2048, evaluate=True) == start


def test_where_each_pass_has_one_sample_fewer_tokens_a_pass_are_no_rung() -> None:
    assert next_rung(attempt(), "training", one_by_one=True) == {"checkpointed_layers": 8}
    assert next_rung(attempt(), "evaluation", one_by_one=True) == {"evaluate": False}


def test_no_batch_is_small_enough_for_a_model_that_cannot_be_loaded() -> None:
    assert next_rung(attempt(), "loading") is None


def test_a_rung_taken_on_smaller_cards_says_nothing_of_larger_ones(tmp_path: Path) -> None:
    start = attempt()
    after = Ladder.read(tmp_path, 24).add_rung("tuned", SHORT, {"pass_tokens": 1024}, start)
    assert Ladder.read(tmp_path, 24).apply_rungs(start) == after
    assert Ladder.read(tmp_path, 16).apply_rungs(start) == after
    assert Ladder.read(tmp_path, 80).apply_rungs(start) == start


def test_rungs_are_remembered_and_hold_on_other_cards(tmp_path: Path) -> None:
    ladder, start = Ladder.read(tmp_path), attempt()
    after = ladder.add_rung("tuned", SHORT, {"pass_tokens": 1024}, start)
    after = ladder.add_rung("tuned", replace(SHORT, during="evaluation"), {"evaluation_tokens": 1024}, after)
    again = Ladder.read(tmp_path)
    assert again.apply_rungs(start) == after
    assert again.decisions == [
        {
            "what": "out of memory",
            "value": "passes of at most 1,024 tokens, still 16 samples a step",
            "why": "adapter tuned, in training after step 3 (asked for 2.00 GiB, 1.94 MiB of 23.65 GiB free)",
        },
        {
            "what": "out of memory",
            "value": "evaluation in passes of at most 1,024 tokens; training unchanged",
            "why": "adapter tuned, in evaluation after step 3 (asked for 2.00 GiB, 1.94 MiB of 23.65 GiB free)",
        },
    ]
    on_two = again.apply_rungs(attempt(2))
    assert (on_two.step.pass_tokens, on_two.step.effective_batch) == (1024, 16)
    lean = attempt(tokens=700)
    assert again.apply_rungs(lean).step.pass_tokens == 700, "a plan that is lower already stays so"


def test_more_checkpointed_layers_are_not_taken_back_on_other_cards(tmp_path: Path) -> None:
    Ladder.read(tmp_path).add_rung("tuned", SHORT, {"checkpointed_layers": 15}, attempt())
    assert Ladder.read(tmp_path).apply_rungs(attempt()).step.checkpointed_layers == 15
    more = replace(attempt(), step=StepPlan(16, 1, 2048, checkpointed_layers=23))
    assert Ladder.read(tmp_path).apply_rungs(more).step.checkpointed_layers == 23


def test_rungs_of_earlier_versions_that_counted_samples_are_ignored(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{"micro_batch": 2}, {"eval_micro_batch": 1}, {"gradient_checkpointing": True}]
    rungs = [{"decision": {"value": str(change)}, "change": change, "room": 0} for change in changes]
    write_json(tmp_path / "ladder.json", {"rungs": rungs})
    ladder = Ladder.read(tmp_path)
    assert [rung["change"] for rung in ladder.ignored] == changes[:2]
    assert [made["value"] for made in ladder.decisions] == [str(changes[2])]
    after = ladder.apply_rungs(attempt())
    assert after.step == StepPlan(16, 1, 2048, checkpointed_layers=30), "all layers, as that rung meant"


def test_a_lowered_length_is_a_recipe_that_the_worker_reads_again() -> None:
    after = lowered_attempt(attempt(max_length=2048, least_max_length=600), {"max_length": 600})
    assert Train(**after.settings.model_dump()).max_length == 600


def test_every_change_has_words() -> None:
    start = attempt(max_pixels=10_000)
    for change in (
        descent(attempt(), "training") + descent(attempt(layers=0), "training") + descent(start, "evaluation")
    ):
        assert describe_change(dict([change]), start)
    for name in ("max_pixels", "max_length"):
        assert name in describe_change({name: 784}, lowered_attempt(start, {name: 784}))


def test_help_for_the_first_phase_names_what_it_can_have() -> None:
    first = attempt(connector=Connector(max_length=600))
    told = memory_advice(replace(first, settings=first.settings.connector_settings()))
    assert "train.connector.max_length below 600" in told
    assert "4 bits" not in told and "ZeRO" not in told


def test_help_does_not_name_what_is_done_already() -> None:
    assert "load_in_4bit" in memory_advice(attempt())
    assert "load_in_4bit" not in memory_advice(attempt(load_in_4bit=True))
    assert "max_pixels" not in memory_advice(attempt())


@pytest.mark.parametrize(
    ("pixels", "least", "named"), [(784, None, True), (50_001, 50_000, True), (50_000, 50_000, False)]
)
def test_help_names_fewer_pixels_only_above_the_least_that_the_recipe_allows(
    pixels: int, least: int | None, named: bool
) -> None:
    text = memory_advice(attempt(max_pixels=pixels, least_max_pixels=least))
    assert ("fewer pixels (train.max_pixels below" in text) == named
    assert f"shorter samples (train.max_length below {attempt().settings.max_length})" in text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError(SAID), "asked for 2.00 GiB, 1.94 MiB of 23.65 GiB free"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        ),
        (
            RuntimeError("NCCL error in: NCCLUtils.cpp:77, unhandled cuda error\nCuda failure 2 'out of memory'"),
            "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error Cuda failure 2 'out of memory'",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000 bytes."),
            "asked for 8000 bytes",
        ),
    ],
)
def test_shortages_are_known_by_type_or_text(error: Exception, said: str) -> None:
    assert find_shortage(error, "training", 5) == Shortage("training", 5, said)
    try:
        try:
            raise error
        finally:
            raise KeyError("what a `finally` above it stumbles over")
    except KeyError as covered:
        assert find_shortage(covered, "training", 5) == Shortage("training", 5, said)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ValueError("CUDA out of memory"), OSError(28)])
def test_other_errors_are_none(error: Exception) -> None:
    assert find_shortage(error, "training", 5) is None
    assert lost_gpu_message(error) is None


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: unspecified launch failure",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: no CUDA-capable device is detected",
    ],
)
def test_a_card_that_fell_away_is_known_by_cuda_s_words(words: str) -> None:
    text = f"{words}\nCUDA kernel errors might be asynchronously reported at some other API call."
    assert lost_gpu_message(RuntimeError(text)) == words
    assert find_shortage(RuntimeError(text), "training", 5) is None


def test_an_assertion_on_the_device_is_a_defect_and_no_lost_card() -> None:
    assert lost_gpu_message(RuntimeError("CUDA error: device-side assert triggered")) is None
