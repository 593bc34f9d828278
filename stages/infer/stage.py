"""infer: every test sample answered by the base model and by every adapter, in one start of one engine.

With `infer.vote` the adapters then vote. With `infer.ablate` the samples are answered again without each of some
components of the task; with `infer.merged` each adapter's weights are merged into a copy of the base and served by an
engine of their own. Adapters that were trained with a connector (`train.connector`) answer with it, and `base` is the
model as it came: that takes an engine for each of the two.
"""

import time
from collections import Counter
from pathlib import Path
from typing import cast

from stages.contract.errors import DataError
from stages.contract.files import read_json, read_jsonl, remove, write_json, write_jsonl
from stages.contract.recipe import Adapter
from stages.contract.records import Prediction, Sample
from stages.contract.stage import Stage
from stages.engines.engine import Engine, EngineSettings
from stages.hardware.probe import probe
from stages.hardware.serve import plan_serving
from stages.hardware.targets import Target, load_targets, working_target
from stages.infer.asking import NO_ANSWER, Asking, Variant
from stages.infer.voting import VOTE, hold_vote, refuse_impossible_vote
from stages.models.connector import trained_connector, with_connector
from stages.models.rendering import Prompt
from stages.models.shape import UnknownShapeError, read_shape
from stages.tasks import load_task

Chunks = dict[Variant, list[list[Sample]]]

TRIED = "batch_size.json"
"""Where it is kept which batch size was found: a later start must batch the same samples together."""


def work(stage: Stage) -> None:
    """The stage's work, for `run_stage`."""
    recipe = stage.run.recipe
    every = variants_of(stage)
    asked = _asked(stage, every)
    pieces = _pieces(asked, recipe.infer.chunk_size)
    if stage.nothing_to_do(len(pieces), "chunks of samples"):
        return
    if recipe.infer.vote is not None:
        compared = max(len(samples) for variant, samples in asked.items() if variant.asks == "validation")
        refuse_impossible_vote(recipe.infer.vote, [each.name for each in trained_adapters(stage)], compared)
    model = stage.run.model(recipe.model.path, "model.path")
    known = {variant: _taken_over(stage, variant) for variant in every}
    chunks: Chunks = {variant: [] for variant in every}
    for number, (variant, members) in enumerate(pieces):
        if stage.has(number) and any(sample["id"] not in known[variant] for sample in members):
            chunks[variant].append(members)
    asking = Asking(stage, model, every)
    engines = _Engines(stage)
    found: dict[Variant, list[Prediction]] = {}
    try:
        _answer(stage, asking, engines, model, chunks)
        for variant in every:
            wanted = [s for n, (who, members) in enumerate(pieces) if who == variant and stage.has(n) for s in members]
            found[variant] = [known[variant].get(s["id"]) or asking.prediction(variant, s) for s in wanted]
            _write(stage, variant, found[variant])
            mine = [sample for sample in wanted if sample["id"] not in known[variant]]
            if mine:
                took = stage.facts.setdefault("answering", {})
                took[variant.name] = {"samples": len(mine), "seconds": asking.seconds(variant, mine)}
        if recipe.infer.vote is not None and stage.shard is None:

            def ask_again(narrowed: dict[Variant, list[Sample]]) -> dict[Variant, list[Prediction]]:
                size = recipe.infer.chunk_size
                again = {v: [m[start : start + size] for start in range(0, len(m), size)] for v, m in narrowed.items()}
                _answer(stage, asking, engines, model, again)
                return {v: [asking.prediction(v, sample) for sample in members] for v, members in narrowed.items()}

            _write(stage, VOTE, hold_vote(stage, asked, found, ask_again))
    finally:
        engines.close()
        asking.close()
    remove(stage.path("merged"))


def trained_adapters(stage: Stage) -> list[Adapter]:
    """The recipe's adapters, but for those whose training failed and that train went on without."""
    untrained = (stage.run.manifest("train") or {}).get("untrained", {})
    return [adapter for adapter in stage.run.recipe.train.adapters if adapter.name not in untrained]


