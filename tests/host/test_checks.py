"""Mistakes are found before the first stage, all at once, and without a library that takes seconds to import."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import Exit, LorryError
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import CONTRACT_VERSION, STAGES, Run
from stages.host.checks import refuse_mistakes
from stages.tasks import settle_recipe
from tests.conftest import Lorry, make_data
from tests.hardware.recorded import Box
from tests.hardware.shapes import make_gptq_shape, make_llava_shape, make_shape

GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.fixture
def mounts(lorry: Lorry, tmp_path: Path) -> Lorry:
    """Mounts with data of the minimal recipe, and models of true shapes without weights."""
    models = tmp_path / "models"
    for name in ("SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"):
        make_shape(models / name, "Qwen2.5-0.5B")
    make_llava_shape(models / "llava")
    make_gptq_shape(models / "gptq", "Qwen2.5-0.5B")
    make_data(lorry.data / "few", documents=1, pages=1)
    return replace(
        lorry, models=models, extra={"LORRY_TARGET": "cpu", "CUDA_VISIBLE_DEVICES": "", "LORRY_GPU_DENY": ""}
    )


@pytest.fixture
def refused(mounts: Lorry, recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that returns the lines of a refusal and its exit code."""
    for name, value in mounts.extra.items():
        monkeypatch.setenv(name, value)

    def check(*overrides: str, stages: tuple[str, ...] = STAGES, machine: bool = True) -> tuple[list[str], Exit]:
        roots = Roots(mounts.data, mounts.models, mounts.runs)
        overrides = ("infer.engine=transformers", *overrides)
        recipe = settle_recipe(load_recipe(recipe_file, overrides=overrides), str(recipe_file), roots.data)
        try:
            refuse_mistakes(Run("r", recipe, roots), stages, machine)
        except LorryError as error:
            return str(error).splitlines(), error.exit_code
        return [], Exit.DONE

    return check


def test_a_sound_recipe_has_no_mistake(refused: Any) -> None:
    assert refused() == ([], Exit.DONE)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("data.path=nowhere",), "nowhere: no such data folder; set data.path to a folder below LORRY_DATA"),
        (("model.path=nowhere",), "nowhere: no such model folder; set model.path to a folder below LORRY_MODELS"),
        (
            ("model.path=Qwen/Qwen3-0.6B",),
            "Qwen/Qwen3-0.6B: no such model folder; if this is its name on a hub, run `lorry fetch Qwen/Qwen3-0.6B`;"
            " set model.path to a folder",
        ),
        (("preprocess.retrieval.embedder=Alibaba/gte",), "run `lorry fetch Alibaba/gte`; set prepro"),
        (("model.swift_type=lama",), "model.swift_type: ms-swift has no 'lama'; did you mean 'llama'"),
        (
            ("model.path=llava", "model.swift_type=qwen2"),
            "model.swift_type: 'qwen2' is for Qwen2ForCausalLM, but ",
        ),
        (("model.swift_template=chtml",), "model.swift_template: ms-swift has no 'chtml'; did you mean 'chatml'"),
        (
            ("train.adapters=[{name: a, data: [train, mroe]}]",),
            "train.adapters: the data mix of a names 'train', which ",
        ),
        (("model.path=gptq", "infer.merged=true"), "gptq: is quantised (gptq), so no adapter can be merged into it"),
        (("model.path=gptq", "train.load_in_4bit=true"), "gptq: its weights are quantised already (gptq)"),
        (("model.path=gptq", "train.connector={}"), "gptq: train.connector needs a base in 16 bits or more"),
        (
            ("model.path=llava", "train.freeze_vision=false", "infer.engine=vllm"),
            "train.freeze_vision: false adapts the vision tower of ",
        ),
        (("train.precision=float16",), "train.precision float16: a CPU trains in float32 only"),
        (("train.load_in_4bit=true",), "train.load_in_4bit: bitsandbytes has no kernels for target cpu"),
        (("train.sharding=zero3",), "train.sharding"),
        (("train.effective_batch=7",), ""),
    ],
)
def test_a_mistake_of_the_recipe_is_found(refused: Any, overrides: tuple[str, ...], line: str) -> None:
    lines, code = refused(*overrides)
    if not line:
        assert lines == []
        return
    assert code in (Exit.USAGE, Exit.DOES_NOT_FIT)
    assert any(line in one for one in lines), lines


