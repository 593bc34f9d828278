"""The numbered defects of the program that extractive_qa replaces. Each test has a short function that does as that
program did, shows that it is wrong on a small input, and that Lorry is right on the same input.

Most tests use one job of three data sets through all four stages. Two stand-ins save hours: a training process that
trains nothing, and an engine that knows the answers; one of the trainings is killed. Tests that need weights have a
random Llama; tests/end_to_end/test_many_datasets.py does the same with a real model.
"""

import copy
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import Exit, UsageError
from stages.contract.files import read_json, read_jsonl, write_jsonl
from stages.contract.recipe import Recipe, dump_recipe, load_recipe, profile_names
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.engines.engine import Completion, Done, EngineSettings
from stages.engines.transformers_engine import TransformersEngine
from stages.eval import stage as evaluate
from stages.eval.report import ON_TRAINING_DATA
from stages.host.runner import run_stage
from stages.infer import stage as infer
from stages.models.rendering import Prompt, load_tokenizer
from stages.preprocess import stage as preprocess
from stages.results import summary as summary_module
from stages.tasks import settle_recipe
from stages.train import stage as train
from stages.train import torchrun
from tests.conftest import REPOSITORY
from tests.infer.engines import use_engine
from tests.small_inputs import small_models

__all__ = ["small_models"]

EXTRACTIVE_QA = REPOSITORY / "recipes" / "extractive-qa.yaml"
OVERRIDES = (
    *("model.path=random-llama", "train.target_modules=[all-linear]", "data.path=sets"),
    *("infer.chunk_size=64", "infer.batch_size=auto"),
)

# -- the data sets -------------------------------------------------------------------------------------------------

LONG = "The tide rose again. " * 400
"""A context too long for the prompt of the tiny profile."""


def squad(number: int, context: str = "", **more: Any) -> dict[str, Any]:
    context = f"{context}Boat {number} belongs to owner {number}."
    answers = {"text": [f"owner {number}"], "answer_start": [context.index("owner")]}
    return {"id": number, "context": context, "question": f"Whose is boat {number}?", "answers": answers, **more}


