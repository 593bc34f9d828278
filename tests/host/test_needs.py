"""Which stages compute on GPUs, by the recipe and the sizes of its models."""

from pathlib import Path

import pytest

from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import STAGES, Run
from stages.host.needs import preprocess_models, stages_on_gpus
from stages.host.runs import recipe_path
from stages.models.embedder import SMALL, needs_gpu
from tests.hardware.shapes import make_shape


def run_of(models: Path, recipe: str, profile: str | None, *overrides: str) -> Run:
    loaded = load_recipe(recipe_path(recipe), profile, overrides)
    return Run("r", loaded, Roots(models, models, models))


@pytest.mark.parametrize(
    ("recipe", "profile", "overrides", "models"),
    [
        (
            *("patent-qa", None, ()),
            {
                "preprocess.retrieval.embedder": "gme-Qwen2-VL-7B-Instruct",
                "preprocess.classifier": "Qwen2.5-VL-32B-Instruct",
            },
        ),
        ("patent-qa", "text", (), {}),
        ("patent-qa", "text", ("preprocess.classifier=rule",), {}),
        ("patent-qa", "tiny", (), {}),
        ("logic-choice", None, (), {}),
        (
            *("better-synth", None, ()),
            {
                "preprocess.data_juicer.process[8].image_text_similarity_filter.hf_clip": "clip-vit-base-patch32",
                "preprocess.data_juicer.process[9].image_captioning_mapper.hf_img2seq": "blip2-flan-t5-xl",
            },
        ),
        (
            *("better-synth", None),
            ("preprocess.data_juicer.process=[{image_text_similarity_filter: {hf_clip: c, accelerator: cpu}}]",),
            {},
        ),
    ],
)
def test_preprocess_computes_on_a_gpu_where_its_recipe_has_a_model_for_it(
    tmp_path: Path, recipe: str, profile: str | None, overrides: tuple[str, ...], models: dict[str, str]
) -> None:
    make_shape(tmp_path / "all-MiniLM-L6-v2", "Qwen2.5-0.5B")
    run = run_of(tmp_path, recipe, profile, *overrides)
    assert preprocess_models(run) == models
    expected = ("preprocess", "train", "infer") if models else ("train", "infer")
    assert stages_on_gpus(run, STAGES) == expected
    assert stages_on_gpus(run, ("eval",)) == ()


def test_an_embedder_of_texts_needs_a_gpu_once_it_is_not_small(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert needs_gpu(tmp_path), "its weights are not here: it may be large"
    weights = tmp_path / "model.safetensors"
    for size, expected in ((SMALL, False), (SMALL + 1, True)):
        with weights.open("wb") as file:
            file.truncate(size)
        assert needs_gpu(tmp_path) == expected
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    weights.write_bytes(b"tiny")
    assert needs_gpu(tmp_path), "a page's picture is a thousand tokens"
