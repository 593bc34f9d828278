"""infer: every test sample answered by the base model and by every adapter, in one start of one engine.

With `infer.ablate` the samples are answered again without each of some components of the task; with `infer.merged`
each adapter's weights are merged into a copy of the base and served by an engine of their own.
"""

import time
from collections import Counter
from pathlib import Path

from stages.contract.errors import DataError
from stages.contract.files import read_jsonl, remove, write_jsonl
from stages.contract.records import Prediction, Sample
from stages.contract.stage import Stage
from stages.engines.engine import Engine, EngineSettings
from stages.hardware.probe import probe
from stages.hardware.serve import plan_serving
from stages.hardware.shape import UnknownShapeError, read_shape
from stages.hardware.targets import Target, load_targets, working_target
from stages.infer.asking import Asking, Variant
from stages.tasks import load_task

Chunks = dict[Variant, list[list[Sample]]]


def work(stage: Stage) -> None:
    """The stage's work, for `run_stage`."""
    recipe = stage.run.recipe
    samples: list[Sample] = read_jsonl(stage.run.path("preprocess", "samples", "test.jsonl"))  # type: ignore[assignment]
    every = variants_of(stage)
    pieces = _pieces(every, samples, recipe.infer.chunk_size)
    if stage.nothing_to_do(len(pieces), "chunks of samples"):
        return
    model = stage.run.model(recipe.model.path, "model.path")
    known = {variant: _taken_over(stage, variant) for variant in every}
    chunks: Chunks = {variant: [] for variant in every}
    for number, (variant, members) in enumerate(pieces):
        if stage.has(number) and any(sample["id"] not in known[variant] for sample in members):
            chunks[variant].append(members)
    asking = Asking(stage, model, every)
    try:
        _answer(stage, asking, model, chunks)
        for variant in every:
            wanted = [s for n, (who, members) in enumerate(pieces) if who == variant and stage.has(n) for s in members]
            found = [known[variant].get(s["id"]) or asking.prediction(variant, s) for s in wanted]
            _write(stage, variant, found)
            mine = [sample for sample in wanted if sample["id"] not in known[variant]]
            if mine:
                took = stage.facts.setdefault("answering", {})
                took[variant.name] = {"samples": len(mine), "seconds": asking.seconds(variant, mine)}
    finally:
        asking.close()
    remove(stage.path("merged"))


def variants_of(stage: Stage) -> list[Variant]:
    """Base, the adapters, and the first adapter (or base) without each component that is to be left out.

    Without the adapter it is base, which is answered anyway.
    """
    names = [adapter.name for adapter in stage.run.recipe.train.adapters]
    left_out = [name for name in stage.run.recipe.infer.ablate if name != "adapter"]
    return [Variant(None), *map(Variant, names), *(Variant(names[0], without) for without in left_out)]


def _pieces(variants: list[Variant], samples: list[Sample], size: int) -> list[tuple[Variant, list[Sample]]]:
    """What is submitted at once: base first, then adapter by adapter.

    The chunks are cut from all samples, whatever is missing or another shard's, so that the same samples are always
    batched together: sums in another order can turn a greedy answer at a near tie.
    """
    return [(variant, samples[start : start + size]) for variant in variants for start in range(0, len(samples), size)]


def _taken_over(stage: Stage, variant: Variant) -> dict[str, Prediction]:
    """The predictions of finished shards, by sample."""
    paths = [folder / variant.output for folder in stage.finished_shards]
    rows = [row for path in paths if path.is_file() for row in read_jsonl(path)]  # a shard too many has none
    return {row["id"]: row for row in rows}  # type: ignore[misc]


def _write(stage: Stage, variant: Variant, predictions: list[Prediction]) -> None:
    stage.outputs[variant.output] = write_jsonl(stage.path(variant.output), predictions)  # type: ignore[arg-type]
    outcomes = Counter("failed" if prediction["error"] else "answered" for prediction in predictions)
    stage.counts.update(outcomes)
    if stage.shard is None and variant.without is None:
        _submit(stage, variant, {prediction["id"]: prediction for prediction in predictions})


