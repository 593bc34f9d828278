"""The ledger's rows: what is read out of run folders, whatever state they are in, and their order."""

import csv
import io
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.contract.errors import Exit
from stages.contract.files import digest_of, read_json, read_jsonl, write_json, write_jsonl
from stages.contract.recipe import dump_recipe
from stages.contract.run import CONTRACT_VERSION, lock_stage_folder
from stages.eval.stage import work as eval_work
from stages.host.runner import run_stage
from stages.results.ledger import Row, sorted_rows
from stages.results.ledger_page import render_html
from stages.results.ledger_table import ON_TRAINING_DATA, render_csv, render_table
from stages.results.run_reader import run_names
from tests.contract.test_help import HEAVY, imported_by
from tests.eval.conftest import answer, make_samples
from tests.eval.conftest import make_run as make_run_for_eval
from tests.results.made_runs import (
    MIXES,
    PROCESS,
    ROWS,
    SCORES,
    VERSION,
    Page,
    content_of,
    finish,
    finish_eval,
    make_experiment,
    make_recipe,
    make_run,
    outputs_of,
    row_of,
    rows_of,
)

# -- what is read ------------------------------------------------------------------------------------------------


def test_an_adapter_its_data_and_its_score(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert (
        row_of(tmp_path, "mixed")
        == Row(
            run="job",
            task="patent_qa",
            adapter="mixed",
            data_mix="main#4, extra x 1.5",
            sources="main 4, extra 4",  # six of four, and one of these, drawn twice, is too long
            samples=8,
            steps=12,
            loss=0.25,
            base_model="small",
            seed=42,
            recipe=run.recipe.digest()[:12],
            metric="exact_match",
            score=61.25,
            low=51.25,
            high=71.25,
            n=40,
            failed=3,
            empty=2,
            groups=12,
            gain=41.25,
            gain_low=31.25,
            gain_high=51.25,
            gain_p=0.01,
            scored_on="test data",
            state="scored",
            date="2026-01-02T03:06:05+00:00",
            version=VERSION,
        )
    )
    assert row_of(tmp_path, "plain").sources == "main 6"


def test_base_stands_beside_the_adapters(tmp_path: Path) -> None:
    make_run(tmp_path)
    assert [row.adapter for row in rows_of(tmp_path)] == ["base", "plain", "mixed"]
    base = row_of(tmp_path, "base")
    assert (base.score, base.gain, base.samples, base.data_mix, base.state) == (
        20.0,
        None,
        None,
        "not trained",
        "scored",
    )


def test_another_metric(tmp_path: Path) -> None:
    make_run(tmp_path)
    row = row_of(tmp_path, "mixed", metric="f1")
    assert (row.metric, row.score, row.gain) == ("f1", 30.625, 20.625)
    row = row_of(tmp_path, "mixed", metric="accuracy")
    assert (row.score, row.state) == (None, "not scored by accuracy, but by exact_match, f1")


def test_an_adapter_that_was_asked_no_test_sample(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    scores = read_json(run.path("eval", "scores.json")) | {"mixed": {}}
    finish(run, "eval", {"scores.json": scores, "differences.json": {}}, counts={"scored": 40})
    row = row_of(tmp_path, "mixed")
    assert (row.score, row.samples, row.state) == (None, 8, "not scored: it got no test sample")


def test_the_vote_has_a_row_and_every_adapter_its_part_in_it(tmp_path: Path) -> None:
    held = {
        "adapters": ["mixed"],
        "weights": {"mixed": 0.625},
        "validation": {"plain": 0.5, "mixed": 0.625},
    }
    make_run(tmp_path, scores={**SCORES, "vote": 70.0}, vote=held)
    rows = {row.adapter: row for row in rows_of(tmp_path)}
    assert list(rows) == ["base", "plain", "mixed", "vote"]
    assert [(row.in_vote, row.weight, row.validation) for row in rows.values()] == [
        ("", None, None),
        ("no", None, 50.0),
        ("yes", 0.625, 62.5),
        ("", None, None),
    ]
    assert (rows["vote"].data_mix, rows["vote"].score, rows["vote"].gain) == ("the vote of mixed", 70.0, 50.0)


def test_a_vote_that_is_still_to_be_held_is_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path, vote={"adapters": ["mixed"], "weights": {"mixed": 1.0}, "validation": {}})
    shutil.rmtree(run.stage_folder("eval"))
    assert (row_of(tmp_path, "vote").score, row_of(tmp_path, "vote").state) == (None, "not scored: eval has not run")
    assert row_of(tmp_path, "mixed").in_vote == "yes"


def test_an_adapter_that_could_not_be_trained(tmp_path: Path) -> None:
    make_run(tmp_path, scores={"base": 20.0, "plain": 42.5}, untrained={"mixed": "out of memory\nin step 3"})
    row = row_of(tmp_path, "mixed")
    assert (row.state, row.score, row.samples) == ("not trained: out of memory in step 3", None, None)
    assert row.data_mix == "main#4, extra x 1.5"
    assert row_of(tmp_path, "plain").state == "scored"


@pytest.mark.parametrize("name", ["summary.json", "report.json"])  # the second by versions before this name
def test_where_train_ended_with_an_error_the_error_is_reported(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path, untrained={"mixed": "?"})
    train = run.stage_folder("train")
    (train / "manifest.json").unlink()
    write_json(train / "state.json", {"key": "", "forced": False, "starts": []})
    results = [{"dataset_index": 0, "dataset_name": "main"}]
    failed = {"dataset_index": 1, "dataset_name": "mixed", "error": "no sample fits"}
    write_json(train / name, {"dataset_results": [*results, failed]})
    events = [{"event": "start"}, {"event": "stopped", "error": "1 of 2 adapters"}, {"event": "end"}]
    write_jsonl(train / "events.jsonl", events)
    for stage in ("infer", "eval"):
        shutil.rmtree(run.stage_folder(stage))
    assert row_of(tmp_path, "mixed").state == "not trained: no sample fits"
    assert row_of(tmp_path, "plain").state == "trained, not scored: train is half done: 1 of 2 adapters"
    assert row_of(tmp_path, "plain").samples == 6


def test_what_runs_and_what_has_not_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for stage in ("eval", "infer"):
        shutil.rmtree(run.stage_folder(stage))
    assert row_of(tmp_path, "plain").state == "trained, not scored: infer has not run"
    with lock_stage_folder(run.stage_folder("infer")):
        assert row_of(tmp_path, "plain").state == "trained, not scored: infer is running"
    shutil.rmtree(run.stage_folder("train"))
    assert {row.state for row in rows_of(tmp_path)} == {
        "not trained: train has not run",
        "not scored: infer has not run",
    }
    assert {row.score for row in rows_of(tmp_path)} == {None}


def test_an_adapter_of_a_shard_that_is_not_merged(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for stage in ("infer", "eval"):
        shutil.rmtree(run.stage_folder(stage))
    shard = run.folder / "shards" / "train" / "1-of-2"
    shard.mkdir(parents=True)
    run.stage_folder("train").joinpath("adapters").rename(shard / "adapters")
    shutil.rmtree(run.stage_folder("train"))
    assert row_of(tmp_path, "mixed").state.startswith("trained in shard 1-of-2, which is not merged")


def test_what_was_scored_on_training_data_says_so_everywhere(tmp_path: Path) -> None:
    make_run(tmp_path, "all", seen=40)
    make_run(tmp_path, "some", seen=10)
    rows = rows_of(tmp_path)
    assert {(row.run, row.scored_on) for row in rows} == {
        ("all", "training data"),
        ("some", "training data (10 of 40 samples)"),
    }
    assert all("scored on training data" in row.state for row in rows)
    assert ON_TRAINING_DATA in " ".join(render_table(rows, None, False).split())
    assert ON_TRAINING_DATA in render_html(rows, None, False)
    assert "training data (10 of 40 samples)" in render_csv(rows)


# -- experiments: the data recipe, what it kept, what was trained on it, and the score -----------------------------


def test_baseline_beside_custom(tmp_path: Path) -> None:
    make_run(tmp_path, "baseline")
    make_experiment(tmp_path)
    rows = rows_of(tmp_path)
    told = {(r.run, r.adapter): (r.data_recipe, r.records_read, r.records_kept, r.connector_samples) for r in rows}
    nothing = ("", None, None, None)
    assert {told["baseline", name] for name in SCORES} == {told["custom", "base"]} == {nothing}
    recipe, *counts = told["custom", "plain"]
    assert re.fullmatch(r"text_length, image_captioning, document \([0-9a-f]{8}\)", recipe)
    assert counts == [100, 81, 80]
    row = next(row for row in rows if (row.run, row.adapter) == ("custom", "plain"))
    assert (row.samples, row.score, row.state) == (6, 42.5, "scored")
    lines = list(csv.DictReader(io.StringIO(render_csv(rows))))
    assert [line["records_kept"] for line in lines] == ["", "", "", "", "81", "81"]
    text = render_html(rows, None, False)
    assert {"data recipe", "records kept", "connector samples"} <= set(re.findall(r">([^<>]+)</button>", text))
    assert "81 of 100" in Page(text).cells
    shown = render_table([row for row in rows if row.run == "baseline"], None, False)
    assert "data recipe" not in shown
    assert "kept" not in shown
    assert [row.records_kept for row in sorted_rows(rows, "records_kept", True)][:2] == [81, 81]


def test_other_parameters_are_another_data_recipe(tmp_path: Path) -> None:
    found = []
    for length in (15, 20):
        folder = tmp_path / str(length)
        folder.mkdir()
        make_experiment(folder, [{"text_length_filter": {"min_len": length}}, *PROCESS[1:]])
        found.append(row_of(folder, "plain").data_recipe)
    assert found[0] != found[1]
    assert found[0][:-9] == found[1][:-9]


def test_data_that_are_others_now_are_not_reported_of_an_adapter(tmp_path: Path) -> None:
    run = make_experiment(tmp_path)
    outputs = {name: content_of(path) for name, path in outputs_of(run, "preprocess").items()}
    finish(run, "preprocess", {**outputs, "samples/train.jsonl": []})
    row = row_of(tmp_path, "plain")
    assert (row.data_recipe, row.records_kept, row.connector_samples) == ("", None, 80)


# -- a score stands only beside the training that made it --------------------------------------------------------


def test_a_score_of_an_earlier_training_is_no_score_of_this_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, vote={"adapters": ["mixed"], "weights": {"mixed": 1.0}, "validation": {"mixed": 0.5}})
    training = run.path("train", "adapters", "mixed", "training.json")
    write_json(training, {**read_json(training), "steps": 99})
    outputs = {name: read_json(path) for name, path in outputs_of(run, "train").items() if name.endswith(".json")}
    finish(run, "train", {**outputs, "metrics.jsonl": []})
    row = row_of(tmp_path, "mixed")
    assert (row.steps, row.score, row.gain, row.validation, row.in_vote) == (99, None, None, None, "")
    assert row.state == "stale: train has changed since infer used it; the score was 61.2"
    # of the other adapter nothing has changed
    row = row_of(tmp_path, "plain")
    assert (row.score, row.state) == (42.5, "stale: train has changed since infer used it")


def test_an_adapter_that_is_being_trained_again_has_lost_its_score(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.path("train", "manifest.json").unlink()
    write_json(run.path("train", "state.json"), {})
    shutil.rmtree(run.path("train", "adapters", "mixed"))
    assert row_of(tmp_path, "mixed").state == "stale: train is half done; the score was 61.2"
    assert row_of(tmp_path, "plain").score == 42.5


def test_until_train_is_done_an_adapter_of_an_earlier_recipe_is_none_of_this_one(tmp_path: Path) -> None:
    """It stays in its place until the new one is complete."""
    run = make_run(tmp_path)
    renamed = make_recipe(tmp_path, {"plain": MIXES["plain"], "other": MIXES["mixed"]}, seed=7)
    (run.folder / "recipe.yaml").write_text(dump_recipe(renamed), encoding="utf-8")
    train = run.stage_folder("train")
    (train / "manifest.json").unlink()
    for stage in ("infer", "eval"):
        shutil.rmtree(run.stage_folder(stage))
    assert [(row.adapter, row.samples, row.steps) for row in rows_of(tmp_path)] == [
        *(("base", None, None), ("plain", None, None), ("other", None, None)),
    ]
    write_json(train / "summary.json", {"dataset_results": [{"dataset_index": 0, "dataset_name": "main"}]})
    assert row_of(tmp_path, "plain").samples == 6, "which this start has found or trained"


def test_a_recipe_that_has_changed_since(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    changed = make_recipe(tmp_path, {**MIXES, "plain": ["extra"]}, eval={"worst": 3})
    (run.folder / "recipe.yaml").write_text(dump_recipe(changed), encoding="utf-8")
    row = row_of(tmp_path, "plain")
    assert (row.data_mix, row.sources) == ("main", "")  # as it was trained, not as the recipe says now
    assert row.state == "stale: train ran with another recipe than recipe.yaml; the score was 42.5"
    changed = make_recipe(tmp_path, {**MIXES, "plain": ["extra"]})  # of what eval goes by, nothing has changed
    (run.folder / "recipe.yaml").write_text(dump_recipe(changed), encoding="utf-8")
    row = row_of(tmp_path, "plain")
    assert (row.score, row.state) == (42.5, "stale: train ran with another recipe than recipe.yaml")


def test_a_run_with_a_key_that_was_replaced_keeps_its_scores(tmp_path: Path) -> None:
    """As earlier versions wrote it: the key is in the recipe, and eval's manifest counts it."""
    run = make_run(tmp_path)
    recipe = yaml.safe_load(dump_recipe(run.recipe))
    recipe["eval"] = {"bootstrap": 2000, **recipe["eval"]}
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    path = run.path("eval", "manifest.json")
    manifest = read_json(path)
    counted = {"task": run.recipe.task, "seed": run.recipe.seed, "infer.ablate": [], "infer.vote": None}
    digest = digest_of({**counted, "eval": recipe["eval"]})
    values = {"contract": CONTRACT_VERSION, "stage": "eval", "recipe": digest, "inputs": manifest["inputs"]}
    write_json(path, {**manifest, "key": digest_of(values)})
    assert (row_of(tmp_path, "plain").score, row_of(tmp_path, "plain").state) == (42.5, "scored")
    recipe["eval"]["worst"] = 3
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert row_of(tmp_path, "plain").state.startswith("stale: eval ran with another recipe than recipe.yaml")


def test_sources_are_not_reported_of_other_samples_than_were_trained_on(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path = run.path("preprocess", "samples", "train.jsonl")
    write_jsonl(path, read_jsonl(path)[::-1])
    assert row_of(tmp_path, "mixed").sources == ""


def test_an_adapter_that_the_recipe_no_longer_has(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    fewer = make_recipe(tmp_path, {"plain": ["main"]})
    (run.folder / "recipe.yaml").write_text(dump_recipe(fewer), encoding="utf-8")
    row = row_of(tmp_path, "mixed")
    assert (row.data_mix, row.score) == ("main#4, extra x 1.5", 61.25)
    assert row.state == "stale: train ran with another recipe than recipe.yaml"


# -- folders in every state --------------------------------------------------------------------------------------


def test_another_version_of_the_contract(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    manifest = read_json(run.path("eval", "manifest.json"))
    write_json(run.path("eval", "manifest.json"), {**manifest, "contract": 2})
    told = f"eval ran under version 2 of the contract, this Lorry reads {CONTRACT_VERSION}"
    assert row_of(tmp_path, "mixed").state == f"trained, not scored: {told}"
    assert row_of(tmp_path, "base").score is None
    (run.folder / "recipe.yaml").write_text("model: {path: small}\nolder: 1\n", encoding="utf-8")
    (row,) = rows_of(tmp_path)
    assert row.state.startswith("broken: made under version 2 of the contract, this Lorry reads 3; recipe.yaml")


def test_another_version_of_lorry(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    finish_eval(run, version="0.99.1")
    row = row_of(tmp_path, "mixed")
    assert (row.score, row.version, row.state) == (61.25, "0.99.1", f"scored, by Lorry 0.99.1 (this is {VERSION})")


def test_a_file_that_the_manifest_does_not_vouch_for_is_not_believed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    scores = read_json(run.path("eval", "scores.json"))
    scores["mixed"]["exact_match"]["value"] = 99.0
    write_json(run.path("eval", "scores.json"), scores)
    row = row_of(tmp_path, "mixed")
    assert (row.score, row.samples, row.state) == (None, 8, "broken: eval/scores.json has changed since eval wrote it")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("recipe.yaml", None, "broken: recipe.yaml is missing"),
        ("recipe.yaml", b"- a list\n", "broken: recipe.yaml: found a list; write a mapping with the keys"),
        ("recipe.yaml", b"\xff\xfe", "broken: recipe.yaml: cannot read the recipe"),
        ("eval/manifest.json", b"{", "trained, not scored: eval/manifest.json is damaged"),
        ("eval/manifest.json", b"[]", "trained, not scored: eval/manifest.json is damaged"),
        ("eval/manifest.json", b'{"contract": 3}', "trained, not scored: eval/manifest.json is damaged"),
        ("eval/scores.json", None, "broken: eval/scores.json has changed since eval wrote it"),
        ("train/adapters/mixed/training.json", b"{}", "broken: train/adapters/mixed/training.json has changed since"),
    ],
)
def test_damage_is_reported_in_a_row(tmp_path: Path, name: str, content: bytes | None, told: str) -> None:
    run = make_run(tmp_path)
    make_run(tmp_path, "whole")
    if content is None:
        (run.folder / name).unlink()
    else:
        (run.folder / name).write_bytes(content)
    rows = rows_of(tmp_path)
    assert any(row.run == "job" and row.state.startswith(told) for row in rows), [row.state for row in rows]
    assert [row.state for row in rows if row.run == "whole"] == ["scored"] * 3


JUNK = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["log", "vote", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    held = {"adapters": ["mixed"], "weights": {"mixed": 1.0}, "validation": {"plain": 0.5, "mixed": 0.625}}
    make_run(folder, vote=held, scores={**SCORES, "vote": 70.0})
    return folder


@settings(max_examples=50)
@given(data=st.data())
def test_no_damage_is_a_crash(whole: Path, data: st.DataObject) -> None:
    """Any value of any manifest, or any whole file, replaced by anything."""
    files = sorted(path for path in (whole / "runs" / "job").rglob("*.json*") if not path.name.startswith("."))
    path = data.draw(st.sampled_from(files))
    before = path.read_bytes()
    try:
        if path.name == "manifest.json" and data.draw(st.booleans()):
            manifest = json.loads(before)
            place: Any = manifest
            key = data.draw(st.sampled_from(sorted(place)))
            while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
                place = place[key]
                key = data.draw(st.sampled_from(sorted(place)))
            place[key] = data.draw(JUNK)
            path.write_text(json.dumps(manifest), encoding="utf-8")
        else:
            path.write_bytes(data.draw(st.binary(max_size=20) | JUNK.map(lambda junk: json.dumps(junk).encode())))
        rows = rows_of(whole)
        assert rows
        assert all(row.state for row in rows)
        for column in fields(Row):
            assert len(sorted_rows(rows, column.name, True)) == len(rows)
        render_csv(rows), render_html(rows, None, False), render_table(rows, None, False)
    finally:
        path.write_bytes(before)


def test_only_runs_are_runs(tmp_path: Path) -> None:
    make_run(tmp_path)
    runs = tmp_path / "runs"
    for name in ("lost+found", ".cache/train", "half/train", "shards/shards"):
        (runs / name).mkdir(parents=True)
    (runs / "ledger.html").write_text("")
    assert run_names(runs) == ["half", "job", "shards"]
    states = {row.run: row.state for row in rows_of(tmp_path) if row.run != "job"}
    assert states == dict.fromkeys(("half", "shards"), "broken: recipe.yaml is missing")


def test_names_that_no_terminal_should_obey(tmp_path: Path) -> None:
    make_run(tmp_path, "a\x1b[31m\nb")
    assert {row.run for row in rows_of(tmp_path)} == {"a\ufffd[31m b"}


def test_what_eval_writes_is_what_is_read(tmp_path: Path) -> None:
    samples = make_samples()
    right = [answer(sample, sample["references"][0]) for sample in samples]
    wrong = [answer(sample, "a lever") for sample in samples]
    run = make_run_for_eval(tmp_path, samples, {"base": wrong, "tuned": right}, pictures=False)
    (run.folder / "recipe.yaml").write_text(dump_recipe(run.recipe), encoding="utf-8")
    assert run_stage(run, "eval", eval_work) == Exit.DONE
    row = row_of(tmp_path, "tuned")
    assert (row.metric, row.score, row.high, row.groups, row.n, row.failed) == ("exact_match", 100, 100, 6, 24, 0)
    assert (row.gain, row.gain_high, row.state) == (100, 100, "scored")
    assert (row.low, row.gain_low, row.gain_p) == pytest.approx((64.24, 47.6, 0.0022), abs=0.02)
    assert (row.version, row_of(tmp_path, "base").score) == (VERSION, 0)


# -- order -------------------------------------------------------------------------------------------------------


@given(rows=ROWS, column=st.sampled_from([field.name for field in fields(Row)]), descending=st.booleans())
def test_sorting_loses_no_row_and_what_is_missing_is_last(rows: list[Row], column: str, descending: bool) -> None:
    found = sorted_rows(rows, column, descending)
    assert sorted(map(id, found)) == sorted(map(id, rows))
    values = [getattr(row, column) for row in found]
    known = [value for value in values if value not in (None, "")]
    assert values[: len(known)] == known
    keys = [padded(value.casefold()) if isinstance(value, str) else value for value in known]
    assert keys == sorted(keys, reverse=descending)


def padded(text: str) -> str:
    """With numbers of one length, so that they compare as numbers."""
    return "".join(part.rjust(20, "0") if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", text)))


def test_numbers_sort_as_numbers_and_equal_rows_keep_their_order() -> None:
    rows = [Row("a", score=9.0), Row("b", score=10.0), Row("c"), Row("d", score=10.0)]
    assert [row.run for row in sorted_rows(rows, "score", True)] == ["b", "d", "a", "c"]
    assert [row.run for row in sorted_rows(rows, "score", False)] == ["a", "b", "d", "c"]
    named = [Row(name) for name in ("mix-10", "Mix-2", "mix", "2b", "mix-1")]
    assert [row.run for row in sorted_rows(named, "run", False)] == ["2b", "mix", "mix-1", "Mix-2", "mix-10"]


def test_reading_imports_nothing_heavy() -> None:
    _, modules = imported_by("stages.results.ledger")
    assert modules & (set(HEAVY) - {"pydantic", "stages.contract.recipe"}) == set()
    assert not any(module.startswith(("stages.eval", "stages.infer")) for module in modules)
