"""Inference in shards: by chunk, merged to the bytes of an unsharded run, without an engine."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import Exit
from stages.contract.files import read_json, read_jsonl
from stages.contract.part import Shard
from stages.contract.run import Run
from stages.engines import weights
from stages.engines.engine import Completion
from stages.host.runner import run_stage
from stages.infer import stage as infer
from stages.models.rendering import Prompt
from tests.conftest import snapshot
from tests.infer.conftest import describe
from tests.infer.test_stage import Answer, answers, echo

Asked = list[tuple[str | None, str]]


def noting(asked: Asked) -> Answer:
    def answer(prompts: list[Prompt], adapter: str | None) -> list[Completion]:
        asked.extend((adapter, prompt.id) for prompt in prompts)
        return echo(prompts, adapter)

    return answer


def no_engine(prompts: list[Prompt], adapter: str | None) -> list[Completion]:
    raise AssertionError("there is nothing to ask")


def unsharded(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of the run, done in one."""
    other = replace(run, name="whole")
    shutil.copytree(run.folder, other.folder)
    assert answers(other, monkeypatch, echo) == Exit.DONE
    return other


def predictions(run: Run) -> dict[str, bytes]:
    return snapshot(run.path("infer", "predictions"))


def manifest(run: Run, *folder: str) -> dict[str, Any]:
    return dict(read_json(run.folder.joinpath(*(folder or ("infer",)), "manifest.json")))


def test_shards_share_the_chunks_and_the_merge_gives_the_bytes_of_one_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Asked] = [[], [], []]
    for index in (2, 0, 1):
        assert answers(run, monkeypatch, noting(asked[index]), Shard(index, 3)) == Exit.DONE
    chunks = [[(name, f"s{i}") for i in half] for name in (None, "tuned") for half in (range(3), range(3, 6))]
    assert asked == [chunks[0] + chunks[3], chunks[1], chunks[2]]
    assert not run.path("infer").exists()

    with monkeypatch.context() as patch:
        patch.setattr(weights, "probe", lambda: pytest.fail("no GPU is needed"))
        assert answers(run, monkeypatch, no_engine) == Exit.DONE
    whole = unsharded(run, monkeypatch)
    assert predictions(run) == predictions(whole)
    for part in ("outputs", "counts", "skipped", "key"):
        assert manifest(run)[part] == manifest(whole)[part]
    taken, *of_shards = manifest(run)["decisions"]
    assert (taken["what"], taken["value"]) == ("shards taken over", "0/3, 1/3, 2/3")
    assert [(made["what"], made["why"][-3:]) for made in of_shards] == [
        (what, f"{index}/3") for index in range(3) for what in ("engine", "longest")
    ]


def test_a_killed_shard_resumes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first: Asked = []

    def killed_after_a_chunk(prompts: list[Prompt], adapter: str | None) -> list[Completion]:
        if first:
            raise RuntimeError("killed")
        return noting(first)(prompts, adapter)

    assert answers(run, monkeypatch, killed_after_a_chunk, Shard(0, 2)) == Exit.CRASHED
    again: Asked = []
    assert answers(run, monkeypatch, noting(again), Shard(0, 2)) == Exit.DONE
    assert first == [(None, f"s{i}") for i in range(3)]
    assert again == [("tuned", f"s{i}") for i in range(3)]
    assert answers(run, monkeypatch, no_engine, Shard(0, 2)) == Exit.DONE, "done means skip"


def test_the_merge_answers_the_chunks_that_no_shard_answered(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers(run, monkeypatch, echo, Shard(0, 4)) == Exit.DONE
    assert answers(run, monkeypatch, echo, Shard(3, 4)) == Exit.DONE
    rest: Asked = []
    assert answers(run, monkeypatch, noting(rest)) == Exit.DONE
    assert rest == [(None, f"s{i}") for i in range(3, 6)] + [("tuned", f"s{i}") for i in range(3)]
    assert predictions(run) == predictions(unsharded(run, monkeypatch))


def test_a_stale_shard_is_ignored(run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert answers(run, monkeypatch, echo, Shard(0, 2)) == Exit.DONE
    samples = run.path("preprocess", "samples", "test.jsonl")
    samples.write_text(samples.read_text().replace("word", "other"))
    describe(run, "preprocess", "samples/test.jsonl", "asked.jsonl")
    asked: Asked = []
    assert answers(run, monkeypatch, noting(asked)) == Exit.DONE
    assert len(asked) == 12
    assert "ignores shards 0/2, which are unfinished or have other inputs or another recipe" in capfd.readouterr().err
    assert not any(made["what"] == "shards taken over" for made in manifest(run)["decisions"])


def test_a_surplus_shard_is_done_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert answers(run, monkeypatch, no_engine, Shard(4, 5)) == Exit.DONE
    assert "shard 4/5 has nothing to do, as there are only 4 chunks of samples" in capfd.readouterr().err
    assert answers(run, monkeypatch, echo) == Exit.DONE
    assert len(read_jsonl(run.path("infer", "predictions", "base.jsonl"))) == 6


def test_failed_samples_are_counted_as_in_one_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_on_s1(prompts: list[Prompt], adapter: str | None) -> list[Completion]:
        if any(prompt.id == "s1" for prompt in prompts):
            raise ValueError("bad sample")
        return echo(prompts, adapter)

    for index in range(2):
        assert answers(run, monkeypatch, fails_on_s1, Shard(index, 2)) == Exit.DONE
    assert manifest(run, "shards", "infer", "0-of-2")["counts"] == {"answered": 4, "failed": 2}
    assert answers(run, monkeypatch, no_engine) == Exit.DONE
    assert manifest(run)["counts"] == {"answered": 10, "failed": 2}


@pytest.mark.long
def test_the_real_engine_gives_the_same_bytes_in_shards(run: Run, small_models: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(small_models / "random-llama")
    adapter = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    adapter.save_pretrained(run.path("train", "adapters", "tuned"))
    describe(run, "train", "adapters/tuned/adapter_config.json")
    whole = replace(run, name="whole")
    shutil.copytree(run.folder, whole.folder)
    for index in range(3):
        assert run_stage(run, "infer", infer.work, part=Shard(index, 3)) == Exit.DONE
    for each in (run, whole):
        assert run_stage(each, "infer", infer.work) == Exit.DONE
    assert predictions(run) == predictions(whole)
    base_answers, tuned_answers = predictions(run).values()
    assert base_answers != tuned_answers
