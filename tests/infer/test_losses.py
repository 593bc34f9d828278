"""infer's losses of given answers: whose, on which tokens, resumed to the same bytes, in shards and merged."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import Exit
from stages.contract.files import digest_of, read_json, read_jsonl
from stages.contract.part import Part, Shard
from stages.contract.recipe import Recipe
from stages.contract.records import is_asked
from stages.contract.run import Run
from stages.engines.engine import Completion, Done, DoneLoss, GivenAnswer
from stages.host.runner import run_stage
from stages.infer import stage as infer
from stages.models.rendering import Prompt, Renderer
from tests.conftest import snapshot
from tests.infer.conftest import ask, describe, sample
from tests.infer.engines import use_engine

Loss = tuple[str, str | None]
"""A sample's id and the model whose loss of it was computed."""


class CountingEngine:
    """Its loss is the number of tokens that count, and 100 more for an adapter. Fails for samples in `fails`, and for
    everything once `budget` losses are computed."""

    def __init__(self, asked: list[Loss], continuous: bool, budget: float, fails: Sequence[str]) -> None:
        self.continuous, self._asked, self._budget, self._fails = continuous, asked, budget, fails

    def generate(self, prompts: list[Prompt], adapter: str | None, done: Done | None = None) -> list[Completion]:
        found = [Completion(f"answer {prompt.id}", 2, "stop") for prompt in prompts]
        for place, completion in enumerate(found):
            if done is not None:
                done(place, completion)
        return found

    def losses(self, answers: list[GivenAnswer], adapter: str | None, done: DoneLoss | None = None) -> list[float]:
        found = []
        for place, answer in enumerate(answers):
            if answer.sample_id in self._fails or len(self._asked) >= self._budget:
                raise RuntimeError(f"cannot read {answer.sample_id}")
            self._asked.append((answer.sample_id, adapter))
            found.append(answer.learnt + (0.5 if adapter is None else 0.25))
            if done is not None:
                done(place, found[-1])
        return found

    def close(self) -> None:
        return None


def with_losses(run: Run, **changes: Any) -> Run:
    recipe: Recipe = run.recipe
    return replace(
        run, recipe=recipe.model_copy(update={"infer": recipe.infer.model_copy(update={"losses": True, **changes})})
    )


def infers(
    run: Run,
    patch: pytest.MonkeyPatch,
    asked: list[Loss] | None = None,
    part: Part = None,
    continuous: bool = False,
    budget: float = math.inf,
    fails: Sequence[str] = (),
) -> Exit:
    use_engine(patch, lambda _: CountingEngine([] if asked is None else asked, continuous, budget, fails))
    return run_stage(run, "infer", infer.work, part=part)


def losses(run: Run, name: str) -> list[dict[str, Any]]:
    return read_jsonl(run.path("infer", "losses", f"{name}.jsonl"))


def chat(name: str, *turns: str, answer: str | None = None, **more: Any) -> dict[str, Any]:
    """A test conversation, with its answer in `meta`, as the task chat writes it."""
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    meta = {"group": name} if answer is None else {"group": name, "answer": {"role": "assistant", "content": answer}}
    references = [] if answer is None else [answer]
    return {"id": name, "messages": messages, "images": [], "references": references, "meta": meta, **more}


