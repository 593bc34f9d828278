"""Many adapters in one run: one that fails leaves the others, a change costs what it changes, and nothing is blessed
that was touched. A stand-in publishes what a training process would."""

import importlib.metadata
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from entrypoints.lorry import main as lorry
from stages.contract.errors import DataError, DoesNotFitError, Exit, InterruptedRunError, LorryError, UsageError
from stages.contract.files import FileHashes, digest_of, read_json, write_json, write_jsonl
from stages.contract.part import Part, Shard
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import CONTRACT_VERSION, Run, describe_output, lock_stage_folder
from stages.hardware.memory import Lengths
from stages.host.runner import run_stage, write_recipe
from stages.models.chat_settings import PLAIN, ChatSettings
from stages.train import attempts, planning
from stages.train import stage as train
from stages.train.ladder import LostCardError, MemoryRanOutError, Shortage
from stages.train.torchrun import TrainingProcesses
from tests.conftest import REPOSITORY, snapshot
from tests.small_inputs import RANDOM_LLAMA
from tests.tasks.stand_ins.worker import publish
from tests.train.conftest import Training
from tests.train.test_nodes import processes_naming

MIXES: dict[str, list[Any]] = {"one": ["a"], "two": ["a#4", "b"], "three": ["c#3"]}
NAMES = list(MIXES)
SIZES = {"a": 8, "b": 4, "c": 6}


class Killed(BaseException):
    """Stands for a SIGKILL: nothing is caught, nothing is tidied up."""


@dataclass
class Trainer:
    """Stands where `TrainingProcesses.train` stands. It leaves a checkpoint, then fails or publishes."""

    fails: Mapping[str, BaseException] = field(default_factory=dict)
    jobs: list[Any] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    """Adapters that found a checkpoint."""
    seen: list[Any] = field(default_factory=list)
    """The report, as it stood when each training began."""

    @property
    def trained(self) -> list[str]:
        return [job.adapter.name for job in self.jobs]

    def __call__(self, stage: Any, job: Any, *rest: Any) -> float | None:
        name = job.adapter.name
        self.jobs.append(job)
        self.seen.append(read_json(stage.path("summary.json")))
        if (job.work / "checkpoint-1").is_dir():
            self.resumed.append(name)
        (job.work / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        if name in self.fails:
            raise self.fails[name]
        publish(job)
        return 100.0


def stand_in(patch: pytest.MonkeyPatch, trainer: Trainer) -> None:
    patch.setattr(TrainingProcesses, "train", lambda self, job, *_: trainer(self._stage, job))


@dataclass(frozen=True)
class Job:
    run: Run
    trains: Callable[..., tuple[Exit, Trainer]]
    """Run the stage with a trainer that fails as told."""

    def but(self, *overrides: str, mixes: Mapping[str, list[Any]] | None = None, **changes: Any) -> "Job":
        """The same run with another recipe."""
        return replace(self, run=replace(self.run, recipe=recipe(*overrides, mixes=mixes or MIXES)), **changes)

    def __call__(self, part: Part = None, force: bool = False, **fails: BaseException) -> tuple[Exit, Trainer]:
        return self.trains(self.run, part, fails, force)

    @property
    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.run.path("train", "manifest.json"))
        return found

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.run.path("train", "summary.json"))
        return found

    @property
    def kept(self) -> set[str]:
        """Adapters that are there, hidden halves included."""
        folder = self.run.path("train", "adapters")
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    def write(self, split: str, *ids: str, text: str = "?") -> None:
        """Samples of a split: `a/0` is of the data set a."""
        rows = [
            {
                "id": name,
                "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": name}],
                "images": [],
                "references": ["x"],
                "meta": {"source": name.partition("/")[0]},
            }
            for name in ids
        ]
        write_jsonl(self.run.path("preprocess", "samples", f"{split}.jsonl"), rows)
        names = [f"samples/{path.name}" for path in sorted(self.run.path("preprocess", "samples").iterdir())]
        hashes = FileHashes(self.run.folder / "none")
        outputs = {name: describe_output(self.run.path("preprocess"), name, None, hashes) for name in names}
        manifest = {
            "contract": CONTRACT_VERSION,
            "version": importlib.metadata.version("lorry"),
            "key": self.run.key("preprocess", {}),
        }
        write_json(self.run.path("preprocess", "manifest.json"), {**manifest, "inputs": {}, "outputs": outputs})


