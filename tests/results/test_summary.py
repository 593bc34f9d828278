"""summary.json: the fields that readers of the original's JSON look for, with their meanings and units."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from stages.contract.files import write_json
from stages.contract.recipe import Adapter, Recipe, load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.results.summary import build_summary, dataset_name, dataset_result, stage_seconds, training_facts
from tests.conftest import REPOSITORY

ORIGINAL: dict[str, set[str]] = {
    "": {"pipeline_info", "dataset_results", "summary_statistics"},
    "pipeline_info": {
        *("model_path", "lora_config_dir", "config_name", "total_datasets", "successful_datasets", "failed_datasets"),
        *("pipeline_time", "start_time"),
    },
    "dataset_results": {"dataset_index", "dataset_name", "dataset_path", "training", "evaluation", "timestamp"},
    "failed": {"dataset_index", "dataset_name", "dataset_path", "error", "timestamp"},
    "training": {
        *("dataset_name", "training_time", "train_samples", "initial_loss", "final_loss", "training_metrics"),
        *("training_args", "lora_config"),
    },
    "training_metrics": {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"},
    "lora_config": {"config_name", "config_path", "r", "lora_alpha", "lora_dropout", "target_modules"},
    "summary_statistics": {
        *("avg_training_time", "avg_evaluation_time", "avg_em_score", "avg_f1_score", "best_em_score", "best_f1_score"),
    },
}
"""The original's fields; those of an evaluation are checked where eval writes them, in tests/eval/test_data_sets.py."""

TIMING = {
    **{"train_runtime": 12.5, "train_samples_per_second": 4.0, "train_steps_per_second": 1.3, "train_loss": 1.2},
    "seconds": 20.0,
}


def recipe(*overrides: str) -> Recipe:
    adapters = "train.adapters=[{name: boats, data: [boats]}, {name: laws-1, data: [laws]}, {name: all}]"
    sets = (adapters, "train.adapter_for_each_source=false", "data.path=sets", *overrides)
    return load_recipe(REPOSITORY / "recipes" / "extractive-qa.yaml", None, sets)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run("r", recipe("train.lora_config=lora/small.json"), Roots(tmp_path / "data", tmp_path, tmp_path / "runs"))
    (run.roots.data / "sets" / "boats").mkdir(parents=True)
    (run.roots.data / "sets" / "boats" / "train.jsonl").write_text("")
    (run.roots.data / "sets" / "boats.txt").write_text("about them")
    (run.roots.data / "sets" / "laws").mkdir()
    (run.roots.data / "sets" / "laws.json").write_text("[]")
    return run


def trained(run: Run, name: str, **facts: Any) -> dict[str, Any]:
    """`training` of an adapter that has been trained."""
    folder = run.path("train", "adapters", name)
    log = [{"step": 1, "loss": 2.5}, {"step": 2, "eval_loss": 1.1}, {"step": 2, "loss": 0.5}]
    known = {"samples": {"train": 24, "validation": 2}, "pass_tokens": 8192, "log": log}
    write_json(folder / "training.json", {**known, **facts})
    write_json(folder / "timing.json", TIMING)
    adapter = next(each for each in run.recipe.train.adapters if each.name == name)
    found = training_facts(run, adapter, folder)
    assert found is not None
    return found


def evaluated(exact: float, f1: float, seconds: float | None = 3.0, failed: int = 0) -> dict[str, Any]:
    return {"evaluation_time": seconds, "metrics": {"exact_match": exact, "f1": f1}, "failed": failed}


def report(run: Run, *results: dict[str, Any], start: str | None = None, **times: Any) -> dict[str, Any]:
    entries = [dataset_result(run, a, r) for a, r in zip(run.recipe.train.adapters, results, strict=False)]
    found = build_summary(run, entries, start or datetime.now(UTC).isoformat(), **times)
    return dict(json.loads(json.dumps(found, allow_nan=False)))


def test_every_field_of_the_original_is_there(run: Run) -> None:
    done = {"training": trained(run, "boats"), "evaluation": evaluated(50.0, 60.0)}
    found = report(run, done, {"error": "it is cursed"})
    assert set(found) == ORIGINAL[""]
    first, second = found["dataset_results"]
    assert set(first) == ORIGINAL["dataset_results"]
    assert set(second) == ORIGINAL["failed"]
    assert set(first["training"]) == ORIGINAL["training"]
    assert set(first["training"]["training_metrics"]) == ORIGINAL["training_metrics"]
    assert set(first["training"]["lora_config"]) == ORIGINAL["lora_config"]
    for part in ("pipeline_info", "summary_statistics"):
        assert set(found[part]) >= ORIGINAL[part]
    assert len(first["training"]["training_args"]) == 6


