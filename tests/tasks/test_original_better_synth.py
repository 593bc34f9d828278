"""The numbered defects of the programs that better_synth replaces. Each test has a short function that does as those
programs did, shows that it is wrong on a small input, and that Lorry is right on the same input."""

import csv
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from entrypoints.lorry import main
from stages.contract.errors import Exit
from stages.contract.files import digest_of, read_json, read_jsonl, remove, sha256_file, write_json, write_jsonl
from stages.contract.mixes import training_samples
from stages.contract.recipe import Adapter, Recipe, load_recipe
from stages.contract.records import failed_prediction
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.contract.stage import Stage
from stages.engines.engine import Completion, Done, EngineSettings
from stages.eval import stage as evaluation
from stages.eval.scores import overall_figures, score_models, scored_lines
from stages.host.runner import run_stage
from stages.infer import stage as infer
from stages.models.rendering import Prompt
from stages.preprocess import stage as preprocess
from stages.results.comparison import EvaluatedRun, suspicions
from stages.tasks import better_synth, settle_recipe
from stages.tasks.better_synth import read_answer
from stages.train import stage as training
from stages.train.nodes import folder_parts
from tests.conftest import REPOSITORY, need_model
from tests.infer.conftest import describe
from tests.infer.engines import use_engine

RECIPE = REPOSITORY / "recipes" / "better-synth.yaml"
DEMO = REPOSITORY / "recipes" / "data" / "better-synth"


# -- one run -----------------------------------------------------------------------------------------------------


@dataclass
class Engine:
    """Replaces an engine."""

    says: str = "A"
    stop_after: int | None = None
    continuous: bool = True
    calls: list[tuple[str | None, list[Prompt]]] = field(default_factory=list)
    answered: list[tuple[str | None, str]] = field(default_factory=list)

    def generate(self, prompts: list[Prompt], adapter: str | None, done: Done | None = None) -> list[Completion]:
        self.calls.append((adapter, prompts))
        found = []
        for place, prompt in enumerate(prompts):
            if len(self.answered) == self.stop_after:
                raise KeyboardInterrupt
            found.append(Completion(self.says, 4, "stop"))
            self.answered.append((adapter, prompt.id))
            if done is not None:
                done(place, found[-1])
        return found

    def close(self) -> None:
        return None


def recipe_with(data: Path, *overrides: str) -> Recipe:
    sets = ("preprocess.data_juicer=null", *overrides)
    return settle_recipe(load_recipe(RECIPE, "tiny", sets), "better-synth", data)


@dataclass(frozen=True)
class Job:
    """A run in its own folder with its mounts. Data-Juicer is left out in tests that do not need it."""

    root: Path
    models: Path
    recipe: Recipe

    @property
    def run(self) -> Run:
        return Run("r", self.recipe, Roots(self.root / "data", self.models, self.root / "runs"))

    def preprocess(self) -> Exit:
        return run_stage(self.run, "preprocess", preprocess.work)

    def infer(self, engine: Engine) -> Exit:
        """Infer with an adapter where training writes one."""
        write_json(self.run.path("train", "adapters", "tuned", "adapter_config.json"), {"r": 16})
        describe(self.run, "train", "adapters/tuned/adapter_config.json")
        with pytest.MonkeyPatch.context() as patch:
            use_engine(patch, lambda _: engine)
            return run_stage(self.run, "infer", infer.work)

    def samples(self, split: str) -> list[dict[str, Any]]:
        return read_jsonl(self.run.path("preprocess", "samples", f"{split}.jsonl"))

    def predictions(self, name: str) -> list[dict[str, Any]]:
        return read_jsonl(self.run.path("infer", "predictions", f"{name}.jsonl"))


