"""`lorry export`: folders that other programs load, whole or not there, and never in the place of something else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from entrypoints.lorry import main
from stages.contract.errors import DoesNotFitError, UsageError
from stages.contract.files import read_json, sha256_file, write_json
from stages.contract.run import Run
from stages.host.exporting import MARK, Request, export
from stages.models import merge
from stages.models.chat_settings import chat_settings
from stages.models.rendering import Renderer
from tests.conftest import snapshot
from tests.results.made_runs import content_of, finish, make_recipe, make_run, outputs_of
from tests.train.test_small_jobs import write_model

Load: Any = AutoModelForCausalLM.from_pretrained
TOKENS = torch.arange(40).reshape(2, 20)


def write_adapter(run: Run, name: str, **lora: Any) -> None:
    """Put a random adapter in the place of a trained one."""
    folder = run.path("train", "adapters", name)
    torch.manual_seed(len(name))
    config = LoraConfig(r=4, init_lora_weights=False, **{"target_modules": "all-linear", **lora})
    tuned: Any = get_peft_model(Load(run.model(run.recipe.model.path, "model.path")), config)
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink()
    files = {path.name: sha256_file(path) for path in folder.iterdir()}
    write_json(folder / "made.json", {"key": "a key", "files": files})


def made_run(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str, **model: Any) -> Run:
    """A finished run with these adapters on a tiny base. `model` are keys of the recipe's section."""
    for variable in ("data", "models", "runs"):
        monkeypatch.setenv(f"LORRY_{variable.upper()}", str(folder / variable))
    (folder / "data" / "few").mkdir(parents=True)
    base = folder / "models" / "small"
    write_model(base, hidden_size=128)  # heads of 32, the smallest that vLLM has kernels for on a CPU
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A base\n")
    (base / "LICENSE").write_text("The licence.")
    recipe = make_recipe(folder, {name: ["main"] for name in names}, model={"path": "small", **model})
    run = make_run(folder, scores={"base": 20.0, **dict.fromkeys(names, 42.5)}, recipe=recipe)
    for name in names:
        write_adapter(run, name)
    return run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return made_run(tmp_path, monkeypatch, "plain")


def exported(folder: Path, **changes: Any) -> list[str]:
    """Export into `folder`; returns the lines."""
    wanted = {"run": "job", "adapter": None, "every": False, "merged": folder, "alone": None, "base": None, **changes}
    return list(export(Request(**wanted)))


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(TOKENS).logits
    return result


def tuned_logits(run: Run, name: str = "plain") -> torch.Tensor:
    return logits(PeftModel.from_pretrained(Load(run.roots.models / "small"), run.path("train", "adapters", name)))


def front_matter(folder: Path) -> dict[str, Any]:
    _, text, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def test_a_merged_model_is_an_ordinary_folder_with_the_adapters_logits(run: Run, tmp_path: Path) -> None:
    lines = exported(tmp_path / "out")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "LICENSE", "README.md", "Modelfile", MARK),
    }
    assert (logits(Load(out)) - tuned_logits(run)).abs().max() < 1e-5
    assert (logits(Load(out)) - logits(Load(run.roots.models / "small"))).abs().max() > 0.1
    assert read_json(out / "config.json") == read_json(run.roots.models / "small" / "config.json")
    assert AutoTokenizer.from_pretrained(out).decode([5, 6]) == AutoTokenizer.from_pretrained(
        run.roots.models / "small"
    ).decode([5, 6])
    commands = "\n".join(lines)
    for wanted in (
        f"vllm serve {out}",
        f"convert_hf_to_gguf.py {out} --outfile job-plain.gguf",
        f"ollama create job-plain -f {out}/Modelfile",
        f"hf upload OWNER/job-plain {out}",
    ):
        assert wanted in commands


def test_the_card_has_what_hubs_read_and_what_was_measured(run: Run, tmp_path: Path) -> None:
    exported(tmp_path / "out", base="maker/small")
    assert front_matter(tmp_path / "out") == {
        **{"base_model": "maker/small", "base_model_relation": "finetune", "library_name": "transformers"},
        **{"license": "apache-2.0", "pipeline_tag": "text-generation", "tags": ["lorry", "lora", "patent-qa"]},
    }
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| exact_match | 20.0 [10.0, 30.0] | 42.5 [32.5, 52.5] | +22.5 [+12.5, +32.5] | 40 |" in card
    samples = read_json(run.path("preprocess", "manifest.json"))["outputs"]["samples/train.jsonl"]["sha256"]
    assert samples in card and "task: patent_qa" in card and "loss 3.500 at the first entry" in card
    assert str(tmp_path) not in card