def variants_of(stage: Stage) -> list[Variant]:
    """Base, the adapters, and the first adapter (or base) without each component that is to be left out. Where there is
    a vote, the adapters answer the validation samples too.

    Without the adapter it is base, which is answered anyway.
    """
    infer = stage.run.recipe.infer
    names = [adapter.name for adapter in trained_adapters(stage)]
    left_out = [name for name in infer.ablate if name != "adapter"]
    found = [Variant(None), *map(Variant, names), *(Variant(names[0], without) for without in left_out)]
    return found + [Variant(name, asks="validation") for name in names if infer.vote is not None]


def _asked(stage: Stage, variants: list[Variant]) -> dict[Variant, list[Sample]]:
    """The samples that each variant answers."""
    run = stage.run

    def read(name: str) -> list[Sample]:
        return cast(list[Sample], read_jsonl(run.path("preprocess", "samples", f"{name}.jsonl")))

    tested = read("test")
    compared = read("validation_asked") if run.recipe.infer.vote is not None else []
    adapters = {adapter.name: adapter for adapter in run.recipe.train.adapters}

    def of(variant: Variant) -> list[Sample]:
        if variant.asks == "validation":
            return [sample for sample in compared if sample["references"]]
        if run.recipe.infer.answers == "all" or variant.adapter is None:
            return tested
        return [sample for sample in tested if adapters[variant.adapter].covers(sample["meta"]["source"])]

    return {variant: of(variant) for variant in variants}


def _pieces(asked: dict[Variant, list[Sample]], size: int) -> list[tuple[Variant, list[Sample]]]:
    """What is submitted at once: base first, then adapter by adapter.

    The chunks are cut from all samples, whatever is missing or another shard's, so that the same samples are always
    batched together: sums in another order can turn a greedy answer at a near tie.
    """
    return [(v, samples[at : at + size]) for v, samples in asked.items() for at in range(0, len(samples), size)]


def _taken_over(stage: Stage, variant: Variant) -> dict[str, Prediction]:
    """The predictions of finished shards, by sample."""
    paths = [folder / variant.output for folder in stage.finished_shards]
    rows = [row for path in paths if path.is_file() for row in read_jsonl(path)]  # a shard too many has none
    return {row["id"]: row for row in rows}  # type: ignore[misc]


def _write(stage: Stage, variant: Variant, predictions: list[Prediction]) -> None:
    stage.outputs[variant.output] = write_jsonl(stage.path(variant.output), predictions)  # type: ignore[arg-type]
    outcomes = Counter("failed" if prediction["error"] else "answered" for prediction in predictions)
    outcomes["abstained"] = sum((prediction["error"] or "").startswith(NO_ANSWER) for prediction in predictions)
    stage.counts.update(+outcomes)
    if stage.shard is None and variant.without is None and variant.asks == "test":
        _submit(stage, variant, {prediction["id"]: prediction for prediction in predictions})


def _submit(stage: Stage, variant: Variant, predictions: dict[str, Prediction]) -> None:
    """Write the submission, one line for each row that was asked, in order; those without an answer are told.

    Raises DataError where its lines would not be those of the questions: that is a defect, not a thing to hand in.
    """
    task = load_task(stage.run.recipe.task)
    rows = read_jsonl(stage.run.path("preprocess", "asked.jsonl"))
    asked = [row for row in rows if row.get("line", True)]
    if stage.run.recipe.infer.answers == "own sources" and variant.adapter is not None:
        asked = [row for row in asked if not predictions.keys().isdisjoint(row["ids"])]
    lines = [task.submission(row, predictions) for row in asked]
    named = [name for row in rows for name in row["ids"]]
    surplus = set(predictions) - set(named)
    if surplus:
        raise DataError(f"{variant.submission}: no line is asked for {', '.join(sorted(surplus)[:3])}; run preprocess")
    path = stage.path(variant.submission)
    stage.outputs[variant.submission] = write_jsonl(path, lines)
    if read_jsonl(path) != lines or len(set(named)) < len(named):
        raise DataError(f"{path}: not one line for each of the {len(asked)} that are asked, or a question in two")
    answered = {name for name, prediction in predictions.items() if prediction["answer"]}
    empty = sum(not answered.issuperset(row["ids"]) or not row["ids"] for row in asked)
    stage.facts.setdefault("submission", {})[variant.name] = {"lines": len(asked), "without answer": empty}
    if empty:
        stage.events.say(f"{variant.submission}: {empty} of {len(asked)} lines have no answer")