def make_job(root: Path, *overrides: str) -> Job:
    """A job with the demo's data and a LLaVA model of which only tokenizer and picture settings are read."""
    shutil.copytree(DEMO, root / "data" / "better-synth")
    return Job(root, need_model("tiny-llava").parent, recipe_with(root / "data", *overrides))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The preprocessed job."""
    job = make_job(tmp_path_factory.mktemp("prepared"))
    assert job.preprocess() == Exit.DONE
    return job


@pytest.fixture
def job(prepared: Job, tmp_path: Path) -> Job:
    """A copy of the preprocessed job for tests that change it."""
    shutil.copytree(prepared.root, tmp_path / "job")
    return Job(tmp_path / "job", prepared.models, prepared.recipe)


def in_one_phase(job: Job) -> Job:
    """The same job without a connector, which only training writes."""
    return Job(job.root, job.models, recipe_with(job.root / "data", "train.connector=null"))


# -- 4: the synthetic data are trained on --------------------------------------------------------------------------


def test_defect_4_the_connector_is_trained_on_the_synthetic_data(prepared: Job, job: Job) -> None:
    """Pretraining was commented out: baseline and custom run were tuned on the same 12,000 conversations."""

    def original(pretrain: list[str], finetune: list[str]) -> list[str]:
        return finetune  # uses a projector that existed before

    assert original(["a bus"], ["talk"]) == original(["a red bus on a street"], ["talk"])

    path = job.root / "data" / "better-synth" / "records.jsonl"
    rows = read_jsonl(path)
    made_better = [
        {**row, "text": row["text"].replace(" <|", ", seen by day <|")} for row in rows if "#" not in row["text"]
    ]
    write_jsonl(path, made_better)
    assert job.preprocess() == Exit.DONE
    connector = job.recipe.train.connector
    assert connector is not None
    mixes = {"connector": connector.data, "tuned": job.recipe.train.adapters[0].data}
    learnt = {
        name: [training_samples(each.samples("train"), Adapter(name="x", data=mix), 1) for each in (prepared, job)]
        for name, mix in mixes.items()
    }
    before, after = learnt["connector"]
    answers = [sample["messages"][-1]["content"] for sample in after]
    assert answers and all(answer.endswith(", seen by day") for answer in answers) and len(after) < len(before)
    assert all(sample["meta"]["source"] == "pretrain" for sample in [*before, *after])
    before, after = learnt["tuned"]
    assert before == after and before, "the second phase learns the same: only the connector differs"


# -- 5, 6: paths and the names of runs ------------------------------------------------------------------


def test_defect_5_paths_depend_on_no_variable_and_no_machine(prepared: Job, tmp_path: Path) -> None:
    """PRETRAIN_DATASET=$SCRIPT_DIR/../input/... came before SCRIPT_DIR=..."""

    def original(environment: dict[str, str]) -> str:
        return environment.get("SCRIPT_DIR", "") + "/../input/pretrain_stage_1"

    assert os.path.normpath(original({})) == "/input/pretrain_stage_1", "relative to the root of the machine"

    elsewhere = make_job(tmp_path / "another machine")
    assert elsewhere.preprocess() == Exit.DONE
    for split in ("train", "test"):
        text = prepared.run.path("preprocess", "samples", f"{split}.jsonl").read_bytes()
        assert text == elsewhere.run.path("preprocess", "samples", f"{split}.jsonl").read_bytes()
        assert str(prepared.root).encode() not in text
        for sample in elsewhere.samples(split):
            assert all((elsewhere.run.folder / image).is_file() for image in sample["images"])
    for path in (RECIPE, prepared.run.folder / "recipe.yaml"):
        assert "/home" not in path.read_text(encoding="utf-8") and "$" not in path.read_text(encoding="utf-8")


def test_defect_6_the_converter_has_its_original_or_says_so(job: Job, capfd: Any) -> None:
    """It was called without --original_llava_ds_path: every question was lost."""

    def original(record: dict[str, Any]) -> list[dict[str, str]]:
        text = record["text"].replace("<__dj__image>", "<image>").removesuffix(" <|__dj__eoc|>")
        return [{"from": "human", "value": text}]

    record = {"id": "1", "text": "<__dj__image>\na red bus <|__dj__eoc|>", "images": ["a.png"]}
    assert "gpt" not in {turn["from"] for turn in original(record)}

    data = job.root / "data" / "better-synth"
    questions = {sample["messages"][0]["content"] for sample in job.samples("train") if "pretrain" in sample["id"]}
    asked = {one["conversations"][0]["value"] for one in json.loads((data / "records_llava.json").read_text())}
    assert questions == asked and len(asked) == 4
    (data / "records_llava.json").unlink()
    assert job.preprocess() == Exit.DATA
    told = capfd.readouterr().err
    assert "records_llava.json: no such file" in told and "records.jsonl:1" in told


def test_defect_6_two_runs_have_two_folders_and_a_missing_one_is_not_scored(job: Job) -> None:
    """EXP_NAME stayed "default" in the custom script: it overwrote the baseline, then scored a missing run."""

    def original(script: str) -> str:
        return {"baseline": "MGM-2B-Finetune-default", "custom": "MGM-2B-Finetune-default"}[script]

    assert original("custom") == original("baseline")

    first = job.run.path("preprocess", "manifest.json").read_bytes()
    custom = Run("custom", recipe_with(job.root / "data", "preprocess.samples.pad=false"), job.run.roots)
    assert run_stage(custom, "preprocess", preprocess.work) == Exit.DONE
    assert job.run.path("preprocess", "manifest.json").read_bytes() == first
    assert custom.folder != job.run.folder
    assert run_stage(custom, "infer", infer.work) == Exit.USAGE, "nothing is trained there yet"
    assert not custom.path("infer", "predictions").exists()


# -- 8, 9: answering -----------------------------------------------------------------------------------------------


def test_defect_8_an_answer_is_whole_and_every_picture_is_shown(job: Job) -> None:
    """The prompt's length was cut off the output, which does not begin with the prompt if that is multimodal."""

    def original(prompt: str, output: str) -> str:
        return output[len(prompt) :]

    assert original("What is it?", "a red bus") == ""

    job, engine = in_one_phase(job), Engine("exit sign, above the door")
    assert job.infer(engine) == Exit.DONE
    answers = [row for row in job.predictions("tuned") if row["id"].startswith("textvqa/")]
    assert len(answers) == 24
    assert {(row["answer"], row["text"]) for row in answers} == {(engine.says, engine.says)}
    assert read_answer(engine.says, job.samples("test")[0]) == engine.says  # type: ignore[arg-type]
    shown = {prompt.id: len(prompt.pictures) for _, prompts in engine.calls for prompt in prompts}
    assert shown == {sample["id"]: 1 for sample in job.samples("test")}


