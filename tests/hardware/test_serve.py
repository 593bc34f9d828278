"""On how many cards a model is served, and what is left on them: from its shape alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stages.contract.errors import DoesNotFitError, UsageError
from stages.hardware.serve import RUNTIME, SHARE, plan_serving
from stages.models.shape import ModelShape, read_shape
from tests.hardware.shapes import CONFIGS, make_shape, write_safetensors

GIB = 1024**3


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelShape]:
    return {name: read_shape(make_shape(tmp_path_factory.mktemp("shape"), name)) for name in CONFIGS}


@pytest.mark.parametrize(
    ("model", "cards", "count"),
    [
        ("Qwen2.5-0.5B", 8, 2),  # 14 heads: 7 divides them, but not 2 heads of keys
        ("Qwen2.5-7B", 1, 1),
        ("Qwen2.5-7B", 3, 2),  # 28 heads and 4 KV heads
        ("Qwen2.5-7B", 8, 4),
        ("Qwen2.5-14B", 5, 4),  # 40 heads: 5 divides them, but not 8 of keys
        ("Qwen2.5-14B", 8, 8),
    ],
)
def test_as_many_cards_are_taken_as_the_heads_can_be_shared_by(
    shapes: dict[str, ModelShape], model: str, cards: int, count: int
) -> None:
    plan = plan_serving(shapes[model], [80 * GIB] * cards, None, "bfloat16", 2048)
    assert plan.tensor_parallel == count
    assert plan.why.startswith(f"as many of {cards} GPU(s) as heads allow; room for ")


def test_more_cards_than_heads_of_keys_each_keep_one(shapes: dict[str, ModelShape]) -> None:
    """28 layers of heads of 128, in 16 bits."""
    few = replace(shapes["Qwen2.5-7B"], heads=32, kv_heads=4)
    found = {n: plan_serving(few, [80 * GIB] * 8, n, "bfloat16", 2048).kv_token for n in (1, 2, 4, 8)}
    assert found == {1: 2 * 28 * 4 * 128 * 2, 2: 2 * 28 * 2 * 128 * 2, 4: 2 * 28 * 128 * 2, 8: 2 * 28 * 128 * 2}


@pytest.mark.parametrize("asked", [3, 7, 16])
def test_a_number_that_the_model_does_not_allow_is_refused_with_those_that_it_does(
    shapes: dict[str, ModelShape], asked: int
) -> None:
    with pytest.raises(
        UsageError, match=rf"tensor_parallel {asked}: 28 heads and 4 KV heads cannot .* of 8 .*; set it to 1 or 2 or 4$"
    ):
        plan_serving(shapes["Qwen2.5-7B"], [80 * GIB] * 8, asked, "bfloat16", 2048)


def test_what_is_asked_for_is_taken_and_the_fullest_of_the_freest_decides(shapes: dict[str, ModelShape]) -> None:
    shape = shapes["Qwen2.5-7B"]
    plan = plan_serving(shape, [10 * GIB, 70 * GIB, 40 * GIB], 2, "bfloat16", 2048)
    assert plan.tensor_parallel == 2
    assert plan.weights == shape.parameters  # 2 bytes each, on two cards
    assert plan.room == (round(SHARE * 40 * GIB) - plan.weights - RUNTIME) // plan.kv_token
    assert f"room for {plan.room:,} tokens" in plan.why


def test_too_little_memory_is_reported_with_what_it_takes(shapes: dict[str, ModelShape]) -> None:
    shape = shapes["Qwen2.5-14B"]
    with pytest.raises(
        DoesNotFitError,
        match=r"max_length 16384: inference takes 3\d\.\d GiB on each of 1 GPU.* sequence, but 24\.0 GiB are",
    ):
        plan_serving(shape, [24 * GIB], None, "bfloat16", 16384)
    fitting = plan_serving(shape, [24 * GIB] * 2, None, "bfloat16", 16384)
    assert fitting.room is not None and fitting.room >= 16384
    with pytest.raises(DoesNotFitError, match=r"a lower infer\.max_length"):
        plan_serving(shape, [24 * GIB] * 2, None, "bfloat16", fitting.room + 1)


def test_where_memory_is_not_known_nothing_is_said_of_room(shapes: dict[str, ModelShape]) -> None:
    plan = plan_serving(shapes["Qwen2.5-7B"], [0, 0], None, "bfloat16", 2048)
    assert (plan.tensor_parallel, plan.room) == (2, None)


def test_quantised_weights_count_as_they_are_stored(tmp_path: Path) -> None:
    """GPTQ's integers as they are, its scales in what is computed in."""
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS["Qwen2.5-0.5B"], "quantization_config": {"bits": 4}}))
    inner = "model.layers.0.mlp.down_proj"
    write_safetensors(tmp_path / "a.safetensors", {f"{inner}.qweight": [4864 // 8, 896]}, "I32", 4)
    write_safetensors(tmp_path / "b.safetensors", {f"{inner}.scales": [38, 896]}, "F16", 2)
    shape = read_shape(tmp_path)
    for dtype, width in (("float16", 2), ("float32", 4)):
        plan = plan_serving(shape, [8 * GIB], None, dtype, 2048)
        assert plan.weights == 4864 * 896 // 2 + 38 * 896 * width
