"""The speed and the hours of a training in its plan."""

import json
from pathlib import Path

import pytest

from stages.contract.files import write_jsonl
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.hardware import speed
from stages.hardware.speed import MeasuredShare, Workload
from stages.host.planning import plan
from tests.conftest import REPOSITORY
from tests.hardware.shapes import make_shape

ADAPTERS = (
    "train.adapters=[{name: one, data: [{source: s, count: 3}]}, {name: two, data: [{source: s, count: 5}]}]",
    "train.epochs=2",
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of a 7B on text with two adapters, whose stages have not run; half of an H200's peak was measured."""
    monkeypatch.setattr(speed, "MEASURED", (MeasuredShare("docs", "H200", 0.5, 3000, 16_384),))
    make_shape(tmp_path / "models" / "Qwen2.5-7B-Instruct", "Qwen2.5-7B")
    recipe = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "text", ADAPTERS)
    return Run("r", recipe, Roots(tmp_path, tmp_path / "models", tmp_path / "runs"))


def lines(run: Run, target: str = "h100", workload: Workload | None = None) -> list[str]:
    found = list(map(str, plan(run, target, 1, None, workload)))
    return [line for line in found if line.startswith(("speed", "training time"))]


def test_the_plan_has_speed_and_hours(run: Run) -> None:
    expected, time = lines(run, workload=Workload(9_812, 412.0))
    assert expected.startswith("speed: about 1") and " tokens/s, 48% of the peak: an estimate, from " in expected
    assert expected.endswith("; this card has not been measured")
    per_second = float(expected.split()[2].replace(",", ""))
    assert time == (
        f"training time: about {2 * 9_812 * 412 / per_second / 60:.0f} minutes, an estimate: 2 epochs of 9,812 samples"
        " of 2 adapters, 412 tokens each in the mean"
    )
    assert "training time: about 13.3 hours, " in lines(run, workload=Workload(981_200, 412.0))[1]


def test_before_preprocess_hours_are_unknown(run: Run) -> None:
    assert lines(run)[1] == "training time: not known before preprocess; run it, then plan again"


def test_after_preprocess_the_samples_of_all_adapters_count(run: Run, language_model: Path) -> None:
    words = [{"role": "user", "content": "a word " * 100}, {"role": "assistant", "content": "yes"}]
    file = run.path("preprocess", "samples", "train.jsonl")
    file.parent.mkdir(parents=True)
    write_jsonl(file, [{"messages": words, "images": [], "meta": {"source": "s"}}] * 4)
    run.path("preprocess", "manifest.json").write_text(json.dumps({}))
    folder = run.roots.models / "Qwen2.5-7B-Instruct"
    (folder / "tokenizer.json").write_bytes((language_model / "tokenizer.json").read_bytes())
    assert "2 epochs of 8 samples of 2 adapters, 23" in lines(run)[1]


@pytest.mark.parametrize("target", ["cpu", "v100"])
def test_what_nobody_measured_has_no_line(run: Run, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if target != "cpu":
        monkeypatch.setattr(speed, "MEASURED", ())
    assert lines(run, target) == []