def test_defect_9_prompts_are_batched_and_a_stop_loses_no_answer(job: Job) -> None:
    """One picture at a time, into a file opened with "w": a second start lost the answers of the first."""

    def original(path: Path, questions: list[str], say: Callable[[str], str]) -> None:
        with path.open("w", encoding="utf-8") as file:
            for question in questions:
                file.write(json.dumps({"answer_id": uuid.uuid4().hex, "text": say(question)}) + "\n")

    def broken(question: str) -> str:
        raise KeyboardInterrupt

    path = job.root / "answers.jsonl"
    original(path, ["a", "b"], str.upper)
    with pytest.raises(KeyboardInterrupt):
        original(path, ["a", "b"], broken)
    assert path.read_text() == "", "both answers are gone"

    job, first, second = in_one_phase(job), Engine(stop_after=30), Engine()
    assert job.infer(first) == Exit.INTERRUPTED
    assert max(len(prompts) for _, prompts in first.calls) == job.recipe.infer.chunk_size > 1
    assert job.infer(second) == Exit.DONE
    every = [(adapter, sample["id"]) for adapter in (None, "tuned") for sample in job.samples("test")]
    assert sorted(map(str, first.answered + second.answered)) == sorted(map(str, every)), "each is asked once"
    found = {name: job.run.path("infer", "submission", f"{name}.jsonl").read_bytes() for name in ("base", "tuned")}
    shutil.rmtree(job.run.path("infer"))
    assert job.infer(Engine()) == Exit.DONE
    for name, text in found.items():
        assert job.run.path("infer", "submission", f"{name}.jsonl").read_bytes() == text, "with the same ids of answers"


