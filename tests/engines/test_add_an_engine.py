"""The table of engines, and docs/add-an-engine.md followed to the letter in a copy of the project."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from entrypoints.lorry import main
from stages.contract.errors import UsageError
from stages.contract.files import read_json, read_jsonl, write_json
from stages.contract.recipe import dump_recipe, load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.engines import (
    ENGINES,
    engine_kind,
    engine_libraries,
    refuse_unserved_pictures,
    refuse_unserved_rank,
    start_engine,
)
from stages.engines.engine import EngineSettings
from stages.engines.vllm_options import RANKS, supported_rank
from stages.tasks import settle_recipe
from tests.conftest import REPOSITORY
from tests.infer.conftest import ask, describe, sample
from tests.pages import copy_checkout, read_page, run_command, write_files

PAGE = "add-an-engine.md"
TABLE = Path("stages", "engines", "__init__.py")


def add_the_line(checkout: Path) -> None:
    """Put the page's one line at the end of the table, unless somebody has followed the page here."""
    text = (REPOSITORY / "docs" / PAGE).read_text(encoding="utf-8")
    (line,) = re.findall(rf"^Add to the end of `ENGINES` in `{TABLE}`:\n\n```\n(.*\n)```$", text, re.MULTILINE)
    table = (checkout / TABLE).read_text(encoding="utf-8")
    if line in table:
        return
    begin = table.index("\nENGINES = (\n")
    end = table.index("\n)\n", begin) + 1
    (checkout / TABLE).write_text(table[:end] + line + table[end:], encoding="utf-8")


def prepare_demo(roots: Roots) -> Run:
    """The run of `make demo` after train, with few samples and an adapter without weights."""
    recipe = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny")
    run = Run("demo", settle_recipe(recipe, "patent-qa", roots.data), roots)
    ask(run, [sample(f"s{i}", "word " * i) for i in range(3)])
    write_json(run.path("train", "adapters", "tuned", "adapter_config.json"), {"r": 8})
    describe(run, "train", "adapters/tuned/adapter_config.json")
    (run.folder / "recipe.yaml").write_text(dump_recipe(run.recipe), encoding="utf-8")
    return run


@pytest.mark.long
def test_the_page_is_followed_to_the_letter(tmp_path: Path, small_models: Path) -> None:
    page, checkout = read_page(PAGE), copy_checkout(tmp_path / "checkout")
    write_files(page, checkout)
    add_the_line(checkout)
    models = tmp_path / "models"  # a random Llama under the small model's name: the page sees no other difference
    models.mkdir()
    (models / "SmolLM2-135M-Instruct").symlink_to(small_models / "random-llama")
    run = prepare_demo(Roots(tmp_path / "data", models, tmp_path / "runs"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LORRY_", "PYTEST_"))}
    environment |= {"LORRY_MODELS": str(models), "LORRY_RUNS": str(run.roots.runs), "LORRY_DATA": str(run.roots.data)}
    environment |= {"LORRY_TARGET": "cpu", "MYPY_CACHE_DIR": str(REPOSITORY / ".mypy_cache")}
    environment.pop("PYTHONPATH", None)

    shown = [run_command(command, checkout, environment) for command in page.commands]
    for command, done in zip(page.commands, shown, strict=True):
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
    tests, first, second = shown[-3:]
    assert re.search(r"^\.\s+\[100%\]", tests.stdout, re.MULTILINE), tests.stdout
    assert "infer: engine: echo (infer.engine; float32 on target cpu)" in first.stdout
    assert second.stdout.splitlines() == ["infer: up to date", f"predictions: {run.path('infer', 'predictions')}"]
    for name in ("base", "tuned"):
        rows = read_jsonl(run.path("infer", "predictions", f"{name}.jsonl"))
        assert [row["id"] for row in rows] == ["s0", "s1", "s2"]
        assert all("assistant" in row["text"] and row["finish_reason"] == "length" for row in rows)
    decision = read_json(run.path("infer", "manifest.json"))["decisions"][0]
    assert (decision["what"], decision["value"]) == ("engine", "echo")

    wrong = run_command("lorry-infer --run demo --set infer.engine=ecko", checkout, environment)
    assert wrong.returncode == 2
    assert wrong.stdout.strip().endswith(
        "no engine 'ecko'; did you mean 'echo'? known engines: vllm, transformers, echo"
    )
    planned = run_command("lorry recipe schema", checkout, environment)
    assert '"echo"' in planned.stdout


def test_reading_the_table_loads_no_engine() -> None:
    program = "import sys, stages.engines; from stages.host import needs; stages.engines.engine_kind('vllm');"
    program += "print([name for name in ('torch', 'vllm', 'transformers', 'numpy', 'PIL') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_engine_is_where_the_table_says() -> None:
    for kind in ENGINES:
        module, _, name = kind.path.partition(":")
        source = REPOSITORY.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        assert f"\nclass {name}:\n" in source, kind.name
    assert len({kind.name for kind in ENGINES}) == len(ENGINES)


def test_what_the_engines_can_do() -> None:
    vllm, transformers = engine_kind("vllm"), engine_kind("transformers")
    assert vllm.shares_weights and not transformers.shares_weights
    assert transformers.serves_adapted_vision and not vllm.serves_adapted_vision
    assert {"torch", "transformers", "vllm"} <= set(engine_libraries())


def test_a_model_type_that_the_engine_cannot_serve_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "mgm"})
    with pytest.raises(UsageError) as caught:
        start_engine("vllm", EngineSettings(tmp_path, {}, "float32", 8, 1, 64, 0))
    others = " or ".join(kind.name for kind in ENGINES if "mgm" not in kind.cannot_serve)
    assert str(caught.value) == f"{tmp_path}: vllm cannot serve mgm models; set infer.engine to {others}"


