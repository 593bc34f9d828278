"""What training MGM-2B takes, from the headers of a folder of its true shape."""

from dataclasses import replace
from pathlib import Path

import pytest

from stages.contract.recipe import Train
from stages.hardware.memory import (
    Estimate,
    Lengths,
    adapted_modules,
    adapter_parameters,
    estimate_memory,
    trained_parameters,
)
from stages.hardware.step import StepPlan
from stages.models.shape import ModelShape, read_shape
from tests.conftest import Lorry
from tests.hardware.shapes import write_safetensors

LENGTHS = Lengths(longest=1024, answer=128)
PICTURE = 2880 * 192 * 192
"""Numbers in the large map of one picture."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from stages.models.mgm import MgmConfig, MgmForConditionalGeneration

    folder = tmp_path_factory.mktemp("models")
    with torch.device("meta"):
        network = MgmForConditionalGeneration(MgmConfig())
    network.config.save_pretrained(folder / "MGM-2B")
    shapes = {name: list(t.shape) for name, t in network.state_dict().items() if name != "lm_head.weight"}
    write_safetensors(folder / "MGM-2B" / "model.safetensors", shapes)
    return folder


@pytest.fixture(scope="module")
def shape(models: Path) -> ModelShape:
    return read_shape(models / "MGM-2B")


def settings(**values: object) -> Train:
    fields = {"adapters": [{"name": "a"}], "gradient_checkpointing": True, "rank": 16, "effective_batch": 128}
    return Train.model_validate({**fields, **values})


def estimate(shape: ModelShape, train: Train, samples: int = 1) -> Estimate:
    """The estimate for passes of so many samples."""
    layers = shape.layers if train.gradient_checkpointing else 0
    step = StepPlan(train.effective_batch, 1, samples * LENGTHS.longest, layers)
    return estimate_memory(shape, train, step, "bfloat16", "none", LENGTHS)


def test_parts_are_distinguished_by_their_names(shape: ModelShape) -> None:
    assert shape.parameters == 3_019_166_144 and shape.tied and shape.kv_heads == 1 and shape.head_size == 256
    adapted = adapted_modules(shape, settings())
    assert len(adapted) == 18 * 7 and all(name.startswith("model.language_model.layers.") for name in adapted)
    # of each layer: query and output 2048 to 2048, key and value 2048 to 256, gate, up and down 2048 to 16384
    assert adapter_parameters(shape, settings()) == 18 * 16 * (2 * 4096 + 2 * 2304 + 3 * 18432)
    first = settings(connector={"data": ["pretrain"], "effective_batch": 256}).connector_settings()
    assert trained_parameters(shape, first) == 6_295_552 + 1_051_648 + 2 * 2_955_904 and not adapted_modules(
        shape, first
    )


def test_one_picture_at_a_time_is_in_the_estimate(shape: ModelShape) -> None:
    least = settings(target_modules=["q_proj"], rank=1)
    assert estimate(shape, least).activations == 16 * PICTURE  # more than a layer of 1024 tokens, and freed before it
    assert estimate(shape, settings(), 16).activations > 16 * PICTURE
    first = settings(connector={"data": ["pretrain"], "effective_batch": 256}).connector_settings()
    without = replace(shape, vision_aux=None)
    kept = estimate(shape, first, 8).activations - estimate(without, first, 8).activations
    assert kept == 8 * 5 * PICTURE
    whole = first.model_copy(update={"gradient_checkpointing": False})
    assert estimate(shape, whole, 8).activations - estimate(without, whole, 8).activations == 8 * 15 * PICTURE
    assert estimate(shape, first).activations > (5 + 20) * PICTURE


def test_plan_for_24_gb(models: Path, tmp_path: Path) -> None:
    lorry = Lorry(tmp_path, models, tmp_path / "runs", {"CUDA_VISIBLE_DEVICES": ""})
    asked = ("entrypoints.lorry", "plan", "better-synth", "--profile", "mgm", "--target", "rtx4090")
    done = lorry(*asked)
    assert done.code == 0, done.output
    assert "MGM-2B, 3.02 billion parameters, on rtx4090 of 24 GiB, in bfloat16" in done.lines[0]
    assert "of 23.6 GiB on each GPU" in done.lines[-1] and done.lines[-1].startswith("fits")
    rows = [line.split() for line in done.lines if line.startswith("weights ")]
    assert float(rows[-1][-1]) == pytest.approx(2 * 3_019_166_144 / 2**30, abs=0.01)
    assert "the fastest way does not fit: " in done.output and "fits with passes of at most " in done.output