# -- 1, 2: an evaluation that evaluates ------------------------------------------------------------------------------

SIMULATED = {"text": 2950, "unknown": 855, "3": 642, "Nike": 485, "blue": 68}
"""The only texts among the 5000 answers of both models."""


def test_defect_1_answers_that_no_model_gave_are_detected() -> None:
    """5000 simulated answers, the same for both models; the score was the share of distinct answers."""
    answers = [text for text, count in SIMULATED.items() for _ in range(count)]

    def original(answers: list[str]) -> float:
        return len(set(answers)) / len(answers)  # without any reference answer

    assert original(answers) == 0.001 and original([f"wrong {n}" for n in range(5000)]) == 1.0

    recipe = load_recipe(RECIPE, "tiny")
    samples: list[Any] = []
    for number in range(5000):
        right = "blue" if number % 100 == 0 else f"word {number}"
        meta = {"group": f"picture {number}", "source": "textvqa", "kind": "textvqa"}
        samples.append(
            {"id": f"textvqa/{number}", "messages": [], "images": [], "references": [right] * 10, "meta": meta}
        )

    def run(name: str, base: list[str], tuned: list[str]) -> EvaluatedRun:
        given = {
            model: [{**failed_prediction(sample["id"], ""), "answer": text, "error": None} for sample, text in both]
            for model, both in (("base", zip(samples, base, strict=True)), ("tuned", zip(samples, tuned, strict=True)))
        }
        scores = score_models(better_synth, recipe, samples, given)  # type: ignore[arg-type]
        figures, _ = overall_figures(scores)
        return EvaluatedRun(name, "better_synth", {}, {}, "b" * 64, figures, scored_lines(scores))

    blank = [f"wrong {number}" for number in range(5000)]
    baseline, custom = run("baseline", blank, answers), run("custom", blank, answers)
    assert baseline.figures["tuned"]["textvqa_accuracy"]["value"] == 0.0
    told = suspicions([baseline, custom])
    few = "only 5 distinct answers among 5000, and 4951 distinct references; check its prompts"
    assert told == [
        f"baseline/tuned: {few}",
        f"custom/tuned: {few}",
        "baseline/tuned and custom/tuned: all 5000 answers are identical, wrong ones included; check that they are two"
        " models",
    ]
    read = [sample["references"][0] if number % 3 else f"wrong {number}" for number, sample in enumerate(samples)]
    honest = run("honest", blank, read)
    assert suspicions([honest]) == []
    assert honest.figures["tuned"]["textvqa_accuracy"]["value"] == pytest.approx(100 * 3333 / 5000, abs=0.02)


def scored(job: Job) -> Exit:
    """eval, after the rest of what a training tells has been put into its manifest."""
    path = job.run.path("train", "manifest.json")
    times = {"starts": ["2026-01-02T03:04:05.000+00:00"], "end": "2026-01-02T03:05:05+00:00", "seconds": 60.0}
    nothing = {"skipped": [], "decisions": [], "counts": {}, "gpus": [], "dependencies": {}, "peak_memory_bytes": 0}
    write_json(path, {**read_json(path), **times, **nothing, "recipe": "", "revision": None, "image": None})
    return run_stage(job.run, "eval", evaluation.work)


