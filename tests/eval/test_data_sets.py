"""Many data sets and adapters: each counts on the samples it was asked; scores of training data say so; the vote."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import Exit
from stages.contract.files import FileHashes, read_json, read_jsonl, write_json, write_jsonl
from stages.contract.recipe import Recipe, load_recipe
from stages.contract.records import Prediction, Sample, failed_prediction
from stages.contract.run import Run, describe_output
from stages.eval import stage as evaluation
from stages.eval.report import ON_TRAINING_DATA
from stages.host.runner import run_stage
from tests.eval.conftest import LOSSES, RECIPE, answer, make_sample

Build = Callable[..., Run]


def recipe(*overrides: str) -> Recipe:
    adapters = "train.adapters=[{name: a, data: [first]}, {name: b, data: [second, third#3]}, {name: c}]"
    return load_recipe(RECIPE, "tiny", (adapters, *overrides))


OWN = "infer.answers=own sources"


@pytest.fixture
def build(build: Build) -> Build:
    """`make_run` without losses, unless a test gives them: drawing their curve takes a third of eval's time."""
    return functools.partial(build, losses=[])


@pytest.fixture
def samples() -> list[Sample]:
    """12 questions, of three data sets in turn."""
    return [make_sample(n, source=("first", "second", "third")[n % 3], page_images=[], pages=[]) for n in range(12)]


def right(samples: list[Sample], *sources: str) -> list[Prediction]:
    """Right answers to the samples of these data sets, or to all."""
    return [answer(s, s["references"][0]) for s in samples if not sources or s["meta"]["source"] in sources]


def evaluate(run: Run, **facts: Any) -> dict[str, Any]:
    """The scores, with some facts in infer's manifest."""
    path = run.path("infer", "manifest.json")
    write_json(path, {**read_json(path), **facts})
    assert run_stage(run, "eval", evaluation.work) == Exit.DONE
    found: dict[str, Any] = read_json(run.path("eval", "scores.json"))
    return found


def add_outputs(run: Run, stage: str, *names: str) -> None:
    """Put these files into a stage's manifest."""
    manifest = read_json(run.path(stage, "manifest.json"))
    hashes = FileHashes(run.folder / "none")
    outputs = {name: describe_output(run.path(stage), name, None, hashes) for name in names}
    write_json(run.path(stage, "manifest.json"), {**manifest, "outputs": {**manifest["outputs"], **outputs}})


# -- answers: own sources ------------------------------------------------------------------------------------------


def test_an_adapter_counts_on_its_own_data_sets_alone(build: Build, samples: list[Sample]) -> None:
    lost = [answer(s, "a lever") for s in samples if s["meta"]["source"] != "first"]
    lost[0] = failed_prediction(lost[0]["id"], "too long")
    predictions = {"base": right(samples), "a": right(samples, "first"), "b": lost, "c": right(samples)}
    scores = evaluate(build(samples, predictions, pictures=False, recipe=recipe(OWN)))
    figures = {name: scores[name]["exact_match"] for name in scores}
    counts = {name: (one["n"], one["failed"], one["value"]) for name, one in figures.items()}
    assert counts == {"base": (12, 0, 100), "a": (4, 0, 100), "b": (8, 1, 0), "c": (12, 0, 100)}


def test_a_sample_that_was_asked_and_not_answered_has_failed(build: Build, samples: list[Sample]) -> None:
    predictions = {"base": right(samples), "a": right(samples, "first")[1:]}
    scores = evaluate(build(samples, predictions, pictures=False, recipe=recipe(OWN)))
    assert (scores["a"]["exact_match"]["n"], scores["a"]["exact_match"]["failed"]) == (4, 1)


def test_if_all_answer_all_a_missing_prediction_has_failed(build: Build, samples: list[Sample]) -> None:
    predictions = {"base": right(samples), "a": right(samples, "first")}
    scores = evaluate(build(samples, predictions, pictures=False, recipe=recipe()))
    assert (scores["a"]["exact_match"]["n"], scores["a"]["exact_match"]["failed"]) == (12, 8)


def test_differences_are_on_the_same_samples(build: Build, samples: list[Sample]) -> None:
    """Base is right everywhere else: no credit and no blame for what the adapter was not asked."""
    base = [answer(s, "a lever" if s["meta"]["source"] == "first" else s["references"][0]) for s in samples]
    run = build(samples, {"base": base, "a": right(samples, "first")}, pictures=False, recipe=recipe(OWN))
    evaluate(run)
    difference = read_json(run.path("eval", "differences.json"))["a"]["exact_match"]
    assert (difference["value"], difference["groups"]) == (100, 3)
    assert difference["low"] is difference["high"] is difference["p"] is None  # three documents are too few


