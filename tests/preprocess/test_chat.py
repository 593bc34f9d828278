"""preprocess checks the chat template of the model that will be trained, before its own work, and records what changes
prompts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import Exit, UsageError
from stages.contract.files import FileHashes, read_json, write_json
from stages.contract.recipe import Recipe, load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.host.runner import run_stage
from stages.infer.journal import journal_names
from stages.models.chat_settings import PLAIN, chat_settings
from stages.models.rendering import Renderer, check_samples
from stages.preprocess import stage as preprocess
from tests.conftest import REPOSITORY, need_model
from tests.models.chat_models import KINDS, chat_model
from tests.preprocess.test_rows import make_files


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models mount with a model of each kind of chat template, and a template file."""
    folder = tmp_path_factory.mktemp("models")
    for name, kind in KINDS.items():
        chat_model(folder / name, kind)
        (folder / name / "model.safetensors").write_bytes(b"weights")
    (folder / "own.jinja").write_text(PLAIN)
    return folder


@pytest.fixture
def make_run(tmp_path: Path, models: Path) -> Callable[..., Run]:
    """Return a function that makes a run of logic-choice on small files, with a model and overrides."""
    make_files(tmp_path / "data" / "logic")

    def made(model: str, *overrides: str, name: str = "r") -> Run:
        sets = ("data.path=logic", "data.test_fraction=0.2", f"model.path={model}", *overrides)
        recipe = load_recipe(REPOSITORY / "recipes" / "logic-choice.yaml", "tiny", sets)
        return Run(name, recipe, Roots(tmp_path / "data", models, tmp_path / "runs"))

    return made


def preprocessed(run: Run, capfd: pytest.CaptureFixture[str]) -> tuple[Exit, list[str]]:
    """The exit code of the stage, and its lines."""
    code = run_stage(run, "preprocess", preprocess.work)
    output = capfd.readouterr()
    return code, [line for line in (output.out + output.err).splitlines() if line.startswith("preprocess: ")]


