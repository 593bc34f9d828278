"""The options of the stage commands, which Compose files and Kubernetes Jobs give as environment variables."""

from dataclasses import replace

import pytest
import yaml

from entrypoints.common import print_lines
from stages.host.outcome import Lines, Note, Problem
from tests.conftest import Finished, Lorry


def show(lorry: Lorry, *arguments: str, **variables: str) -> Finished:
    """`lorry recipe show`, which takes the options of every stage command."""
    return replace(lorry, extra=variables)("entrypoints.lorry", "recipe", "show", *arguments)


def test_every_option_can_come_from_the_environment(lorry: Lorry) -> None:
    settings = " train.connector={epochs: 2, max_length: 64}  train.epochs=9\nseed=7 "
    done = show(lorry, LORRY_RECIPE="patent-qa", LORRY_PROFILE="tiny", LORRY_SET=settings)
    assert done.code == 0, done.output
    shown = yaml.safe_load(done.output)
    assert (shown["profile"], shown["train"]["epochs"], shown["seed"]) == ("tiny", 9, 7)
    assert shown["train"]["connector"]["max_length"] == 64, "a value may hold blanks"


def test_the_command_line_wins(lorry: Lorry, recipe_file: object) -> None:
    done = show(
        lorry,
        *(str(recipe_file), "--set", "seed=3"),
        **{"LORRY_RECIPE": "nonsense", "LORRY_SET": "train.epochs=9"},
    )
    shown = yaml.safe_load(done.output)
    assert (done.code, shown["seed"], shown["train"]["epochs"] == 9) == (0, 3, False)


def test_an_empty_variable_is_none(lorry: Lorry) -> None:
    done = show(lorry, "patent-qa", LORRY_RECIPE="", LORRY_PROFILE="", LORRY_SET="", LORRY_RUN="")
    assert done.code == 0, done.output
    assert yaml.safe_load(done.output)["profile"] is None
    assert show(lorry, LORRY_RECIPE="").lines == [
        "error: RECIPE: not given, and no --run either; name a RECIPE, or an existing run with --run"
    ]


@pytest.mark.parametrize("command", ["preprocess", "lorry"])
def test_a_run_can_come_from_the_environment(lorry: Lorry, command: str) -> None:
    started = replace(lorry, extra={"LORRY_RUN": "mine"})
    done = started(f"entrypoints.{command}", *(["run"] if command == "lorry" else []))
    assert (done.code, done.lines) == (
        2,
        [f"error: {lorry.runs}/mine/recipe.yaml: no such run; name a RECIPE to start one"],
    )


def test_results_go_to_standard_output_and_notes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    def lines() -> Lines:
        yield Note("train: up to date")
        yield "report: /runs/job/eval/report.html"
        yield Problem("infer: ended by SIGKILL")
        return 1

    assert print_lines(lines()) == 1
    shown = capsys.readouterr()
    assert shown.out == "report: /runs/job/eval/report.html\n"
    assert shown.err == "train: up to date\ninfer: ended by SIGKILL\n"