def recipe(*overrides: str, mixes: Mapping[str, list[Any]] = MIXES) -> Any:
    adapters = json.dumps([{"name": name, "data": parts} for name, parts in mixes.items()])
    sets = (*RANDOM_LLAMA, "train.effective_batch=4", f"train.adapters={adapters}")
    return load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny", (*sets, *overrides))


def every_id() -> list[str]:
    return [f"{source}/{n}" for source, count in SIZES.items() for n in range(count)]


@pytest.fixture
def job(tmp_path: Path, small_models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """Three adapters on three data sets, with samples as preprocess leaves them."""
    monkeypatch.setenv("LORRY_TARGET", "cpu")
    monkeypatch.setattr(planning, "read_lengths", lambda *_: Lengths(longest=20, answer=5))

    def trains(run: Run, part: Part, fails: Mapping[str, BaseException], force: bool) -> tuple[Exit, Trainer]:
        trainer = Trainer(fails)
        stand_in(monkeypatch, trainer)
        return run_stage(run, "train", train.work, force, part), trainer

    job = Job(Run("r", recipe(), Roots(tmp_path / "data", small_models, tmp_path / "runs")), trains)
    job.write("train", *every_id())
    job.write("validation", "a/v", "b/v")
    yield job


def names(report: Mapping[str, Any]) -> list[str]:
    """What a report has an entry of, with a mark where that is an error."""
    adapters = NAMES
    return [adapters[one["dataset_index"]] + ("!" if "error" in one else "") for one in report["dataset_results"]]


# -- one fails -----------------------------------------------------------------------------------------------------


def test_each_is_trained_on_its_mix_in_the_recipes_order(job: Job) -> None:
    code, trainer = job()
    assert (code, trainer.trained) == (Exit.DONE, NAMES)
    assert job.kept == set(NAMES)
    counts = job.manifest["counts"]
    assert [counts[f"{name} samples"] for name in NAMES] == [8, 8, 3]
    assert "untrained" not in job.manifest
    assert len({each.key for each in trainer.jobs}) == 3
    assert not job.run.path("train", "checkpoints").exists()
    code, trainer = job()
    assert (code, trainer.trained) == (Exit.DONE, []), "up to date"


NO_MEMORY = Shortage("loading", 0, "asked for 2.00 GiB, 1.00 GiB free")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LorryError("training two: ended by SIGKILL"), Exit.CRASHED),
        (DataError("no training sample fits in train.max_length 16; raise it"), Exit.DATA),
        (DoesNotFitError("the disk is full"), Exit.DOES_NOT_FIT),
        (MemoryRanOutError("out of memory", NO_MEMORY), Exit.DOES_NOT_FIT),
    ],
)
def test_one_that_fails_leaves_the_others_and_its_exit_code(
    job: Job, capfd: pytest.CaptureFixture[str], error: LorryError, code: Exit
) -> None:
    found, trainer = job(two=error)
    assert (found, trainer.trained) == (code, NAMES), "all were tried"
    assert job.kept == {"one", "three"}
    assert not job.run.path("train", "manifest.json").exists()
    told = capfd.readouterr().err.strip().splitlines()[-1]
    assert "train.adapters: 1 of 3 failed: two: " in told and "train.keep_going=true" in told
    assert names(job.report) == ["one", "two!", "three"]
    assert job.report["pipeline_info"]["failed_datasets"] == 1

    found, trainer = job()
    assert (found, trainer.trained, trainer.resumed) == (Exit.DONE, ["two"], ["two"])
    assert job.kept == set(NAMES) and names(job.report) == NAMES


