"""Ablations: added to a finished run, they ask only new prompts, and a kill loses no answer."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stages.contract.errors import Exit
from stages.contract.files import read_json, read_jsonl, write_json
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.engines.engine import Completion, Done
from stages.host.runner import run_stage
from stages.infer import stage as infer
from stages.models.rendering import Prompt
from stages.tasks import load_task
from stages.tasks.patent_qa.questions import PatentQuestion
from stages.tasks.task import Found
from tests.conftest import REPOSITORY, snapshot
from tests.infer.conftest import ask, describe
from tests.infer.engines import use_engine

SETTINGS = (
    *("model.path=random-llama", "preprocess.classifier=model", "infer.max_length=2048", "infer.chunk_size=3"),
    "infer.passes={refine: true, classify_tokens: 2, refine_tokens: 16}",
)

PAGES = {number: {"text": f"Text of page {number}.", "image": f"{number}.jpg"} for number in (1, 2, 3, 4)}

NEW = {
    "style": [("refine", "where"), ("refine", "what"), ("refine", "any"), ("refine", "other")],
    "refine": [],
    "classifier": [("answer", "where"), ("refine", "where")],
    "retrieval": [(name, sample) for name in ("answer", "refine") for sample in ("what", "any", "other")],
    "position_hint": [("answer", "where"), ("refine", "where")],
    "adapter": [],
}
"""The prompts of the adapter that each component adds."""

Asked = list[tuple[str, str]]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing is caught, nothing is tidied up."""


class NotingEngine:
    """Notes pass and sample of all that it is asked, and dies before it answers more than `life` prompts."""

    continuous = True

    def __init__(self, asked: Asked, life: int) -> None:
        self._asked, self._life = asked, life

    def generate(self, prompts: list[Prompt], adapter: str | None, done: Done | None = None) -> list[Completion]:
        found = []
        for place, prompt in enumerate(prompts):
            if self._life == 0:
                raise Killed
            self._life -= 1
            name = {2: "classify", 16: "refine"}.get(prompt.max_new_tokens or 0, "answer")
            self._asked.append((name, prompt.id))
            text = hashlib.sha256(f"{adapter} {prompt.tokens}".encode()).hexdigest()[:8]
            yes_or_no = "Y" if prompt.id == "where" else "N"
            found.append(Completion(yes_or_no if name == "classify" else text, 2, "stop"))
            if done is not None:
                done(place, found[-1])
        return found

    def close(self) -> None:
        return None


def question(name: str, text: str, *pages: int) -> PatentQuestion:
    return PatentQuestion(name, text, "a.pdf", pages, None, ("x",), (), "", None, 0)


@pytest.fixture
def run(tmp_path: Path, small_models: Path) -> Run:
    """A run whose questions need all three passes; of the one on a position the drawing is enough."""
    recipe = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny", SETTINGS)
    run = Run("r", recipe, Roots(tmp_path / "data", small_models, tmp_path / "runs"))
    found = Found(PAGES, ranked=[4, 3, 2, 1], examples=["above part 5"])
    questions = [question("where", "Where is part 3 on page 2?", 2), question("what", "What is part 3 on page 2?", 2)]
    questions += [question("any", "What is it made of?"), question("other", "What is it for?")]
    build = load_task("patent_qa").build_samples
    ask(run, [sample for each in questions for sample in build(recipe, each, found, "test")])
    write_json(run.path("train", "adapters", "tuned", "adapter_config.json"), {"r": 8})
    describe(run, "train", "adapters/tuned/adapter_config.json")
    return run


def ablating(run: Run, *components: str) -> Run:
    changed = run.recipe.infer.model_copy(update={"ablate": list(components)})
    return replace(run, recipe=run.recipe.model_copy(update={"infer": changed}))


def infers(run: Run, monkeypatch: pytest.MonkeyPatch, life: int = -1) -> tuple[Exit, Asked]:
    """Start infer; -1 is a long life. Returns how it ended and what it asked."""
    asked: Asked = []
    use_engine(monkeypatch, lambda _: NotingEngine(asked, life))
    return run_stage(run, "infer", infer.work), asked


def lives(run: Run, monkeypatch: pytest.MonkeyPatch, life: int) -> Iterator[Asked]:
    """What each start asks, each killed at its `life`th answer, until one gets to the end."""
    for _ in range(100):
        code, asked = infers(run, monkeypatch, life)
        yield asked
        if code == Exit.DONE:
            return
    raise AssertionError("it never ends")


@pytest.mark.long
def test_a_component_added_to_a_finished_run_asks_only_new_prompts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, asked = infers(run, monkeypatch)
    assert (code, len(asked)) == (Exit.DONE, 2 + 4 * 4)
    before = snapshot(run.path("infer", "predictions"))
    for count, (component, new) in enumerate(NEW.items(), start=1):
        code, asked = infers(ablating(run, *list(NEW)[:count]), monkeypatch)
        assert code == Exit.DONE
        assert sorted(asked) == sorted(new), component
        assert snapshot(run.path("infer", "predictions")) == before
    assert {path.stem for path in run.path("infer", "ablations").iterdir()} == set(NEW) - {"adapter"}
    answering = read_json(run.path("infer", "manifest.json"))["answering"]
    assert set(answering) == {"base", "tuned", *(f"without {name}" for name in NEW if name != "adapter")}


def test_a_removed_component_asks_nothing_and_may_come_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert infers(ablating(run, "style", "retrieval"), monkeypatch)[0] == Exit.DONE
    before = snapshot(run.path("infer", "ablations"))
    assert infers(ablating(run, "style"), monkeypatch) == (Exit.DONE, [])
    assert set(snapshot(run.path("infer", "ablations"))) == {"style.jsonl"}
    assert infers(ablating(run, "style", "retrieval"), monkeypatch) == (Exit.DONE, [])
    assert snapshot(run.path("infer", "ablations")) == before


@pytest.mark.kill
@pytest.mark.parametrize("life", [1, 2, 5])
def test_kills_during_ablations_lose_no_answer(run: Run, monkeypatch: pytest.MonkeyPatch, life: int) -> None:
    whole = replace(ablating(run, *NEW), name="whole")
    for stage in ("preprocess", "train"):
        whole.stage_folder(stage).parent.mkdir(parents=True, exist_ok=True)
        whole.stage_folder(stage).symlink_to(run.stage_folder(stage))
    assert infers(whole, monkeypatch)[0] == Exit.DONE

    assert infers(run, monkeypatch)[0] == Exit.DONE
    starts = list(lives(ablating(run, *NEW), monkeypatch, life))
    new = sorted(asked for component in NEW.values() for asked in component)
    assert [len(asked) for asked in starts[:-1]] == [life] * ((len(new) - 1) // life), "killed again and again"
    assert sorted(asked for start in starts for asked in start) == new, "nothing twice"
    for folder in ("predictions", "ablations", "submission"):
        assert snapshot(run.path("infer", folder)) == snapshot(whole.path("infer", folder)), folder


def test_without_the_refining_pass_the_long_answer_counts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert infers(ablating(run, "refine"), monkeypatch)[0] == Exit.DONE
    whole = read_jsonl(run.path("infer", "predictions", "tuned.jsonl"))
    without = read_jsonl(run.path("infer", "ablations", "refine.jsonl"))
    assert [each["text"] for each in without] == [each["passes"]["answer"] for each in whole]
