"""LLaVA-1.5-7B's shape, and what either phase of its training takes."""

import pytest

from stages.contract.recipe import Adapter, Connector, Train
from stages.hardware.fit import disk_bytes, plan_training, recipe_way
from stages.hardware.memory import Lengths, adapted_modules, trained_parameters
from stages.models.shape import ModelShape, read_shape
from tests.hardware.shapes import make_llava_shape

GIB = 1024**3
CARD = round(23.63 * GIB)
"""Memory of an RTX 4090, as CUDA reports it: the original's card."""
CONNECTOR_PARAMETERS = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
RECIPE = Train(
    adapters=[Adapter(name="tuned")],
    connector=Connector(),
    rank=16,
    effective_batch=128,
    max_length=1024,
    gradient_checkpointing=True,
)
LENGTHS = Lengths(700, 100)


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return read_shape(make_llava_shape(tmp_path_factory.mktemp("llava")))


def test_what_its_config_leaves_out_is_a_7b_llama_s(shape: ModelShape) -> None:
    assert (shape.hidden, shape.layers, shape.heads, shape.intermediate) == (4096, 32, 32, 11008)
    assert (shape.vocabulary, shape.kv_heads, shape.head_size, shape.tied) == (32064, 32, 128, False)
    assert shape.parameters == pytest.approx(7.06e9, rel=0.005)


def test_lora_is_the_language_model_s_alone(shape: ModelShape) -> None:
    adapted = adapted_modules(shape, RECIPE)
    assert len(adapted) == 32 * 7
    assert all(name.startswith("language_model.model.layers.") for name in adapted)
    every = adapted_modules(shape, RECIPE.model_copy(update={"freeze_vision": False}))
    assert len(every) == 32 * 7 + 24 * 6, "of all-linear the connector is none, nor is the head"
    layer = 4 * 2 * 4096 + 3 * (4096 + 11008)
    assert trained_parameters(shape, RECIPE) == 32 * 16 * layer


def test_the_first_phase_has_an_optimizer_for_the_connector_alone(shape: ModelShape) -> None:
    first = RECIPE.connector_settings()
    assert trained_parameters(shape, first) == CONNECTOR_PARAMETERS
    assert adapted_modules(shape, first) == []
    found = recipe_way(shape, first, 1, "bfloat16", LENGTHS).estimate
    assert found.adapter == found.gradients == 4 * CONNECTOR_PARAMETERS
    assert found.optimizer == 8 * CONNECTOR_PARAMETERS
    assert found.weights == 2 * (sum(weight.count for weight in shape.weights) - CONNECTOR_PARAMETERS)


def test_both_phases_fit_24_gb_where_all_weights_trained_did_not(shape: ModelShape) -> None:
    """The original's full fine-tuning of 3 billion parameters died on such a card, short of 500 MiB."""
    for settings in (RECIPE.connector_settings(), RECIPE):
        way = plan_training(shape, settings, 1, "bfloat16", CARD, LENGTHS)
        assert way.fits(CARD) and way.step.effective_batch == settings.effective_batch
        assert way.sharding == "none"
    small = round(12 * GIB)
    assert not plan_training(shape, RECIPE.connector_settings(), 1, "bfloat16", small, LENGTHS).fits(small)


def test_nothing_of_the_first_phase_is_sharded_or_in_4_bits(shape: ModelShape) -> None:
    settings = RECIPE.model_copy(update={"sharding": "zero3", "load_in_4bit": False})
    assert plan_training(shape, settings.connector_settings(), 4, "bfloat16", None, LENGTHS).sharding == "none"


def test_the_disk_holds_both(shape: ModelShape) -> None:
    assert disk_bytes(shape, RECIPE) == (
        disk_bytes(shape, RECIPE.connector_settings())
        + disk_bytes(shape, RECIPE.model_copy(update={"connector": None}))
    )
