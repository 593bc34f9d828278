"""The speed that a training should have, from what was measured."""

import json
import re
from dataclasses import replace
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from stages.contract.recipe import Train
from stages.hardware import speed
from stages.hardware.fit import Way, plan_training
from stages.hardware.memory import Lengths
from stages.hardware.peaks import share_of_peak
from stages.hardware.probe import Gpu
from stages.hardware.speed import SOURCE, MeasuredShare, expected_speed
from stages.hardware.step import StepPlan
from stages.models.shape import ModelShape, read_shape
from tests.hardware.shapes import make_shape

GIB = 1024**3
REPOSITORY = Path(__file__).parents[2]
SETTINGS = {
    "qa, dropout 0.05": "16 bits",
    "docs, dropout 0.05": "16 bits",
    "VL-7B, a page of 1 MP in each sample": "16 bits",
    **{f"{data}, {name}": name.lower() for data in ("qa", "docs") for name in ("NF4", "GPTQ")},
}
"""The settings whose shares are in MEASURED, as the recipes train, with the kind of the base's weights."""
BATCH, LAYERS = 16, 28
"""Samples of a step and decoder layers in all of them."""

ROWS = (
    MeasuredShare("short", "H200", 0.4, 150, 4000),
    MeasuredShare("long", "H200", 0.5, 3000, 16_384),
    MeasuredShare("packed", "H200", 0.3, 150, 4000, weights="nf4"),
    MeasuredShare("pages", "H200", 0.2, 1500, 16_384, pictures=True),
)