def test_the_data_sets_are_counted_and_named(run: Run) -> None:
    found = report(run, {"training": trained(run, "boats")}, {"error": "it is cursed"})
    info = found["pipeline_info"]
    counts = (info["total_datasets"], info["successful_datasets"], info["failed_datasets"])
    assert counts == (3, 1, 1), "the third is still to come"
    assert (info["lora_config_dir"], info["config_name"]) == ("lora", "small")
    assert info["model_path"] == run.recipe.model.path
    named = [(one["dataset_index"], one["dataset_name"], one["dataset_path"]) for one in found["dataset_results"]]
    assert named == [(0, "boats", "sets/boats"), (1, "laws", "sets/laws.json")]
    (run.roots.data / "sets" / "boats" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert dataset_result(run, run.recipe.train.adapters[0], {})["dataset_path"] == "sets/boats", "its part has gone"


def test_a_mix_is_named_after_its_adapter_and_is_in_the_data_folder(run: Run) -> None:
    assert dataset_name(Adapter.model_validate({"name": "both", "data": ["boats", "laws"]})) == "both"
    (entry,) = [dataset_result(run, adapter, {}) for adapter in run.recipe.train.adapters if adapter.name == "all"]
    assert (entry["dataset_name"], entry["dataset_path"]) == ("all", "sets")


def test_training_is_told_by_what_was_used(run: Run) -> None:
    found = trained(run, "boats", pass_tokens=4096)
    assert (found["initial_loss"], found["final_loss"]) == (2.5, 0.5), "of training, not of validation; never null"
    assert found["train_samples"] == 24
    assert found["training_time"] == 20.0, "all of it; the loop's own is in training_metrics"
    assert found["training_metrics"]["train_runtime"] == 12.5
    arguments = found["training_args"]
    assert (arguments["effective_batch"], arguments["pass_tokens"]) == (run.recipe.train.effective_batch, 4096)
    assert arguments["num_train_epochs"] == run.recipe.train.epochs
    lora = found["lora_config"]
    assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"]) == (8, 16, 0.05)
    assert (lora["config_name"], lora["config_path"]) == ("small", "lora/small.json")


def test_without_a_file_of_settings_none_is_named(run: Run) -> None:
    plain = Run(run.name, recipe(), run.roots)
    found = report(plain, {"training": trained(plain, "boats")})
    assert found["pipeline_info"]["lora_config_dir"] is None and found["pipeline_info"]["config_name"] is None
    lora = found["dataset_results"][0]["training"]["lora_config"]
    assert (lora["config_name"], lora["config_path"], lora["r"]) == (None, None, 8)


def test_an_adapter_of_another_program_has_no_training_to_tell(run: Run) -> None:
    folder = run.path("train", "adapters", "boats")
    assert training_facts(run, run.recipe.train.adapters[0], folder) is None
    found = report(run, {"training": None, "evaluation": evaluated(50.0, 60.0)})
    assert found["summary_statistics"]["avg_training_time"] is None
    assert found["summary_statistics"]["avg_em_score"] == 50.0


def test_a_training_without_a_loss_in_its_log_and_without_times(run: Run) -> None:
    found = trained(run, "boats", log=[])
    assert (found["initial_loss"], found["final_loss"]) == (None, None)
    run.path("train", "adapters", "boats", "timing.json").unlink()
    again = training_facts(run, run.recipe.train.adapters[0], run.path("train", "adapters", "boats"))
    assert again is not None and again["training_time"] is None and again["training_metrics"] == {}


def test_the_summary_is_of_those_that_were_evaluated(run: Run) -> None:
    found = report(
        run,
        {"training": trained(run, "boats"), "evaluation": evaluated(50.0, 60.0, seconds=None, failed=2)},
        {"error": "it is cursed"},
        {"training": trained(run, "all"), "evaluation": evaluated(75.0, 80.0, failed=1)},
    )
    assert found["summary_statistics"] == {
        **{"avg_training_time": 20.0, "avg_evaluation_time": 3.0, "avg_em_score": 62.5, "avg_f1_score": 70.0},
        **{"best_em_score": 75.0, "best_f1_score": 80.0, "failed_answers": 3},
    }


def test_a_summary_of_nothing_is_null_and_not_zero(run: Run) -> None:
    found = report(run, {"error": "it is cursed"})["summary_statistics"]
    assert found.pop("failed_answers") == 0
    assert set(found.values()) == {None}


def test_the_start_is_the_first_ones_and_the_time_is_since_then(run: Run) -> None:
    start = (datetime.now(UTC) - timedelta(hours=2)).isoformat(timespec="milliseconds")
    info = report(run, start=start)["pipeline_info"]
    assert info["start_time"] == start
    assert info["pipeline_time"] == pytest.approx(7200, abs=60)


def test_a_later_stage_adds_its_own_time_to_that_of_those_before_it(run: Run) -> None:
    """It may be run on another day: the time between is not the pipeline's."""
    start = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    begun = (datetime.now(UTC) - timedelta(seconds=10)).isoformat()
    info = report(run, start=start, before=100.0, begun=begun)["pipeline_info"]
    assert info["start_time"] == start
    assert info["pipeline_time"] == pytest.approx(110, abs=60)


def test_a_stage_took_from_its_first_start_to_its_end() -> None:
    manifest = {"starts": ["2026-01-02T03:00:00.000+00:00", "2026-01-02T03:04:00.000+00:00"], "seconds": 60.0}
    assert stage_seconds({**manifest, "end": "2026-01-02T03:05:00+00:00"}) == 300.0
    assert stage_seconds({**manifest, "starts": manifest["starts"][1:], "end": "2026-01-02T03:04:00+00:00"}) == 60.0  # type: ignore[index]


def test_every_entry_says_when_it_was_made(run: Run) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    (entry,) = report(run, {"error": "it is cursed"})["dataset_results"]
    stamp = datetime.fromisoformat(entry["timestamp"])
    assert stamp.tzinfo is not None and before <= stamp <= datetime.now(UTC)