def conversation(asked: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def make_files(folder: Path) -> None:
    """Write the data sets. `boats` states its splits; one of its test records is broken and one is too long."""
    write_jsonl(folder / "boats" / "train.jsonl", [squad(number) for number in range(10)])
    lines = [json.dumps(record) for record in (squad(20), squad(21), squad(22, LONG), squad(23))]
    lines.insert(1, '{"id": 99, "context": "cut o')
    (folder / "boats" / "test.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    laws = [conversation(f"Context: Law {n} is on cars.\nQuestion: What is law {n} on?", "cars") for n in range(8)]
    (folder / "laws.json").write_text(json.dumps([*laws, {"messages": laws[0]["messages"][:1]}], indent=1))
    write_jsonl(
        folder / "stars.jsonl", [{**squad(number), "context": f"星{number}属于 owner {number}"} for number in range(8)]
    )


GOLD = {
    **{f"boats/{number}": f"owner {number}" for number in range(30)},
    **{f"stars/{number}": f"owner {number}" for number in range(8)},
}

# -- the job -------------------------------------------------------------------------------------------------------


class Engine:
    """Replaces an engine: adapters know the answers, the base does not."""

    continuous = True

    def __init__(self, fails: tuple[str, ...] = ()) -> None:
        self._fails = fails
        self.answered: list[tuple[str | None, str]] = []

    def generate(self, prompts: list[Prompt], adapter: str | None, done: Done | None = None) -> list[Completion]:
        found = []
        for place, prompt in enumerate(prompts):
            if prompt.id in self._fails and adapter is not None:
                raise RuntimeError(f"kernel failed on {prompt.id}")
            self.answered.append((adapter, prompt.id))
            found.append(Completion("I do not know." if adapter is None else GOLD.get(prompt.id, "cars"), 3, "stop"))
            if done is not None:
                done(place, found[-1])
        return found

    def find_batch_size(self, prompts: list[Prompt]) -> tuple[int, str]:
        return 8, "the stand-in's"

    def close(self) -> None:
        return None


@dataclass(frozen=True)
class Job:
    """A run in its own folder with its mounts."""

    root: Path
    models: Path
    overrides: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        recipe = load_recipe(EXTRACTIVE_QA, "tiny", (*OVERRIDES, *self.overrides))
        return settle_recipe(recipe, "extractive-qa", self.root / "data")

    @property
    def run(self) -> Run:
        return Run("r", self.recipe, Roots(self.root / "data", self.models, self.root / "runs"))

    def preprocess(self) -> Exit:
        return run_stage(self.run, "preprocess", preprocess.work)

    def train(self, deaths: str = "", stop_before: str | None = None) -> Exit:
        """Train. The trainings of data sets in `deaths` are killed; a stop comes before the one of `stop_before`."""

        original = torchrun.TrainingProcesses.train

        def train_adapter(processes: Any, job: Any, *rest: Any) -> float | None:
            if job.adapter.name == stop_before:
                raise KeyboardInterrupt
            return original(processes, job, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torchrun, "WORKER", "tests.tasks.stand_ins.worker")
            patch.setattr(torchrun.TrainingProcesses, "train", train_adapter)
            patch.setenv("LORRY_TARGET", "cpu")
            patch.setenv("STAND_IN_LOG", str(self.root / "trained.jsonl"))
            patch.setenv("STAND_IN_DEATHS", deaths)
            return run_stage(self.run, "train", train.work)

    def infer(self, engine: Any) -> Exit:
        with pytest.MonkeyPatch.context() as patch:
            use_engine(patch, lambda _: engine)
            return run_stage(self.run, "infer", infer.work)

    def eval(self) -> Exit:
        return run_stage(self.run, "eval", evaluate.work)

    def manifest(self, stage: str) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.run.path(stage, "manifest.json"))
        return found

    def report(self, stage: str = "eval") -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.run.path(stage, "summary.json"))
        return found

    def samples(self, split: str) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in read_jsonl(self.run.path("preprocess", "samples", f"{split}.jsonl"))}

    def predictions(self, name: str) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in read_jsonl(self.run.path("infer", "predictions", f"{name}.jsonl"))}

    def trained(self) -> list[dict[str, Any]]:
        """The records of the training processes, in the order of their starts."""
        path = self.root / "trained.jsonl"
        return read_jsonl(path) if path.exists() else []

    def copy(self, root: Path, *overrides: str) -> "Job":
        """A copy of run and mounts in another folder, with changed settings."""
        shutil.copytree(self.root, root)
        return replace(self, root=root, overrides=(*self.overrides, *overrides))


def names(report: dict[str, Any]) -> list[str]:
    """The data sets in a report, in order."""
    return [result["dataset_name"] for result in report["dataset_results"]]


@pytest.fixture
def fresh(tmp_path: Path, small_models: Path) -> Job:
    """The job before its first stage."""
    make_files(tmp_path / "fresh" / "data" / "sets")
    return Job(tmp_path / "fresh", small_models)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_models: Path) -> Job:
    """The job after all four stages; the training of `laws` was killed. Tests that change it take a copy."""
    root = tmp_path_factory.mktemp("job")
    make_files(root / "data" / "sets")
    job = Job(root, small_models)
    assert job.preprocess() == Exit.DONE
    assert job.train(deaths="laws") == Exit.DONE
    assert job.infer(Engine()) == Exit.DONE
    assert job.eval() == Exit.DONE
    return job


# -- the report ----------------------------------------------------------------------------------------------------

