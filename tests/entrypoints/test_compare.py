"""`lorry compare`: which runs it takes, what it shows, and how it answers for the others."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from entrypoints.lorry import main
from stages.contract.errors import Exit
from stages.contract.files import FileHashes, read_json, read_jsonl, write_json, write_jsonl
from stages.contract.recipe import dump_recipe
from stages.contract.records import Prediction, Sample, failed_prediction
from stages.contract.roots import Roots
from stages.contract.run import Run, describe_output
from stages.eval.stage import work
from stages.host.runner import run_stage
from stages.results.ledger import read_ledger
from stages.results.ledger_table import UNTESTED, render_csv, render_table
from tests.eval.conftest import answer, make_run, make_samples
from tests.eval.test_losses import conversation, make_chat_run, plain_text, with_losses

Answer = Callable[[int, Sample], str]


def right(number: int, sample: Sample) -> str:
    return sample["references"][0]


def wrong(number: int, sample: Sample) -> str:
    return f"lever {number}"


def half(number: int, sample: Sample) -> str:
    return right(number, sample) if number % 2 else f"half a lever {number}"


def evaluated(folder: Path, name: str, tuned: Answer, base: Answer = wrong, samples: list[Sample] | None = None) -> Run:
    """A run that eval has really scored, below `<folder>/runs`."""
    made = folder / "made"
    samples = make_samples() if samples is None else samples
    given: dict[str, list[Prediction]] = {
        model: [answer(sample, says(number, sample)) for number, sample in enumerate(samples)]
        for model, says in (("base", base), ("tuned", tuned))
    }
    run = make_run(made, samples, given, pictures=False)
    (run.folder / "recipe.yaml").write_text(dump_recipe(run.recipe), encoding="utf-8")
    assert run_stage(run, "eval", work) == Exit.DONE
    (folder / "runs").mkdir(exist_ok=True)
    shutil.move(run.folder, folder / "runs" / name)
    shutil.rmtree(made)
    return Run(name, run.recipe, Roots(folder / "data", folder / "models", folder / "runs"))


@pytest.fixture
def lorry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    for name, part in (("LORRY_RUNS", "runs"), ("LORRY_DATA", "data"), ("LORRY_MODELS", "models")):
        monkeypatch.setenv(name, str(tmp_path / part))
    monkeypatch.setenv("COLUMNS", "140")

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["compare", *arguments])

    return call


def line_of(done: Result, run: str, model: str) -> str:
    """The row of the first table."""
    return next(line for line in done.output.splitlines() if line.split()[:2] == [run, model])


def test_runs_stand_side_by_side(tmp_path: Path, lorry: Callable[..., Result]) -> None:
    evaluated(tmp_path, "baseline", half)
    evaluated(tmp_path, "custom", right)
    done = lorry("baseline", "custom")
    assert done.exit_code == 0, done.output
    assert "over baseline/tuned" in done.output
    assert "+50.0 [+12.7, +73.0] *" in line_of(done, "custom", "tuned")  # each group of four has two wrong ones
    assert "50.0%" in line_of(done, "custom", "tuned")
    assert "-50.0 [-73.0, -12.7] *" in line_of(done, "baseline", "base")
    assert "*" not in line_of(done, "baseline", "tuned")
    assert [head for head in ("exact_match", "f1", "character_f1") if head in done.output] == [
        "exact_match",
        "f1",
        "character_f1",
    ]
    assert "24 test samples; percent and points" in done.output
    assert "*: the 95% interval excludes 0, also after Holm's correction for 3 models" in done.output
    assert done.output.splitlines()[-1].endswith("; 6 documents: intervals are rough")
    assert "suspicious" not in done.output


def test_identical_answers_are_reported(tmp_path: Path, lorry: Callable[..., Result]) -> None:
    evaluated(tmp_path, "baseline", half)
    evaluated(tmp_path, "custom", half)
    done = lorry("baseline", "custom")
    assert done.exit_code == 0
    assert (
        "suspicious: baseline/tuned and custom/tuned: all 24 answers are identical, wrong ones included" in done.output
    )
    assert "100.0%" in line_of(done, "custom", "tuned")
    assert "if two models give identical answers, wrong ones included" in " ".join(lorry("--help").output.split())


def one_line(done: Result, *told: str) -> None:
    assert (done.exit_code, len(done.output.splitlines())) == (2, 1), done.output
    for text in told:
        assert text in done.output


def test_another_test_set_is_refused(tmp_path: Path, lorry: Callable[..., Result]) -> None:
    evaluated(tmp_path, "baseline", half)
    evaluated(tmp_path, "fewer", half, samples=make_samples()[:20])
    one_line(lorry("baseline", "fewer"), "fewer: scored on another test set than baseline (4 of 24 samples")


def test_what_is_not_evaluated_is_reported_and_not_compared(tmp_path: Path, lorry: Callable[..., Result]) -> None:
    evaluated(tmp_path, "baseline", half)
    evaluated(tmp_path, "custom", right)
    evaluated(tmp_path, "never", right)
    shutil.rmtree(tmp_path / "runs" / "never" / "eval")
    done = lorry("baseline", "never", "custom")
    assert done.exit_code == 0
    assert "never: not compared, because eval has not run" in done.output.splitlines()
    assert line_of(done, "custom", "tuned")
    one_line(
        lorry("baseline", "never"),
        "baseline, never: a comparison needs two scored runs, and 1 can be compared (never: not compared, because"
        " eval has not run); run the missing stages, or name other runs",
    )


def test_a_success_without_a_sample_is_nothing_evaluated(tmp_path: Path, lorry: Callable[..., Result]) -> None:
    run = evaluated(tmp_path, "baseline", half)
    evaluated(tmp_path, "custom", right)
    figures = {model: {} for model in ("base", "tuned")}
    _written(run, "scores.json", figures)
    one_line(lorry("custom", "baseline"), "baseline: not compared, because eval scored no sample")


def _written(run: Run, name: str, content: Any) -> None:
    """Put another output in its place, with a manifest that vouches for it."""
    path = run.path("eval", name)
    write_jsonl(path, content) if path.suffix == ".jsonl" else write_json(path, content)
    manifest = read_json(run.path("eval", "manifest.json"))
    manifest["outputs"][name] = describe_output(run.stage_folder("eval"), name, None, FileHashes(path.parent / ".x"))
    write_json(run.path("eval", "manifest.json"), manifest)


def test_figures_of_other_answers_are_refused(tmp_path: Path, lorry: Callable[..., Result]) -> None:
    evaluated(tmp_path, "baseline", half)
    run = evaluated(tmp_path, "custom", right)
    manifest = read_json(run.path("infer", "manifest.json"))
    manifest["outputs"]["predictions/tuned.jsonl"]["sha256"] = "0" * 64
    write_json(run.path("infer", "manifest.json"), manifest)
    one_line(lorry("baseline", "custom"), "infer has changed since eval used it; run eval again, then compare")


def test_scores_that_were_changed_by_hand_are_refused(tmp_path: Path, lorry: Callable[..., Result]) -> None:
    evaluated(tmp_path, "baseline", half)
    run = evaluated(tmp_path, "custom", right)
    lines = read_jsonl(run.path("eval", "scored.jsonl"))
    write_jsonl(run.path("eval", "scored.jsonl"), lines[1:])
    one_line(lorry("baseline", "custom"), "eval/scored.jsonl has changed since eval wrote it")


def test_an_eval_of_before_is_to_be_done_again(tmp_path: Path, lorry: Callable[..., Result]) -> None:
    evaluated(tmp_path, "baseline", half)
    run = evaluated(tmp_path, "custom", right)
    manifest = read_json(run.path("eval", "manifest.json"))
    del manifest["outputs"]["scored.jsonl"]
    write_json(run.path("eval", "manifest.json"), manifest)
    one_line(
        lorry("baseline", "custom"),
        "custom: an older version of Lorry scored it and kept no score per sample; run eval again with --force",
    )


def test_two_runs_are_needed_that_are_there(tmp_path: Path, lorry: Callable[..., Result]) -> None:
    evaluated(tmp_path, "baseline", half)
    one_line(lorry("baseline"), "name two runs or more")
    one_line(lorry("baseline", "baseline"), "name two runs or more")
    one_line(lorry("baseline", "basline"), "no such run; did you mean 'baseline'?")


def test_failures_are_no_answers(tmp_path: Path, lorry: Callable[..., Result]) -> None:
    samples = make_samples()
    evaluated(tmp_path, "baseline", half)
    run = evaluated(tmp_path, "custom", right)
    failed = [failed_prediction(sample["id"], "out of memory") for sample in samples]
    made = make_run(
        tmp_path / "made",
        samples,
        {"base": [answer(sample, wrong(n, sample)) for n, sample in enumerate(samples)], "tuned": failed},
        pictures=False,
    )
    (made.folder / "recipe.yaml").write_text(dump_recipe(made.recipe), encoding="utf-8")
    assert run_stage(made, "eval", work) == Exit.DONE
    shutil.rmtree(run.folder)
    shutil.move(made.folder, run.folder)
    done = lorry("baseline", "custom")
    assert done.exit_code == 0
    assert "suspicious: custom/tuned: all 24 answers failed" in done.output
    assert line_of(done, "custom", "tuned").split()[-3:] == ["24", "24", "0"]


# -- held-out losses ---------------------------------------------------------------------------------------------


def scored_by_loss(folder: Path, name: str, samples: list[Sample], gain: float, more_tokens: int = 0) -> Run:
    """A run whose adapter lowers each sample's loss by `gain` nats a token. Its tokenizer needs `more_tokens` for the
    first sample."""
    made = folder / "made"
    run = make_chat_run(made, samples, lambda number: gain + 0.01 * number)
    if more_tokens:
        rows = {model: read_jsonl(run.path("infer", "losses", f"{model}.jsonl")) for model in ("base", "tuned")}
        for own in rows.values():
            own[0]["tokens"] += more_tokens
        with_losses(run, rows)
    (run.folder / "recipe.yaml").write_text(dump_recipe(run.recipe), encoding="utf-8")
    assert run_stage(run, "eval", work) == Exit.DONE
    (folder / "runs").mkdir(exist_ok=True)
    shutil.move(run.folder, folder / "runs" / name)
    shutil.rmtree(made)
    return Run(name, run.recipe, Roots(folder / "data", folder / "models", folder / "runs"))


def test_held_out_losses_are_compared_on_the_same_tokens(lorry: Callable[..., Result], tmp_path: Path) -> None:
    samples = [conversation(number) for number in range(8)]
    scored_by_loss(tmp_path, "a", samples, 0.1)
    scored_by_loss(tmp_path, "b", samples, 0.3, more_tokens=2)
    done = lorry("a", "b")
    assert done.exit_code == 0, done.output
    lines = [" ".join(line.split()) for line in done.output.splitlines()]
    first, better = (next(line for line in lines if line.startswith(start)) for start in ("a tuned", "b tuned"))
    assert "over a/tuned [95%]" in done.output
    assert re.match(r"a tuned 17\.\d\d \[.*\] 2\.8\d\d 8 220$", first), "the model that others are compared with"
    assert " -0.200 [-0.200, -0.200]* 7 0 0 " in better, "seven of eight are on the same tokens"
    assert "b: 1 of 8 held-out losses, such as that of c0, are not on the same tokens as in a" in done.output


def test_runs_that_are_scored_by_loss_only_are_compared_and_listed(
    lorry: Callable[..., Result], tmp_path: Path
) -> None:
    samples = [plain_text(number) for number in range(6)]
    for name, gain in (("a", 0.1), ("b", 0.2)):
        run = scored_by_loss(tmp_path, name, samples, gain)
    done = lorry("a", "b")
    assert done.exit_code == 0, done.output
    assert "held-out loss" in done.output and "test samples; percent" not in done.output
    rows = {row.adapter: row for row in read_ledger(run.roots, ["b"], None).rows}
    tuned = rows["tuned"]
    nats = sum((3 - 0.2 - 0.01 * number) * (10 + 5 * number) for number in range(6))
    assert tuned.perplexity == pytest.approx(math.exp(nats / 135), rel=1e-5)
    assert tuned.perplexity_low is not None and tuned.perplexity_low < tuned.perplexity < (tuned.perplexity_high or 0)
    assert (tuned.win_rate, tuned.score, tuned.state, tuned.scored_on) == (100.0, None, "scored", "test data")
    assert (rows["base"].win_rate, rows["base"].perplexity) == (None, pytest.approx(math.exp(3), rel=1e-6))
    table = render_table(list(rows.values()), None, False)
    assert "perplexity" in table and UNTESTED not in table
    assert "perplexity" in render_csv(list(rows.values())).splitlines()[0]