def test_tables_show_each_adapters_own_n_and_groups(build: Build, samples: list[Sample], capfd: Any) -> None:
    predictions = {"base": right(samples), "a": right(samples, "first"), "b": right(samples, "second", "third")}
    run = build(samples, predictions, pictures=False, recipe=recipe(OWN))
    evaluate(run)
    lines = [line.strip() for line in capfd.readouterr().out.splitlines()]
    rows = [line.split() for line in lines[lines.index("exact_match") + 1 : lines.index("f1")]]
    own = [("base", "12"), ("base, of a's samples", "4"), ("a", "4"), ("base, of b's samples", "8"), ("b", "8")]
    assert [(" ".join(row[: row.index("100.0")]), row[-3]) for row in rows] == own
    report = run.path("eval", "report.html").read_text(encoding="utf-8")
    assert "base, of a’s samples" in report and "base 100.0 on the same 4" in report
    kinds = read_json(run.path("eval", "by_group.json"))["a"]["kind"]
    assert sum(one["exact_match"]["n"] for one in kinds.values() if one) == 4
    assert not re.search(r"\bnan\b", run.path("eval", "report.html").read_text(encoding="utf-8"))


def test_an_adapter_without_a_test_question_of_its_own_has_no_scores(build: Build, samples: list[Sample]) -> None:
    kept = [sample for sample in samples if sample["meta"]["source"] != "first"]
    scores = evaluate(build(kept, {"base": right(kept), "a": [], "c": right(kept)}, pictures=False, recipe=recipe(OWN)))
    assert scores["a"] == {} and scores["c"]["exact_match"]["n"] == 8


def test_the_summary_counts_each_data_set_on_its_own(build: Build, samples: list[Sample]) -> None:
    predictions = {"base": right(samples), "a": right(samples, "first")[1:], "b": right(samples, "second", "third")}
    run = build(samples, predictions, pictures=False, recipe=recipe(OWN))
    write_json(
        run.path("train", "manifest.json"), {**(run.manifest("train") or {}), "untrained": {"c": "it is cursed"}}
    )
    evaluate(run, answering={"a": {"samples": 4, "seconds": 2.5}})
    summary = read_json(run.path("eval", "summary.json"))
    a, b, c = summary["dataset_results"]
    original = {"dataset_name", "evaluation_time", "eval_samples", "batch_size", "metrics", "generation_kwargs"}
    assert original <= set(a["evaluation"]) and {"exact_match", "f1"} <= set(a["evaluation"]["metrics"])
    found = {key: a["evaluation"][key] for key in ("dataset_name", "eval_samples", "failed", "evaluation_time")}
    assert found == {"dataset_name": "first", "eval_samples": 4, "failed": 1, "evaluation_time": 2.5}
    assert a["evaluation"]["metrics"]["exact_match"] == 75.0
    assert b["evaluation"]["dataset_name"] == "b", "a mix has the adapter's name"
    assert (b["evaluation"]["eval_samples"], b["evaluation"]["failed"]) == (8, 0)
    assert c["error"] == "it is cursed" and "evaluation" not in c
    totals = summary["summary_statistics"]
    assert totals["avg_em_score"] == pytest.approx((75 + 100) / 2) and totals["failed_answers"] == 1


def with_ablation(run: Run, records: list[Prediction]) -> Run:
    path = run.path("infer", "ablations", "style.jsonl")
    write_jsonl(path, records)  # type: ignore[arg-type]
    return run


def test_ablations_count_the_samples_that_the_adapter_was_asked(build: Build, samples: list[Sample]) -> None:
    run = build(
        samples,
        {"base": right(samples), "a": right(samples, "first")},
        pictures=False,
        recipe=recipe(OWN, "infer.ablate=[style]"),
    )
    with_ablation(run, right(samples, "first"))
    evaluate(run)
    found = read_json(run.path("eval", "ablations.json"))
    for each in found.values():
        assert (each["figures"]["exact_match"]["n"], each["figures"]["exact_match"]["failed"]) == (4, 0)
        assert each["changed"] == 0