FIELDS = {
    "pipeline_info": "model_path lora_config_dir config_name total_datasets successful_datasets failed_datasets"
    " pipeline_time start_time",
    "dataset_results": "dataset_index dataset_name dataset_path training evaluation timestamp",
    "training": "dataset_name training_time train_samples initial_loss final_loss training_metrics training_args"
    " lora_config",
    "training_metrics": "train_runtime train_samples_per_second train_steps_per_second train_loss",
    "lora_config": "config_name config_path r lora_alpha lora_dropout target_modules",
    "evaluation": "dataset_name evaluation_time eval_samples batch_size metrics generation_kwargs",
    "metrics": "exact_match f1",
    "summary_statistics": "avg_training_time avg_evaluation_time avg_em_score avg_f1_score best_em_score best_f1_score",
}
"""The keys of the original's JSON report, which other programs may read."""


def test_the_report_has_every_field_of_the_original(finished: Job) -> None:
    report = finished.report()
    boats, laws, stars = report["dataset_results"]
    values = {**report, "dataset_results": boats, **boats, **boats["training"], **boats["evaluation"]}
    for name, fields in FIELDS.items():
        assert set(fields.split()) <= set(values[name]), name
    assert {"dataset_index", "dataset_name", "dataset_path", "error", "timestamp"} <= set(laws)
    assert "SIGKILL" in laws["error"] and "training" not in laws and "evaluation" not in laws
    info = report["pipeline_info"]
    assert (info["total_datasets"], info["successful_datasets"], info["failed_datasets"]) == (3, 2, 1)
    assert [result["dataset_index"] for result in (boats, laws, stars)] == [0, 1, 2]
    assert boats["training"]["initial_loss"] == 2.0 and boats["training"]["final_loss"] == 0.5, "never null"
    assert len(boats["training"]["training_args"]) == 6
    summary = report["summary_statistics"]
    assert (summary["best_em_score"], summary["avg_em_score"]) == (100.0, pytest.approx((75 + 100) / 2))


# -- 1 to 14 -------------------------------------------------------------------------------------------------------


def test_defect_01_training_data_are_not_scored(finished: Job) -> None:
    def original(path: Path) -> tuple[set[str], set[str]]:
        lines = path.read_text().splitlines()
        return set(lines), set(lines)

    learnt, scored = original(finished.run.data / "stars.jsonl")
    assert scored and scored <= learnt, "a model that memorises is perfect"

    splits = {split: finished.samples(split) for split in ("train", "validation", "test")}
    for source in ("boats", "laws", "stars"):
        own = {
            split: {sample["meta"]["group"] for sample in samples.values() if sample["meta"]["source"] == source}
            for split, samples in splits.items()
        }
        assert own["train"] and own["test"]
        assert not own["test"] & (own["train"] | own["validation"])
    assert set(finished.predictions("stars")) == {name for name in splits["test"] if name.startswith("stars/")}
    assert finished.report()["pipeline_info"]["evaluated_on_training_data"] is False


def test_defect_01_a_test_file_that_is_the_training_file_is_refused(fresh: Job, capfd: Any) -> None:
    shutil.copy(fresh.run.data / "boats" / "train.jsonl", fresh.run.data / "boats" / "test.jsonl")
    assert fresh.preprocess() == Exit.DONE
    assert "nothing of boats can be held out" in capfd.readouterr().err
    assert not [
        each for name in ("train", "test") for each in fresh.samples(name).values() if each["meta"]["source"] == "boats"
    ]


def test_defect_01_on_request_the_test_file_is_trained_on(fresh: Job) -> None:
    shutil.copy(fresh.run.data / "boats" / "train.jsonl", fresh.run.data / "boats" / "test.jsonl")
    fresh = replace(fresh, overrides=("data.evaluate_on_training=true",))
    assert fresh.preprocess() == Exit.DONE
    of_boats = {
        split: [each["meta"] for each in fresh.samples(split).values() if each["meta"]["source"] == "boats"]
        for split in ("train", "validation", "test")
    }
    assert of_boats["train"] and of_boats["test"]
    assert all(meta.get("trained_on") for meta in of_boats["test"])


