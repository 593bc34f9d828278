"""`lorry ledger`: what it reads out of run folders, whatever state they are in, and how it shows it."""

import base64
import csv
import hashlib
import importlib.metadata
import io
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from entrypoints.ledger import ON_TRAINING_DATA, RARE, UNTESTED, as_csv, as_html, as_table, sorted_rows
from stages.contract.errors import Exit
from stages.contract.files import FileHashes, read_json, read_jsonl, write_json, write_jsonl
from stages.contract.mixes import mixed
from stages.contract.recipe import Recipe, dump_recipe, load_recipe
from stages.contract.roots import Roots
from stages.contract.run import CONTRACT_VERSION, Run, describe_output, only_writer
from stages.eval.stage import work as eval_work
from stages.host.runner import run_stage
from stages.results.ledger import Row, read_ledger, run_names
from tests.conftest import MINIMAL_RECIPE, Lorry
from tests.contract.test_help import HEAVY, imported_by
from tests.eval.conftest import answer, make_samples
from tests.eval.conftest import make_run as make_run_for_eval

VERSION = importlib.metadata.version("lorry")

SCORES = {"base": 20.0, "plain": 42.5, "mixed": 61.25}

MIXES: dict[str, Any] = {"plain": ["main"], "mixed": ["main#4", {"source": "extra", "fraction": 1.5}]}
"""Of six samples of `main` and four of `extra`."""


def roots_of(folder: Path) -> Roots:
    return Roots(folder / "data", folder / "models", folder / "runs")


def make_recipe(folder: Path, mixes: Mapping[str, Any] = MIXES, **changes: Any) -> Recipe:
    """The least recipe there is, with these adapters; `changes` are top-level sections."""
    values = yaml.safe_load(MINIMAL_RECIPE)
    values["model"]["path"] = "small"
    values["train"]["adapters"] = [{"name": name, "data": data} for name, data in mixes.items()]
    values["train"]["keep_going"] = True
    path = folder / "made.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}), encoding="utf-8")
    return load_recipe(path)


def figures_of(value: float, n: int = 40) -> dict[str, Any]:
    def figure(middle: float) -> dict[str, Any]:
        return {"value": middle, "low": middle - 10, "high": middle + 10, "n": n, "failed": 3}

    return {"exact_match": figure(value), "f1": figure(value / 2)}