def test_ablations_are_of_the_first_adapter_with_predictions(build: Build, samples: list[Sample], capfd: Any) -> None:
    predictions = {"base": right(samples), "vote": right(samples), "b": right(samples)}
    run = with_ablation(
        build(samples, predictions, pictures=False, recipe=recipe("infer.ablate=[style]")), right(samples)
    )
    evaluate(run)
    assert list(read_json(run.path("eval", "ablations.json"))) == ["everything", "style"]
    assert "b answered all questions again without each component in turn." in run.path(
        "eval", "report.html"
    ).read_text(encoding="utf-8")
    assert "without style" in capfd.readouterr().out


# -- training data -------------------------------------------------------------------------------------------------


def vote_facts(**changes: Any) -> dict[str, Any]:
    """A vote in infer's manifest."""
    weights = {"a": 1.0, "b": 1.0}
    known: dict[str, Any] = {"adapters": list(weights), "chosen": "all", "weights": weights, "validation": {"a": 0.5}}
    known |= {"best": "a", "decided by": {"majority": 11, "better voters": 1}, "second round": 0}
    return {**known, **changes}


def with_votes(run: Run, samples: list[Sample], split: tuple[int, ...] = (3,)) -> Run:
    """Write votes.jsonl of two adapters that agree on all samples but those of `split`."""
    rows = []
    for number, sample in enumerate(samples):
        given = sample["references"][0] if sample["references"] else "x"
        votes = {"a": given, "b": "a lever" if number in split else given}
        unanimous = len(set(votes.values())) == 1
        row = {"id": sample["id"], "round": 1, "votes": votes, "answer": given, "by": "majority"}
        rows.append({**row, "agreement": 1.0 if unanimous else 0.5, "entropy": 0.0 if unanimous else 1.0})
    write_jsonl(run.path("infer", "votes.jsonl"), rows)
    add_outputs(run, "infer", "votes.jsonl")
    return run


def test_scores_of_training_data_say_so_in_every_table(build: Build, samples: list[Sample], capfd: Any) -> None:
    for sample in samples[:5]:
        sample["meta"]["trained_on"] = True
    settings = recipe("data.evaluate_on_training=true", "infer.ablate=[style]", "infer.vote={}")
    predictions = {"base": right(samples), "vote": right(samples), "a": right(samples), "b": right(samples)}
    run = with_votes(
        with_ablation(build(samples, predictions, recipe=settings, pictures=False, losses=LOSSES), right(samples)),
        samples,
    )
    evaluate(run, vote=vote_facts())
    manifest = run.manifest("eval") or {}
    assert manifest["counts"]["scored on training data"] == 5
    shown = " ".join(capfd.readouterr().out.split())
    words = ON_TRAINING_DATA.split(":")[0]
    assert shown.count(words) == 1 + 1 + 1 + 1, "above; below the scores; the votes; the ablations"
    report = run.path("eval", "report.html").read_text(encoding="utf-8")
    sections = [part for part in report.split("<section") if "<table" in part]
    silent = {re.findall(r"<h2>(.*?)</h2>", part)[0] for part in sections if ON_TRAINING_DATA not in part}
    assert silent == {"Training loss", "Stages"}, "these have no scores"
    assert read_json(run.path("eval", "summary.json"))["pipeline_info"]["evaluated_on_training_data"] is True


def test_scores_of_held_out_data_have_no_warning(build: Build, samples: list[Sample], capfd: Any) -> None:
    run = build(samples, {"base": right(samples)}, pictures=False, recipe=recipe())
    evaluate(run)
    assert "scored on training data" not in (run.manifest("eval") or {})["counts"]
    assert ON_TRAINING_DATA not in " ".join(capfd.readouterr().out.split())
    assert ON_TRAINING_DATA not in run.path("eval", "report.html").read_text(encoding="utf-8")
    assert read_json(run.path("eval", "summary.json"))["pipeline_info"]["evaluated_on_training_data"] is False


# -- the vote ------------------------------------------------------------------------------------------------------