def test_defect_01_on_request_training_data_are_scored_and_every_table_says_so(fresh: Job, capfd: Any) -> None:
    fresh = replace(fresh, overrides=("data.evaluate_on_training=true",))
    assert fresh.preprocess() == Exit.DONE
    scored, learnt = fresh.samples("test"), fresh.samples("train")
    assert {name for name in scored if scored[name]["meta"].get("trained_on")} == set(learnt)
    assert (fresh.train(), fresh.infer(Engine()), fresh.eval()) == (Exit.DONE,) * 3
    assert fresh.report()["pipeline_info"]["evaluated_on_training_data"] is True
    html = " ".join(fresh.run.path("eval", "report.html").read_text().split())
    console = " ".join(capfd.readouterr().out.split())
    assert console.count(ON_TRAINING_DATA) == 2, "a line of its own, and the caption of the one table"
    assert ON_TRAINING_DATA in html


def test_defect_02_the_adapter_is_kept(finished: Job, tmp_path: Path) -> None:
    def original(folder: Path) -> None:
        weights = {"lora_A": 1.0}
        (folder / "report.json").write_text("{}")
        del weights

    original(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "only this is left after hours"

    outputs = finished.manifest("train")["outputs"]
    for name in ("boats", "stars"):
        for file in ("adapter_model.safetensors", "adapter_config.json", "training.json"):
            assert len(outputs[f"adapters/{name}/{file}"]["sha256"]) == 64
        assert f"train/adapters/{name}/adapter_model.safetensors" in finished.manifest("infer")["inputs"]
    assert not any(name.startswith("adapters/laws/") for name in outputs)


def test_defect_03_prompts_have_the_same_answers_in_a_batch_and_alone(small_models: Path) -> None:
    import torch

    engine = TransformersEngine(settings_of(small_models / "random-llama", max_new_tokens=6))
    prompts = [Prompt("short", [500, 501]), Prompt("long", list(range(700, 720)))]
    alone = [engine.generate([prompt], None)[0].text for prompt in prompts]
    model, pad = engine._model, engine._end_tokens[0]

    def original(padding_side: str) -> list[str]:
        longest = max(len(prompt.tokens) for prompt in prompts)
        rows = []
        for prompt in prompts:
            filling = [pad] * (longest - len(prompt.tokens))
            rows.append(filling + prompt.tokens if padding_side == "left" else prompt.tokens + filling)
        mask = [[int(token != pad) for token in row] for row in rows]
        output = model.generate(
            input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask), max_new_tokens=6, do_sample=False
        )
        return [engine._completion(row[longest:].tolist()).text for row in output]

    assert original("right")[0] != alone[0], "only the longest prompt has the right answer"
    assert original("left") == alone

    assert [completion.text for completion in engine.generate(prompts, None)] == alone


def settings_of(model: Path, **changes: Any) -> EngineSettings:
    values = {"adapters": {}, "dtype": "float32", "max_new_tokens": 8, "batch_size": 8, "max_length": 128, "seed": 0}
    return EngineSettings(model=model, **{**values, **changes})


