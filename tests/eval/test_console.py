"""The results on the console: on standard output, whole on terminals of any width, each count beside its score."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from entrypoints.eval import main
from stages.contract.errors import Exit
from stages.contract.files import read_json
from stages.contract.recipe import load_recipe
from stages.contract.records import Prediction, Sample
from stages.contract.run import Run
from stages.eval.stage import work
from stages.host.runner import run_stage
from stages.results.uncertainty import interval_text
from stages.tasks import settle_recipe
from tests.eval.conftest import RECIPE, answer, make_sample
from tests.on_terminal import shown_on_terminal

Build = Callable[..., Run]
Predictions = dict[str, list[Prediction]]

ADAPTERS = (
    "a-second-adapter-with-a-very-long-name-of-its-own",
    "适配器的中文名字也可以很长很长",
    *(f"mix-{n}" for n in range(7)),
)
FIGURE = re.compile(r"[+-]?\d+\.\d \[[^\]\n]*\]")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_nine_adapters_fit_a_terminal_of_any_width(
    build: Build, samples: list[Sample], predictions: Predictions, width: int
) -> None:
    given = {"base": predictions["base"], **dict.fromkeys(ADAPTERS, predictions["tuned"])}
    run = build(samples, given, losses=[], pictures=False)
    shown = shown_on_terminal(width, lambda: run_stage(run, "eval", work))
    lines = [line for line in shown if not line.startswith("suspicious")]
    assert max(map(cell_len, lines)) <= width
    expected = [
        interval_text(figure["value"], figure["low"], figure["high"], sign)
        for name, sign in (("scores.json", ""), ("differences.json", "+"))
        for model, figures in read_json(run.path("eval", name)).items()
        for metric, figure in figures.items()
        if metric != "retrieval_recall" or model == "base"  # a fact, the same for every model
    ]
    assert Counter(FIGURE.findall("\n".join(lines))) == Counter(expected), "no figure is broken"
    names = "".join("".join(line.split()) for line in lines)
    assert names.count("适配器") >= 6 and names.count("mix-6") >= 6, "one row a metric"


def test_results_go_to_standard_output_and_progress_to_standard_error(
    build: Build, samples: list[Sample], predictions: Predictions, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_stage(build(samples, predictions, losses=[]), "eval", work) == Exit.DONE
    shown = capfd.readouterr()
    assert "exact_match" in shown.out and "eval: done in" not in shown.out
    assert "exact_match" not in shown.err and "eval: done in" in shown.err


def test_a_finished_stage_names_the_folders_with_its_results(
    build: Build, samples: list[Sample], predictions: Predictions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = settle_recipe(load_recipe(RECIPE, "tiny"), str(RECIPE), tmp_path / "data")
    run = build(samples, predictions, losses=[], pictures=False, recipe=recipe)
    assert run_stage(run, "eval", work) == Exit.DONE
    for name in ("data", "models", "runs"):
        monkeypatch.setenv(f"LORRY_{name.upper()}", str(tmp_path / name))
    adapter = run.path("train", "adapters", "tuned")
    adapter.mkdir(parents=True)
    done = CliRunner().invoke(main, ["--run", run.name])
    assert done.exit_code == 0, done.output
    assert done.stderr == "eval: up to date\n"
    lines = done.stdout.splitlines()
    assert lines == [
        f"adapter tuned: {adapter}",
        f"predictions: {run.path('infer', 'predictions')}",
        f"report: {run.path('eval', 'report.html')}",
    ]
    assert all(Path(line.partition(": ")[2]).exists() for line in lines)


def test_empty_answers_are_counted_and_shown_everywhere(
    build: Build, samples: list[Sample], predictions: Predictions, capfd: pytest.CaptureFixture[str]
) -> None:
    empty = [answer(sample, "" if number % 2 else " \n") for number, sample in enumerate(samples)]
    run = build(samples, {"base": predictions["base"], "tuned": empty}, losses=[])
    assert run_stage(run, "eval", work) == Exit.DONE
    figure = read_json(run.path("eval", "scores.json"))["tuned"]["exact_match"]
    assert (figure["n"], figure["failed"], figure["empty"]) == (24, 0, 24)
    assert (run.manifest("eval") or {})["counts"]["empty"] == 24
    assert read_json(run.path("eval", "summary.json"))["dataset_results"][0]["evaluation"]["empty"] == 24
    shown = capfd.readouterr()
    lines = [line.split() for line in shown.out.splitlines()]
    assert next(line[-3:] for line in lines if line[:1] == ["tuned"]) == ["24", "0", "24"]
    assert ", 24 empty answers" in shown.err
    said = "patent-qa/tuned: all 24 answers are empty; check its prompts"
    report = run.path("eval", "report.html").read_text(encoding="utf-8")
    assert f"suspicious: {said}" in shown.out and f"Suspicious: {said}" in report
    assert '<td class="number empty loss">24</td>' in report


def test_a_score_over_nothing_is_a_dash_with_the_reason(build: Build, capfd: pytest.CaptureFixture[str]) -> None:
    english = [make_sample(number, source="first", page_images=[], pages=[]) for number in range(8)]
    chinese = [make_sample(number, source="second", page_images=[], pages=[]) for number in range(8, 12)]
    adapters = "train.adapters=[{name: a, data: [first]}, {name: b, data: [second]}]"
    recipe = load_recipe(RECIPE, "tiny", (adapters, "infer.answers=own sources"))
    base = [answer(sample, "a lever") for sample in english + chinese]
    given = {"base": base, "a": base[:8], "b": base[8:]}
    run = build(english + chinese, given, losses=[], pictures=False, recipe=recipe)
    assert run_stage(run, "eval", work) == Exit.DONE
    report = run.path("eval", "report.html").read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b", report)
    assert "– none of its test samples has this metric" in report
    assert "CMRC F1 –" in report and "(–: not a metric of this sample)" in report
    lines = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    place = lines.index("cmrc_f1")
    assert lines[place + 2] == "a – 0"
    assert "–: none of the model's test samples has this metric" in lines
    a, b = (each["evaluation"]["metrics"] for each in read_json(run.path("eval", "summary.json"))["dataset_results"])
    assert (a["cmrc_f1"], b["cmrc_f1"]) == (None, 0.0)
