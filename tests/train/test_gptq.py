"""LoRA on SmolLM2 in GPTQ's 4 bits, by the train command on the CPU."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.contract.errors import UsageError
from stages.contract.files import FileHashes, read_json, read_jsonl
from stages.models import gptq
from tests.conftest import Lorry
from tests.train.conftest import Training

BASE = "SmolLM2-135M-Instruct-GPTQ-Int4"


@pytest.mark.long
def test_an_adapter_learns_on_it_and_loads_again(lorry: Lorry, gptq_base: Path, tmp_path: Path) -> None:
    overrides = (
        *(f"model.path={BASE}", "train.target_modules=[all-linear]", "train.effective_batch=8"),
        *("train.epochs=2", "train.learning_rate=2e-3", "train.warmup_ratio=0", "train.log_every=1"),
        *("train.gradient_checkpointing=false", "train.checkpoint_every=1000"),
    )
    before = FileHashes(tmp_path / "none").tree_digest(gptq_base)
    training = Training(lorry, overrides).with_samples(16, validation=0)
    code, output = training(OMP_NUM_THREADS="1")
    assert code == 0, output
    losses = [entry["loss"] for entry in read_jsonl(training.run.path("train", "metrics.jsonl")) if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < 0.7 * losses[0]
    assert FileHashes(tmp_path / "none").tree_digest(gptq_base) == before, "the base is never written to"
    adapter = training.run.path("train", "adapters", "tuned")
    assert read_json(adapter / "adapter_config.json")["base_model_name_or_path"] == BASE

    import torch
    from safetensors.torch import load_file

    from stages.engines.engine import EngineSettings
    from stages.engines.transformers_engine import TransformersEngine
    from stages.models.rendering import Renderer

    learnt = load_file(adapter / "adapter_model.safetensors")
    assert len(learnt) == 30 * 7 * 2
    assert all(weight.any() for name, weight in learnt.items() if "lora_B" in name), "every module learns"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        engine = TransformersEngine(EngineSettings(gptq_base, {"tuned": adapter}, "float32", 12, 2, 256, 0))
        messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "What is train3?"}]
        prompt = Renderer(gptq_base).render("x", messages)  # type: ignore[arg-type]
        tuned, plain = (engine.generate([prompt], name)[0].text for name in ("tuned", None))
    finally:
        torch.set_num_threads(threads)
    assert tuned.startswith("It is train")
    assert tuned != plain


def test_a_base_in_4_bits_is_not_put_in_4_bits_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    job: Any = SimpleNamespace(model=tmp_path / "model", settings=SimpleNamespace(load_in_4bit=True))
    from stages.train.base import quantisation_options

    with pytest.raises(UsageError, match=r"its weights are quantised already \(gptq\)"):
        quantisation_options(job)


def test_without_a_library_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    loading = gptq.patch_gptq_kernels(tmp_path, on_card=False, training=True)
    with pytest.raises(UsageError, match="its GPTQ weights need gptqmodel and optimum, which this Python lacks; run"):
        loading.__enter__()


@pytest.mark.kill
def test_without_a_library_the_command_ends_in_that_line(lorry: Lorry, gptq_base: Path, tmp_path: Path) -> None:
    """As where gptqmodel was never installed: Python finds no such package."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name in ('gptqmodel', 'auto_gptq') else found(name, *a)\n"
    )
    training = Training(lorry, (f"model.path={BASE}",)).with_samples(4, validation=0)
    code, output = training(PYTHONPATH=str(tmp_path))
    assert code == 2
    assert "its GPTQ weights need gptqmodel, which this Python lacks; run" in output.strip().splitlines()[-1]