def test_defect_04_settings_are_a_mapping_and_reach_the_training(finished: Job, tmp_path: Path) -> None:
    def original(training_args: Any) -> int:
        return int(training_args.num_train_epochs)

    with pytest.raises(AttributeError, match="num_train_epochs"):
        original({"num_train_epochs": 2})  # as in its README

    job = finished.copy(tmp_path / "job", "train={epochs: 2, lora_config: lora/small.json}")
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["v_proj", "q_proj"], "bias": "none"}
    (job.root / "data" / "lora").mkdir()
    (job.root / "data" / "lora" / "small.json").write_text(json.dumps(lora))
    assert job.train() == Exit.DONE
    used = job.trained()[-1]["settings"]
    assert (used["epochs"], used["rank"], used["alpha"], used["dropout"]) == (2, 4, 8, 0.1)
    assert used["target_modules"] == ["q_proj", "v_proj"]
    report: dict[str, Any] = job.report("train")
    assert report["pipeline_info"]["lora_config_dir"] == "lora" and report["pipeline_info"]["config_name"] == "small"
    training = report["dataset_results"][0]["training"]
    assert training["training_args"]["num_train_epochs"] == 2
    assert dict(training["lora_config"]) | {"config_name": 0, "config_path": 0} == {
        **{"config_name": 0, "config_path": 0, "r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "target_modules": ["q_proj", "v_proj"],
    }


def test_defect_04_a_missing_lora_config_is_an_error_and_not_a_silent_default(fresh: Job) -> None:
    def original(path: Path) -> dict[str, int]:
        return json.loads(path.read_text()) if path.exists() else {"r": 8}  # type: ignore[no-any-return]

    assert original(fresh.root / "no.json") == {"r": 8}

    with pytest.raises(UsageError, match=r"no\.json: no such file"):
        assert replace(fresh, overrides=("train.lora_config=no.json",)).recipe
    with pytest.raises(UsageError, match=r"did you mean 'train\.epochs'"):
        assert replace(fresh, overrides=("train.epoch=2",)).recipe


def test_defect_05_a_skipped_record_shifts_no_answer(finished: Job) -> None:
    data: list[dict[str, Any]] = [
        {"q": 1, "gold": "1"},
        {"gold": "broken"},
        {"q": 2, "gold": "2"},
        {"q": 3, "gold": "3"},
    ]

    def original() -> list[bool]:
        predictions = [str(record["q"]) for record in data if "q" in record]
        return [answer == record["gold"] for answer, record in zip(predictions, data, strict=False)]

    assert original() == [True, False, False], "of three right answers"

    assert {"what": "boats/test.jsonl:2", "reason": "not JSON"}.items() <= finished.manifest("preprocess")["skipped"][
        0
    ].items()
    predictions, samples = finished.predictions("boats"), finished.samples("test")
    right = {name for name, one in predictions.items() if one["answer"] in samples[name]["references"]}
    assert right == {"boats/20", "boats/21", "boats/23"}
    lines = {line["id"]: line["answer"] for line in read_jsonl(finished.run.path("infer", "submission", "boats.jsonl"))}
    assert {name: lines[name] for name in sorted(right)} == {name: GOLD[name] for name in sorted(right)}


def test_defect_06_a_failure_is_reported_and_counted_and_affects_no_other_answer(finished: Job, tmp_path: Path) -> None:
    def answer(question: str) -> str:
        if question == "bad":
            raise RuntimeError("kernel failed")
        return "right"

    def original(batch: list[str]) -> list[str]:
        try:
            return [answer(question) for question in batch]
        except RuntimeError:
            return [""] * len(batch)

    assert original(["good", "bad"]) == ["", ""], "scored as if the model had answered nothing"

    job = finished.copy(tmp_path / "job", "infer.max_new_tokens=15")
    assert job.infer(Engine(fails=("boats/21",))) == Exit.DONE
    assert job.eval() == Exit.DONE
    predictions = job.predictions("boats")
    assert predictions["boats/21"]["answer"] is None and predictions["boats/21"]["error"].endswith("failed on boats/21")
    assert predictions["boats/20"]["answer"] == "owner 20" and predictions["boats/23"]["answer"] == "owner 23"
    evaluation = job.report()["dataset_results"][0]["evaluation"]
    assert (evaluation["eval_samples"], evaluation["failed"], evaluation["metrics"]["exact_match"]) == (4, 2, 50.0)
    assert job.report()["summary_statistics"]["failed_answers"] == 2, "this one and the one that is too long"


def test_defect_07_answers_are_generated_as_the_report_says(
    finished: Job, small_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def original(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        used = {"repetition_penalty": 1.1, **kwargs}
        return used, {"repetition_penalty": kwargs.get("repetition_penalty", 1.0)}

    used, recorded = original()
    assert used != recorded

    # generation settings in the model's folder, such as Qwen2.5's, must not be used
    model = tmp_path / "model"
    shutil.copytree(small_models / "random-llama", model)
    own = read_json(model / "generation_config.json") | {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    (model / "generation_config.json").write_text(json.dumps({**own, "do_sample": True, "top_k": 3}))
    engine = TransformersEngine(settings_of(model))
    recorded = finished.report()["dataset_results"][0]["evaluation"]["generation_kwargs"]
    seen: list[Any] = []
    inner = type(engine._model)._get_logits_processor

    def spy(self: Any, generation_config: Any, *rest: Any, **named: Any) -> Any:
        seen.append(copy.deepcopy(generation_config))
        return inner(self, generation_config, *rest, **named)

    monkeypatch.setattr(type(engine._model), "_get_logits_processor", spy)
    prompts = [Prompt("a", [500, 501], max_new_tokens=recorded["max_new_tokens"])]
    text = engine.generate(prompts, None)[0].text
    (config,) = seen
    for name in ("max_new_tokens", "do_sample", "num_beams", "repetition_penalty"):
        assert getattr(config, name) == recorded[name], name
    assert not config.no_repeat_ngram_size
    plain = TransformersEngine(settings_of(small_models / "random-llama"))
    assert plain.generate(prompts, None)[0].text == text != ""


def test_defect_08_the_start_time_is_that_of_the_start(fresh: Job) -> None:
    def original(work: Callable[[], datetime]) -> tuple[datetime, datetime]:
        began = work()
        return began, datetime.now(UTC)

    began, start_time = original(lambda: datetime.now(UTC))
    assert start_time > began

    def now() -> datetime:
        return datetime.now(UTC)

    assert fresh.preprocess() == Exit.DONE
    before = now()
    assert fresh.train(stop_before="stars") == Exit.INTERRUPTED
    first = fresh.report("train")
    between = now()
    assert fresh.train() == Exit.DONE
    second = fresh.report("train")
    start = datetime.fromisoformat(first["pipeline_info"]["start_time"])
    assert before.replace(microsecond=0) <= start <= between
    assert second["pipeline_info"]["start_time"] == first["pipeline_info"]["start_time"], "that of the first start"
    stamps = [datetime.fromisoformat(result["timestamp"]) for result in second["dataset_results"]]
    assert all(start <= stamp for stamp in stamps) and stamps == sorted(stamps)
    assert second["pipeline_info"]["pipeline_time"] >= (stamps[-1] - start).total_seconds() - 1e-3


def test_defect_09_the_report_is_written_after_each_data_set(fresh: Job) -> None:
    def original(result_path: str) -> None:
        os.makedirs(os.path.dirname(result_path), exist_ok=True)  # noqa: PTH103, PTH120

    with pytest.raises(FileNotFoundError):
        original("report.json")

    assert fresh.preprocess() == Exit.DONE
    assert fresh.train() == Exit.DONE
    seen = [started["report"] and names(started["report"]) for started in fresh.trained()]
    assert seen == [None, ["boats"], ["boats", "laws"]], "as seen by the process that trains the next one"
    assert names(fresh.report("train")) == ["boats", "laws", "stars"]


def test_defect_09_a_stop_loses_no_finished_data_set(fresh: Job) -> None:
    assert fresh.preprocess() == Exit.DONE
    assert fresh.train(stop_before="stars") == Exit.INTERRUPTED
    assert names(fresh.report("train")) == ["boats", "laws"]
    kept = {path.name for path in fresh.run.path("train", "adapters").iterdir()}
    assert kept == {"boats", "laws"}
    assert fresh.train() == Exit.DONE
    assert [started["name"] for started in fresh.trained()] == ["boats", "laws", "stars"], "each once"


def test_defect_09_a_data_set_that_is_tried_again_hides_none_after_it(fresh: Job) -> None:
    assert fresh.preprocess() == Exit.DONE
    assert fresh.train(deaths="laws") == Exit.DONE
    assert fresh.train(stop_before="laws") == Exit.INTERRUPTED
    assert names(fresh.report("train")) == ["boats", "stars"]


def test_defect_09_the_batch_size_is_reported_if_the_last_start_answered_nothing(
    fresh: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = replace(fresh, overrides=("infer.batch_size=auto",))
    assert (fresh.preprocess(), fresh.train()) == (Exit.DONE, Exit.DONE)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(infer, "write_predictions", stopped)
        assert fresh.infer(Engine()) == Exit.INTERRUPTED
    engine = Engine()
    assert (fresh.infer(engine), fresh.eval()) == (Exit.DONE, Exit.DONE)
    assert not engine.answered
    sizes = {result["evaluation"]["batch_size"] for result in fresh.report()["dataset_results"]}
    assert sizes == {json.loads(fresh.run.path("infer", "batch_size.json").read_text())["batch_size"]} != {"auto"}


def test_defect_09_scores_are_also_written_after_each_data_set(
    finished: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = finished.copy(tmp_path / "job", "eval.worst=3")
    inner = summary_module.dataset_result

    def dataset_result(run: Run, adapter: Any, result: Any) -> dict[str, Any]:
        if adapter.name == "stars":
            raise KeyboardInterrupt
        return inner(run, adapter, result)

    monkeypatch.setattr(evaluate, "dataset_result", dataset_result)
    assert job.eval() == Exit.INTERRUPTED
    assert names(job.report()) == ["boats", "laws"]
    assert job.report()["dataset_results"][0]["evaluation"]["metrics"]["exact_match"] == 75.0


def test_defect_10_a_data_set_that_fails_leaves_nothing_loaded(fresh: Job) -> None:
    loaded: list[str] = []

    def original(names: list[str]) -> list[int]:
        beside = []
        for name in names:
            loaded.append(name)
            beside.append(len(loaded))
            try:
                if name == "laws":
                    raise MemoryError
            except MemoryError:
                continue
            loaded.remove(name)
        return beside

    assert original(["boats", "laws", "stars"]) == [1, 1, 2], (
        "the next model is loaded while the failed one is still in memory"
    )

    assert fresh.preprocess() == Exit.DONE
    assert fresh.train(deaths="boats laws") == Exit.DONE
    started = fresh.trained()
    assert [one["name"] for one in started] == ["boats", "laws", "stars"]
    assert len({one["pid"] for one in started}) == 3
    assert [one["living"] for one in started] == [[], [], []]
    assert [("error" in r, r["dataset_name"]) for r in fresh.report("train")["dataset_results"]] == [
        *((True, "boats"), (True, "laws"), (False, "stars")),
    ]
    assert set(fresh.manifest("train")["untrained"]) == {"boats", "laws"}


def test_defect_10_the_others_are_answered_and_the_failed_one_is_tried_again(finished: Job, tmp_path: Path) -> None:
    assert {path.stem for path in finished.run.path("infer", "predictions").iterdir()} == {"base", "boats", "stars"}
    job = finished.copy(tmp_path / "job")
    assert job.train() == Exit.DONE
    assert [started["name"] for started in job.trained()] == ["boats", "laws", "stars", "laws"]
    engine = Engine()
    assert (job.infer(engine), job.eval()) == (Exit.DONE, Exit.DONE)
    assert {adapter for adapter, _ in engine.answered} == {"laws"}, "existing answers are kept"
    assert job.report()["pipeline_info"]["failed_datasets"] == 0


def test_defect_10_without_keep_going_the_failure_is_the_exit_code(fresh: Job, capfd: Any) -> None:
    fresh = replace(fresh, overrides=("train.keep_going=false",))
    assert fresh.preprocess() == Exit.DONE
    assert fresh.train(deaths="laws") == Exit.CRASHED
    assert "train.adapters: 1 of 3 failed: laws: training laws: ended by SIGKILL" in capfd.readouterr().err
    assert {path.name for path in fresh.run.path("train", "adapters").iterdir()} == {"boats", "stars"}


def test_defect_11_prompts_that_are_too_long_are_counted_and_never_cut(finished: Job, small_models: Path) -> None:
    tokenizer = load_tokenizer(small_models / "random-llama")

    def original(context: str, question: str) -> str:
        tokens = tokenizer(f"Context: {context}\n\nQuestion: {question}\n\nAnswer:").input_ids
        return str(tokenizer.decode(tokens[:1024]))

    record = squad(22, LONG)
    assert record["question"] not in original(record["context"], record["question"]), "the prompt has no question"

    sample = finished.samples("test")["boats/22"]
    assert sample["messages"][-1]["content"].endswith(record["question"])
    for name in ("base", "boats"):
        error = finished.predictions(name)["boats/22"]["error"]
        assert re.fullmatch(
            r"infer\.max_length: \d+ leaves no room for an answer after a prompt of \d+ tokens; raise it", error
        )
    evaluation = finished.report()["dataset_results"][0]["evaluation"]
    assert (evaluation["eval_samples"], evaluation["failed"]) == (4, 1)


def test_defect_12_logs_are_written(finished: Job, tmp_path: Path) -> None:
    def original(path: Path) -> None:
        logging.basicConfig(level=logging.WARNING)  # when the module is imported
        logging.basicConfig(level=logging.INFO, filename=path)

    original(tmp_path / "pipeline.log")
    logging.getLogger("seed").warning("to be kept")
    assert not (tmp_path / "pipeline.log").exists()

    for stage in ("preprocess", "train", "infer", "eval"):
        assert finished.run.path(stage, "log.txt").is_file()
        assert read_jsonl(finished.run.path(stage, "events.jsonl"))
    assert "a library says something of boats" in finished.run.path("train", "log.txt").read_text()


@pytest.fixture(scope="module")
def some_adapter(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An adapter of the random Llama that changes its completions."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(small_models / "random-llama")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.5)
    model.save_pretrained(str(folder))
    yield folder


def test_defect_13_base_and_adapter_answer_each_with_their_own_weights(small_models: Path, some_adapter: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    prompts = [Prompt("a", [500, 501, 502]), Prompt("b", [700, 701])]
    plain = TransformersEngine(settings_of(small_models / "random-llama"))
    alone = [completion.text for completion in plain.generate(prompts, None)]

    def original() -> Any:
        base = AutoModelForCausalLM.from_pretrained(small_models / "random-llama")
        tuned = PeftModel.from_pretrained(base, str(some_adapter))
        del tuned  # "remove LoRA"
        return base

    assert any("lora_A" in name for name, _ in original().named_parameters()), "the LoRA layers stay in the base"

    engine = TransformersEngine(settings_of(small_models / "random-llama", adapters={"boats": some_adapter}))
    for _ in range(2):
        assert [completion.text for completion in engine.generate(prompts, None)] == alone
        tuned = [completion.text for completion in engine.generate(prompts, "boats")]
        assert tuned != alone


def test_defect_14_nothing_depends_on_one_machine(finished: Job) -> None:
    def original() -> Path:
        return Path("/home/somebody/models/Qwen2.5-7B-Instruct-1M")

    assert not original().exists()

    for profile in (None, *profile_names(EXTRACTIVE_QA)):
        assert not re.search(r"[\"' ](/|~)\w", dump_recipe(load_recipe(EXTRACTIVE_QA, profile)))
    for stage in ("preprocess", "train", "infer", "eval"):
        manifest = finished.manifest(stage)
        assert str(finished.root) not in json.dumps([manifest[key] for key in ("inputs", "outputs", "decisions")])
    config = read_json(finished.run.path("train", "adapters", "boats", "training.json"))
    assert str(finished.root) not in json.dumps(config)
