"""infer: every test sample answered by the base model and by every adapter, in one start of one engine."""

import time
from collections import Counter
from pathlib import Path

from stages.contract.files import JsonlJournal, machine_error, read_jsonl, write_jsonl
from stages.contract.records import Prediction, Sample, failed_prediction
from stages.contract.stage import Stage
from stages.engines.engine import Engine, EngineSettings, Prompt, load_tokenizer, render
from stages.hardware.probe import probe
from stages.hardware.targets import load_targets, working_target
from stages.tasks import load_task


def work(stage: Stage) -> None:
    """The stage's work, for `run_stage`."""
    recipe = stage.run.recipe
    samples: list[Sample] = read_jsonl(stage.run.path("preprocess", "samples", "test.jsonl"))  # type: ignore[assignment]
    names: list[str | None] = [None, *(adapter.name for adapter in recipe.train.adapters)]
    chunks = _chunks(names, samples, recipe.infer.chunk_size)
    if stage.nothing_to_do(len(chunks), "chunks of samples"):
        return
    journals = {name: JsonlJournal(stage.path("partial", f"{name or 'base'}.jsonl")) for name in names}
    model = stage.run.model(recipe.model.path, "model.path")
    for name, journal in journals.items():
        _take_over(stage, name, journal)
    mine = [chunk for number, chunk in enumerate(chunks) if stage.has(number)]
    answered = {name: {prediction["id"] for prediction in journal.records} for name, journal in journals.items()}
    if any(sample["id"] not in answered[name] for name, members in mine for sample in members):
        _answer(stage, model, samples, mine, journals, answered)
    for name, journal in journals.items():
        journal.close()
        by_id = {prediction["id"]: prediction for prediction in journal.records}
        wanted = [sample["id"] for who, members in mine if who == name for sample in members]
        output = f"predictions/{name or 'base'}.jsonl"
        stage.outputs[output] = write_jsonl(stage.path(output), [by_id[sample_id] for sample_id in wanted])
        outcomes = Counter("failed" if by_id[sample_id]["error"] else "answered" for sample_id in wanted)
        stage.counts.update(outcomes)


def _chunks(names: list[str | None], samples: list[Sample], size: int) -> list[tuple[str | None, list[Sample]]]:
    """What is submitted at once: base first, then adapter by adapter.

    The chunks are cut from all samples, whatever is missing or another shard's, so that the same samples are always
    batched together: sums in another order can turn a greedy answer at a near tie.
    """
    return [(name, samples[start : start + size]) for name in names for start in range(0, len(samples), size)]


def _take_over(stage: Stage, name: str | None, journal: JsonlJournal) -> None:
    """Put the answers of finished shards beside those that an earlier start found."""
    known = {prediction["id"] for prediction in journal.records}
    for folder in stage.finished_shards:
        path = folder / "predictions" / f"{name or 'base'}.jsonl"
        new = [row for row in read_jsonl(path) if row["id"] not in known] if path.is_file() else []  # surplus: none
        journal.append(new)
        known |= {prediction["id"] for prediction in new}


def _answer(
    stage: Stage,
    model: Path,
    samples: list[Sample],
    chunks: list[tuple[str | None, list[Sample]]],
    journals: dict[str | None, JsonlJournal],
    answered: dict[str | None, set[str]],
) -> None:
    """Answer those samples of the chunks that are not answered yet."""
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
        done, total = Counter[str | None](), Counter[str | None]()
        for name, chunk in chunks:
            total[name] += len(chunk)
        for name, chunk in chunks:
            done[name] += len(chunk)
            wanted = {sample["id"] for sample in chunk} - answered[name]
            if not wanted:
                continue
            before = time.monotonic()
            new = _answer_chunk(stage, engine, name, chunk, prompts)
            tokens = sum(prediction["completion_tokens"] for prediction in new)
            journals[name].append(prediction for prediction in new if prediction["id"] in wanted)  # type: ignore[misc]
            rate = round(tokens / (time.monotonic() - before), 1)
            activity = f"answer with {name or 'base'}"
            stage.events.progress(activity, done[name], total[name], "samples", tokens_per_second=rate)
            stage.stop.check()
    finally:
        engine.close()


def _start_engine(stage: Stage, model: Path, max_length: int) -> Engine:
    recipe = stage.run.recipe
    target = working_target(probe(), load_targets())
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
        from stages.engines.vllm_engine import VllmEngine

        engine = VllmEngine(settings)
    else:
        from stages.engines.transformers_engine import TransformersEngine

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
