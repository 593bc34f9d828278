"""How questions become samples: in which files, with which marks, and which are skipped and counted."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import Exit
from stages.contract.files import read_json, read_jsonl, write_jsonl
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.host.runner import run_stage
from stages.preprocess import stage as preprocess
from stages.tasks import settle_recipe
from tests.conftest import REPOSITORY

FILES = ("train", "validation", "test", "validation_asked")
HELD_OUT = "training question of a held-out group"


@dataclass(frozen=True)
class Prepared:
    """A finished preprocess stage, and its exit code."""

    run: Run
    code: Exit

    def samples(self, name: str) -> dict[str, dict[str, Any]]:
        rows = read_jsonl(self.run.path("preprocess", "samples", f"{name}.jsonl"))
        assert len({row["id"] for row in rows}) == len(rows)
        return {row["id"]: row for row in rows}

    def problems(self, name: str) -> set[str]:
        return {row["meta"]["problem_id"] for row in self.samples(name).values()}

    @property
    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.run.path("preprocess", "manifest.json"))
        return found

    @property
    def skipped(self) -> Counter[str]:
        return Counter(entry["reason"] for entry in self.manifest["skipped"])


def problem(name: str, answers: bool = True) -> dict[str, Any]:
    question = {"options": ["red", "blue", "green"], **({"answer": "B"} if answers else {})}
    return {"id": name, "problem": f"Known of {name}.", "questions": [{"question": f"{n}?", **question} for n in "xy"]}


def make_files(folder: Path, tested: bool = False) -> None:
    """Write 20 problems, 3 in another file, 2 without answers (with answers if `tested`), and guesses for all."""
    rows = [problem(f"p{n}") for n in range(20)]
    test = [problem(f"t{n}", answers=tested) for n in range(2)]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", test)
    write_jsonl(folder / "sources" / "more.jsonl", [problem(f"m{n}") for n in range(3)])
    labels = [{"id": row["id"], "questions": [{"answer": "C"}, {"answer": "C"}]} for row in [*rows, *test]]
    write_jsonl(folder / "labels" / "guessed.jsonl", labels)


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Prepared]:
    """Return a function that runs the stage on the files with overrides."""

    def prepared(*overrides: str, tested: bool = False) -> Prepared:
        make_files(tmp_path / "data" / "logic", tested)
        sets = ("data.path=logic", "data.test_fraction=0.2", "data.validation_fraction=0.2", *overrides)
        recipe = load_recipe(REPOSITORY / "recipes" / "logic-choice.yaml", "tiny", sets)
        run = Run("r", recipe, Roots(tmp_path / "data", tmp_path / "models", tmp_path / "runs"))
        return Prepared(run, run_stage(run, "preprocess", preprocess.work))

    return prepared


def test_every_sample_names_its_data_set(prepare: Callable[..., Prepared]) -> None:
    made = prepare()
    assert made.code == Exit.DONE
    sources = {name: Counter(row["meta"]["source"] for row in made.samples(name).values()) for name in FILES}
    assert set(sources["train"]) == {"train", "more", "guessed"}
    for name in FILES[1:]:
        assert set(sources[name]) == {"train"}, "only what the data themselves answer is scored or validated on"
    assert sources["train"]["more"] == 6


def test_validation_questions_are_written_twice_once_without_their_answers(prepare: Callable[..., Prepared]) -> None:
    made = prepare()
    learnt, asked = made.samples("validation"), made.samples("validation_asked")
    assert list(learnt) == list(asked) and learnt
    for name, row in asked.items():
        assert [message["role"] for message in row["messages"]] == ["system", "user"]
        assert [message["role"] for message in learnt[name]["messages"]] == ["system", "user", "assistant"]
        assert row["messages"] == learnt[name]["messages"][:-1]
        assert row["references"] == ["B"], "it is scored as a test sample is"
        assert row["meta"]["source"] == learnt[name]["meta"]["source"]
    assert "samples/validation_asked.jsonl" in made.manifest["outputs"]


def test_prompts_of_test_questions_have_no_answer(prepare: Callable[..., Prepared]) -> None:
    for row in prepare().samples("test").values():
        assert row["messages"][-1]["role"] == "user"
        assert "trained_on" not in row["meta"]


def test_a_guess_of_a_held_out_problem_is_skipped_and_counted(prepare: Callable[..., Prepared]) -> None:
    made = prepare()
    held_out = (made.problems("test") | made.problems("validation")) - {"t0", "t1"}
    assert len(made.problems("test") - {"t0", "t1"}) == 4 and len(made.problems("validation")) == 3
    guessed = {row["meta"]["problem_id"] for row in made.samples("train").values() if row["meta"]["label_source"]}
    assert guessed == {f"p{n}" for n in range(20)} - held_out | {"t0", "t1"}, (
        "a problem that is only asked may be learnt"
    )
    assert made.skipped == {HELD_OUT: 2 * len(held_out)}
    details = {entry["detail"].rpartition(", from ")[2] for entry in made.manifest["skipped"]}
    assert details == {"guessed"}
    counts = made.manifest["counts"]
    used = sum(counts[split] for split in ("train", "validation", "test"))
    assert counts["questions"] == used + len(made.manifest["skipped"]), "every question is used or listed as skipped"


def test_if_the_test_file_is_scored_no_guess_of_it_is_learnt(prepare: Callable[..., Prepared]) -> None:
    made = prepare(tested=True)
    assert made.problems("test") == {"t0", "t1"}
    assert not made.problems("train") & {"t0", "t1"}


# -- evaluate_on_training ------------------------------------------------------------------------------------------


def test_scoring_training_data_marks_each_of_them(prepare: Callable[..., Prepared]) -> None:
    made = prepare("data.evaluate_on_training=true")
    assert made.code == Exit.DONE
    tested, trained = made.samples("test"), made.samples("train")
    marked = {name for name, row in tested.items() if row["meta"].get("trained_on")}
    assert marked == {name for name, row in trained.items() if row["meta"]["source"] == "train"}
    assert {row["meta"]["problem_id"] for name, row in tested.items() if name not in marked} == {"t0", "t1"}
    assert not any("trained_on" in row["meta"] for row in trained.values()), "the mark is the test sample's"
    assert all(tested[name]["messages"] == trained[name]["messages"][:-1] for name in marked)
    assert not made.problems("validation") & {row["meta"]["problem_id"] for row in tested.values()}


def test_guesses_are_not_scored_even_then(prepare: Callable[..., Prepared]) -> None:
    made = prepare("data.evaluate_on_training=true")
    assert {row["meta"]["source"] for row in made.samples("test").values()} == {"train"}
    assert not any(row["meta"]["label_source"] for row in made.samples("test").values())


def test_each_test_sample_is_in_a_line_of_the_submission(prepare: Callable[..., Prepared]) -> None:
    made = prepare("data.evaluate_on_training=true")
    rows = read_jsonl(made.run.path("preprocess", "asked.jsonl"))
    named = [name for row in rows for name in row["ids"]]
    assert sorted(named) == sorted(made.samples("test"))


def test_questions_without_a_usable_prompt_are_named_before_any_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data" / "better-synth"
    shutil.copytree(REPOSITORY / "recipes" / "data" / "better-synth", data)
    first = read_jsonl(data / "textvqa.jsonl")[0]["image"]
    lost = [row["image"] for row in read_jsonl(data / "textvqa.jsonl")].count(first)
    (data / first).unlink()

    def prepared(*overrides: str) -> Prepared:
        sets = ("preprocess.data_juicer=null", *overrides)
        recipe = settle_recipe(
            load_recipe(REPOSITORY / "recipes" / "better-synth.yaml", "tiny", sets), "r", tmp_path / "data"
        )
        run = Run("r", recipe, Roots(tmp_path / "data", tmp_path / "models", tmp_path / "runs"))
        return Prepared(run, run_stage(run, "preprocess", preprocess.work))

    some = prepared()
    assert some.code == Exit.DONE
    assert some.manifest["counts"]["textvqa test samples that cannot be asked"] == lost
    assert f"{lost} of 24 test samples of textvqa count as failed, such as textvqa/" in capfd.readouterr().err
    assert prepared("preprocess.samples.textvqa_images=nope").code == Exit.DATA
    assert "none of 24 test questions of textvqa has a usable prompt, such as textvqa/" in capfd.readouterr().err


# -- data of other forms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoding", "name"), [("gbk", "GBK"), ("utf-16", "UTF-16")])
def test_a_file_in_another_encoding_is_read_and_named(
    prepare: Callable[..., Prepared], tmp_path: Path, capfd: pytest.CaptureFixture[str], encoding: str, name: str
) -> None:
    run = prepare().run
    path = tmp_path / "data" / "logic" / "sources" / "more.jsonl"
    text = path.read_text(encoding="utf-8").replace("Known of", "关于这个问题，已知：")
    path.write_bytes(text.encode(encoding))
    capfd.readouterr()
    assert run_stage(run, "preprocess", preprocess.work) == Exit.DONE
    assert f"preprocess: sources/more.jsonl: read as {name}; save it as UTF-8 if its text looks wrong" in (
        capfd.readouterr().err
    )
    done = Prepared(run, Exit.DONE)
    assert done.manifest["encodings"] == {"sources/more.jsonl": name}
    learnt = done.samples("train")["m0/0@more"]
    assert "关于这个问题，已知： m0." in learnt["messages"][1]["content"]