def test_every_mistake_has_its_line(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_TARGET", "h200")
    wrong = ("data.path=nil", "model.path=none", "model.swift_type=lama", "model.swift_template=chtml")
    lines, code = refused(*wrong, "preprocess.retrieval.embedder=nothing")
    assert [line.partition(": ")[0].rpartition("/")[2] for line in lines] == [
        *("nil", "nothing", "none", "model.swift_type", "model.swift_template", "target 'h200'")
    ]
    assert code == Exit.USAGE


def test_each_stage_finds_its_own(refused: Any) -> None:
    wrong = ("data.path=nil", "model.path=none", "preprocess.retrieval.embedder=nothing")
    found = {stage: refused(*wrong, stages=(stage,))[0] for stage in STAGES}
    assert {stage: len(lines) for stage, lines in found.items()} == {"preprocess": 2, "train": 1, "infer": 1, "eval": 0}
    assert "none: no such model folder" in found["train"][0]


def test_a_path_from_the_current_folder_is_no_name_on_a_hub(
    refused: Any, mounts: Lorry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mounts.models.parent)
    lines, _ = refused("model.path=models/gptq", stages=("train",))
    assert f"a path is relative to the model mount, and {mounts.models}/gptq is elsewhere; set model.path" in lines[0]
    assert "lorry fetch" not in lines[0]


def test_a_damaged_model_is_found(refused: Any, mounts: Lorry) -> None:
    weights = mounts.models / "SmolLM2-135M-Instruct" / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 1)
    lines, code = refused(stages=("train",))
    assert (len(lines), code) == (1, Exit.USAGE)
    assert lines[0].startswith(f"{weights}: damaged (")


def test_a_data_file_is_for_conversations_only(refused: Any, mounts: Lorry) -> None:
    file = mounts.data / "few" / "questions.jsonl"
    for stages in (STAGES, ("preprocess",)):
        lines, code = refused("data.path=few/questions.jsonl", stages=stages)
        assert lines == [f"data.path: {file} is a file, but patent_qa reads a folder; name the folder"]
        assert code == Exit.USAGE


def test_a_data_folder_without_documents_is_found(refused: Any, mounts: Lorry) -> None:
    shutil.rmtree(mounts.data / "few" / "documents")
    lines, code = refused()
    assert (code, len(lines)) == (Exit.DATA, 1)
    assert "documents: no documents; put the PDFs there" in lines[0]


def test_python_files_that_would_have_to_run_are_found(refused: Any, mounts: Lorry) -> None:
    path = mounts.models / "SmolLM2-135M-Instruct" / "config.json"
    config = {**json.loads(path.read_text()), "model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    path.write_text(json.dumps(config))
    assert any("its Python files (own.py) would have to run; set model.trust" in line for line in refused()[0])
    assert not any("Python files" in line for line in refused("model.trust_remote_code=true")[0])


def test_a_model_type_that_the_engine_cannot_serve_is_found(refused: Any, mounts: Lorry) -> None:
    config = mounts.models / "SmolLM2-135M-Instruct" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "mgm"}))
    lines, _ = refused("infer.engine=vllm", stages=("infer",), machine=False)
    assert "vllm cannot serve mgm models; set infer.engine to transformers" in lines[0]


def test_a_missing_library_is_found_and_those_that_the_recipe_does_not_need_are_not(
    refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.host import needs

    there = needs.importlib.util.find_spec
    gone = {"data_juicer", "ray", "vllm", "peft"}
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None if name in gone else there(name))
    lines, code = refused()
    assert (lines, code) == (
        ["train: needs peft, not installed here; run `make setup`, or `lorry launch` with Docker"],
        Exit.USAGE,
    )