def test_where_the_recipe_goes_on_there_is_a_manifest_and_the_next_run_tries_again(job: Job) -> None:
    going = job.but("train.keep_going=true")
    code, _ = going(two=LorryError("it is cursed"))
    assert code == Exit.DONE
    assert job.manifest["untrained"] == {"two": "it is cursed"}
    assert job.manifest["counts"]["untrained"] == 1
    assert {name.split("/")[1] for name in job.manifest["outputs"] if "/" in name} == {"one", "three"}
    first = job.manifest["starts"][0]

    code, trainer = going(two=LorryError("still cursed"))
    assert (code, trainer.trained, trainer.resumed) == (Exit.DONE, ["two"], ["two"]), "from its checkpoint"
    assert job.manifest["untrained"] == {"two": "still cursed"}
    assert names(job.report) == ["one", "two!", "three"]

    code, trainer = going()
    assert (code, trainer.trained, trainer.resumed) == (Exit.DONE, ["two"], ["two"])
    assert "untrained" not in job.manifest and job.kept == set(NAMES)
    assert job.manifest["starts"][0] == job.report["pipeline_info"]["start_time"] == first
    assert not job.run.path("train", "checkpoints").exists()
    code, trainer = going()
    assert (code, trainer.trained) == (Exit.DONE, [])


def test_going_on_may_be_decided_after_the_failure(job: Job) -> None:
    assert job(two=LorryError("it is cursed"))[0] == Exit.CRASHED
    code, trainer = job.but("train.keep_going=true")(two=LorryError("still cursed"))
    assert (code, trainer.trained, trainer.resumed) == (Exit.DONE, ["two"], ["two"])
    assert job.manifest["untrained"] == {"two": "still cursed"}


@pytest.mark.parametrize("keep_going", ["true", "false"])
def test_where_all_fail_nothing_is_gone_on_with(job: Job, capfd: pytest.CaptureFixture[str], keep_going: str) -> None:
    going = job.but(f"train.keep_going={keep_going}")
    code, trainer = going(one=DataError("bad"), two=DataError("worse"), three=LorryError("worst"))
    assert (code, trainer.trained) == (Exit.DATA, NAMES)
    assert not job.run.path("train", "manifest.json").exists()
    told = capfd.readouterr().err.strip().splitlines()[-1]
    assert "train.adapters: 3 of 3 failed: one: bad; two: worse; three: worst" in told
    assert "keep_going" not in told
    assert names(job.report) == ["one!", "two!", "three!"]


def test_one_alone_fails_in_its_own_words_and_the_report_has_them(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    alone = job.but("train.keep_going=true", mixes={"one": MIXES["one"]})
    code, _ = alone(one=DataError("no training sample fits"))
    assert code == Exit.DATA
    assert capfd.readouterr().err.strip().splitlines()[-1] == "train: no training sample fits"
    assert names(job.report) == ["one!"]


@pytest.mark.parametrize("error", [InterruptedRunError("stopped"), LostCardError("the card is gone")])
def test_a_stop_or_a_lost_card_is_no_failure_of_an_adapter(job: Job, error: LorryError) -> None:
    going = job.but("train.keep_going=true")
    code, trainer = going(two=error)
    assert (code, trainer.trained) == (Exit.INTERRUPTED, ["one", "two"]), "the others are not tried"
    assert names(job.report) == ["one"]
    code, trainer = going()
    assert (code, trainer.trained, trainer.resumed) == (Exit.DONE, ["two", "three"], ["two"])


def test_memory_that_runs_out_goes_down_the_ladder_of_that_adapter_alone(job: Job) -> None:
    class Hungry(Trainer):
        def __call__(self, stage: Any, job: Any, *rest: Any) -> float | None:
            if job.adapter.name == "two" and job.pass_tokens > 40:
                self.jobs.append(job)
                raise MemoryRanOutError("out of memory", Shortage("training", 3, "asked for 2 GiB"))
            return super().__call__(stage, job, *rest)

    hungry = Hungry()
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, hungry)
        assert run_stage(job.run, "train", train.work) == Exit.DONE
    assert [(one.adapter.name, one.pass_tokens, one.settings.effective_batch) for one in hungry.jobs] == [
        *(("one", 80, 4), ("two", 80, 4), ("two", 40, 4), ("three", 80, 4)),
    ]