def test_a_base_model_is_refused_before_the_data_are_read(
    make_run: Callable[..., Run], capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run("base")
    code, lines = preprocessed(run, capfd)
    assert code == Exit.USAGE
    assert lines == [
        f"preprocess: {run.roots.models / 'base'}: has no chat template, as is usual for a base model; set"
        " model.chat_template to chatml or plain, or to a .jinja file below the model mount"
    ]
    code, lines = preprocessed(make_run("base", "model.chat_template=plain"), capfd)
    assert code == Exit.DONE, lines
    code, lines = preprocessed(make_run("base", "model.chat_template=own.jinja", name="file"), capfd)
    assert code == Exit.DONE, lines


def test_a_missing_system_role_is_reported_once_and_recorded(
    make_run: Callable[..., Run], capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run("no_system")
    code, lines = preprocessed(run, capfd)
    assert code == Exit.DONE, lines
    line = "preprocess: the chat template has no system role: the system message goes into the user's message"
    assert lines.count(line) == 1
    assert read_json(run.path("preprocess", "manifest.json"))["chat"] == {"system": "in the user's message"}


def test_a_model_with_a_system_role_leaves_no_line_and_no_fact(
    make_run: Callable[..., Run], capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run("chatml")
    code, lines = preprocessed(run, capfd)
    assert code == Exit.DONE and not any("chat template" in line for line in lines)
    assert "chat" not in read_json(run.path("preprocess", "manifest.json"))
    assert not (run.folder / "date.json").exists()


def test_an_ignored_setting_ends_the_stage(make_run: Callable[..., Run], capfd: pytest.CaptureFixture[str]) -> None:
    code, lines = preprocessed(make_run("chatml", "model.enable_thinking=true"), capfd)
    assert code == Exit.USAGE
    assert len(lines) == 1 and "model.enable_thinking: found true, but the chat template of" in lines[0]
    run = make_run("hybrid", "model.enable_thinking=false", name="hybrid")
    assert preprocessed(run, capfd)[0] == Exit.DONE
    assert read_json(run.path("preprocess", "manifest.json"))["chat"] == {"enable_thinking": False}


def test_a_run_has_one_date_on_every_day(make_run: Callable[..., Run], capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run("dated")
    assert preprocessed(run, capfd)[0] == Exit.DONE
    recorded = read_json(run.folder / "date.json")["date"]
    assert read_json(run.path("preprocess", "manifest.json"))["chat"] == {"date": recorded}
    write_json(run.folder / "date.json", {"date": "2026-02-03"})  # as if it had begun on that day
    assert chat_settings(run).date == "2026-02-03"
    asked: list[Any] = [{"role": "user", "content": "A?"}]
    renderer = Renderer(run.roots.models / "dated", chat_settings(run))
    assert "Today: 03 Feb 2026" in renderer.tokenizer.decode(renderer.render("x", asked).tokens)
    write_json(run.folder / "date.json", {"date": "yesterday"})
    with pytest.raises(UsageError, match=r"date.json: found .*; write "):
        chat_settings(run)


def test_samples_with_pictures_that_lorry_does_not_read_need_ms_swift_s_names(
    make_run: Callable[..., Run], capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run("chatml")
    assert preprocessed(run, capfd)[0] == Exit.DONE, "samples without pictures do not"
    samples = [{"id": "s", "images": ["a.png"]}]
    with pytest.raises(UsageError, match=r"model.swift_type: found null, but sample s has pictures, which Lorry"):
        check_samples(run, Renderer(run.roots.models / "chatml"), samples)
    run = make_run("chatml", f"model.path={need_model('tiny-llava')}")
    check_samples(run, Renderer(need_model("tiny-llava")), samples)


ANSWER = "'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'"


@pytest.mark.parametrize(
    ("was", "becomes", "why"),
    [
        (ANSWER, ANSWER.replace("m['content']", "m['content'][:1]"), "writes the answer 'yes' as 'y'"),
        (
            ANSWER,
            ANSWER.replace("m['role']", "{'user': 'assistant', 'assistant': 'user'}.get(m['role'], m['role'])"),
            "begins an answer with '<|im_end|>\\n<|im_start|>user\\n', but a prompt ends with",
        ),
        (
            ANSWER,
            ANSWER.replace("'<|im_end|>", "('' if m['role'] == 'assistant' else '<|im_end|>') + '"),
            "writes an end token after a question, but none after an answer",
        ),
        ("'<|im_start|>assistant\n'", "'<|im_start|>assistant: '", "but a prompt ends with"),
    ],
    ids=["cut", "swapped", "endless", "other prompt"],
)
def test_a_mutated_template_is_refused(
    make_run: Callable[..., Run], models: Path, capfd: pytest.CaptureFixture[str], was: str, becomes: str, why: str
) -> None:
    template = KINDS["chatml"].template or ""
    assert was in template
    (models / "mutated.jinja").write_text(template.replace(was, becomes))
    code, lines = preprocessed(make_run("chatml", "model.chat_template=mutated.jinja"), capfd)
    assert code == Exit.USAGE, lines
    assert len(lines) == 1 and why in lines[0] and lines[0].endswith("with a corrected template")


def conversations(*talks: list[dict[str, Any]], **others: Any) -> list[dict[str, Any]]:
    return [{"id": f"s{number}", "messages": talk, "images": [], **others} for number, talk in enumerate(talks)]


def test_a_conversation_that_the_template_cannot_write_is_refused_by_its_name(
    make_run: Callable[..., Run], models: Path
) -> None:
    plain: list[dict[str, Any]] = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "Yes"}]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
    calling = [plain[0], {"role": "assistant", "tool_calls": [call]}]
    twice = [plain[0], *plain]
    renderers = {name: Renderer(models / name) for name in ("chatml", "no_system")}
    with pytest.raises(
        UsageError, match=r"^sample s1: .*chatml: the chat template leaves out the tool call 'look'; set"
    ):
        check_samples(make_run("chatml"), renderers["chatml"], conversations(plain, calling))
    with pytest.raises(UsageError, match=r"^sample s0: .*chatml: the chat template leaves out the tools; set"):
        check_samples(make_run("chatml"), renderers["chatml"], conversations(plain, tools=[call]))
    with pytest.raises(UsageError, match=r"^sample s2: .*refuses a conversation of user, user \(Roles must alternate"):
        check_samples(make_run("no_system"), renderers["no_system"], conversations(plain, plain, twice))
    assert check_samples(make_run("chatml"), renderers["chatml"], conversations(plain, twice)) == {}


def test_what_the_template_changes_is_counted(make_run: Callable[..., Run], models: Path) -> None:
    texts = (" A?", "Yes \n"), ("A?", "Yes"), ("B?\n\n", "No")
    talks = [[{"role": "user", "content": one}, {"role": "assistant", "content": other}] for one, other in texts]
    talks[1][1]["reasoning_content"] = "Hm."
    samples = conversations(*talks)
    stripped = "messages whose outer white space the chat template strips"
    unknown = "answers whose reasoning_content the chat template leaves out"
    found = {name: check_samples(make_run(name), Renderer(models / name), samples) for name in ("chatml", "no_system")}
    assert found == {"chatml": {unknown: 1}, "no_system": {unknown: 1, stripped: 3}}
    assert check_samples(make_run("hybrid"), Renderer(models / "hybrid"), samples) == {}


# -- what depends on it --------------------------------------------------------------------------------------------


def with_model(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=values)})


@pytest.mark.parametrize(
    "change", [{"enable_thinking": False}, {"chat_template": "chatml"}, {"chat_template": "own.jinja"}]
)
def test_completions_of_other_prompts_are_not_reused(make_run: Callable[..., Run], change: dict[str, Any]) -> None:
    run = make_run("hybrid")
    other = replace(run, recipe=with_model(run.recipe, **change))
    hashes = FileHashes(run.folder / "none")
    names = [journal_names(one, run.roots.models / "hybrid", [], hashes) for one in (run, other)]
    assert names[0] != names[1]
    assert run.recipe.digest("model") != other.recipe.digest("model")


def test_the_content_of_a_template_file_is_an_input(make_run: Callable[..., Run], models: Path, tmp_path: Path) -> None:
    run = make_run("base", "model.chat_template=own.jinja", "preprocess.classifier=model")
    before = run.inputs("preprocess", FileHashes(tmp_path / "none"))
    assert set(before) >= {"models/base", "models/chat_template", "model"}
    missing = make_run("base", "model.chat_template=other.jinja", "preprocess.classifier=model")
    with pytest.raises(UsageError, match=r"other.jinja: no such file; set model.chat_template to a .jinja file below"):
        missing.inputs("preprocess", FileHashes(tmp_path / "none"))