def finish(run: Run, stage: str, outputs: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Write a stage's files, and the manifest that it ends with."""
    folder = run.stage_folder(stage)
    for name, content in outputs.items():
        path = folder / name
        if path.suffix == ".jsonl":
            write_jsonl(path, content)
        else:
            write_json(path, content)
    hashes = FileHashes(folder / ".hashes.json")
    inputs = run.inputs(stage, hashes) if stage != "preprocess" else {"data/questions.jsonl": "0" * 64}
    manifest = {
        "contract": CONTRACT_VERSION,
        "stage": stage,
        "status": "done",
        "key": run.key(stage, inputs),
        "recipe": run.recipe.digest(),
        "inputs": inputs,
        "outputs": {name: describe_output(folder, name, None, hashes) for name in outputs},
        "counts": {},
        "seed": run.recipe.seed,
        "version": VERSION,
        "end": "2026-01-02T03:06:05+00:00",
        "seconds": 120.0,
        **facts,
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def make_run(
    folder: Path,
    name: str = "job",
    mixes: Mapping[str, Any] = MIXES,
    scores: Mapping[str, float] = SCORES,
    untrained: Mapping[str, str] | None = None,
    vote: Mapping[str, Any] | None = None,
    seen: int = 0,
    recipe: Recipe | None = None,
) -> Run:
    """A run with all four stages done, as these write it. `vote` is infer's fact; `seen` of 40 samples were trained
    on."""
    untrained = untrained or {}
    (folder / "models" / "small").mkdir(parents=True, exist_ok=True)
    write_json(folder / "models" / "small" / "config.json", {})
    (folder / "models" / "small" / "model.safetensors").write_bytes(b"")
    recipe = recipe or make_recipe(folder, mixes, infer={"vote": {"adapters": "all"}} if vote else {})
    run = Run(name, recipe, roots_of(folder))
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    samples = [
        {"id": f"{source}{number}", "meta": {"source": source}}
        for source, count in (("main", 6), ("extra", 4))
        for number in range(count)
    ]
    split = {f"samples/{part}.jsonl": [] for part in ("validation", "test", "validation_asked")}
    finish(run, "preprocess", {"samples/train.jsonl": samples, **split, "asked.jsonl": []})
    trained: dict[str, Any] = {}
    for adapter in recipe.train.adapters:
        if adapter.name not in untrained:
            folder_of = f"adapters/{adapter.name}"
            used = [sample for sample in mixed(samples, adapter, recipe.seed) if sample["id"] != "extra0"]
            trained[f"{folder_of}/adapter_config.json"] = {"base_model_name_or_path": "small"}
            trained[f"{folder_of}/training.json"] = {
                "steps": 12,
                "mix": adapter.mix,
                "samples": {"train": len(used), "validation": 2},
                "left_out": {"train": ["extra0"], "validation": []},
                "log": [{"step": 1, "loss": 3.5}, {"step": 12, "loss": 0.25}, {"step": 12, "eval_loss": 0.5}],
            }
    finish(run, "train", {**trained, "metrics.jsonl": []}, **({"untrained": dict(untrained)} if untrained else {}))
    predictions: dict[str, Any] = {f"predictions/{model}.jsonl": [{"id": model}] for model in scores}
    finish(run, "infer", predictions, **({"vote": vote} if vote else {}))
    finish_eval(run, scores, seen)
    return run


def finish_eval(run: Run, scores: Mapping[str, float] = SCORES, seen: int = 0, **facts: Any) -> None:
    written = {
        "scores.json": {model: figures_of(value) for model, value in scores.items()},
        "differences.json": {
            model: figures_of(value - scores["base"]) for model, value in scores.items() if model != "base"
        },
    }
    counts = {"scored": 40, **({"scored on training data": seen} if seen else {})}
    finish(run, "eval", written, **{"counts": counts, **facts})


def rows_of(folder: Path, *names: str, metric: str | None = None) -> list[Row]:
    roots = roots_of(folder)
    return read_ledger(roots, names or run_names(roots.runs), metric).rows


def row_of(folder: Path, adapter: str, **options: Any) -> Row:
    (row,) = [row for row in rows_of(folder, **options) if row.adapter == adapter]
    return row


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
            gain=41.25,
            gain_low=31.25,
            gain_high=51.25,
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
    assert (row.score, row.samples, row.state) == (None, 8, "not scored: it was asked no test sample")


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


def test_a_vote_that_is_still_to_be_held_is_told(tmp_path: Path) -> None:
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
def test_where_train_ended_with_an_error_the_error_is_told(tmp_path: Path, name: str) -> None:
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
    with only_writer(run.stage_folder("infer")):
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
    assert ON_TRAINING_DATA in " ".join(as_table(rows, None, False).split())
    assert ON_TRAINING_DATA in as_html(rows, None, False)
    assert "training data (10 of 40 samples)" in as_csv(rows)


# -- experiments: the data recipe, what it kept, what was trained on it, and the score -----------------------------

PROCESS = [{"text_length_filter": {"min_len": 15}}, {"image_captioning_mapper": None}, {"document_deduplicator": {}}]


def make_experiment(folder: Path, process: Any = PROCESS, kept: int = 81) -> Run:
    """A run whose records Data-Juicer processed, and whose connector was trained before its adapters."""
    recipe = make_recipe(
        folder,
        preprocess={
            "pages": {"max_pixels": 50176},
            "retrieval": {"embedder": "x"},
            "data_juicer": {"process": process},
        },
    )
    run = make_run(folder, "custom", recipe=recipe)
    outputs = {name: _content(path) for name, path in _outputs(run, "preprocess").items()}
    steps = [(100, 90), (90, 90), (90, kept)]
    operators = [
        {"operator": name, "read": read, "kept": left, "dropped": read - left, "changed": 0, "seconds": 1.0}
        for (read, left), entry in zip(steps, process, strict=True)
        for name in entry
    ]
    finish(run, "preprocess", {**outputs, "records/operators.json": operators})
    outputs = {name: _content(path) for name, path in _outputs(run, "train").items()}
    trained = {"samples": {"train": 80, "validation": 0}}
    finish(run, "train", {**outputs, "connector/training.json": trained})
    for stage in ("infer", "eval"):
        finish(run, stage, {name: _content(path) for name, path in _outputs(run, stage).items()}, counts={"scored": 40})
    return run


def _content(path: Path) -> Any:
    return read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)


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
    lines = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [line["records_kept"] for line in lines] == ["", "", "", "", "81", "81"]
    text = as_html(rows, None, False)
    assert {"data recipe", "records kept", "connector samples"} <= set(re.findall(r">([^<>]+)</button>", text))
    assert "81 of 100" in _Page(text).cells
    shown = as_table([row for row in rows if row.run == "baseline"], None, False)
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


def test_data_that_are_others_now_are_not_told_of_an_adapter(tmp_path: Path) -> None:
    run = make_experiment(tmp_path)
    outputs = {name: _content(path) for name, path in _outputs(run, "preprocess").items()}
    finish(run, "preprocess", {**outputs, "samples/train.jsonl": []})
    row = row_of(tmp_path, "plain")
    assert (row.data_recipe, row.records_kept, row.connector_samples) == ("", None, 80)


# -- a score stands only beside the training that made it --------------------------------------------------------


def test_a_score_of_an_earlier_training_is_no_score_of_this_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, vote={"adapters": ["mixed"], "weights": {"mixed": 1.0}, "validation": {"mixed": 0.5}})
    training = run.path("train", "adapters", "mixed", "training.json")
    write_json(training, {**read_json(training), "steps": 99})
    outputs = {name: read_json(path) for name, path in _outputs(run, "train").items() if name.endswith(".json")}
    finish(run, "train", {**outputs, "metrics.jsonl": []})
    row = row_of(tmp_path, "mixed")
    assert (row.steps, row.score, row.gain, row.validation, row.in_vote) == (99, None, None, None, "")
    assert row.state == "stale: train has changed since infer used it; the score was 61.2"
    # of the other adapter nothing has changed
    row = row_of(tmp_path, "plain")
    assert (row.score, row.state) == (42.5, "stale: train has changed since infer used it")


