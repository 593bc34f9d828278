"""Three data sets through the real commands with the real small model: an adapter for each but the last, whose samples
are all too long."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stages.contract.files import read_json, read_jsonl, write_jsonl
from tests.conftest import MODELS, REPOSITORY, Lorry, need_model

pytestmark = pytest.mark.long

SETS = REPOSITORY / "recipes" / "data" / "extractive-qa"
SETTINGS = (
    # the last layers are enough to learn the form of an answer
    r"train.target_modules=.*\.layers\.2[0-9]\..*_proj",
    *("train.epochs=3", "train.checkpoint_every=8", "infer.max_new_tokens=12"),
)


def make_files(folder: Path) -> None:
    write_jsonl(folder / "harbour.jsonl", read_jsonl(SETS / "harbour.jsonl")[:24])
    (folder / "orders").mkdir()
    for split, count in (("train", 16), ("test", 6)):
        pq.write_table(
            pq.read_table(SETS / "orders" / f"{split}.parquet")[:count], folder / "orders" / f"{split}.parquet"
        )
    long = {"id": "long", "context": "The ship sails on. " * 200, "question": "What sails on?", "answer": "The ship"}
    write_jsonl(folder / "orders" / "train-more.jsonl", [long])
    novels = [{**long, "id": number, "context": f"{number} {long['context']}"} for number in range(4)]
    write_jsonl(folder / "novels.jsonl", novels)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run's folder after `lorry run`."""
    need_model("SmolLM2-135M-Instruct")
    root = tmp_path_factory.mktemp("sets")
    make_files(root / "data" / "sets")
    lorry = Lorry(root / "data", MODELS, root / "runs", {"LORRY_TARGET": "cpu"})
    sets = (word for setting in ("data.path=sets", *SETTINGS) for word in ("--set", setting))
    finished = lorry("entrypoints.lorry", "run", "extractive-qa", "--profile", "tiny", "--run", "sets", *sets)
    assert finished.code == 0, finished.output
    yield root / "runs" / "sets"


def test_each_data_set_has_an_adapter_that_has_learnt(job: Path) -> None:
    from safetensors.numpy import load_file

    adapters = job / "train" / "adapters"
    assert {path.name for path in adapters.iterdir()} == {"harbour", "orders"}
    weights = {name: load_file(adapters / name / "adapter_model.safetensors") for name in ("harbour", "orders")}
    (first, second) = weights.values()
    assert set(first) == set(second) and any((first[name] != second[name]).any() for name in first)
    for name in weights:
        log = read_json(adapters / name / "training.json")["log"]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        assert len(losses) == 6, "two steps, which have all samples, in each of three epochs"
        assert sum(losses[-2:]) < 0.6 * sum(losses[:2])
        said = next(
            entry["training"]
            for entry in read_json(job / "train" / "summary.json")["dataset_results"]
            if entry.get("training", {}).get("dataset_name") == name
        )
        assert (said["initial_loss"], said["final_loss"]) == (losses[0], losses[-1])


def test_too_long_samples_are_skipped_and_a_data_set_of_nothing_else_fails_alone(job: Path) -> None:
    manifest = read_json(job / "train" / "manifest.json")
    long = {"what": "orders/long", "reason": "longer than train.max_length", "detail": "train, adapter orders"}
    assert long in manifest["skipped"]
    assert manifest["counts"]["orders samples"] < 17
    assert list(manifest["untrained"]) == ["novels"] and "max_length" in manifest["untrained"]["novels"]


def test_each_adapter_answers_its_own_questions_and_stops_by_itself(job: Path) -> None:
    tested = read_jsonl(job / "preprocess" / "samples" / "test.jsonl")
    answers = {path.stem: read_jsonl(path) for path in (job / "infer" / "predictions").iterdir()}
    assert {name: len(rows) for name, rows in answers.items()} == {"base": len(tested), "harbour": 6, "orders": 6}
    for name in ("harbour", "orders"):
        assert all(row["id"].startswith(f"{name}/") for row in answers[name])
        assert sum(row["finish_reason"] == "stop" for row in answers[name]) >= 5, "the end is learnt"
    too_long = [row for row in answers["base"] if row["error"]]
    assert all(row["id"].startswith("novels/") and "max_length" in row["error"] for row in too_long)


def test_the_summary_has_scores_of_each_data_set_and_the_failed_one(job: Path) -> None:
    summary = read_json(job / "eval" / "summary.json")
    harbour, novels, orders = summary["dataset_results"]
    assert "max_length" in novels["error"] and summary["pipeline_info"]["failed_datasets"] == 1
    base = by_data_set(job, "base")
    for entry in (harbour, orders):
        evaluation = entry["evaluation"]
        assert (evaluation["eval_samples"], evaluation["failed"]) == (6, 0)
        assert evaluation["batch_size"] >= 1 and evaluation["evaluation_time"] > 0
        assert evaluation["metrics"]["f1"] >= base[entry["dataset_name"]]["f1"]["value"]
    assert summary["summary_statistics"]["avg_training_time"] > 0


def by_data_set(job: Path, model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job / "eval" / "by_group.json").read_text())[model]["kind"]
    return found