def test_a_card_says_why_there_are_no_scores_and_names_no_base_that_hubs_cannot_know(run: Run, tmp_path: Path) -> None:
    run.path("eval", "manifest.json").unlink()
    lines = exported(tmp_path / "out")
    assert "Not scored: eval has not run." in (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in front_matter(tmp_path / "out")
    assert any("--base OWNER/NAME" in line for line in lines)


def test_the_card_has_the_held_out_losses(run: Run, tmp_path: Path) -> None:
    def loss(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.25, "high": value + 0.25}

    over = {"loss": loss(-0.5), "beside": {"loss": loss(2.0)}}
    losses = {"base": {"loss": loss(2.0), "n": 9}, "plain": {"loss": loss(1.5), "n": 9, "over_base": over}}
    written = {name: content_of(path) for name, path in outputs_of(run, "eval").items()}
    finish(run, "eval", {**written, "losses.json": losses}, counts={"scored": 40})
    exported(tmp_path / "out")
    row = "| held-out loss | 2.000 [1.750, 2.250] | 1.500 [1.250, 1.750] | -0.500 [-0.750, -0.250] | 9 |"
    assert row in (tmp_path / "out" / "README.md").read_text()


def test_a_base_that_lies_where_fetch_puts_it_has_the_hubs_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "maker").mkdir(parents=True)
    (tmp_path / "models" / "maker" / "small").symlink_to(tmp_path / "models" / "small")
    made_run(tmp_path, monkeypatch, "plain", path="maker/small")
    exported(tmp_path / "out", merged=None, alone=tmp_path / "out")
    assert read_json(tmp_path / "out" / "adapter_config.json")["base_model_name_or_path"] == "maker/small"
    assert front_matter(tmp_path / "out")["base_model"] == "maker/small"


def test_an_adapter_alone_names_a_base_that_peft_finds(run: Run, tmp_path: Path) -> None:
    lines = exported(tmp_path / "out", merged=None, alone=tmp_path / "out")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("adapter_model.safetensors", "adapter_config.json", "README.md", MARK),
    }
    config = read_json(out / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(run.roots.models / "small")
    assert (logits(AutoModelForCausalLM.from_pretrained(out)) - tuned_logits(run)).abs().max() < 1e-5
    assert f"vllm serve {run.roots.models / 'small'} --enable-lora --max-lora-rank 8 " in "\n".join(lines)
    assert f"--base {run.roots.models / 'small'}" in "\n".join(lines)
    exported(out, merged=None, alone=out, base="maker/small")
    assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == "maker/small"


CONVERSATION = [{"role": "user", "content": "What is 木?"}]


@pytest.mark.parametrize("alone", [False, True], ids=["merged", "adapter"])
def test_a_template_of_the_recipe_goes_along_and_renders_as_training_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    run = made_run(tmp_path, monkeypatch, "plain", chat_template="plain")
    base, out = run.roots.models / "small", tmp_path / "out"
    add_first_token(base)
    shutil.rmtree(run.roots.runs)
    run = make_run(tmp_path, scores={"base": 1.0, "plain": 2.0}, recipe=run.recipe)
    write_adapter(run, "plain")
    exported(out, **({"merged": None, "alone": out} if alone else {}))
    tokenizer = AutoTokenizer.from_pretrained(out)
    rendered = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False)
    asked = Renderer(base, chat_settings(run)).render("x", CONVERSATION).tokens  # type: ignore[arg-type]
    assert rendered == asked and rendered[0] == tokenizer.bos_token_id
    assert rendered != AutoTokenizer.from_pretrained(base).apply_chat_template(
        CONVERSATION, add_generation_prompt=True, return_dict=False
    )


def add_first_token(model: Path) -> None:
    """Let a model's tokenizer begin every text with its first token."""
    path = model / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    special = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [special, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [0], "tokens": ["<|im_start|>"]}},
    }
    path.write_text(json.dumps(values), encoding="utf-8")


def test_thinking_as_the_recipe_sets_it_is_the_templates_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    thinks = "{% if enable_thinking is defined and not enable_thinking %}NO{% endif %}{{ messages[0].content }}"
    (tmp_path / "models" / "t.jinja").write_text(thinks)
    made_run(tmp_path, monkeypatch, "plain", chat_template="t.jinja", enable_thinking=False)
    exported(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == "NO" + CONVERSATION[0]["content"]
    asked = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, enable_thinking=True)
    assert asked == CONVERSATION[0]["content"]


def test_of_several_adapters_one_is_named_or_all_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made_run(tmp_path, monkeypatch, "plain", "mixed")
    with pytest.raises(UsageError, match=r"has 2 adapters \(mixed, plain\); name one, or give --all"):
        exported(tmp_path / "out")
    with pytest.raises(UsageError, match="no trained adapter 'plan'; did you mean 'plain'"):
        exported(tmp_path / "out", adapter="plan")
    assert not (tmp_path / "out").exists()
    exported(tmp_path / "out", every=True)
    for name in ("plain", "mixed"):
        assert (logits(Load(tmp_path / "out" / name)) - tuned_logits(run, name)).abs().max() < 1e-5


def test_only_what_an_export_wrote_is_replaced(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.md").write_text("mine")
    with pytest.raises(UsageError, match=r"has thesis.md, which no export wrote; name another folder"):
        exported(out)
    assert [path.name for path in out.iterdir()] == ["thesis.md"]
    (out / "thesis.md").unlink()
    exported(out)  # an empty folder is free
    exported(out)
    (out / "notes.txt").write_text("mine")
    before = snapshot(out)
    with pytest.raises(UsageError, match=r"has notes.txt"):
        exported(out)
    assert snapshot(out) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="exists and is no folder"):
        exported(tmp_path / "file")


