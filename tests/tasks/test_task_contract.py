"""The contract for tasks: checked when a recipe is read, typed, and explained by a page that works as written."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from stages.contract.errors import UsageError
from stages.tasks import articulation, extractive_qa, load_task, patent_qa, task_names
from stages.tasks.common import default_prompts, default_results, default_settings
from stages.tasks.task import HAVE_DEFAULTS, check_task, reads_conversations, reads_documents, reads_records
from tests.conftest import REPOSITORY, Lorry
from tests.pages import copy_checkout, read_page, run_command, write_files

TASKS = ["articulation", "better_synth", "chat", "extractive_qa", "logic_choice", "patent_qa"]


def module_with(source: types.ModuleType = extractive_qa, **changes: object) -> types.ModuleType:
    """A copy of a task's module with other members; None takes one out."""
    module = types.ModuleType("stages.tasks.changed")
    vars(module).update({**vars(source), "__file__": "stages/tasks/changed.py", **changes})
    for name, value in changes.items():
        if value is None:
            delattr(module, name)
    return module


def fault_of(module: types.ModuleType) -> str:
    with pytest.raises(UsageError) as caught:
        check_task(module)
    return str(caught.value)


def test_tasks_are_the_workloads_and_nothing_else() -> None:
    assert task_names() == TASKS
    for name in ("common", "task", "common.metrics", "../patent_qa", ""):
        with pytest.raises(UsageError, match="no task"):
            load_task(name)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_the_contract(name: str) -> None:
    task = load_task(name)
    assert reads_documents(task) == (name == "patent_qa")
    assert reads_records(task) == (name == "better_synth")
    assert reads_conversations(task) == (name == "chat")


def test_a_missing_function_is_named_with_the_file() -> None:
    assert fault_of(module_with(score=None, narrowed_sample=None)) == (
        "task: stages/tasks/changed.py breaks the contract of QuestionTask (stages/tasks/task.py): narrowed_sample is"
        " missing (define it, or import it from stages.tasks.common.default_prompts); score is missing (define it)"
    )


def test_wrong_parameters_are_named_with_those_of_the_contract() -> None:
    def score(answer: str, sample: object) -> dict[str, float]:
        return {}

    assert "score must take (recipe, answer, sample), found (answer, sample)" in fault_of(module_with(score=score))


def test_further_parameters_must_be_optional() -> None:
    def with_default(recipe: object, answer: str, sample: object, strict: bool = False) -> dict[str, float]:
        return {}

    def without(recipe: object, answer: str, sample: object, strict: bool) -> dict[str, float]:
        return {}

    check_task(module_with(score=with_default))
    assert "found (recipe, answer, sample, strict)" in fault_of(module_with(score=without))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("COMPONENTS", ["retry"], "COMPONENTS must be a tuple of texts, found ['retry']"),
        ("SHARED", ("classify", 3), "SHARED must be a tuple of texts"),
        ("READS_DOCUMENTS", "no", "READS_DOCUMENTS must be True or False, found 'no'"),
        ("Scoring", dict, "Scoring must be a subclass of stages.contract.recipe.Section"),
        ("read_answer", "first line", "read_answer must be a function, found 'first line'"),
    ],
)
def test_a_member_of_another_type_is_refused(name: str, value: object, words: str) -> None:
    assert words in fault_of(module_with(**{name: value}))


def test_a_document_task_needs_more_functions() -> None:
    assert "find_documents is missing" in fault_of(module_with(READS_DOCUMENTS=True))
    check_task(patent_qa)
    both = fault_of(module_with(patent_qa, READS_RECORDS=True))
    assert "READS_DOCUMENTS and READS_RECORDS are both set" in both
    assert "read_conversations is missing" in fault_of(module_with(READS_CONVERSATIONS=True))


def test_a_record_task_needs_no_read_questions() -> None:
    fault = fault_of(module_with(articulation, READS_RECORDS=True, read_questions=None))
    assert "read_records is missing" in fault and "read_questions" not in fault


def test_the_contract_and_its_typing_agree_for_every_task(tmp_path: Path) -> None:
    lines = ["from stages.tasks.task import ConversationTask, DocumentTask, QuestionTask, RecordTask"]
    for number, name in enumerate(task_names()):
        task = load_task(name)
        kinds = {"DocumentTask": task.READS_DOCUMENTS, "RecordTask": task.READS_RECORDS}
        kinds |= {"ConversationTask": task.READS_CONVERSATIONS}
        kind = next((kind for kind, is_it in kinds.items() if is_it), "QuestionTask")
        lines += [f"from stages.tasks import {name}", f"task_{number}: {kind} = {name}"]
    (tmp_path / "typed.py").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(REPOSITORY / "pyproject.toml")]
    done = subprocess.run(
        [*command, str(tmp_path / "typed.py")], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_task_that_breaks_its_contract_ends_with_2_when_the_recipe_is_read(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path)
    page = read_page("add-a-workload.md")
    write_files(page, checkout)
    file = checkout / "stages" / "tasks" / "capitals.py"
    whole = file.read_text(encoding="utf-8")
    for broken, words in (
        (whole.replace("def read_answer(text: str, sample: Sample)", "def read_answer(text: str)"), "read_answer must"),
        (whole.replace("narrowed_sample, ", ""), "narrowed_sample is missing"),
        (whole.replace("import DataError", "import NoSuchError"), "cannot import stages/tasks/capitals"),
        ("def broken(:\n", "cannot import stages/tasks/capitals"),
    ):
        file.write_text(broken, encoding="utf-8")
        done = run_command("lorry recipe show capitals", checkout, dict(os.environ))
        assert done.returncode == 2, done.stdout
        assert words in done.stdout and "capitals.yaml: task: " in done.stdout
        assert len(done.stdout.strip().splitlines()) == 1


@pytest.mark.long
def test_the_page_is_followed_to_the_letter(tmp_path: Path, small_models: Path, lorry: Lorry) -> None:
    page = read_page("add-a-workload.md")
    checkout = copy_checkout(tmp_path / "checkout")
    write_files(page, checkout)
    models = tmp_path / "models"  # a random Llama under the small model's name: nothing else differs for the page
    models.mkdir()
    (models / "SmolLM2-135M-Instruct").symlink_to(small_models / "random-llama")
    environment = {**os.environ, "LORRY_MODELS": str(models), "LORRY_RUNS": str(lorry.runs), "LORRY_TARGET": "cpu"}
    environment["MYPY_CACHE_DIR"] = str(REPOSITORY / ".mypy_cache")
    environment.pop("LORRY_DATA", None)
    shown = [run_command(command, checkout, environment) for command in page.commands]
    for command, done in zip(page.commands, shown, strict=True):
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
    first, second = shown[-2:]
    assert "skipped 1: no capital" in first.stdout and "exact_match" in first.stdout
    assert "report: " in first.stdout
    assert second.stdout.count("up to date") == 5, second.stdout
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/tasks/test_capitals.py"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert tests.returncode == 0, tests.stdout


def test_defaults_are_the_contracts() -> None:
    defined = {
        name: module.__name__.rpartition("_")[2]
        for module in (default_prompts, default_results, default_settings)
        for name, value in vars(module).items()
        if name.isupper() or getattr(value, "__module__", None) == module.__name__
    }
    assert defined == HAVE_DEFAULTS