def test_every_model_has_the_losses_of_all_samples_on_the_same_tokens(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_losses(run)
    asked: list[Loss] = []
    assert infers(run, monkeypatch, asked) == Exit.DONE
    assert asked[0][1] is None and len(asked) == 12
    base, tuned = losses(run, "base"), losses(run, "tuned")
    assert [row["id"] for row in base] == [row["id"] for row in tuned] == [f"s{number}" for number in range(6)]
    assert [row["tokens"] for row in base] == [row["tokens"] for row in tuned] == [2] * 6, "x and the end token"
    assert {row["loss"] for row in base} == {2.5} and {row["loss"] for row in tuned} == {2.25}
    manifest = read_json(run.path("infer", "manifest.json"))
    assert manifest["counts"]["losses"] == 12 and "without a loss" not in manifest["counts"]
    assert {"losses/base.jsonl", "losses/tuned.jsonl", "predictions/base.jsonl"} <= set(manifest["outputs"])


def test_without_the_setting_there_are_none_and_the_key_is_as_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert infers(run, monkeypatch) == Exit.DONE
    assert not run.path("infer", "losses").exists()
    values = run.recipe.model_dump(mode="json", exclude={"infer": {"losses"}})
    assert run.recipe.digest("infer") == digest_of({"infer": values["infer"]})
    assert run.recipe.digest("infer") != with_losses(run).recipe.digest("infer")


def test_all_answers_of_a_conversation_count_as_in_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_losses(run, max_length=128)
    given = chat("c", "部件3在哪里？", "在第二页。", "为何？", answer="图三写着。")
    ask(run, [given])
    assert infers(run, monkeypatch) == Exit.DONE
    (row,) = losses(run, "base")
    renderer = Renderer(run.roots.models / "random-llama")
    (whole,) = renderer.training_sequences([*given["messages"], given["meta"]["answer"]])
    assert row["tokens"] == sum(label >= 0 for label in whole.labels)
    words = renderer.tokenizer.encode("在第二页。<|im_end|>") + renderer.tokenizer.encode("图三写着。<|im_end|>")
    assert [label for label in whole.labels if label >= 0] == words


def changed(run: Run, **train: Any) -> Run:
    """A run that was trained with other settings."""
    other = replace(run, recipe=run.recipe.model_copy(update={"train": run.recipe.train.model_copy(update=train)}))
    describe(other, "train", "adapters/tuned/adapter_config.json")
    return other


def test_only_the_last_answer_counts_if_training_learns_only_that(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given = chat("c", "部件3在哪里？", "在第二页。", "为何？", answer="图三写着。")
    tokenizer = Renderer(run.roots.models / "random-llama").tokenizer
    last = changed(with_losses(run, max_length=128), learn="last")
    ask(last, [given])
    assert infers(last, monkeypatch) == Exit.DONE
    assert losses(last, "base")[0]["tokens"] == len(tokenizer.encode("图三写着。<|im_end|>"))


def test_a_conversation_that_is_too_long_is_cut_where_training_cuts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    long = chat("long", "word " * 40, "An answer that is cut off.", "And?", answer="No.")
    short = changed(with_losses(run, max_length=64), too_long="cut")
    ask(short, [long])
    assert infers(short, monkeypatch) == Exit.DONE
    tokenizer = Renderer(run.roots.models / "random-llama").tokenizer
    assert losses(short, "base")[0]["tokens"] == len(tokenizer.encode("No.<|im_end|>"))


def test_tool_calls_count_as_the_template_writes_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template here writes no tools, so that only the reason is left; an answer in words beside it has a loss."""
    run = with_losses(run, max_length=128)
    call = {"type": "function", "function": {"name": "find", "arguments": {"part": 3}}}
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    calls = chat("calls", "Find it.", tools=tools)
    calls["meta"]["answer"] = {"role": "assistant", "content": "", "tool_calls": [call]}
    ask(run, [calls, chat("words", "Find it.", answer="No.")])
    assert infers(run, monkeypatch) == Exit.DONE
    found, words = losses(run, "base")
    assert "chat template" in found.get("error", "") and "loss" in words


def test_samples_without_anything_to_ask_have_losses_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_losses(run)
    alone = chat("alone", answer="It begins with an answer.")
    asked = chat("asked", "Who?", answer="I.")
    unknown = chat("unknown", "Who?")
    ask(run, [alone, asked, unknown])
    assert not is_asked(alone) and is_asked(asked)  # type: ignore[arg-type]
    assert infers(run, monkeypatch) == Exit.DONE
    predictions = read_jsonl(run.path("infer", "predictions", "tuned.jsonl"))
    assert [row["id"] for row in predictions] == ["asked", "unknown"]
    found = losses(run, "tuned")
    assert [row["id"] for row in found] == ["alone", "asked", "unknown"]
    assert [("loss" in row, row.get("error")) for row in found] == [
        (True, None),
        (True, None),
        (False, "has no answer whose loss could be computed"),
    ]
    manifest = read_json(run.path("infer", "manifest.json"))
    assert (manifest["counts"]["losses"], manifest["counts"]["without a loss"]) == (4, 2)


def test_a_test_set_that_is_only_scored_by_loss(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_losses(run, max_length=256)
    texts = {f"t{number}": "Plain text. 纯文本。" * number for number in range(1, 8)}
    ask(run, [chat(name, text=text) for name, text in texts.items()])
    assert infers(run, monkeypatch) == Exit.DONE
    assert read_jsonl(run.path("infer", "predictions", "base.jsonl")) == []
    tokenizer = Renderer(run.roots.models / "random-llama").tokenizer
    for row in losses(run, "base"):
        # all but the first, which nothing predicts; and the end token
        assert row["tokens"] == len(tokenizer.encode(texts[row["id"]]))


def test_a_conversation_that_is_too_long_is_counted_with_the_reason(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = with_losses(run)
    ask(run, [sample("long", "word " * 100), sample("short", "?")])
    assert infers(run, monkeypatch) == Exit.DONE
    long, short = losses(run, "base")
    assert long["error"].startswith("infer.max_length: 64 is too short for a conversation of 1")
    assert "loss" in short
    assert "infer: 1 test samples have no loss, such as long: infer.max_length: 64 is too" in capfd.readouterr().err


@pytest.mark.parametrize("continuous", [True, False])
def test_a_killed_start_resumes_with_equal_files(run: Run, monkeypatch: pytest.MonkeyPatch, continuous: bool) -> None:
    run = with_losses(run)
    whole = replace(run, name="whole")
    shutil.copytree(run.folder, whole.folder)
    assert infers(whole, monkeypatch, continuous=continuous) == Exit.DONE
    asked: list[Loss] = []
    assert infers(run, monkeypatch, asked, continuous=continuous, budget=4) == Exit.CRASHED
    assert not run.path("infer", "losses").exists()
    again: list[Loss] = []
    assert infers(run, monkeypatch, again, continuous=continuous) == Exit.DONE
    everything = [(f"s{number}", model) for model in (None, "tuned") for number in range(6)]
    # one that pads computes a chunk again as a whole, so that batches stay as they were
    assert again == (everything[4:] if continuous else everything[3:])
    assert snapshot(run.path("infer", "losses")) == snapshot(whole.path("infer", "losses"))


def test_a_sample_that_fails_is_counted_and_a_broken_engine_ends_the_stage(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_losses(run)
    everything = [f"s{number}" for number in range(6)]
    assert infers(run, monkeypatch, fails=everything) == Exit.CRASHED
    assert infers(run, monkeypatch, fails=["s1"]) == Exit.DONE
    found = losses(run, "base")
    assert found[1] == {"id": "s1", "error": "RuntimeError: cannot read s1"}
    assert all("loss" in row for row in found if row["id"] != "s1")


def test_shards_share_the_chunks_and_the_merge_has_the_bytes_of_one_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_losses(run)
    whole = replace(run, name="whole")
    shutil.copytree(run.folder, whole.folder)
    assert infers(whole, monkeypatch) == Exit.DONE
    shared: list[Loss] = []
    for index in range(3):
        assert infers(run, monkeypatch, shared, Shard(index, 3)) == Exit.DONE
    assert len(shared) == len(set(shared)) == 12
    nothing: list[Loss] = []
    assert infers(run, monkeypatch, nothing, budget=0) == Exit.DONE
    assert nothing == []
    assert snapshot(run.path("infer", "losses")) == snapshot(whole.path("infer", "losses"))
    assert snapshot(run.path("infer", "predictions")) == snapshot(whole.path("infer", "predictions"))


@pytest.mark.long
def test_the_real_engine_resumes_merges_and_shares_with_equal_files(run: Run, small_models: Path) -> None:
    """In shards, merged into the weights, and beside another adapter: the same losses of the same adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(small_models / "random-llama")
    adapter = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    adapter.save_pretrained(run.path("train", "adapters", "tuned"))
    describe(run, "train", "adapters/tuned/adapter_config.json")
    run = with_losses(run)
    others = {name: replace(run, name=name) for name in ("whole", "merged")}
    for other in others.values():
        shutil.copytree(run.folder, other.folder)
    for index in range(2):
        assert run_stage(run, "infer", infer.work, part=Shard(index, 2)) == Exit.DONE
    merged = with_losses(others["merged"], merged=True)
    for each in (run, others["whole"], merged):
        assert run_stage(each, "infer", infer.work) == Exit.DONE
    assert snapshot(run.path("infer", "losses")) == snapshot(others["whole"].path("infer", "losses"))
    for name in ("base", "tuned"):
        plain, other = ([row["loss"] for row in losses(each, name)] for each in (run, merged))
        assert plain == pytest.approx(other, rel=1e-4)
    assert losses(run, "base") != losses(run, "tuned")
