"""infer: every test sample answered by the base model and by every adapter, in one start of one engine."""

import time
from collections import Counter
from pathlib import Path

from stages.contract.files import JsonlJournal, machine_error, read_jsonl, write_jsonl
from stages.contract.records import Prediction, Sample, failed_prediction
from stages.contract.stage import Stage
from stages.hardware.probe import probe
from stages.hardware.targets import load_targets, target_of
from stages.infer.engine import Engine, EngineSettings, Prompt, load_tokenizer, render
from stages.tasks import load_task


def work(stage: Stage) -> None:
    """The stage's work, for `run_stage`."""
    recipe = stage.run.recipe
    samples: list[Sample] = read_jsonl(stage.run.path("preprocess", "samples", "test.jsonl"))  # type: ignore[assignment]
    names: list[str | None] = [None, *(adapter.name for adapter in recipe.train.adapters)]
    journals = {name: JsonlJournal(stage.path("partial", f"{name or 'base'}.jsonl")) for name in names}
    model = stage.run.model(recipe.model.path, "model.path")
    missing = {name: _unanswered(samples, journal) for name, journal in journals.items()}
    if any(missing.values()):
        _answer(stage, model, samples, missing, journals)
    for name, journal in journals.items():
        journal.close()
        by_id = {prediction["id"]: prediction for prediction in journal.records}
        output = f"predictions/{name or 'base'}.jsonl"
        stage.outputs[output] = write_jsonl(stage.path(output), [by_id[sample["id"]] for sample in samples])
        outcomes = Counter("failed" if prediction["error"] else "answered" for prediction in by_id.values())
        stage.counts.update(outcomes)


def _unanswered(samples: list[Sample], journal: JsonlJournal) -> list[Sample]:
    answered = {prediction["id"] for prediction in journal.records}
    return [sample for sample in samples if sample["id"] not in answered]


def _answer(
    stage: Stage,
    model: Path,
    samples: list[Sample],
    missing: dict[str | None, list[Sample]],
    journals: dict[str | None, JsonlJournal],
) -> None:
    """Answer what is missing, chunk by chunk, the base first and then adapter by adapter.

    The chunks are cut from all samples, whatever is missing, so that a restart batches the same samples together:
    sums in another order can turn a greedy answer at a near tie.
    """
    recipe = stage.run.recipe
    tokenizer = load_tokenizer(model)
    prompts = {sample["id"]: render(tokenizer, sample) for sample in samples if "error" not in sample["meta"]}
    room = recipe.infer.max_length - recipe.infer.max_new_tokens
    for sample in samples:
        if sample["id"] in prompts and len(prompts[sample["id"]].tokens) > room:
            length = len(prompts.pop(sample["id"]).tokens)
            sample["meta"]["error"] = f"prompt of {length} tokens leaves no room for an answer in infer.max_length"
    longest = max((len(prompt.tokens) for prompt in prompts.values()), default=1)
    engine = _start_engine(stage, model, longest + recipe.infer.max_new_tokens)
    try:
        for name, journal in journals.items():
            wanted = {sample["id"] for sample in missing[name]}
            size = recipe.infer.chunk_size
            for start in range(0, len(samples), size):
                chunk = samples[start : start + size]
                if not any(sample["id"] in wanted for sample in chunk):
                    continue
                before = time.monotonic()
                new = _answer_chunk(stage, engine, name, chunk, prompts)
                tokens = sum(prediction["completion_tokens"] for prediction in new)
                journal.append(prediction for prediction in new if prediction["id"] in wanted)  # type: ignore[misc]
                rate = round(tokens / (time.monotonic() - before), 1)
                who, done = name or "base", min(start + size, len(samples))
                stage.events.progress(f"answer with {who}", done, len(samples), "samples", tokens_per_second=rate)
                stage.stop.check()
    finally:
        engine.close()


def _start_engine(stage: Stage, model: Path, max_length: int) -> Engine:
    recipe = stage.run.recipe
    target = target_of(probe(), load_targets())
    settings = EngineSettings(
        model=model,
        adapters={a.name: stage.run.path("train", "adapters", a.name) for a in recipe.train.adapters},
        dtype=target.dtype,
        max_new_tokens=recipe.infer.max_new_tokens,
        batch_size=recipe.infer.batch_size,
        max_length=max_length,
        seed=recipe.seed,
    )
    stage.decide("engine", recipe.infer.engine, f"infer.engine; {target.dtype} on target {target.name}")
    before = time.monotonic()
    engine: Engine
    if recipe.infer.engine == "vllm":
        from stages.infer.vllm_engine import VllmEngine

        engine = VllmEngine(settings)
    else:
        from stages.infer.transformers_engine import TransformersEngine

        engine = TransformersEngine(settings)
    stage.facts["engine_start_seconds"] = round(time.monotonic() - before, 2)
    return engine


def _answer_chunk(
    stage: Stage, engine: Engine, adapter: str | None, chunk: list[Sample], prompts: dict[str, Prompt]
) -> list[Prediction]:
    """Predictions for a chunk. If the engine fails on it, its samples are tried one by one and those that fail again
    are recorded as failed; but what is the machine's or the engine's fault is raised, and no sample bears it."""
    task = load_task(stage.run.recipe.task)
    able = [prompts[sample["id"]] for sample in chunk if sample["id"] in prompts]
    found: dict[str, Prediction] = {
        sample["id"]: failed_prediction(sample["id"], sample["meta"]["error"])
        for sample in chunk
        if sample["id"] not in prompts
    }
    try:
        completions = engine.generate(able, adapter) if able else []
    except Exception as error:
        _raise_if_not_the_samples_fault(stage, error)
        if len(able) == 1:
            prompt = able[0]
            print(f"sample {prompt.id} failed: {error!r}")  # into the log
            found[prompt.id] = failed_prediction(prompt.id, f"{type(error).__name__}: {error}", len(prompt.tokens))
            if not _answers_another(engine, adapter, prompt, prompts):
                raise
            return [found[sample["id"]] for sample in chunk]
        return [_answer_chunk(stage, engine, adapter, [sample], prompts)[0] for sample in chunk]
    for prompt, completion in zip(able, completions, strict=True):
        found[prompt.id] = {
            "id": prompt.id,
            "answer": task.read_answer(completion.text),
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(prompt.tokens),
            "completion_tokens": completion.tokens,
            "error": None,
        }
    return [found[sample["id"]] for sample in chunk]


def _raise_if_not_the_samples_fault(stage: Stage, error: Exception) -> None:
    stage.stop.check()  # a Ctrl-C reaches an engine's own processes too
    explained = machine_error(error)
    if explained is not None:
        raise explained from error


def _answers_another(engine: Engine, adapter: str | None, failed: Prompt, prompts: dict[str, Prompt]) -> bool:
    """Whether the engine still answers something: the shortest other prompt."""
    others = sorted((p for p in prompts.values() if p.id != failed.id), key=lambda p: len(p.tokens))
    for prompt in others[:3]:
        try:
            engine.generate([prompt], adapter)
        except Exception as error:  # noqa: BLE001 - any failure means: not this one
            print(f"after {failed.id}, {prompt.id} failed too: {error!r}")
        else:
            return True
    return False