def test_vllm_on_a_cpu_refuses_a_vision_language_model(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "qwen2_5_vl", "vision_config": {"depth": 2}})
    with pytest.raises(UsageError) as caught:
        refuse_unserved_pictures(engine_kind("vllm"), tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: is a vision-language model, which vllm cannot serve on a CPU; set infer.engine to transformers"
    )
    refuse_unserved_pictures(engine_kind("transformers"), tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "qwen2"})
    refuse_unserved_pictures(engine_kind("vllm"), tmp_path)


def test_a_rank_that_the_engine_cannot_serve_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        refuse_unserved_rank(engine_kind("vllm"), 513)
    assert str(caught.value) == (
        "train.rank 513: vllm serves adapters up to rank 512; lower it, set infer.merged to true, or infer.engine to"
        " transformers"
    )
    refuse_unserved_rank(engine_kind("vllm"), 512)
    refuse_unserved_rank(engine_kind("transformers"), 513)


def test_each_rank_gets_the_smallest_that_vllm_accepts() -> None:
    found = find_spec("vllm")  # importing it takes ten seconds
    assert found is not None and found.origin is not None
    source = (Path(found.origin).parent / "config" / "lora.py").read_text(encoding="utf-8")
    assert f"MaxLoRARanks = Literal[{', '.join(map(str, RANKS))}]" in source
    assert engine_kind("vllm").most_rank == RANKS[-1]
    given = [1, 2, 8, 9, 16, 17, 64, 100, 129, 257, 321, 512]
    assert list(map(supported_rank, given)) == [1, 8, 8, 16, 16, 32, 64, 128, 256, 320, 512, 512]


@pytest.mark.parametrize(
    ("value", "hint"),
    [("transfomers", "did you mean 'transformers'? known engines: vllm, "), ("fast", "known engines: vllm, ")],
)
def test_an_unknown_engine_exits_with_2_and_names_the_recipes_line(recipe_file: Path, value: str, hint: str) -> None:
    recipe_file.write_text(recipe_file.read_text(encoding="utf-8") + f"infer:\n  engine: {value}\n", encoding="utf-8")
    line = len(recipe_file.read_text(encoding="utf-8").splitlines())
    done = CliRunner().invoke(main, ["recipe", "show", str(recipe_file)])
    assert done.exit_code == 2
    assert f"{recipe_file}:{line}: infer.engine: no engine {value!r}; {hint}transformers" in done.output