def test_defect_2_an_evaluation_without_answers_fails(job: Job, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program wrote `success: true` with `total_questions: 0`."""

    def original(questions: list[str]) -> dict[str, Any]:
        return {"success": True, "total_questions": len(questions)}

    assert original([])["success"] is True

    job = in_one_phase(job)
    assert job.infer(Engine()) == Exit.DONE
    assert scored(job) == Exit.DONE
    counted = job.run.manifest("eval")
    assert counted is not None and counted["counts"]["scored"] > counted["counts"]["counted together"] > 0
    figures = read_json(job.run.path("eval", "scores.json"))["tuned"]
    questions = {sample["meta"]["together"] for sample in job.samples("test") if sample["meta"]["source"] == "mmbench"}
    assert figures["mmbench_accuracy"]["n"] == len(questions)
    assert figures["mmbench_accuracy"]["value"] == 0, "always A is right in one rotation of each question, never in all"
    assert job.run.path("eval", "uploads", "tuned", "mmbench.xlsx").is_file()

    data = job.root / "data" / "better-synth"
    (data / "textvqa_annotations.json").unlink()
    with (data / "mmbench.tsv").open(encoding="utf-8", newline="") as file:
        rows = [{**row, "answer": ""} for row in csv.DictReader(file, delimiter="\t")]
    with (data / "mmbench.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    shutil.copytree(job.run.folder, job.run.folder.with_name("whole"))
    shutil.rmtree(job.run.path("train"))  # the stand-in for an adapter, which belongs to the old data
    assert job.preprocess() == Exit.DONE
    assert job.infer(Engine()) == Exit.DONE
    capfd.readouterr()
    assert scored(job) == Exit.DATA
    assert "none of" in capfd.readouterr().err
    assert job.run.manifest("eval") is None

    for name in ("runs", "data", "models"):
        monkeypatch.setenv(f"LORRY_{name.upper()}", str(getattr(job.run.roots, name)))
    done = CliRunner().invoke(main, ["compare", "whole", "r"])
    assert done.exit_code == Exit.USAGE
    assert "r: not compared, because eval is half done" in done.output
    assert f"none of {len(job.samples('test'))} test samples has a reference" in done.output


# -- 3: steps that were not done ------------------------------------------------------------------------


def test_defect_3_a_failed_step_is_reported_as_failed(job: Job) -> None:
    """The final report had a check mark at every step, whatever had happened."""

    def original(steps: dict[str, int]) -> list[str]:
        return [f"✓ {step}" for step in steps]

    assert original({"preprocess": 0, "train": 1}) == ["✓ preprocess", "✓ train"]

    mounts = {f"LORRY_{name.upper()}": str(getattr(job.run.roots, name)) for name in ("runs", "data", "models")}

    def lorry(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "entrypoints.lorry", *words]
        environment = {**os.environ, **mounts}
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)

    sets = ("--set", "preprocess.data_juicer=null", "--set", "train.connector.max_length=16")  # no sample fits
    done = lorry("run", "better-synth", "--profile", "tiny", "--run", "failing", *sets)
    assert done.returncode == Exit.DATA
    assert "no training sample with a picture fits in train.connector.max_length 16" in done.stderr
    assert "all four stages are up to date" not in done.stdout
    states = {line.split()[0]: line for line in lorry("status", "failing").stdout.splitlines()[1:]}
    assert "done" in states["preprocess"] and not any("done," in states[stage] for stage in ("train", "infer", "eval"))


# -- 4, 7: the pretrained connector reaches every adapter and inference ---------------------------------


def train(job: Job) -> None:
    """train, with stand-ins for its processes: what they leave is a function of all that they would learn from."""

    def learn(
        stage: Stage,
        adapter: Adapter,
        key: str,
        _plan: Any,
        _processes: Any,
        _node: Any,
        connector: tuple[Path, str] | None,
    ) -> None:
        samples = training_samples(job.samples("train"), adapter, job.recipe.seed)
        digest = digest_of([[sample["messages"] for sample in samples], connector and connector[1]])
        folder = stage.path(*folder_parts(adapter.name))
        remove(folder)  # as publishing does
        folder.mkdir(parents=True)
        if adapter.name == "connector":
            weights = load_file(job.models / "tiny-llava" / "model.safetensors")
            own = {n: np.full_like(w, int(digest[:4], 16)) for n, w in weights.items() if "multi_modal_projector" in n}
            save_file(own, folder / "connector.safetensors")
        else:
            (folder / "adapter_model.safetensors").write_text(digest)
            write_json(folder / "adapter_config.json", {"r": 16})
        counts = {
            "samples": {"train": len(samples)},
            "steps": 1,
            "pass_tokens": 1024,
            "max_length": 512,
        }
        write_json(
            folder / "training.json",
            {**counts, "left_out": {}, "log": [], "without_picture": 0, "beyond_most_samples": 0},
        )
        files = {path.name: sha256_file(path) for path in folder.iterdir()}
        write_json(folder / "made.json", {"key": key, "files": files})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_plan", lambda *_: None)
        patch.setattr(training, "train_through_ladder", learn)
        assert run_stage(job.run, "train", training.work) == Exit.DONE


def test_defect_4_pretraining_has_an_effect_on_the_adapters(prepared: Job, job: Job, tmp_path: Path) -> None:
    """Baseline and custom runs ended in the same adapter, whatever the captions said."""

    def original(captions: list[str], conversations: list[str]) -> str:
        return digest_of(conversations)  # uses a projector that existed before

    assert original(["a bus"], ["talk"]) == original(["a red bus on a street"], ["talk"])

    baseline, custom = job, Job(tmp_path / "custom", job.models, job.recipe)
    shutil.copytree(prepared.root, custom.root)
    path = custom.root / "data" / "better-synth" / "records.jsonl"
    rows = read_jsonl(path)
    write_jsonl(path, [{**row, "text": row["text"].replace(" <|", ", seen by day <|")} for row in rows])
    assert custom.preprocess() == Exit.DONE
    for each in (baseline, custom):
        train(each)
    first, second = (
        each.run.path("train", "adapters", "tuned", "adapter_model.safetensors").read_text()
        for each in (baseline, custom)
    )
    assert first != second
    connectors = [(each.run.manifest("train") or {})["connector"]["sha256"] for each in (baseline, custom)]
    assert connectors[0] != connectors[1]

    # an adapter trained with one connector is not used with the other
    shutil.copytree(baseline.run.path("train", "adapters"), tmp_path / "adapters")
    shutil.rmtree(custom.run.path("train", "adapters"))
    custom.run.path("train", "manifest.json").unlink()
    shutil.copytree(tmp_path / "adapters", custom.run.path("train", "adapters"))
    train(custom)
    assert custom.run.path("train", "adapters", "tuned", "adapter_model.safetensors").read_text() == second


def test_defect_7_inference_uses_the_projector_that_the_adapter_was_trained_with(job: Job, capfd: Any) -> None:
    """The base was the folder that adapter_config.json names; the projector in `non_lora_trainables.bin` was not read,
    and files in the model's folder were renamed while it was loaded."""

    def original(base: dict[str, str], adapter: dict[str, str]) -> dict[str, str]:
        return {**base, "lora": adapter["lora"]}  # without the rest of the trained weights

    assert original({"projector": "old"}, {"lora": "x", "projector": "new"})["projector"] == "old"

    train(job)
    model = job.models / "tiny-llava"
    before = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    started: list[tuple[Path, tuple[str, ...], float]] = []

    def start(settings: EngineSettings) -> Engine:
        folder = settings.model
        index = read_json(folder / "model.safetensors.index.json")
        name = "multi_modal_projector.linear_1.bias"
        file = folder / index["weight_map"][name] if index else folder / "model.safetensors"
        started.append((folder, tuple(settings.adapters), float(load_file(file)[name][0])))
        return Engine()

    with pytest.MonkeyPatch.context() as patch:
        use_engine(patch, start)
        assert run_stage(job.run, "infer", infer.work) == Exit.DONE
    untouched = float(load_file(model / "model.safetensors")["multi_modal_projector.linear_1.bias"][0])
    learnt = load_file(job.run.path("train", "connector", "connector.safetensors"))
    (base, nobody, of_base), (both, somebody, of_both) = started
    assert (base, nobody, of_base) == (model, (), untouched)
    assert (somebody, of_both) == (("tuned",), float(learnt["multi_modal_projector.linear_1.bias"][0]))
    assert of_both != untouched
    assert both.is_relative_to(job.run.folder), "each run has its own folder"
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == before, "nothing is renamed"

    # parts that do not fit together are an error, not a printed line
    job.run.path("train", "connector", "connector.safetensors").unlink()
    capfd.readouterr()
    assert run_stage(job.run, "infer", infer.work) == Exit.USAGE
    assert "connector.safetensors: missing; run train again" in capfd.readouterr().err