def _submit(stage: Stage, variant: Variant, predictions: dict[str, Prediction]) -> None:
    """Write the submission, one line for each row that was asked, in order; those without an answer are told.

    Raises DataError where its lines would not be those of the questions: that is a defect, not a thing to hand in.
    """
    task = load_task(stage.run.recipe.task)
    rows = read_jsonl(stage.run.path("preprocess", "asked.jsonl"))
    lines = [task.submission(row, predictions.get(row["id"])) for row in rows]
    surplus = set(predictions) - {row["id"] for row in rows}
    if surplus:
        raise DataError(f"{variant.submission}: no line is asked for {', '.join(sorted(surplus)[:3])}; run preprocess")
    path = stage.path(variant.submission)
    stage.outputs[variant.submission] = write_jsonl(path, lines)
    written = [int(line["idx"]) for line in read_jsonl(path)]
    if written != sorted({int(row["idx"]) for row in rows}):
        raise DataError(f"{path}: {len(written)} lines for {len(rows)} questions, one twice or in another order")
    answered = {name for name, prediction in predictions.items() if prediction["answer"]}
    empty = sum(row["id"] not in answered for row in rows)
    stage.facts.setdefault("submission", {})[variant.name] = {"lines": len(rows), "without answer": empty}
    if empty:
        stage.events.say(f"{variant.submission}: {empty} of {len(rows)} lines have no answer")


# -- engines -----------------------------------------------------------------------------------------------------


def _answer(stage: Stage, asking: Asking, model: Path, chunks: Chunks) -> None:
    """Answer what is missing; nothing is loaded where nothing is."""

    def left(variant: Variant) -> bool:
        return not all(asking.is_done(variant, members) for members in chunks[variant])

    if not any(left(variant) for variant in chunks):
        return
    adapters = {variant.adapter for variant in chunks if variant.adapter and left(variant)}
    folders = {name: stage.run.path("train", "adapters", name) for name in sorted(adapters)}
    if not stage.run.recipe.infer.merged:
        if stage.run.recipe.infer.engine == "vllm":
            from stages.engines.merge import refuse_adapted_vision

            refuse_adapted_vision(folders)
        every = {a.name: stage.run.path("train", "adapters", a.name) for a in stage.run.recipe.train.adapters}
        _with_engine(stage, asking, model, every, {None, *every}, chunks)
        return
    from stages.engines.merge import merged_copy

    # base first: it answers the passes that are shared by all
    _with_engine(stage, asking, model, {}, {None}, chunks)
    for name, folder in folders.items():
        target = _target()
        merged = merged_copy(model, folder, stage.path("merged", name), target.dtype)
        _with_engine(stage, asking, merged, {}, {name}, chunks)
        remove(merged)


def _with_engine(
    stage: Stage, asking: Asking, model: Path, adapters: dict[str, Path], served: set[str | None], chunks: Chunks
) -> None:
    """Start an engine, ask what it serves, and end it."""
    samples = {variant: [s for members in chunks[variant] for s in members] for variant in chunks}
    length, pictures, pixels = asking.most(samples)
    engine = _start_engine(stage, model, adapters, length, pictures, pixels)
    try:
        asking.answer(engine, served, chunks)
    finally:
        engine.close()


def _target() -> Target:
    return working_target(probe(), load_targets())


def _start_engine(
    stage: Stage, model: Path, adapters: dict[str, Path], max_length: int, pictures: int, pixels: int
) -> Engine:
    recipe, target = stage.run.recipe, _target()
    settings = EngineSettings(
        model=model,
        adapters=adapters,
        dtype=target.dtype,
        max_new_tokens=recipe.infer.max_new_tokens,
        batch_size=recipe.infer.batch_size,
        max_length=max_length,
        seed=recipe.seed,
        tensor_parallel=_tensor_parallel(stage, model, target.dtype, max_length),
        max_pictures=pictures,
        max_pixels=pixels,
    )
    stage.decide("engine", recipe.infer.engine, f"infer.engine; {target.dtype} on target {target.name}")
    stage.decide(
        "longest", f"{max_length} tokens", "the longest prompt with its answer, and no more than infer.max_length"
    )
    before = time.monotonic()
    engine: Engine
    if recipe.infer.engine == "vllm":
        from stages.engines.vllm_engine import VllmEngine

        engine = VllmEngine(settings)
    else:
        from stages.engines.transformers_engine import TransformersEngine

        engine = TransformersEngine(settings)
    started = round(time.monotonic() - before, 2)
    stage.facts["engine_start_seconds"] = round(stage.facts.get("engine_start_seconds", 0.0) + started, 2)
    return engine


def _tensor_parallel(stage: Stage, model: Path, dtype: str, max_length: int) -> int:
    """Cards that share the weights. Raises DoesNotFitError where they cannot hold them."""
    cards = probe().gpus
    asked = stage.run.recipe.infer.tensor_parallel
    if not cards or stage.run.recipe.infer.engine != "vllm":
        return 1
    try:
        plan = plan_serving(read_shape(model), [gpu.memory_free for gpu in cards], asked, dtype, max_length)
    except UnknownShapeError as error:
        stage.decide("tensor parallel", asked or 1, f"not planned: {error}")
        return asked or 1
    stage.decide("tensor parallel", plan.tensor_parallel, plan.why)
    return plan.tensor_parallel
