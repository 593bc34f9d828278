"""The ladder alone: which rung comes next, what it leaves as it is, what is remembered, what counts as a shortage."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.contract.recipe import Adapter, Connector, Train
from stages.hardware.batch import plan_batch
from stages.train.ladder import (
    Attempt,
    During,
    Ladder,
    Shortage,
    change_as_options,
    describe_change,
    find_shortage,
    lost_gpu_message,
    lowered_attempt,
    memory_advice,
    next_rung,
)
from tests.train.hungry_worker import SAID

SHORT = Shortage("training", 3, "asked for 2.00 GiB, 1.94 MiB of 23.65 GiB free")


def attempt(gpus: int = 1, **settings: Any) -> Attempt:
    train = Train(adapters=[Adapter(name="tuned")], **settings)
    batch = plan_batch(train.effective_batch, train.micro_batch, gpus)
    return Attempt(train, batch, eval_micro_batch=batch.micro_batch)


def descent(start: Attempt, during: During) -> list[tuple[str, Any]]:
    """Every rung down to the last."""
    rungs: list[tuple[str, Any]] = []
    while (change := next_rung(start, during)) is not None:
        rungs += change.items()
        start = lowered_attempt(start, change)
    return rungs


def test_training_goes_down_rung_by_rung_and_takes_length_only_where_it_is_allowed() -> None:
    assert descent(attempt(micro_batch=4), "training") == [
        ("micro_batch", 2),
        ("micro_batch", 1),
        ("gradient_checkpointing", True),
    ]
    allowed = attempt(
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
@pytest.mark.parametrize("micro_batch", [1, 3, 4, 8, 32])
def test_the_effective_batch_is_the_same_on_every_rung(gpus: int, effective: int, micro_batch: int) -> None:
    start = now = attempt(gpus, effective_batch=effective, micro_batch=micro_batch)
    while (change := next_rung(now, "training")) is not None:
        now = lowered_attempt(now, change)
        assert now.batch.effective_batch == start.batch.effective_batch
        assert now.eval_micro_batch == start.eval_micro_batch
    assert now.batch.micro_batch == 1


def test_an_evaluation_changes_only_the_evaluation() -> None:
    start = attempt(micro_batch=4)
    assert descent(start, "evaluation") == [("eval_micro_batch", 2), ("eval_micro_batch", 1), ("evaluate", False)]
    last = lowered_attempt(lowered_attempt(start, {"eval_micro_batch": 1}), {"evaluate": False})
    assert replace(last, eval_micro_batch=4, evaluate=True) == start


def test_no_batch_is_small_enough_for_a_model_that_cannot_be_loaded() -> None:
    assert next_rung(attempt(micro_batch=8), "loading") is None


def test_a_rung_taken_on_smaller_cards_says_nothing_of_larger_ones(tmp_path: Path) -> None:
    start = attempt(micro_batch=4)
    after = Ladder.read(tmp_path, 24).add_rung("tuned", SHORT, {"micro_batch": 2}, start)
    assert Ladder.read(tmp_path, 24).apply_rungs(start) == after
    assert Ladder.read(tmp_path, 16).apply_rungs(start) == after
    assert Ladder.read(tmp_path, 80).apply_rungs(start) == start


def test_rungs_are_remembered_and_hold_on_other_cards(tmp_path: Path) -> None:
    ladder, start = Ladder.read(tmp_path), attempt(micro_batch=4)
    after = ladder.add_rung("tuned", SHORT, {"micro_batch": 2}, start)
    after = ladder.add_rung("tuned", replace(SHORT, during="evaluation"), {"eval_micro_batch": 2}, after)
    again = Ladder.read(tmp_path)
    assert again.apply_rungs(start) == after
    assert again.decisions == [
        {
            "what": "out of memory",
            "value": "micro-batch 2, accumulation 8: 2 x 8 x 1 GPU(s) = 16",
            "why": "adapter tuned, in training after step 3 (asked for 2.00 GiB, 1.94 MiB of 23.65 GiB free)",
        },
        {
            "what": "out of memory",
            "value": "evaluation 2 at a time; training unchanged",
            "why": "adapter tuned, in evaluation after step 3 (asked for 2.00 GiB, 1.94 MiB of 23.65 GiB free)",
        },
    ]
    on_two = again.apply_rungs(attempt(2, micro_batch=4))
    assert (on_two.batch.micro_batch, on_two.batch.effective_batch) == (2, 16)
    lean = attempt(micro_batch=1)
    assert again.apply_rungs(lean).batch.micro_batch == 1, "a plan that is lower already stays so"


def test_a_lowered_length_is_a_recipe_that_the_worker_reads_again() -> None:
    after = lowered_attempt(attempt(max_length=2048, least_max_length=600), {"max_length": 600})
    assert Train(**after.settings.model_dump()).max_length == 600


def test_what_to_set_by_hand() -> None:
    settings = attempt(connector=Connector()).settings
    for change in ({"micro_batch": 2}, {"eval_micro_batch": 2}):
        assert change_as_options(change, settings) == "--set train.micro_batch=2"
        assert change_as_options(change, settings.connector_settings()) == "--set train.connector.micro_batch=2"
    for each in (settings, settings.connector_settings()):
        assert change_as_options({"gradient_checkpointing": True}, each) == "--set train.gradient_checkpointing=true"
        assert change_as_options({"evaluate": False}, each).startswith("--set data.validation_fraction=0")


def test_every_change_has_words() -> None:
    start = attempt(max_pixels=10_000)
    for change in descent(attempt(micro_batch=2), "training") + descent(start, "evaluation"):
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
