"""The five jobs: their overrides fit the recipes, and their models without contents are read as others are."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import job_models
from benchmarks.job_hooks import sitecustomize
from benchmarks.jobs import JOBS, Job, Named
from benchmarks.random_models import make_model
from benchmarks.training import config_of
from stages.contract.recipe import load_recipe
from stages.models.shape import read_shape
from tests.conftest import REPOSITORY

NAME = "Qwen2.5-VL-7B"


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", JOBS)
def test_the_overrides_of_a_job_fit_its_recipe(name: str, tiny: bool) -> None:
    named = Named(name, JOBS[name], tiny)
    recipe = load_recipe(REPOSITORY / "recipes" / f"{named.job.recipe}.yaml", named.job.profile, tuple(named.sets))
    assert recipe.train.log_every == 1, "a step that is not logged has no time"
    assert recipe.model.path.removeprefix("tiny-") in (*job_models.SHAPES, job_models.MGM)


def test_models_have_the_published_numbers_of_parameters() -> None:
    from stages.models.config_sizes import decoder_sizes
    from stages.models.config_tensors import make_tensors

    found = {}
    for name in ("Qwen2.5-VL-32B-Instruct", "Qwen2.5-7B-Instruct", "CodeLlama-7b-Instruct-hf"):
        config = job_models.SHAPES[name]
        tensors = make_tensors(config, decoder_sizes(config, Path(name)), Path(name))
        found[name] = round(sum(_product(shape) for _, shape, _ in tensors) / 1e9, 2)
    # CodeLlama has 6.74 billion with its own 32,016 tokens
    assert found == {
        "Qwen2.5-VL-32B-Instruct": 33.45,
        "Qwen2.5-7B-Instruct": 7.62,
        "CodeLlama-7b-Instruct-hf": 6.88,
    }


def _product(sizes: tuple[int, ...]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A model folder whose files have no contents."""
    folder = tmp_path / "model"
    make_model(folder, config_of(NAME, True), has_contents=False)
    (folder / sitecustomize.NO_WEIGHTS).touch()
    return folder


def test_files_without_contents_have_their_sizes_and_take_no_disk(empty: Path) -> None:
    (path,) = empty.glob("*.safetensors")
    assert read_shape(empty).disk_bytes > 70_000_000
    assert path.stat().st_size > 70_000_000 > 100 * path.stat().st_blocks * 512


def test_weights_of_a_folder_without_any_are_made_the_same_each_time(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, modeling_utils

    monkeypatch.setattr(
        modeling_utils.PreTrainedModel, "from_pretrained", modeling_utils.PreTrainedModel.from_pretrained
    )
    sitecustomize.make_weights_on_device(modeling_utils)
    first, second = (AutoModelForImageTextToText.from_pretrained(empty, dtype=torch.bfloat16) for _ in range(2))
    assert first.dtype == torch.bfloat16
    assert not any(weight.is_meta for weight in first.parameters())
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert first.get_output_embeddings().weight.float().std().item() == pytest.approx(0.02, rel=0.1)


def test_what_the_hooks_replace_exists() -> None:
    from stages.engines import transformers_engine, vllm_engine, vllm_options
    from stages.train import attention

    names: list[tuple[Any, tuple[str, ...]]] = [
        (vllm_engine.VllmEngine, ("_sampling", "_completion", "generate", "__init__")),
        (transformers_engine.TransformersEngine, ("_completion", "generate", "__init__")),
        (transformers_engine._Sampling, ("__call__",)),
        (transformers_engine, ("GenerationConfig",)),
        (vllm_options, ("vllm_arguments",)),
        (attention, ("KERNELS",)),
    ]
    for holder, wanted in names:
        assert set(wanted) <= set(vars(holder)), holder
    kernels = {one for job in JOBS.values() if (one := _kernel(job))}
    assert kernels and kernels <= set(attention.KERNELS)


def _kernel(job: Job) -> str | None:
    return job.environment.get("LORRY_JOBS_KERNEL")