def test_an_interrupted_export_leaves_the_earlier_one_and_nothing_else(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path / "out")
    before, there = snapshot(tmp_path / "out"), {path.name for path in tmp_path.iterdir()}

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merge, "_files_beside_weights", stop)
        for folder in (tmp_path / "out", tmp_path / "new"):
            with pytest.raises(KeyboardInterrupt):
                exported(folder)
    assert snapshot(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == there
    partial = tmp_path / ".new.partial"  # as a kill leaves it
    partial.mkdir()
    (partial / "model.safetensors").write_text("half")
    exported(tmp_path / "new")
    assert not partial.exists() and logits(Load(tmp_path / "new")).isfinite().all()


def refused(folder: Path, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        exported(folder)
    assert not folder.exists() and not folder.with_name(f".{folder.name}.partial").exists()


def test_what_cannot_be_exported_is_refused_with_its_cure(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=1000))
        refused(tmp_path / "out", DoesNotFitError, r"the merged model needs .* GB, but only 0.0 GB are free")
    weights = run.path("train", "adapters", "plain", "adapter_model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    refused(tmp_path / "out", UsageError, "has changed since train wrote it; run train again")
    weights.write_bytes(whole)
    config = run.roots.models / "small" / "config.json"
    write_json(config, {**read_json(config), "changed": 1})
    refused(tmp_path / "out", UsageError, "small: has changed since job was trained; restore it")


def test_a_base_in_gptq_cannot_be_merged_but_its_adapter_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_run(tmp_path, monkeypatch, "plain")
    config = run.roots.models / "small" / "config.json"
    write_json(config, {**read_json(config), "quantization_config": {"quant_method": "gptq", "bits": 4}})
    run.path("train", "manifest.json").unlink()  # which has the digest of the plain base
    result = CliRunner().invoke(main, ["export", "job", "--merged", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "small: is quantised (gptq), so no adapter can be merged into it; export with --adapter" in result.output
    result = CliRunner().invoke(main, ["export", "job", "--adapter", str(tmp_path / "out")])
    assert result.exit_code == 0 and (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_an_adapter_of_nf4_is_merged_into_the_bases_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_run(tmp_path, monkeypatch, "plain")
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("load_in_4bit: false", "load_in_4bit: true"))
    lines = exported(tmp_path / "out")
    assert any("in 4 bits (NF4)" in line for line in lines)
    assert "in 4 bits (NF4)" in (tmp_path / "out" / "README.md").read_text()
    assert (logits(Load(tmp_path / "out")) - tuned_logits(run)).abs().max() < 1e-5


ALONE = """
import importlib.abc, sys
class Ours(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("stages", "entrypoints", "recipes", "benchmarks"):
            raise ImportError(f"{name} is Lorry's")
sys.meta_path.insert(0, Ours())
"""
"""Lets a process import nothing of Lorry."""

BY_TRANSFORMERS = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
merged, adapter = sys.argv[1:]
tokens = AutoTokenizer.from_pretrained(merged)("What is a tree?", return_tensors="pt").input_ids
with torch.inference_mode():
    one = AutoModelForCausalLM.from_pretrained(merged)(tokens).logits
    two = AutoModelForCausalLM.from_pretrained(adapter)(tokens).logits
print("off", float((one - two).abs().max()), float((one).abs().max()))
"""

BY_VLLM = """
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
merged, adapter = sys.argv[1:]
import json, pathlib
base = json.loads((pathlib.Path(adapter) / "adapter_config.json").read_text())["base_model_name_or_path"]
asked = [{"role": "user", "content": "What is a tree?"}]
how = SamplingParams(max_tokens=8, temperature=0.0, logprobs=1)
small = {"max_model_len": 256, "enforce_eager": True, "dtype": "float32", "max_num_seqs": 2}
one = LLM(merged, **small).chat(asked, how, use_tqdm=False)[0].outputs[0]
llm = LLM(base, enable_lora=True, max_lora_rank=8, **small)
two = llm.chat(asked, how, use_tqdm=False, lora_request=LoRARequest("tuned", 1, adapter))[0].outputs[0]
print("same", one.token_ids == two.token_ids, len(one.token_ids))
"""


@pytest.mark.long
@pytest.mark.parametrize("program", [BY_TRANSFORMERS, BY_VLLM], ids=["transformers and PEFT", "vLLM"])
def test_both_are_loaded_by_a_process_without_lorrys_code(run: Run, tmp_path: Path, program: str) -> None:
    exported(tmp_path / "merged", alone=tmp_path / "adapter")
    environment = {
        **{"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": ""},
        **{"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
    }
    done = subprocess.run(
        [sys.executable, "-c", ALONE + program, str(tmp_path / "merged"), str(tmp_path / "adapter")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.strip().splitlines()[-1].split()
    if program == BY_VLLM:
        assert said == ["same", "True", "8"]
    else:
        assert float(said[1]) < 1e-5 < float(said[2])
