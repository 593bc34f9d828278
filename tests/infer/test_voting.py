"""The infer stage holding votes: who votes, second rounds, abstentions, kills, shards, and another way to vote."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import Exit
from stages.contract.files import read_json, read_jsonl, write_json, write_jsonl
from stages.contract.part import Part, Shard
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.engines.engine import Completion, Done, EngineSettings
from stages.host.runner import run_stage
from stages.infer import stage as infer
from stages.models import rendering
from stages.models.rendering import Prompt, Renderer
from stages.tasks import settle_recipe
from stages.tasks.logic_choice import build_samples
from stages.tasks.logic_choice.problems import LogicQuestion
from tests.conftest import REPOSITORY, snapshot
from tests.infer.conftest import describe
from tests.infer.engines import use_engine

ADAPTERS = ("one", "two", "three")
OPTIONS = ("red", "blue", "green")

TEST: dict[str, dict[str, str]] = {
    "all": {"one": "A", "two": "A", "three": "A"},
    "most": {"one": "A", "two": "B", "three": "B"},
    "split": {"one": "A", "two": "B", "three": "C"},
    "some": {"one": "A", "two": "?", "three": "B"},
    "lone": {"one": "?", "two": "C", "three": "?"},
    "none": {"one": "?", "two": "?", "three": "?"},
}
"""What each adapter answers to each test question; `?` is no valid answer."""

VALIDATION: dict[str, dict[str, str]] = {
    "v0": {"one": "B", "two": "A", "three": "A"},
    "v1": {"one": "B", "two": "A", "three": "A"},
    "v2": {"one": "?", "two": "A", "three": "C"},
    "v3": {"one": "A", "two": "B", "three": "C"},
}
"""The same of the validation questions, where A is right: once, three times, twice."""

SECOND = {"split": {"one": "C", "two": "B", "three": "C"}, "some": {"one": "?", "two": "A", "three": "A"}}
"""What they answer when they are asked again."""

Says = Callable[[str | None, Prompt, bool], str]


def scripted(adapter: str | None, prompt: Prompt, again: bool) -> str:
    """What an adapter says by the tables above; base says A."""
    given = SECOND[prompt.id] if again else {**TEST, **VALIDATION}[prompt.id]
    letter = given[adapter] if adapter else "A"
    return "No idea." if letter == "?" else f"Answer: {letter}"


class Killed(BaseException):
    """Stands for a SIGKILL: nothing is caught, nothing is tidied up."""


@dataclass
class Engine:
    """Notes what it is asked, and dies before it answers more than `life` prompts."""

    life: int = -1
    says: Says = scripted
    continuous: bool = True
    asked: list[tuple[str | None, str, bool]] = field(default_factory=list)
    """Adapter, sample, and whether with fewer options."""
    closed: bool = False

    def generate(self, prompts: list[Prompt], adapter: str | None, done: Done | None = None) -> list[Completion]:
        found = []
        for place, prompt in enumerate(prompts):
            if self.life == 0:
                raise Killed
            self.life -= 1
            again = len(prompt.tokens) < FULL[prompt.id]
            self.asked.append((adapter, prompt.id, again))
            found.append(Completion(self.says(adapter, prompt, again), 3, "stop"))
            if done is not None:
                done(place, found[-1])
        return found

    def close(self) -> None:
        self.closed = True


FULL: dict[str, int] = {}
"""Tokens of each sample's prompt with all its options; a shorter prompt is of a second round."""


def sample(name: str, answers: tuple[str, ...] = ("A",)) -> dict[str, Any]:
    place = (name, name, 0, f"Facts of {name}.", "Which hat?", OPTIONS)
    made = build_samples(None, LogicQuestion(*place, answers, "train", f"g-{name}", None, None), None, "test")  # type: ignore[arg-type]
    return dict(made[0])


@pytest.fixture(scope="module")
def tokenizer() -> Callable[[Path], Any]:
    """Loads each tokenizer once: a start of the stage takes half a second for it."""
    return lru_cache(rendering.load_tokenizer)


