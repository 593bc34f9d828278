"""What of a run is served, and by which engine; nothing is loaded for it."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import UsageError
from stages.contract.files import sha256_file, write_json
from stages.contract.recipe import Connector
from stages.contract.run import Run
from stages.host.serving import existing_run
from stages.models.connector import FILE
from stages.serve.served import served_run, system_prompt
from tests.conftest import need_model
from tests.serve.conftest import NAMES, SYSTEM

pytestmark = pytest.mark.usefixtures("environment")


def served(run: Run, engine: str | None = None, only: str | None = None, said: list[str] | None = None) -> Any:
    return served_run(run, engine, only, None, ([] if said is None else said).append)


def changed(run: Run, section: str, **values: Any) -> Run:
    part = getattr(run.recipe, section).model_copy(update=values)
    return replace(run, recipe=run.recipe.model_copy(update={section: part}))


def test_base_and_every_trained_adapter_have_their_names(tuned: Run) -> None:
    assert served(tuned).names == NAMES
    assert served(tuned, only="terse").names == ["terse"]
    assert served(tuned, only="base").names == ["base"]


def test_the_recipes_engine_serves_where_it_can(tuned: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = changed(tuned, "infer", engine="vllm")
    assert served(wanted).kind.name == "vllm"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    said: list[str] = []
    assert served(wanted, said=said).kind.name == "transformers"
    assert said[-1].startswith("infer.engine vllm: needs vllm, not installed here")
    with pytest.raises(UsageError, match="needs vllm"):
        served(wanted, engine="vllm")


def test_merged_adapters_are_served_by_vllm_one_at_a_time(tuned: Run) -> None:
    merged = changed(tuned, "infer", engine="vllm", merged=True)
    said: list[str] = []
    assert served(merged, said=said).kind.name == "transformers"
    assert "infer.merged: base and adapters have weights of their own" in said[-1]
    (weights,) = served(merged, only="formal").weights
    assert (weights.names, weights.adapters) == (["formal"], {})
    assert (weights.model / "model.safetensors").is_file()
    assert served(merged, only="base").kind.name == "vllm"


def test_adapters_with_a_connector_have_weights_of_their_own(tuned: Run, tmp_path: Path) -> None:
    """The connector here is a layer that the random Llama has, too."""
    from safetensors.torch import load_file, save_file

    run = replace(changed(tuned, "train", connector=Connector(data=[])), roots=replace(tuned.roots, runs=tmp_path))
    shutil.copytree(tuned.folder, run.folder)
    folder = run.path("train", "connector")
    folder.mkdir()
    name = "model.norm.weight"
    tensor = load_file(tuned.roots.models / "random-llama" / "model.safetensors")[name] * 2
    save_file({name: tensor}, folder / FILE)
    write_json(folder / "made.json", {"files": {FILE: sha256_file(folder / FILE)}})
    found = served(run)
    assert [weights.names for weights in found.weights] == [["base"], ["formal", "terse"]]
    assert found.names == NAMES
    base, connected = (weights.model for weights in found.weights)
    assert base == tuned.roots.models / "random-llama" and connected.parent == run.folder / "serve"
    with pytest.raises(UsageError, match=r"train\.connector: base and adapters have weights of their own"):
        served(run, engine="vllm")
    (alone,) = served(run, engine="vllm", only="formal").weights
    assert (alone.names, alone.model) == (["formal"], connected)


def test_no_more_tokens_than_positions(tuned: Run) -> None:
    assert served(tuned).max_length == 512
    assert served_run(tuned, None, None, 10**9, print).max_length == 8192  # as SmolLM2's config says


def test_pictures_leave_half_of_the_tokens_for_text(tuned: Run) -> None:
    """Where training has no limit of its own: the model's is larger than most contexts."""
    found = served(tuned)
    assert (found.reads_pictures, found.max_pixels) == (False, None)
    seeing = replace(found, weights=[replace(found.weights[0], model=need_model("tiny-qwen2.5-vl"))])
    assert seeing.reads_pictures
    assert seeing.max_pixels == 256 * 28 * 28
    assert replace(seeing, run=changed(tuned, "train", max_pixels=50_176)).max_pixels == 50_176


def test_what_is_not_there_is_named(tuned: Run) -> None:
    with pytest.raises(UsageError, match=r"other: no such model in .*; known models: base, formal, terse"):
        served(tuned, only="other")
    with pytest.raises(UsageError, match="train is not done, so there is nothing to serve"):
        served(replace(tuned, name="other"))
    with pytest.raises(UsageError, match=r"nowhere: no such run; known runs: job$"):
        existing_run("nowhere")
    assert existing_run("job").recipe.train.adapters == tuned.recipe.train.adapters


def test_the_run_of_a_recipe(tuned: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose and Kubernetes name a recipe; its run has the recipe's name unless LORRY_RUN names another."""
    monkeypatch.setenv("LORRY_RECIPE", "patent-qa")
    with pytest.raises(UsageError, match="patent-qa: no such run"):
        existing_run(None)
    assert existing_run("job").name == "job"
    monkeypatch.delenv("LORRY_RECIPE")
    with pytest.raises(UsageError, match="RUN: not given"):
        existing_run("")


def test_the_commonest_system_prompt(tuned: Run) -> None:
    assert system_prompt(served(tuned)) == SYSTEM