@pytest.mark.parametrize(
    ("variables", "overrides", "line", "code"),
    [
        ({"LORRY_TARGET": "xyz"}, (), "target 'xyz': no such target; known targets: cpu, ", Exit.USAGE),
        ({"LORRY_TARGET": "h100"}, (), "LORRY_TARGET=h100: needs compute capability 9.0 or higher", Exit.DOES_NOT_FIT),
        ({"LORRY_GPU_DENY": "99"}, (), "LORRY_GPU_DENY=99", Exit.USAGE),
        ({"LORRY_GPU_DENY": "0,1,2,3,4,5,6,7"}, (), "denies every GPU here", Exit.DOES_NOT_FIT),
        ({}, ("infer.engine=vllm", "infer.tensor_parallel=5"), "infer.tensor_parallel 5: 14 heads", Exit.USAGE),
    ],
)
def test_a_mistake_about_the_cards_is_found(
    box: Box,
    refused: Any,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    overrides: tuple[str, ...],
    line: str,
    code: Exit,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for name, value in {"LORRY_TARGET": "", **variables}.items():
        monkeypatch.setenv(name, value)
    lines, found = refused(*overrides)
    assert (len(lines), found) == (1, code), lines
    assert line in lines[0]


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ((), ""),  # a small embedder of texts
        (("preprocess.classifier=model",), "preprocess.classifier (SmolLM2-135M-Instruct): "),
        (("preprocess.retrieval.embedder=gme",), "preprocess.retrieval.embedder (gme): "),
        (("preprocess.retrieval.embedder=large",), "preprocess.retrieval.embedder (large): "),
    ],
)
def test_preprocess_without_its_card_is_refused_before_a_page_is_rendered(
    box: Box, refused: Any, mounts: Lorry, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], needed: str
) -> None:
    make_shape(mounts.models / "large", "Qwen2.5-7B")
    (mounts.models / "gme").mkdir()
    (mounts.models / "gme" / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (mounts.models / "gme" / "model.safetensors").write_bytes(b"small")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("LORRY_TARGET", "a800")
    assert refused(*overrides, stages=("preprocess",)) == ([], Exit.DONE), "with GPUs"
    box.keep(0)
    lines, code = refused(*overrides, stages=("preprocess",))
    if not needed:
        assert (lines, code) == ([], Exit.DONE)
        return
    assert (len(lines), code) == (1, Exit.DOES_NOT_FIT), lines
    assert lines[0].startswith(f"{needed}LORRY_TARGET=a800: needs a GPU, but none is visible; give it one (")
    monkeypatch.setenv("LORRY_TARGET", "cpu")
    assert refused(*overrides, stages=("preprocess",)) == ([], Exit.DONE)


@pytest.mark.parametrize("stage", ["preprocess", "train", "infer"])
def test_shards_that_are_all_done_are_merged_without_a_card(
    box: Box, refused: Any, mounts: Lorry, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    make_shape(mounts.models / "large", "Qwen2.5-7B")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("LORRY_TARGET", "a800")
    box.keep(0)
    embedder = "preprocess.retrieval.embedder=large"
    for number in range(2):
        assert refused(embedder, stages=(stage,))[1] == Exit.DOES_NOT_FIT
        folder = mounts.runs / "r" / "shards" / stage / f"{number}-of-2"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"contract": CONTRACT_VERSION}))
    assert refused(embedder, stages=(stage,)) == ([], Exit.DONE)
    if stage == "preprocess":
        lines, _ = refused(embedder, "preprocess.classifier=model", stages=(stage,))
        assert lines and "LORRY_TARGET=a800: needs a GPU" in lines[0], "the merge classifies"


def test_denied_cards_do_not_count(box: Box, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("LORRY_TARGET", "")
    monkeypatch.setenv("LORRY_GPU_DENY", "5,6,7")
    lines, _ = refused("infer.engine=vllm", "infer.tensor_parallel=7")
    assert "so many of 5 GPU(s)" in lines[0]


def test_lorry_run_says_all_of_it_before_anything_is_written(mounts: Lorry, recipe_file: Path) -> None:
    wrong = ("model.path=meta/Llama", "model.swift_template=chtml", "data.path=nowhere")
    done = mounts("entrypoints.lorry", "run", str(recipe_file), *(part for one in wrong for part in ("--set", one)))
    assert done.code == Exit.USAGE, done.output
    assert [line.partition(";")[0] for line in done.lines] == [
        f"error: {mounts.data}/nowhere: no such data folder",
        f"error: {mounts.models}/meta/Llama: no such model folder",
        "error: model.swift_template: ms-swift has no 'chtml'",
    ]
    assert list(mounts.runs.iterdir()) == []


def test_a_stage_says_it_too_and_keeps_the_traceback(mounts: Lorry, recipe_file: Path) -> None:
    wrong = ("--set", "model.swift_type=lama", "--set", "model.swift_template=chtml", "--run", "r")
    done = mounts("entrypoints.train", str(recipe_file), *wrong)
    assert (done.code, [line.partition(";")[0] for line in done.lines]) == (
        Exit.USAGE,
        ["train: model.swift_type: ms-swift has no 'lama'", "train: model.swift_template: ms-swift has no 'chtml'"],
    )
    assert (mounts.runs / "r" / "train" / "log.txt").read_text().startswith("Traceback")