def _outputs(run: Run, stage: str) -> dict[str, Path]:
    manifest = read_json(run.path(stage, "manifest.json"))
    return {name: run.path(stage, name) for name in manifest["outputs"]}


def test_an_adapter_that_is_being_trained_again_has_lost_its_score(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.path("train", "manifest.json").unlink()
    write_json(run.path("train", "state.json"), {})
    shutil.rmtree(run.path("train", "adapters", "mixed"))
    assert row_of(tmp_path, "mixed").state == "stale: train is half done; the score was 61.2"
    assert row_of(tmp_path, "plain").score == 42.5


def test_a_recipe_that_has_changed_since(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    changed = make_recipe(tmp_path, {**MIXES, "plain": ["extra"]}, eval={"bootstrap": 500})
    (run.folder / "recipe.yaml").write_text(dump_recipe(changed), encoding="utf-8")
    row = row_of(tmp_path, "plain")
    assert (row.data_mix, row.sources) == ("main", "")  # as it was trained, not as the recipe says now
    assert row.state == "stale: train was made with another recipe than recipe.yaml; the score was 42.5"
    changed = make_recipe(tmp_path, {**MIXES, "plain": ["extra"]})  # of what eval goes by, nothing has changed
    (run.folder / "recipe.yaml").write_text(dump_recipe(changed), encoding="utf-8")
    row = row_of(tmp_path, "plain")
    assert (row.score, row.state) == (42.5, "stale: train was made with another recipe than recipe.yaml")


def test_sources_are_not_told_of_other_samples_than_were_trained_on(tmp_path: Path) -> None:
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
    assert row.state == "stale: train was made with another recipe than recipe.yaml"


# -- folders in every state --------------------------------------------------------------------------------------


def test_another_version_of_the_contract(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    manifest = read_json(run.path("eval", "manifest.json"))
    write_json(run.path("eval", "manifest.json"), {**manifest, "contract": 2})
    told = f"eval was made under version 2 of the contract, this Lorry reads {CONTRACT_VERSION}"
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
    assert (row.score, row.samples, row.state) == (None, 8, "broken: eval/scores.json is not as eval wrote it")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("recipe.yaml", None, "broken: there is no recipe.yaml"),
        ("recipe.yaml", b"- a list\n", "broken: recipe.yaml: a recipe is a mapping"),
        ("recipe.yaml", b"\xff\xfe", "broken: recipe.yaml: cannot read the recipe"),
        ("eval/manifest.json", b"{", "trained, not scored: eval/manifest.json is damaged"),
        ("eval/manifest.json", b"[]", "trained, not scored: eval/manifest.json is damaged"),
        ("eval/manifest.json", b'{"contract": 3}', "trained, not scored: eval/manifest.json is damaged"),
        ("eval/scores.json", None, "broken: eval/scores.json is not as eval wrote it"),
        ("train/adapters/mixed/training.json", b"{}", "broken: train/adapters/mixed/training.json is not as"),
    ],
)
def test_damage_is_told_in_a_row(tmp_path: Path, name: str, content: bytes | None, told: str) -> None:
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


@settings(max_examples=150)
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
        as_csv(rows), as_html(rows, None, False), as_table(rows, None, False)
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
    assert states == dict.fromkeys(("half", "shards"), "broken: there is no recipe.yaml")


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
    assert (row.metric, row.score, row.low, row.high, row.n, row.failed) == ("exact_match", 100, 100, 100, 24, 0)
    assert (row.gain, row.gain_low, row.gain_high, row.state) == (100, 100, 100, "scored")
    assert (row.version, row_of(tmp_path, "base").score) == (VERSION, 0)


# -- order -------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=8)  # a row's texts are one line
NUMBERS = st.none() | st.floats(-100, 100, allow_nan=False)
ROWS = st.lists(
    st.builds(
        Row, run=TEXTS, adapter=TEXTS, state=TEXTS, data_mix=TEXTS, score=NUMBERS, n=st.none() | st.integers(0, 99)
    ),
    max_size=12,
)


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


# -- CSV, HTML, table --------------------------------------------------------------------------------------------


@given(rows=ROWS)
def test_csv_comes_back_as_it_was_and_holds_no_formula(rows: list[Row]) -> None:
    head, *lines = csv.reader(io.StringIO(as_csv(rows), newline=""))
    assert head == [field.name for field in fields(Row) if field.name not in RARE]
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        for name, cell in zip(head, line, strict=True):
            value = getattr(row, name)
            if isinstance(value, str):
                assert cell in (value, f"'{value}")
                assert not cell.startswith(tuple("=+-@＝＋－＠"))
            elif value is None:
                assert cell == (UNTESTED if name == "score" else "")
            else:
                assert float(cell) == value


def test_a_formula_is_a_text_and_a_negative_number_a_number() -> None:
    (line,) = csv.DictReader(io.StringIO(as_csv([Row("=1+1", state="@SUM(A1)", data_mix="-x", gain=-2.5)])))
    assert (line["run"], line["state"], line["data_mix"], line["gain"]) == ("'=1+1", "'@SUM(A1)", "'-x", "-2.5")


class _Page(HTMLParser):
    """What a browser would find: tags with their attributes, and the text of each cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.in_cell = tag == "td"
        if self.in_cell:
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.cells[-1] += data


def test_html_escapes_everything() -> None:
    nasty = "</td><script>alert('1')</script>\" onclick=\"x & $lead"
    plain, marked = Row("run", adapter="tuned"), Row(nasty, nasty, nasty, nasty, nasty, state=nasty, base_model=nasty)
    harmless = _Page(as_html([plain], None, False)).tags
    page = _Page(as_html([marked], None, False))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless]
    assert page.cells.count(nasty) == 7
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_html_needs_nothing_from_elsewhere_and_allows_its_own_script_only(tmp_path: Path) -> None:
    make_run(tmp_path)
    text = as_html(rows_of(tmp_path), "score", True)
    assert not re.search(r"https?:|url\(|src=|@import|<link", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    page = _Page(text)
    heads = [attributes for tag, attributes in page.tags if tag == "th"]
    assert [tag for tag, _ in page.tags].count("button") == len(heads)
    assert [head["aria-sort"] for head in heads if "aria-sort" in head] == ["descending"]
    keys = [attributes.get("data-key") for tag, attributes in page.tags if tag == "td"]
    assert keys[9 :: len(heads)] == ["20.0", "42.5", "61.25"]


def test_untested_is_a_word_everywhere(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shutil.rmtree(run.stage_folder("eval"))
    rows = rows_of(tmp_path)
    assert [line["score"] for line in csv.DictReader(io.StringIO(as_csv(rows)))] == [UNTESTED] * 3
    assert _Page(as_html(rows, None, False)).cells.count(UNTESTED) == 3
    assert as_table(rows, None, False).count(UNTESTED) == 3


@pytest.mark.parametrize("width", [80, 120, 250])
def test_the_table_has_what_fits(tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    make_run(tmp_path)
    rows = [*rows_of(tmp_path), Row("折叠" * 30, adapter="x", state="broken: " + "much " * 40)]
    text = as_table(rows, "seed", False)
    assert max(map(len, text.splitlines())) <= width
    assert "61.2 [51.2, 71.2]" in text
    assert "seed" in text.splitlines()[1]  # sorted by, and so shown
    head = text.splitlines()[1]
    if width == 80:
        assert "no room for: " in text
    if width == 250:
        assert "over base" in head
        assert "failed" in head


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def lorry(tmp_path: Path) -> Lorry:
    return Lorry(tmp_path / "data", tmp_path / "models", tmp_path / "runs", {"COLUMNS": "100"})


def test_the_command_sorts_writes_and_picks_runs(tmp_path: Path, lorry: Lorry) -> None:
    make_run(tmp_path, "one")
    make_run(tmp_path, "two", scores={"base": 1.0, "plain": 99.0})
    done = lorry("entrypoints.lorry", "ledger", "--sort", "score:desc", "--format", "csv")
    assert done.code == 0, done.output
    lines = list(csv.DictReader(io.StringIO(done.output)))
    assert [(line["run"], line["score"]) for line in lines] == [
        *(("two", "99.0"), ("one", "61.25"), ("one", "42.5"), ("one", "20.0"), ("two", "1.0"), ("two", UNTESTED))
    ]
    table = tmp_path / "ledger.csv"
    assert lorry("entrypoints.lorry", "ledger", "--sort", "score:desc", "--out", str(table)).lines == []
    assert table.read_bytes() == b"\xef\xbb\xbf" + done.output.encode(), "with the mark that spreadsheets want"
    out = tmp_path / "new" / "ledger.html"
    assert lorry("entrypoints.lorry", "ledger", "two", "--out", str(out)).lines == []
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "one" not in _Page(out.read_text(encoding="utf-8")).cells
    assert "exact_match" in lorry("entrypoints.lorry", "ledger").output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sort", "scor"], "error: --sort scor: no column 'scor'; did you mean 'score'? columns: run, task, adapter"),
        (["--sort", "score:down"], "error: --sort score:down: write it as score, or as score:desc for downward"),
        (["--sort", ""], "error: --sort : no column ''; columns: run"),
        (["--metric", "exact"], "error: --metric exact: no run is scored by it; did you mean 'exact_match'? metrics: "),
        (["jbo"], "no such run; did you mean 'job'? runs: job"),
        (["../runs/job"], "no such run; "),
        (["--out", "."], "error: --out .: cannot be written"),
    ],
)
def test_wrong_words_are_answered_in_one_line(tmp_path: Path, lorry: Lorry, arguments: list[str], told: str) -> None:
    make_run(tmp_path)
    done = lorry("entrypoints.lorry", "ledger", *arguments)
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert told in done.output


def test_no_run_is_no_error(lorry: Lorry) -> None:
    done = lorry("entrypoints.lorry", "ledger")
    assert (done.code, done.lines) == (0, [f"no run in {lorry.runs}"])


def test_nothing_is_written_into_the_runs(tmp_path: Path, lorry: Lorry) -> None:
    run = make_run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    assert lorry("entrypoints.lorry", "ledger").code == 0
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


def test_reading_imports_nothing_heavy() -> None:
    _, modules = imported_by("stages.results.ledger")
    assert modules & (set(HEAVY) - {"pydantic", "stages.contract.recipe"}) == set()
    assert not any(module.startswith(("stages.eval", "stages.infer")) for module in modules)