def test_the_vote_has_its_voters_and_its_difference_from_the_best_of_them(build: Build, samples: list[Sample]) -> None:
    samples[5]["references"] = []
    predictions = {"base": right(samples[:5]) + right(samples[6:]), "vote": [], "a": [], "b": []}
    wrong = [answer(s, "a lever" if n == 3 else (s["references"] or ["x"])[0]) for n, s in enumerate(samples)]
    good = [answer(s, (s["references"] or ["x"])[0]) for s in samples]
    predictions |= {"vote": good, "a": wrong, "b": wrong}
    run = with_votes(build(samples, predictions, pictures=False, recipe=recipe("infer.vote={}")), samples, split=(3, 5))
    evaluate(run, vote=vote_facts(weights={"a": 1.0, "b": 0.5}))
    vote = read_json(run.path("eval", "vote.json"))
    voters = {voter["name"]: voter for voter in vote["voters"]}
    assert [voter["mix"] for voter in vote["voters"]] == ["first", "second, third#3", "all"]
    assert (voters["a"]["agreement"], voters["b"]["agreement"]) == (100.0, round(100 * 10 / 12, 4))
    assert (voters["a"]["validation"], voters["b"]["validation"]) == (50.0, None)
    assert (voters["b"]["weight"], voters["c"]["weight"], voters["c"]["agreement"]) == (0.5, None, None)
    assert vote["best"] == "a" and vote["over_best"]["exact_match"]["value"] == round(100 / 11, 4)
    assert [(row["id"], row["right"]) for row in vote["disagreements"]] == sorted(
        [(samples[3]["id"], True), (samples[5]["id"], None)]
    )
    assert (vote["agreement"], vote["entropy"]) == (round(100 * 11 / 12, 4), round(2 / 12, 4))


def test_a_disagreement_that_a_second_round_settled_is_still_one(build: Build, samples: list[Sample]) -> None:
    predictions = {"base": right(samples), "vote": right(samples), "a": right(samples), "b": right(samples)}
    run = with_votes(build(samples, predictions, pictures=False, recipe=recipe("infer.vote={}")), samples)
    rows = read_jsonl(run.path("infer", "votes.jsonl"))
    first = {name: rows[3][name] for name in ("votes", "answer", "by", "agreement", "entropy")}
    agreed = dict.fromkeys(first["votes"], rows[3]["answer"])
    rows[3] |= {"round": 2, "votes": agreed, "agreement": 1.0, "entropy": 0.0, "first_round": first}
    # here one voter gave an answer, there none
    rows[4] |= {"votes": {"a": rows[4]["answer"], "b": None}, "agreement": 0.5}
    rows[5] |= {"votes": {"a": None, "b": None}, "agreement": 0.0, "answer": None, "by": "nobody"}
    write_jsonl(run.path("infer", "votes.jsonl"), rows)
    add_outputs(run, "infer", "votes.jsonl")
    evaluate(run, vote=vote_facts())
    vote = read_json(run.path("eval", "vote.json"))
    assert {row["id"] for row in vote["disagreements"]} == {samples[3]["id"], samples[4]["id"]}
    (settled,) = [row for row in vote["disagreements"] if row["round"] == 2]
    assert settled["votes"] == first["votes"], "their own answers"
    assert (vote["agreement"], vote["entropy"]) == (round(100 * 10 / 12, 4), round(1 / 12, 4))
    voters = {voter["name"]: voter for voter in vote["voters"]}
    assert voters["b"]["agreement"] == round(100 * 9 / 12, 4), "with the final decision"


def test_without_validation_no_voter_is_called_the_best_by_it(build: Build, samples: list[Sample], capfd: Any) -> None:
    predictions = {"base": right(samples), "vote": right(samples), "a": right(samples), "b": right(samples)}
    run = with_votes(build(samples, predictions, pictures=False, recipe=recipe("infer.vote={}")), samples)
    evaluate(run, vote=vote_facts(validation={}))
    shown = " ".join(capfd.readouterr().out.split())
    for text in (shown, run.path("eval", "report.html").read_text(encoding="utf-8")):
        assert "the best by validation" not in text
        assert "a, the first by name, as nothing was validated:" in text


def test_other_weights_are_shown_although_no_answer_changes(build: Build, samples: list[Sample]) -> None:
    """The weights are in infer's manifest, and no key covers that."""
    predictions = {"base": right(samples), "vote": right(samples), "a": right(samples), "b": right(samples)}
    run = with_votes(build(samples, predictions, pictures=False, recipe=recipe("infer.vote={}")), samples)
    evaluate(run, vote=vote_facts())
    weighted = recipe("infer.vote={weights: validation}")
    other = Run(run.name, weighted, run.roots)
    evaluate(other, vote=vote_facts(weights={"a": 0.5, "b": 0.25}), key=other.key("infer", {}))
    weights = [voter["weight"] for voter in read_json(run.path("eval", "vote.json"))["voters"]]
    assert weights == [0.5, 0.25, None]


def test_without_a_vote_there_is_no_outcome_of_one(build: Build, samples: list[Sample], tmp_path: Path) -> None:
    run = build(samples, {"base": right(samples), "a": right(samples)}, pictures=False, recipe=recipe())
    evaluate(run)
    assert not run.path("eval", "vote.json").exists()
    assert "The vote" not in run.path("eval", "report.html").read_text(encoding="utf-8")