@pytest.fixture
def run(tmp_path: Path, small_models: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Six test questions, four to validate on, and three adapters."""
    monkeypatch.setattr(rendering, "load_tokenizer", tokenizer)
    run = voting(Run("r", None, Roots(tmp_path / "data", small_models, tmp_path / "runs")))  # type: ignore[arg-type]
    prepare(run)
    return run


def voting(run: Run, *overrides: str, vote: str = "{}") -> Run:
    """The run with a vote as this says, and other settings."""
    adapters = json.dumps([{"name": name} for name in ADAPTERS])
    small = ("model.path=random-llama", "infer.chunk_size=4", "infer.passes.retries=0", f"train.adapters={adapters}")
    sets = (*small, "infer.vote=null", *([f"infer.vote={vote}"] if vote else []), *overrides)
    recipe = load_recipe(REPOSITORY / "recipes" / "logic-choice.yaml", "tiny", sets)
    return replace(run, recipe=settle_recipe(recipe, "logic-choice", run.roots.data))


def prepare(run: Run, validation: tuple[str, ...] = tuple(VALIDATION), untrained: tuple[str, ...] = ()) -> None:
    """Put the outputs of preprocess and train into the run."""
    test = [sample(name) for name in TEST]
    compared = [sample(name) for name in validation]
    measure(run, test + compared)
    write_jsonl(run.path("preprocess", "samples", "test.jsonl"), test)
    write_jsonl(run.path("preprocess", "samples", "validation_asked.jsonl"), compared)
    rows = [{"id": name, "ids": [name], "places": [name]} for name in TEST]
    write_jsonl(run.path("preprocess", "asked.jsonl"), rows)
    describe(run, "preprocess", "samples/test.jsonl", "samples/validation_asked.jsonl", "asked.jsonl")
    trained = [name for name in ADAPTERS if name not in untrained]
    for name in trained:
        write_json(run.path("train", "adapters", name, "adapter_config.json"), {"r": 8, "of": name})
    describe(run, "train", *(f"adapters/{name}/adapter_config.json" for name in trained))
    manifest = read_json(run.path("train", "manifest.json"))
    write_json(run.path("train", "manifest.json"), {**manifest, "untrained": dict.fromkeys(untrained, "it failed")})


def measure(run: Run, samples: list[dict[str, Any]]) -> None:
    renderer = Renderer(run.roots.models / "random-llama")
    FULL.update({each["id"]: renderer.render(each["id"], each["messages"]).length for each in samples})


def infers(run: Run, monkeypatch: pytest.MonkeyPatch, given: Engine | None = None, part: Part = None) -> Engine:
    """Run the stage to its end with one engine, or none where none is given; returns it."""
    made = given or Engine(life=0)
    use_engine(monkeypatch, lambda _: made if given else pytest.fail("there is nothing to ask"))
    assert run_stage(run, "infer", infer.work, part=part) == Exit.DONE
    return made


def votes(run: Run) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in read_jsonl(run.path("infer", "votes.jsonl"))}


def answers(run: Run, name: str = "vote") -> dict[str, str | None]:
    return {row["id"]: row["answer"] for row in read_jsonl(run.path("infer", "predictions", f"{name}.jsonl"))}


def held(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = read_json(run.path("infer", "manifest.json"))["vote"]
    return found


def results(run: Run) -> dict[str, bytes]:
    """Every byte that the stage hands on."""
    parts = ("predictions", "submission", "validation", "votes.jsonl")
    return {name: content for name, content in snapshot(run.path("infer")).items() if Path(name).parts[0] in parts}


# -- who votes -----------------------------------------------------------------------------------------------------


def test_all_votes_are_equal_and_ties_go_by_validation(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    infers(run, monkeypatch, Engine())
    assert answers(run) == {"all": "A", "most": "B", "split": "B", "some": "B", "lone": "C", "none": None}
    by = {name: row["by"] for name, row in votes(run).items()}
    assert by == {
        **{"all": "majority", "most": "majority", "split": "better voters", "some": "better voters"},
        **{"lone": "majority", "none": "nobody"},
    }
    record = held(run)
    assert record["adapters"] == sorted(ADAPTERS) and record["chosen"] == "all" and record["best"] == "two"
    assert record["validation"] == {"one": 0.25, "three": 0.5, "two": 0.75} and record["validation samples"] == 4
    assert record["weights"] == dict.fromkeys(ADAPTERS, 1.0)
    assert record["decided by"] == dict(Counter(by.values()))
    assert (record["greedy path"], record["second round"]) == ([], 0)
    decision = read_json(run.path("infer", "manifest.json"))["decisions"][-1]
    assert decision == {
        "what": "voters",
        "value": "one, three, two",
        "why": "infer.vote; uniform weights; ties by validation score",
    }


def test_only_adapters_answer_the_validation_questions(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = infers(run, monkeypatch, Engine()).asked
    assert Counter(adapter or "base" for adapter, _, _ in asked) == {"base": 6, **dict.fromkeys(ADAPTERS, 10)}
    assert set(asked) == {
        *((adapter, name, False) for adapter in (None, *ADAPTERS) for name in TEST),
        *((adapter, name, False) for adapter in ADAPTERS for name in VALIDATION),
    }


def test_without_a_vote_the_validation_questions_are_not_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = voting(run, vote="")
    asked = infers(plain, monkeypatch, Engine()).asked
    assert not {name for _, name, _ in asked} & set(VALIDATION)
    assert not run.path("infer", "votes.jsonl").exists()
    assert "vote" not in read_json(run.path("infer", "manifest.json"))


def test_votes_are_weighted_by_validation_scores(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    weighted = voting(run, vote="{weights: validation}")
    infers(weighted, monkeypatch, Engine())
    assert held(run)["weights"] == {"one": 0.25, "three": 0.5, "two": 0.75}
    found = votes(run)
    assert (found["most"]["answer"], found["most"]["by"]) == ("B", "majority")
    assert (found["split"]["answer"], found["split"]["by"]) == ("B", "plurality"), "0.75 is half of 1.5, and no more"
    assert (found["some"]["answer"], found["some"]["by"]) == ("B", "majority"), "0.5 to 0.25"
    assert found["some"]["agreement"] == pytest.approx(1 / 3), "of all voters, unweighted"


def test_a_greedy_electorate_is_recorded_with_its_path(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = voting(run, vote="{adapters: greedy}")
    infers(greedy, monkeypatch, Engine())
    record = held(run)
    assert record["chosen"] == "greedy" and record["greedy path"][0] == record["validation"]["two"] == 0.75
    assert set(record["weights"]) == set(record["adapters"])
    assert record["greedy path"][len(record["adapters"]) - 1] == max(record["greedy path"])
    assert all(set(row["votes"]) == set(record["adapters"]) for row in votes(run).values())
    decision = read_json(run.path("infer", "manifest.json"))["decisions"][-1]
    assert decision["why"].startswith("greedy; ")


def test_named_adapters_vote(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    named = voting(run, vote="{adapters: [three, one]}")
    infers(named, monkeypatch, Engine())
    assert held(run)["adapters"] == ["one", "three"] and held(run)["chosen"] == "by name"
    assert answers(run) == {"all": "A", "most": "B", "split": "C", "some": "B", "lone": None, "none": None}


def test_one_voter_is_no_vote(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = voting(run, vote="{adapters: [one]}")
    infers(alone, monkeypatch, Engine())
    assert answers(run) == answers(run, "one")


def test_the_order_of_the_adapters_changes_no_byte_of_the_vote(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infers(run, monkeypatch, Engine())
    turned = json.dumps([{"name": name} for name in reversed(ADAPTERS)])
    other = voting(replace(run, roots=replace(run.roots, runs=tmp_path / "turned")), f"train.adapters={turned}")
    prepare(other)
    infers(other, monkeypatch, Engine())
    assert results(other) == results(run)
    assert held(other) == held(run)


def test_an_adapter_whose_training_failed_has_no_vote(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(run, untrained=("two",))
    made = infers(run, monkeypatch, Engine())
    assert "two" not in {adapter for adapter, _, _ in made.asked}
    assert held(run)["adapters"] == ["one", "three"]
    assert not run.path("infer", "predictions", "two.jsonl").exists()
    some = voting(run, vote="{adapters: [one, two]}")
    infers(some, monkeypatch)
    assert held(run)["adapters"] == ["one"]


# -- votes that cannot be held -------------------------------------------------------------------------------------


@pytest.mark.parametrize("vote", ["{adapters: greedy}", "{weights: validation}"])
def test_a_vote_by_validation_without_validation_samples_is_refused_before_anything_is_asked(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], vote: str
) -> None:
    prepare(run, validation=())
    use_engine(monkeypatch, lambda _: pytest.fail("hours would be lost"))
    assert run_stage(voting(run, vote=vote), "infer", infer.work) == Exit.DATA
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert (
        "there are no validation samples by which to choose or weight adapters; set data.validation_fraction above 0"
        in message
    )
    infers(run, monkeypatch, Engine())
    assert held(run)["validation"] == {} and held(run)["best"] == "one"
    assert answers(run)["split"] == "A", "ties by name"


def test_a_vote_without_a_trained_voter_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare(run, untrained=("one", "two"))
    use_engine(monkeypatch, lambda _: pytest.fail("hours would be lost"))
    assert run_stage(voting(run, vote="{adapters: [one, two]}"), "infer", infer.work) == Exit.DATA
    assert "infer.vote.adapters: none of one, two is trained; name trained adapters" in capfd.readouterr().err


# -- abstentions ---------------------------------------------------------------------------------------------------


def test_abstentions_are_counted_and_empty_in_the_submission(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    infers(run, monkeypatch, Engine())
    found = {row["id"]: row for row in read_jsonl(run.path("infer", "predictions", "vote.jsonl"))}
    assert found["none"]["error"] == "no adapter gave a valid answer" and found["none"]["answer"] is None
    assert found["lone"]["text"] == found["lone"]["answer"] == "C" and found["lone"]["error"] is None
    assert votes(run)["lone"]["votes"] == {"one": None, "three": None, "two": "C"}
    assert votes(run)["lone"]["agreement"] == pytest.approx(1 / 3)
    lines = read_jsonl(run.path("infer", "submission", "vote.jsonl"))
    assert [line["questions"][0]["answer"] for line in lines] == ["A", "B", "B", "B", "C", ""]
    manifest = read_json(run.path("infer", "manifest.json"))
    assert manifest["counts"]["abstained"] == 6 + 1, "of the test questions, and of one to validate on"
    assert manifest["submission"]["vote"] == {"lines": 6, "without answer": 1}


# -- the second round ----------------------------------------------------------------------------------------------


def test_samples_without_a_majority_are_asked_again_with_the_leading_answers(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = voting(run, vote="{second_round: true}")
    made = infers(again, monkeypatch, Engine())
    assert [entry for entry in made.asked if entry[2]] == [(name, "some", True) for name in sorted(ADAPTERS)]
    found = votes(run)
    assert {name: row["round"] for name, row in found.items()} == {**dict.fromkeys(TEST, 1), "some": 2}
    # three options led in `split`: it would be the question that it was
    assert "first_round" not in found["split"]
    assert found["some"]["answer"] == "A" and found["some"]["by"] == "majority"
    assert found["some"]["votes"] == {"one": None, "three": "A", "two": "A"}
    assert found["some"]["first_round"]["by"] == "better voters"
    assert found["some"]["first_round"]["leading"] == ["A", "B"]
    assert held(run)["second round"] == 1
    assert held(run)["decided by"] == {"majority": 4, "better voters": 1, "nobody": 1}
    assert answers(run, "one")["some"] == "A", "an adapter's own answers stay those of the first round"


def test_if_all_abstain_from_the_second_round_the_first_decides(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(adapter: str | None, prompt: Prompt, again: bool) -> str:
        return "No idea." if again else scripted(adapter, prompt, again)

    again = voting(run, vote="{second_round: true}")
    infers(again, monkeypatch, Engine(says=silent))
    assert votes(run)["some"]["round"] == 1 and votes(run)["some"]["answer"] == "B"


def test_without_a_question_to_narrow_there_is_no_second_round(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from stages.tasks import logic_choice

    monkeypatch.setattr(logic_choice, "narrowed_sample", lambda sample, answers: None)
    again = voting(run, vote="{second_round: true}")
    made = infers(again, monkeypatch, Engine())
    assert not any(entry[2] for entry in made.asked)
    assert "no second round: no question can have fewer choices" in capfd.readouterr().err
    assert held(run)["second round"] == 0


def test_a_second_round_starts_a_larger_engine_if_the_running_one_is_too_small(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard has answered the long questions; the engine that the merge starts for the others has no room for them."""
    long = sample("some")
    for message in (long["messages"][1], long["meta"]):
        key = "content" if "content" in message else "problem"
        message[key] = "word " * 80 + message[key]
    others = [sample(name) for name in TEST if name != "some"]
    write_jsonl(run.path("preprocess", "samples", "test.jsonl"), [long, *others])
    describe(run, "preprocess", "samples/test.jsonl", "samples/validation_asked.jsonl", "asked.jsonl")
    measure(run, [long])
    again = voting(run, "infer.chunk_size=1", vote="{second_round: true}")
    use_engine(monkeypatch, lambda _: Engine())
    for index in (0, 6, 12, 18):  # the first chunk of base and of each adapter
        assert run_stage(again, "infer", infer.work, part=Shard(index, 4 * 6 + 3 * 4)) == Exit.DONE
    rooms: list[int] = []

    def start(settings: EngineSettings) -> Engine:
        rooms.append(settings.max_length)
        return Engine()

    use_engine(monkeypatch, start)
    assert run_stage(again, "infer", infer.work) == Exit.DONE
    small, large = rooms
    assert large > small + 60
    assert votes(run)["some"]["round"] == 2 and votes(run)["some"]["answer"] == "A"


# -- kills, changes, shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("life", [9, 19])
def test_kills_lose_no_answer_and_the_vote_is_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, life: int
) -> None:
    again = voting(run, vote="{second_round: true, weights: validation}")
    whole = replace(again, roots=replace(run.roots, runs=tmp_path / "whole"))
    prepare(whole)
    everything = infers(whole, monkeypatch, Engine()).asked
    asked: list[Any] = []
    for _ in range(100):
        made = Engine(life)
        use_engine(monkeypatch, lambda _, made=made: made)
        code = run_stage(again, "infer", infer.work)
        asked += made.asked
        assert made.closed
        if code == Exit.DONE:
            break
        assert not run.path("infer", "manifest.json").exists()
    assert asked == everything, "each once, in the same order"
    assert results(again) == results(whole)
    assert held(again) == held(whole)


