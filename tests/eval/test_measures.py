"""Measures in units and drawings of a task in eval's files and report, with articulation's demo data."""

from collections.abc import Callable
from typing import Any

import pytest

from stages.contract.errors import Exit
from stages.contract.files import read_json
from stages.contract.recipe import load_recipe
from stages.contract.records import Sample, failed_prediction
from stages.contract.run import Run
from stages.eval import report
from stages.eval import stage as evaluation
from stages.host.runner import run_stage
from stages.tasks import articulation, settle_recipe
from tests.conftest import REPOSITORY
from tests.eval.conftest import answer

DEMO = REPOSITORY / "recipes" / "data" / "articulation"


@pytest.fixture
def run(build: Callable[..., Run]) -> Run:
    """Base fails on every sample. The adapter is right on all but the first, where one joint opens inwards."""
    recipe = settle_recipe(
        load_recipe(REPOSITORY / "recipes" / "articulation.yaml", "tiny", ("eval.worst=2",)),
        "articulation",
        REPOSITORY / "recipes" / "data",
    )
    questions = articulation.read_questions(recipe, DEMO, set(), lambda *_: None)
    samples: list[Sample] = []
    for question in [one for one in questions if one.split == "test"]:
        (sample,) = articulation.build_samples(recipe, question, None, "test")
        sample["meta"]["page_images"] = []
        samples.append(sample)
    right = [sample["references"][0] for sample in samples]
    sign = "sign=-1" if "sign=-1" in right[0] else "sign=1"
    right[0] = right[0].replace(sign, "sign=1" if sign == "sign=-1" else "sign=-1", 1)
    predictions = {
        "base": [failed_prediction(sample["id"], "<no> code") for sample in samples],
        "joints": [answer(sample, text) for sample, text in zip(samples, right, strict=True)],
    }
    return build(samples, predictions, pictures=False, recipe=recipe)


def html(run: Run) -> str:
    return run.path("eval", "report.html").read_text(encoding="utf-8")


def test_measures_are_written_and_shown_with_their_number(run: Run) -> None:
    assert run_stage(run, "eval", evaluation.work) == Exit.DONE
    found: dict[str, Any] = read_json(run.path("eval", "measures.json"))
    assert "measures.json" in read_json(run.path("eval", "manifest.json"))["outputs"]
    assert set(found["base"]) == {"missing joints", "extra joints"}, "no answer has an angle"
    assert found["base"]["missing joints"]["mean"] > 0 and found["base"]["missing joints"]["n"] == 8
    angles = found["joints"]["axis angle with sign, degrees"]
    assert angles["most"] == 180 and angles["median"] == 0 and angles["n"] > 8
    assert found["joints"]["axis angle, degrees"]["most"] == 0
    text = html(run)
    assert "<h2>Measured</h2>" in text and "axis angle with sign, degrees" in text and "180.00" in text


def test_every_sample_is_drawn_once_the_worst_with_its_answer(run: Run) -> None:
    assert run_stage(run, "eval", evaluation.work) == Exit.DONE
    text = html(run)
    drawings = text.count('<figure class="drawing"><svg')
    assert drawings == 8 and text.count("<article>") == 1
    first = text.split("<article>")[1].split("</article>")[0]
    assert "var(--loss, #b3261e)" in first and "0 missing, 0 extra" in first
    assert "Drawings of 7 other samples: the expected answer, and next to it the answer of joints" in text
    assert "<no>" not in text


def test_a_report_limits_its_drawings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_DRAWN", 3)
    assert run_stage(run, "eval", evaluation.work) == Exit.DONE
    assert html(run).count('<figure class="drawing"><svg') == 4
    assert "Drawings of 3 other samples (a report has at most 3)" in html(run)


def test_a_task_without_units_and_drawings_has_neither(evaluated: Run) -> None:
    assert not evaluated.path("eval", "measures.json").exists()
    assert "<h2>Measured</h2>" not in html(evaluated) and "drawing" not in html(evaluated).split("<body>")[1]