@pytest.fixture(autouse=True)
def measured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows above stand for what was measured."""
    if "committed" not in request.node.name:
        monkeypatch.setattr(speed, "MEASURED", ROWS)


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return read_shape(make_shape(tmp_path_factory.mktemp("shape"), "Qwen2.5-7B"))


def way(shape: ModelShape, lengths: Lengths, gpus: int = 1, gib: float = 130, **settings: Any) -> Way:
    train = Train.model_validate({"adapters": [{"name": "a"}], "effective_batch": 16, **settings})
    return plan_training(shape, train, gpus, "bfloat16", int(gib * GIB), lengths)


SHORT, LONG = Lengths(2000, 64, mean=150.0, deviation=130.0), Lengths(4000, 64, mean=3000.0, deviation=500.0)


def test_the_speed_is_that_of_the_measured_training_nearest_in_length(seven: ModelShape) -> None:
    found = expected_speed(seven, way(seven, LONG), "NVIDIA H200", 2000)
    assert found is not None
    assert found.share_of_peak == pytest.approx(0.5)
    card = Gpu(0, "GPU-0", "NVIDIA H200", (9, 0), 0, 0, "")
    assert share_of_peak([card], seven, found.tokens_per_second, 1) == pytest.approx(0.5)
    assert found.why == f"an estimate, from the share that an H200 reached ({SOURCE}: long)"
    short = expected_speed(seven, way(seven, SHORT), "NVIDIA H200", 200)
    assert short is not None and "short" in short.why and short.share_of_peak == pytest.approx(0.4, rel=0.05)


def test_two_cards_are_twice_as_fast_and_checkpointing_costs_a_third(seven: ModelShape) -> None:
    one, two = (expected_speed(seven, way(seven, LONG, gpus), "NVIDIA H200", 3000) for gpus in (1, 2))
    small = expected_speed(seven, way(seven, LONG, gradient_checkpointing=True), "NVIDIA H200", 3000)
    assert one and two and small
    assert two.tokens_per_second == pytest.approx(2 * one.tokens_per_second)
    assert one.tokens_per_second == pytest.approx(4 / 3 * small.tokens_per_second)


def test_a_card_that_nobody_measured_is_said_to_be_one(seven: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    found = expected_speed(seven, way(seven, LONG), "NVIDIA-A800-SXM4-80GB", 3000)
    assert found is not None and found.why.endswith("; this card has not been measured")
    assert found.share_of_peak == pytest.approx(0.5)
    monkeypatch.setattr(speed, "MEASURED", (*ROWS, replace(ROWS[0], card="A800", share=0.45, setting="own")))
    own = expected_speed(seven, way(seven, LONG), "NVIDIA-A800-SXM4-80GB", 3000)
    assert own is not None and ": own)" in own.why, "a row of the card itself comes before one of the same length"
    assert own.share_of_peak > 0.45, "its passes are longer"


def test_the_base_has_the_measured_kind_of_weights(seven: ModelShape) -> None:
    packed = expected_speed(seven, way(seven, LONG, load_in_4bit=True), "NVIDIA H200", 3000)
    assert packed is not None and "packed" in packed.why
    seeing = replace(seven, vision={"depth": 2})
    pages = expected_speed(seeing, way(seven, LONG), "NVIDIA H200", 3000)
    assert pages is not None and "pages" in pages.why


def test_without_a_measurement_or_a_peak_nothing_is_expected(
    seven: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = way(seven, LONG)
    assert expected_speed(seven, plain, "NVIDIA GeForce GTX 1080", 3000) is None
    assert expected_speed(seven, plain, "", 3000) is None, "a CPU"
    assert expected_speed(seven, replace(plain, sharding="zero3"), "NVIDIA H200", 3000) is None
    assert expected_speed(replace(seven, quantisation="awq"), plain, "NVIDIA H200", 3000) is None
    monkeypatch.setattr(speed, "MEASURED", ())
    assert expected_speed(seven, plain, "NVIDIA H200", 3000) is None


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        *(("14B, docs", "Qwen2.5-14B"), ("docs, 32B", "Qwen2.5-32B"), ("0.5B, 2048", "Qwen2.5-0.5B")),
        *(("7B, all layers checkpointed", "Qwen2.5-7B"), ("docs in 24 GB", "Qwen2.5-7B")),
    ],
)
def test_committed_rows_of_other_settings_are_expected_within_a_tenth(
    setting: str, name: str, seven: ModelShape, tmp_path: Path
) -> None:
    (row,) = (row for row in json.loads((REPOSITORY / SOURCE).read_text())["rows"] if row["setting"] == setting)
    step = StepPlan(BATCH, 1, row["pass tokens"], row["checkpointed layers"])
    shape = read_shape(make_shape(tmp_path, name))
    found = expected_speed(shape, replace(way(seven, LONG), step=step), "NVIDIA H200", fmean(row["tokens"]) / BATCH)
    if name.endswith("0.5B"):
        assert found is None, "a small base is not like the measured ones"
    else:
        assert found is not None and found.tokens_per_second == pytest.approx(row["tokens/s"], rel=0.1)


def test_the_committed_shares_are_those_of_the_rows() -> None:
    file = REPOSITORY / SOURCE
    found = json.loads(file.read_text()) if file.is_file() else {"rows": []}
    rows = {row["setting"]: row for row in found["rows"] if row.get("of the peak")}
    expected = []
    for setting, weights in SETTINGS.items():
        if (row := rows.get(setting)) is None:
            continue
        card = re.search(r"[A-Z]+\d+", str(row.get("measured on") or found["machine"]["gpus"][0]))
        assert card is not None
        expected.append(
            MeasuredShare(
                setting=setting,
                card=card.group(),
                share=row["of the peak"],
                tokens=ceil(fmean(row["tokens"]) / BATCH),
                pass_tokens=row["pass tokens"],
                checkpointed=round(row["checkpointed layers"] / LAYERS, 2),
                weights=weights,
                pictures=setting.startswith("VL"),
            )
        )
    text = "".join(f"    {one},\n" for one in expected)
    assert tuple(expected) == speed.MEASURED, f"write these into MEASURED of stages/hardware/speed.py:\n{text}"