def test_another_way_to_vote_asks_nothing_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    infers(run, monkeypatch, Engine())
    before = snapshot(run.path("infer", "predictions"))
    for vote in ("{weights: validation}", "{adapters: greedy}", "{adapters: [one, two]}", ""):
        other = voting(run, vote=vote)
        infers(other, monkeypatch)
        now = snapshot(run.path("infer", "predictions"))
        assert {name: now[name] for name in now if name != "vote.jsonl"} == {
            name: before[name] for name in before if name != "vote.jsonl"
        }
    assert not run.path("infer", "predictions", "vote.jsonl").exists(), "no vote is left of the earlier ones"
    infers(run, monkeypatch)
    assert snapshot(run.path("infer", "predictions")) == before
    again = voting(run, vote="{second_round: true}")
    assert {name for _, name, _ in infers(again, monkeypatch, Engine()).asked} == {"some"}, "only the second round"
    infers(run, monkeypatch)
    infers(again, monkeypatch)


def test_shards_answer_and_the_merge_votes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weighted = voting(run, vote="{weights: validation}")
    whole = replace(weighted, roots=replace(run.roots, runs=tmp_path / "whole"))
    prepare(whole)
    everything = infers(whole, monkeypatch, Engine()).asked
    asked: list[Any] = []
    for index in range(3):
        asked += infers(weighted, monkeypatch, Engine(), Shard(index, 3)).asked
        assert not (weighted.stage_folder("infer", Shard(index, 3)) / "votes.jsonl").exists()
    assert sorted(asked, key=str) == sorted(everything, key=str)
    infers(weighted, monkeypatch)
    assert results(weighted) == results(whole)
    assert held(weighted) == held(whole)


def test_a_merge_holds_the_second_round_itself(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = voting(run, vote="{second_round: true}")
    whole = replace(again, roots=replace(run.roots, runs=tmp_path / "whole"))
    prepare(whole)
    infers(whole, monkeypatch, Engine())
    for index in range(2):
        infers(again, monkeypatch, Engine(), Shard(index, 2))
    asked = infers(again, monkeypatch, Engine()).asked
    assert {(name, fewer) for _, name, fewer in asked} == {("some", True)}
    assert results(again) == results(whole)