def test_memory_that_runs_out_in_processes_that_trained_others_costs_new_processes_and_no_rung(job: Job) -> None:
    class Held(Trainer):
        def __call__(self, stage: Any, job: Any, *rest: Any) -> float | None:
            if job.adapter.name == "two" and "two" not in self.trained:
                self.jobs.append(job)
                raise MemoryRanOutError("out of memory", Shortage("training", 3, "asked for 2 GiB"), earlier_jobs=1)
            return super().__call__(stage, job, *rest)

    held = Held()
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, held)
        assert run_stage(job.run, "train", train.work) == Exit.DONE
    assert [(one.adapter.name, one.pass_tokens) for one in held.jobs] == [
        *(("one", 80), ("two", 80), ("two", 80), ("three", 80)),
    ]


def test_below_the_last_rung_it_ends_in_one_line(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    short = MemoryRanOutError(
        "out of memory", Shortage("training", 3, "asked for 2.00 GiB, 1.94 MiB of 23.65 GiB free")
    )
    code, trainer = job.but(mixes={"one": MIXES["one"]})(one=short)
    assert code == Exit.DOES_NOT_FIT
    assert [(each.pass_tokens, each.checkpointed_layers) for each in trainer.jobs] == [
        *((80, 0), (40, 0), (20, 0), (20, 1), (20, 2)),
    ]
    lines = capfd.readouterr().err.strip().splitlines()
    assert any("out of memory: 2 of 2 layers checkpointed, still 4 samples a step" in line for line in lines)
    assert "nothing is left to reduce" in lines[-1] and "train.load_in_4bit=true" in lines[-1]
    assert "asked for 2.00 GiB, 1.94 MiB of 23.65 GiB free" in lines[-1]
    assert job.kept == set()


def test_a_mix_of_which_nothing_is_there_is_told_before_hours_of_training(
    job: Job, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = job.but(mixes={**MIXES, "two": ["b", "nowhere#3"]})
    code, trainer = wrong()
    assert (code, trainer.trained) == (Exit.USAGE, [])
    error = capfd.readouterr().err
    assert (
        "the data mix of two names 'nowhere', which has no training samples; name a data set that has: a, b, c" in error
    )


def test_a_mix_of_which_nothing_is_there_leaves_the_others_where_the_recipe_goes_on(job: Job) -> None:
    wrong = job.but("train.keep_going=true", mixes={**MIXES, "two": ["b", "nowhere#3"]})
    code, trainer = wrong()
    assert (code, trainer.trained) == (Exit.DONE, ["one", "three"])
    assert names(job.report) == ["one", "two!", "three"]
    code, trainer = job()
    assert (code, trainer.trained) == (Exit.DONE, ["two"]), "once the name is right"


# -- changes -------------------------------------------------------------------------------------------------------


def test_another_mix_trains_that_adapter_alone(job: Job) -> None:
    job()
    before = snapshot(job.run.path("train", "adapters"))
    changed = job.but(mixes={**MIXES, "three": ["c#3", "a#1"]})
    code, trainer = changed()
    assert (code, trainer.trained) == (Exit.DONE, ["three"])
    after = snapshot(job.run.path("train", "adapters"))
    assert {name.split("/")[0] for name in before if before[name] != after.get(name)} == {"three"}
    assert job.manifest["counts"]["three samples"] == 4
    code, trainer = job()
    assert (code, trainer.trained) == (Exit.DONE, []), "and back: the first adapter was kept"
    assert snapshot(job.run.path("train", "adapters")) == before
    assert job()[1].trained == []


@pytest.mark.parametrize(
    ("override", "trained"),
    [
        ("train.rank=3", NAMES),
        ("train.learning_rate=3e-3", NAMES),
        ("train.max_length=300", NAMES),
        ("seed=7", NAMES),
        ("train.micro_batch=1", []),
        ("train.gradient_checkpointing=true", []),
        ("train.keep_checkpoints=5", []),
        ("train.keep_going=true", []),
        ("train.report_to=[]", []),
        ("infer.max_new_tokens=7", []),
    ],
)
def test_a_setting_that_all_depend_on_trains_all_and_room_trains_none(
    job: Job, override: str, trained: list[str]
) -> None:
    job()
    changed = job.but(override)
    changed.write("validation", "a/v", "b/v")  # by preprocess with this recipe
    code, trainer = changed()
    assert (code, trainer.trained) == (Exit.DONE, trained)


def test_other_words_for_the_same_mix_train_nothing(job: Job) -> None:
    job()
    same = {"one": [{"source": "a", "fraction": 1.0}], "two": [{"source": "a", "count": 4, "seed": 42}, "b"]}
    code, trainer = job.but(mixes={**MIXES, **same})()
    assert (code, trainer.trained) == (Exit.DONE, [])


def test_new_data_train_those_who_learn_from_them(job: Job) -> None:
    job()
    job.write("train", *every_id(), "b/new")
    assert job()[1].trained == ["two"]
    job.write("train", *(name for name in every_id() if name != "c/5"))
    assert job()[1].trained == ["three"], "two is as it was at first, three draws among fewer"
    job.write("validation", "a/v", "a/w", "b/v")
    assert job()[1].trained == NAMES, "three has none of its own and is validated on all"


def test_an_adapter_more_or_less_touches_no_other(job: Job) -> None:
    job()
    more = job.but(mixes={"four": ["b"], **MIXES})
    assert more()[1].trained == ["four"]
    assert job.kept == {*NAMES, "four"}
    assert job()[1].trained == []
    assert job.kept == set(NAMES), "the folder of one that is no more disappears"
    renamed = job.but(mixes={"other": MIXES["one"], "two": MIXES["two"], "three": MIXES["three"]})
    assert renamed()[1].trained == ["other"]
    assert job.kept == {"other", "two", "three"}
    assert not any("/one/" in name for name in job.manifest["outputs"])


def test_the_order_in_the_recipe_trains_nothing_again(job: Job) -> None:
    job()
    code, trainer = job.but(mixes=dict(reversed(MIXES.items())))()
    assert (code, trainer.trained) == (Exit.DONE, [])


# -- replaced ------------------------------------------------------------------------------------------------------

RATE = "train.learning_rate=3e-3"


def superseded(job: Job) -> dict[str, bytes]:
    """What is kept of adapters that were replaced, by name without the key."""
    found = snapshot(job.run.path("train", "superseded"))
    return {f"{name.partition('@')[0]}/{name.partition('/')[2]}": content for name, content in found.items()}


def adapters(job: Job) -> dict[str, bytes]:
    return snapshot(job.run.path("train", "adapters"))


def test_a_stopped_training_with_other_settings_leaves_the_finished_adapters(job: Job) -> None:
    job()
    before, outputs = adapters(job), job.manifest["outputs"]
    code, trainer = job.but(RATE)(one=InterruptedRunError("stopped"))
    assert (code, trainer.trained) == (Exit.INTERRUPTED, ["one"])
    assert adapters(job) == before
    with pytest.raises(UsageError, match="infer needs train, which is not done"):
        job.but(RATE).run.inputs("infer", FileHashes(job.run.folder / "none"))
    code, trainer = job()
    assert (code, trainer.trained, job.manifest["outputs"]) == (Exit.DONE, [], outputs), "with the first settings"


def test_a_failed_training_with_other_settings_leaves_the_finished_adapter(job: Job) -> None:
    job()
    before = adapters(job)
    code, _ = job.but(RATE)(two=DataError("no training sample fits"))
    assert code == Exit.DATA
    kept = {name: content for name, content in before.items() if name.startswith("two/")}
    assert kept and kept.items() <= adapters(job).items()


def test_half_a_training_is_gone_on_with_after_one_with_other_settings_was_left(job: Job) -> None:
    assert job(two=InterruptedRunError("stopped"))[0] == Exit.INTERRUPTED
    code, trainer = job.but(RATE)(one=InterruptedRunError("stopped"))
    assert (code, trainer.trained, trainer.resumed) == (Exit.INTERRUPTED, ["one"], []), "another training's"
    code, trainer = job()
    assert (code, trainer.trained, trainer.resumed) == (Exit.DONE, ["two", "three"], ["two"])
    assert not job.run.path("train", "checkpoints").exists()
    assert list(job.run.path("train").glob("superseded/checkpoints@*")) == [], "nor of the one that was left"


def test_force_goes_on_with_no_checkpoint(job: Job) -> None:
    assert job(two=InterruptedRunError("stopped"))[0] == Exit.INTERRUPTED
    assert job.but(RATE)(one=InterruptedRunError("stopped"))[0] == Exit.INTERRUPTED
    code, trainer = job(force=True)
    assert (code, trainer.trained, trainer.resumed) == (Exit.DONE, NAMES, [])


def test_a_replaced_adapter_stays_beside_the_new_one_until_it_is_pruned(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job()
    before = adapters(job)
    changed = job.but(RATE)
    assert changed()[1].trained == NAMES
    after = adapters(job)
    assert superseded(job) == before and after.keys() == before.keys()
    assert {name for name in before if name.endswith("made.json") and before[name] == after[name]} == set()
    assert {name.partition("/")[0] for name in job.manifest["outputs"]} == {"adapters", "metrics.jsonl"}
    assert (job()[1].trained, adapters(job), superseded(job)) == ([], before, after), "and back without a training"

    monkeypatch.setenv("LORRY_RUNS", str(job.run.roots.runs))
    write_recipe(job.run)
    done = CliRunner().invoke(lorry, ["prune", "r"])
    assert (done.exit_code, len(done.output.splitlines())) == (0, 3), done.output
    assert "/superseded/one@" in done.output
    assert not job.run.path("train", "superseded").exists() and adapters(job) == before
    assert job()[1].trained == [], "the run is as done as before"
    assert CliRunner().invoke(lorry, ["prune", "r"]).output == f"{job.run.folder}: nothing to prune\n"
    assert changed()[1].trained == NAMES


def test_prune_waits_for_a_training_and_names_an_unknown_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_RUNS", str(job.run.roots.runs))
    job()
    job.but(RATE)()
    kept = superseded(job)
    with lock_stage_folder(job.run.path("train")):
        done = CliRunner().invoke(lorry, ["prune", "r"])
    assert (done.exit_code, superseded(job)) == (75, kept), done.output
    done = CliRunner().invoke(lorry, ["prune", "nowhere"])
    assert (done.exit_code, done.output.count("\n")) == (2, 1) and "no such run" in done.output


def test_force_replaces_an_adapter_only_when_the_new_one_is_complete(job: Job) -> None:
    job()
    before = adapters(job)
    code, trainer = job(force=True, two=InterruptedRunError("stopped"))
    assert (code, trainer.trained) == (Exit.INTERRUPTED, ["one", "two"])
    assert superseded(job) == before
    code, trainer = job()
    assert (code, trainer.trained) == (Exit.DONE, ["two", "three"]), "it goes on from nothing that was made before"
    assert job.kept == set(NAMES)
    assert not job.run.path("train", "superseded").exists(), "as --force asked"


def test_an_adapter_whose_training_was_killed_just_before_it_got_its_place_is_not_trained_again(job: Job) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def killed(*_: Any) -> None:
            raise Killed

        patch.setattr(attempts, "publish", killed)
        assert job()[0] == Exit.CRASHED
    assert job.kept == set()
    code, trainer = job()
    assert (code, trainer.trained) == (Exit.DONE, ["two", "three"])


# -- touched -------------------------------------------------------------------------------------------------------

WEIGHTS = "adapter_model.safetensors"


def overwrite(folder: Path) -> None:
    (folder / WEIGHTS).write_text("weights of zwo")


def lose(folder: Path) -> None:
    (folder / "training.json").unlink()


def praise(folder: Path) -> None:
    facts = read_json(folder / "training.json")
    write_json(folder / "training.json", {**facts, "samples": {"train": 10**6, "validation": 1}})


def forget(folder: Path) -> None:
    (folder / "made.json").unlink()


def forge(folder: Path) -> None:
    """Another adapter's files under this name, with their own record of how they were made."""
    for path in (folder.parent / "three").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


@pytest.mark.parametrize("half", [False, True], ids=["done", "half done"])
@pytest.mark.parametrize("touch", [overwrite, lose, praise, forget, forge])
def test_an_adapter_that_was_touched_is_trained_again_and_never_blessed(
    job: Job, touch: Callable[[Path], None], half: bool
) -> None:
    job(**({"one": LorryError("later")} if half else {}))
    before = (job.run.path("train", "adapters", "three", WEIGHTS)).read_bytes()
    touch(job.run.path("train", "adapters", "two"))
    code, trainer = job()
    if touch is forget and not half:
        assert (code, trainer.trained) == (Exit.DONE, []), "it is no output: the manifest vouches for all that is"
        return
    assert (code, trainer.trained) == (Exit.DONE, ["one", "two"] if half else ["two"])
    folder = job.run.path("train", "adapters", "two")
    assert (folder / WEIGHTS).read_text() == "weights of two"
    assert read_json(folder / "training.json")["samples"]["train"] == 8
    assert job.run.path("train", "adapters", "three", WEIGHTS).read_bytes() == before


def test_half_an_adapter_that_a_kill_left_is_none(job: Job) -> None:
    job(two=LorryError("later"))
    half = job.run.path("train", "checkpoints", "two", "finished", ".two")
    half.mkdir(parents=True)
    (half / WEIGHTS).write_text("half")
    code, trainer = job()
    assert (code, trainer.trained) == (Exit.DONE, ["two"])
    assert job.kept == set(NAMES)


# -- the report ----------------------------------------------------------------------------------------------------


def test_a_crash_after_the_first_leaves_the_firsts_result_on_disk(job: Job) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, Trainer({"two": Killed()}))
        code = run_stage(job.run, "train", train.work)
    assert code == Exit.CRASHED
    assert names(job.report) == ["one"]
    (first,) = job.report["dataset_results"]
    assert first["training"]["train_samples"] == 8 and first["training"]["final_loss"] == 0.5
    assert job.report["pipeline_info"]["total_datasets"] == 3
    start = job.report["pipeline_info"]["start_time"]
    code, trainer = job()
    assert (code, trainer.trained) == (Exit.DONE, ["two", "three"])
    assert [names(report) for report in trainer.seen] == [["one"], ["one", "two"]], "written after each"
    assert job.report["pipeline_info"]["start_time"] == start == job.manifest["starts"][0], "of the first start"
    assert len(job.manifest["starts"]) == 2


# -- shards --------------------------------------------------------------------------------------------------------


def test_shards_share_the_adapters_and_the_merge_trains_nothing(job: Job, tmp_path: Path) -> None:
    whole = replace(job, run=replace(job.run, roots=replace(job.run.roots, runs=tmp_path / "whole")))
    whole.write("train", *every_id())
    whole.write("validation", "a/v", "b/v")
    assert whole()[0] == Exit.DONE
    assert [job(Shard(index, 2))[1].trained for index in (1, 0)] == [["two"], ["one", "three"]]
    code, trainer = job()
    assert (code, trainer.trained) == (Exit.DONE, [])
    assert job.manifest["outputs"] == whole.manifest["outputs"]
    assert names(job.report) == NAMES


def test_what_a_shard_trained_beside_one_that_failed_is_taken_over(job: Job) -> None:
    going = job.but("train.keep_going=true")
    assert going(Shard(0, 2), three=LorryError("it is cursed"))[0] == Exit.DONE
    assert going(Shard(1, 2))[1].trained == ["two"]
    code, trainer = going(three=LorryError("still cursed"))
    assert (code, trainer.trained) == (Exit.DONE, ["three"]), "one and two are taken over"
    assert job.manifest["untrained"] == {"three": "still cursed"} and job.kept == {"one", "two"}
    code, trainer = going()
    assert (code, trainer.trained) == (Exit.DONE, ["three"])
    assert job.kept == set(NAMES)


def test_a_shard_whose_only_adapter_fails_has_nothing_to_go_on_with(job: Job) -> None:
    going = job.but("train.keep_going=true")
    assert going(Shard(1, 2), two=DataError("bad"))[0] == Exit.DATA
    assert going(Shard(0, 2))[0] == Exit.DONE
    code, trainer = going(two=DataError("bad"))
    assert (code, trainer.trained) == (Exit.DONE, ["two"])
    assert job.manifest["untrained"] == {"two": "bad"}


# -- the chat template ---------------------------------------------------------------------------------------------


def test_adapters_of_another_chat_template_are_trained_again_with_it(job: Job) -> None:
    before = {each.adapter.name: each.key for each in job()[1].jobs}
    code, trainer = job.but("model.chat_template=plain")()
    assert (code, trainer.trained) == (Exit.DONE, NAMES)
    assert all(each.key != before[each.adapter.name] for each in trainer.jobs)
    assert {each.chat for each in trainer.jobs} == {ChatSettings(PLAIN, named=True)}
    assert job.manifest["chat"] == {"template": digest_of(PLAIN)}


def test_a_template_that_cannot_be_used_ends_the_stage_before_a_training(
    job: Job, capfd: pytest.CaptureFixture[str]
) -> None:
    code, trainer = job.but("model.enable_thinking=true")()
    assert (code, trainer.trained) == (Exit.USAGE, [])
    assert "model.enable_thinking: found true, but the chat template of" in capfd.readouterr().err


# -- the training processes ----------------------------------------------------------------------------------------


def three_adapters(training: Training) -> Training:
    adapters = "train.adapters=[{name: one}, {name: two}, {name: three}]"
    return Training(training.lorry, (*training.overrides, adapters, "train.epochs=4", "train.checkpoint_every=2"))


@pytest.mark.long
def test_the_base_is_loaded_once_for_all_adapters(training: Training) -> None:
    """The same data and seed make the same adapter, whatever was trained before."""
    many = three_adapters(training)
    code, output = many()
    assert code == 0, output
    lines = [line for line in output.splitlines() if ": 24 samples" in line]
    loaded = ", on the base that is loaded"
    assert lines == [
        "train: train one: 24 samples",
        *(f"train: train {name}: 24 samples{loaded}" for name in NAMES[1:]),
    ]
    files = [snapshot(many.run.path("train", "adapters", name)) for name in NAMES]
    assert all(one.pop("timing.json") for one in files) and files[0] == files[1] == files[2]
    assert not many.run.path("train", "checkpoints").exists()


def start_second_adapter(many: Training) -> tuple[Path, "subprocess.Popen[str]"]:
    """Start the stage, and wait for the first whole checkpoint of the second adapter. Returns the folder of all
    checkpoints and the stage's process."""
    folder, process = many.run.path("train", "checkpoints"), many.start()
    deadline = time.monotonic() + 120
    while not list((folder / "two").glob("checkpoint-*/complete.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return folder, process


@pytest.mark.kill
def test_a_kill_of_a_training_process_costs_a_new_one_for_that_adapter_alone(training: Training) -> None:
    many = three_adapters(training)
    folder, process = start_second_adapter(many)
    (worker,) = processes_naming(folder)
    os.kill(worker, signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1, output
    assert "train three: 24 samples\n" in output, "a new process loads the base"
    assert "1 of 3 failed: two: training two: ended by SIGKILL" in output
    assert not processes_naming(folder)
    code, output = many()
    assert code == 0 and "train two: 24 samples, resuming from checkpoint-" in output, output


@pytest.mark.kill
def test_a_shortage_of_a_second_adapter_costs_new_processes_then_a_rung(training: Training) -> None:
    many = three_adapters(training)
    hunger = {"during": "training", "above": 2, "from_step": 3, "adapter": "two"}
    code, output = many(HUNGER=json.dumps(hunger))
    assert code == 0, output
    lines = [line for line in output.splitlines() if "out of memory" in line]
    assert lines[0].startswith("train: train two: out of memory in training after step 3 (asked for 2.00 GiB")
    assert lines[0].endswith("in processes that had trained others; new ones try the same")
    assert lines[1:] and all(line.startswith("train: out of memory: passes of at most ") for line in lines[1:])
    assert "train three: 24 samples, on the base that is loaded" in output


@pytest.mark.kill
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_process_that_trains_a_second_adapter_ends_with_its_stage(training: Training, sig: signal.Signals) -> None:
    many = three_adapters(training)
    folder, process = start_second_adapter(many)
    process.send_signal(sig)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == (-sig if sig == signal.SIGKILL else 75), output
    deadline = time.monotonic() + 10
    while processes_naming(folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    code, output = many()
    assert code == 0 and "train two: 24 samples, resuming from checkpoint-" in output, output
    assert "train three: 24 samples, on the base that is loaded" in output
