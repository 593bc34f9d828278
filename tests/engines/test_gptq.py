"""A base in GPTQ's 4 bits in the transformers engine: SmolLM2, quantised by recipes/demo_models.py."""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import UsageError
from stages.engines.engine import EngineSettings
from stages.models import gptq
from stages.models.merge import write_merged_copy
from stages.models.rendering import Renderer

QUESTIONS = ("What is the capital of France?", "Which is larger, a lake or an ocean?", "What does a valve do?")
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(gptq_base: Path) -> Iterator[Path]:
    """The model, and one thread: unpacking is many small steps, in which two threads wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield gptq_base
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def network(base: Path) -> Any:
    """The base as training has it."""
    import torch
    from transformers import AutoModelForCausalLM

    with gptq.patch_gptq_kernels(base, on_card=False, training=True):
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)


@pytest.fixture(scope="module")
def adapters(base: Path, network: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters with random weights, large enough to change answers."""
    import torch
    from peft import LoraConfig, get_peft_model

    folders = {}
    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)
        model = get_peft_model(network, LoraConfig(r=8, target_modules=MODULES, init_lora_weights=False))
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(folders[name])
        model.unload()
    return folders


def test_adapters_answer_each_in_its_own_way_and_leave_the_base_alone(base: Path, adapters: dict[str, Path]) -> None:
    from stages.engines.transformers_engine import TransformersEngine

    engine = TransformersEngine(EngineSettings(base, adapters, "float32", 8, 3, 256, 0))
    renderer = Renderer(base)
    prompts = [renderer.render(str(i), [{"role": "user", "content": text}]) for i, text in enumerate(QUESTIONS)]
    plain = engine.generate(prompts, None)
    assert plain[0].text == "The capital of France is Paris."
    one, two = engine.generate(prompts, "one"), engine.generate(prompts, "two")
    assert one != two and plain not in (one, two)
    assert engine.generate(prompts, None) == plain


@pytest.mark.parametrize("answered_before", [False, True])
def test_the_gradient_goes_through_the_base(network: Any, answered_before: bool) -> None:
    """gptqmodel's own choice on a CPU gives none once it has computed for inference, and says nothing."""
    import torch

    module = network.model.layers[3].mlp.up_proj
    if answered_before:
        with torch.no_grad():
            module.eval()(torch.ones(1, module.in_features))
    module.train()
    x = torch.randn(5, module.in_features, requires_grad=True)
    module(x).sum().backward()
    weights = module.dequantize_weight().float()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weights.sum(1).expand(5, -1), rtol=1e-4, atol=1e-5)


def test_it_computes_nearly_what_the_plain_model_does(network: Any, language_model: Path, base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32, local_files_only=True).eval()
    tokens = AutoTokenizer.from_pretrained(base)("A lever turns about a shaft, and a spring", return_tensors="pt")
    with torch.inference_mode():
        logits = [model.eval()(input_ids=tokens["input_ids"]).logits[0, 3:] for model in (plain, network)]
    agree = torch.nn.functional.cosine_similarity(*logits, dim=-1)
    assert agree.mean() > 0.95


def test_loading_leaves_no_patch_behind(network: Any) -> None:
    from transformers import GPTQConfig

    assert GPTQConfig(bits=4).backend == "auto"
    assert not {"TORCHDYNAMO_DISABLE", "GPTQ_TORCH_CACHE_WEIGHTS"} & set(os.environ)


def test_an_adapter_is_never_merged_into_it(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is quantised \(gptq\), so no adapter can be merged into it; set infer"):
        write_merged_copy(base, tmp_path / "adapter", tmp_path / "merged", "float32")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        ({"gptqmodel", "optimum"}, "gptqmodel"),
        ({"auto_gptq", "optimum"}, "auto_gptq"),
        ({"gptqmodel", "auto_gptq", "optimum"}, "gptqmodel"),  # as transformers decides
        ({"auto_gptq"}, "need optimum, which this Python lacks"),
        ({"optimum"}, "need gptqmodel, which this Python lacks"),
        (set(), "need gptqmodel and optimum, which this Python lacks"),
    ],
)
def test_one_loader_for_both_libraries(here: set[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in here else None)
    if expected in here:
        assert gptq.gptq_library(Path("m")) == expected
        return
    with pytest.raises(UsageError, match=expected):
        gptq.gptq_library(Path("m"))


def test_other_bases_load_without_gptqmodel(tmp_path: Path) -> None:
    from peft.tuners.lora import gptq as in_peft

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    before = in_peft.is_gptqmodel_available
    with gptq.patch_gptq_kernels(tmp_path, on_card=False, training=True):
        assert not in_peft.is_gptqmodel_available()
    assert in_peft.is_gptqmodel_available is before
