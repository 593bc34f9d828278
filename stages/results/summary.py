"""summary.json: the result for each adapter's data set. Its field names are those of extractive_qa's original, because
programs of that original's users read them.

Train writes it after each adapter, eval adds the scores. Times are in seconds, metrics in percent. It is for people and
their programs: no stage reads it, and no manifest records its digest.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any

from stages.contract.errors import DataError
from stages.contract.files import read_json
from stages.contract.recipe import Adapter
from stages.contract.roots import data_path
from stages.contract.run import Run
from stages.tasks.common.tables import data_set_name

SUMMARY = "summary.json"
"""Name of the file in a stage's folder. Earlier versions called it `report.json`, which is still read."""


def read_summary(run: Run, stage: str) -> dict[str, Any]:
    """Return the summary that a stage has written, under its present or earlier name; a summary without results if
    there is no file."""
    for name in (SUMMARY, "report.json"):
        if (found := read_json(run.path(stage, name))) is not None:
            return dict(found)
    return {"dataset_results": []}


def build_summary(
    run: Run, results: Sequence[Mapping[str, Any]], start: str, before: float = 0.0, begun: str | None = None
) -> dict[str, Any]:
    """Build the summary of the `results` so far, as written to summary.json.

    `start` is when the first training began (ISO 8601). If eval writes the summary, `begun` is when eval began, and
    `before` the seconds that the stages before it took.
    """
    config = run.recipe.train.lora_config
    failed = sum("error" in result for result in results)
    took = datetime.now(UTC) - datetime.fromisoformat(begun or start)
    return {
        "pipeline_info": {
            "model_path": run.recipe.model.path,
            "lora_config_dir": str(PurePosixPath(config).parent) if config else None,
            "config_name": PurePosixPath(config).stem if config else None,
            "total_datasets": len(run.recipe.train.adapters),
            "successful_datasets": len(results) - failed,
            "failed_datasets": failed,
            "pipeline_time": round(before + took.total_seconds(), 3),
            "start_time": start,
            "evaluated_on_training_data": run.recipe.data.evaluate_on_training,
        },
        "dataset_results": list(results),
        "summary_statistics": _summary_statistics(results),
    }


def dataset_result(run: Run, adapter: Adapter, result: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of `dataset_results` for one adapter. `result` has `training`, and `evaluation` if eval writes the
    summary; or only `error`."""
    names = [each.name for each in run.recipe.train.adapters]
    return {
        "dataset_index": names.index(adapter.name),
        "dataset_name": dataset_name(adapter),
        "dataset_path": _data_set_path(run, adapter),
        **result,
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def stage_seconds(manifest: Mapping[str, Any]) -> float:
    """The seconds from a stage's first start to its end, or the seconds that its manifest counts if these are more."""
    first, end = (datetime.fromisoformat(text) for text in (manifest["starts"][0], manifest["end"]))
    return max((end - first).total_seconds(), float(manifest["seconds"]))


def _data_set_path(run: Run, adapter: Adapter) -> str:
    """The path of the adapter's data set, as a recipe would name it; that of the data folder for a mix of several, and
    if the data set is no longer there."""
    folder = data_path(run.roots.data, run.recipe.data.path)
    if len(adapter.data) != 1 or not folder.is_dir():
        return run.recipe.data.path
    name = adapter.data[0].source
    own = sorted(path.name for path in folder.iterdir() if _is_data_set(path, name))
    return f"{run.recipe.data.path}/{own[0]}" if own else run.recipe.data.path


def _is_data_set(path: Path, name: str) -> bool:
    """Whether a file or folder is the data set of that name."""
    try:
        return data_set_name(path) == name
    except DataError:  # part of it was deleted since; the summary must not fail because of that
        return path.name == name


def dataset_name(adapter: Adapter) -> str:
    """The name of the data set that an adapter is trained on; for a mix of several, the adapter's name."""
    return adapter.data[0].source if len(adapter.data) == 1 else adapter.name


def training_facts(run: Run, adapter: Adapter, folder: Path) -> dict[str, Any] | None:
    """The entry `training` for the finished adapter in `folder`: facts of its training, and settings of the recipe.
    None if the folder has no training.json."""
    settings = run.recipe.train
    if not (folder / "training.json").is_file():
        return None
    training, timing = read_json(folder / "training.json"), read_json(folder / "timing.json") or {}
    losses = [entry["loss"] for entry in training["log"] if "loss" in entry]
    config = settings.lora_config
    return {
        "dataset_name": dataset_name(adapter),
        "training_time": timing.get("seconds", timing.get("train_runtime")),
        "train_samples": training["samples"]["train"],
        "initial_loss": losses[0] if losses else None,
        "final_loss": losses[-1] if losses else None,
        "training_metrics": {name: value for name, value in timing.items() if name != "seconds"},
        "training_args": {
            "num_train_epochs": settings.epochs,
            "effective_batch": settings.effective_batch,
            "pass_tokens": training.get("pass_tokens"),  # null for an adapter of an earlier version
            "learning_rate": settings.learning_rate,
            "max_grad_norm": settings.max_grad_norm,
            "warmup_ratio": settings.warmup_ratio,
        },
        "lora_config": {
            "config_name": PurePosixPath(config).stem if config else None,
            "config_path": config,
            "r": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_dropout": settings.dropout,
            "target_modules": settings.target_modules,
        },
    }


def _summary_statistics(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entry `summary_statistics`: mean times in seconds, mean and best scores in percent, and the number of failed
    answers, over all results."""
    training = [r["training"]["training_time"] for r in results if r.get("training")]
    evaluation = [r["evaluation"] for r in results if "evaluation" in r]
    exact, f1 = (
        [score for e in evaluation if (score := e["metrics"].get(name)) is not None] for name in ("exact_match", "f1")
    )
    return {
        "avg_training_time": _rounded_mean([time for time in training if time is not None]),
        "avg_evaluation_time": _rounded_mean(
            [e["evaluation_time"] for e in evaluation if e["evaluation_time"] is not None]
        ),
        "avg_em_score": _rounded_mean(exact),
        "avg_f1_score": _rounded_mean(f1),
        "best_em_score": max(exact, default=None),
        "best_f1_score": max(f1, default=None),
        "failed_answers": sum(e["failed"] for e in evaluation),
    }


def _rounded_mean(values: Sequence[float]) -> float | None:
    """The mean, rounded to four decimals; None without values."""
    return round(fmean(values), 4) if values else None