# -- engines -----------------------------------------------------------------------------------------------------


def _answer(stage: Stage, asking: Asking, engines: "_Engines", model: Path, chunks: Chunks) -> None:
    """Answer what is missing; nothing is loaded where nothing is."""

    def left(variant: Variant) -> bool:
        return not all(asking.is_done(variant, members) for members in chunks[variant])

    if not any(left(variant) for variant in chunks):
        if tried := read_json(stage.path(TRIED)):  # by an earlier start, which answered all
            stage.decide("batch size", tried["batch_size"], tried["why"])
        return
    every = {each.name: stage.run.path("train", "adapters", each.name) for each in trained_adapters(stage)}
    asked = {variant.adapter for variant in chunks if variant.adapter and left(variant)}
    merged, connector = stage.run.recipe.infer.merged, trained_connector(stage.run)
    if not merged and stage.run.recipe.infer.engine == "vllm":
        from stages.models.merge import refuse_adapted_vision

        refuse_adapted_vision({name: every[name] for name in sorted(asked)})
    if not merged and connector is None:
        asking.answer(engines.serving(asking, model, every, chunks), {None, *every}, chunks)
        return
    # base first: it answers the passes that are shared by all
    if asking.asks_base(chunks):
        asking.answer(engines.serving(asking, model, {}, chunks), {None}, chunks)
    if not asked:
        return
    if connector is not None:
        model = engines.with_connector(model, connector)
    if not merged:
        asking.answer(engines.serving(asking, model, every, chunks), set(every), chunks)
        return
    from stages.models.merge import merged_copy

    for name in sorted(asked):
        copy = merged_copy(model, every[name], stage.path("merged", name), _target().dtype)
        asking.answer(engines.serving(asking, copy, {}, chunks), {name}, chunks)
        engines.close()
        remove(copy)


class _Engines:
    """The engine that runs, if any does: one at a time, started when something is to be asked of it."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._engine: Engine | None = None
        self._serves: tuple[Path, tuple[str, ...]] | None = None
        self._room = (0, 0, 0)
        self._connected: Path | None = None

    def serving(self, asking: Asking, model: Path, adapters: dict[str, Path], chunks: Chunks) -> Engine:
        """The engine of these weights, with room for all that is asked in these chunks. The one that runs is kept where
        it serves them and has that room: a second round may be about samples that shards have answered."""
        samples = {variant: [s for members in chunks[variant] for s in members] for variant in chunks}
        needed = asking.most(samples)
        too_small = any(need > there for need, there in zip(needed, self._room, strict=True))
        if self._engine is None or self._serves != (model, tuple(adapters)) or too_small:
            self.close()
            self._engine = _start_engine(self._stage, model, adapters, *needed)
            self._serves, self._room = (model, tuple(adapters)), needed
            if self._stage.run.recipe.infer.batch_size == "auto":
                _settle_batch_size(self._stage, self._engine, asking.longest())
        return self._engine

    def with_connector(self, model: Path, connector: tuple[Path, str]) -> Path:
        """The base with a connector, made once in each start: its links are this machine's."""
        if self._connected is None:
            self._connected = with_connector(model, *connector, self._stage.path("merged", "with-connector"))
        return self._connected

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = self._serves = None


def _settle_batch_size(stage: Stage, engine: Engine, longest: list[Prompt]) -> None:
    """Have the engine find its batch size, once for all starts of this work."""
    tried = read_json(stage.path(TRIED))
    if tried is None:
        tried = dict(zip(("batch_size", "why"), engine.find_batch_size(longest), strict=True))
        write_json(stage.path(TRIED), tried)
    stage.decide("batch size", tried["batch_size"], tried["why"])


def _target() -> Target:
    return working_target(probe(), load_targets())


def _start_engine(
    stage: Stage, model: Path, adapters: dict[str, Path], max_length: int, pictures: int, pixels: int
) -> Engine:
    recipe, target = stage.run.recipe, _target()
    size = recipe.infer.batch_size
    settings = EngineSettings(
        model=model,
        adapters=adapters,
        dtype=target.dtype,
        max_new_tokens=recipe.infer.max_new_tokens,
        batch_size=(read_json(stage.path(TRIED)) or {}).get("batch_size") if size == "auto" else size,
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
