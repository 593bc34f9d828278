"""A run with results takes no other job, whichever command or variable names it."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from entrypoints.eval import main as eval_main
from entrypoints.infer import main as infer
from entrypoints.lorry import main as lorry
from entrypoints.preprocess import main as preprocess
from entrypoints.train import main as train
from stages.contract.files import write_json
from stages.contract.recipe import dump_recipe
from stages.host.runs import open_run
from tests.conftest import REPOSITORY, make_data, snapshot

COMMANDS = {"run": lorry, "preprocess": preprocess, "train": train, "infer": infer, "eval": eval_main}


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of patent-qa with an adapter, which has the recipe's name."""
    for name, path in {"DATA": REPOSITORY / "recipes" / "data", "MODELS": tmp_path, "RUNS": tmp_path / "runs"}.items():
        monkeypatch.setenv(f"LORRY_{name}", str(path))
    folder = tmp_path / "runs" / "patent-qa"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(open_run("patent-qa", "tiny").recipe), encoding="utf-8")
    write_json(folder / "train" / "adapters" / "tuned" / "made.json", {"key": "0" * 64})
    return folder


def start(command: str, *arguments: str, **variables: str) -> Result:
    first = ["run"] if command == "run" else []
    return CliRunner().invoke(COMMANDS[command], [*first, *arguments], env=variables)


@pytest.mark.parametrize("command", COMMANDS)
def test_another_task_is_refused_in_one_line(finished: Path, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = snapshot(finished.parent)
    variables = {"LORRY_RECIPE": "logic-choice", "LORRY_RUN": "patent-qa", "LORRY_PROFILE": "tiny"}
    for done in (
        start(command, "logic-choice", "--profile", "tiny", "--run", "patent-qa"),
        start(command, "logic-choice", "--profile", "tiny", "--run", "patent-qa", "--force"),
        start(command, **variables),
        *([start(command, **variables, LORRY_SHARD="0/2")] if command in ("preprocess", "train", "infer") else []),
    ):
        text = done.output + capfd.readouterr().err
        assert (done.exit_code, text.count("\n")) == (2, 1), text
        assert "/patent-qa: holds results of task patent_qa, data.path patent-qa, but this recipe has task " in text
        assert "; give this job a run of its own: --run NAME" in text
    assert snapshot(finished.parent) == before


@pytest.mark.parametrize("command", ["run", "preprocess"])
def test_a_second_data_folder_does_not_replace_the_first_run(
    finished: Path, command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(finished.parent)
    data = make_data(tmp_path / "more", documents=1, pages=1)
    done = start(command, "patent-qa", "--profile", "tiny", "--data", str(data))
    text = done.output + capfd.readouterr().err
    assert (done.exit_code, text.count("\n")) == (2, 1), text
    assert f"holds results of data.path patent-qa, but this recipe has data.path {data};" in text
    assert snapshot(finished.parent) == before
