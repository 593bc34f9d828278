"""Ask the model which questions on a page are answered by its drawing alone, once for each question and model."""

from typing import Any

from stages.contract.files import FileHashes, JsonlJournal, digest_of
from stages.contract.stage import Stage
from stages.engines import start_engine
from stages.engines.engine import Completion, EngineSettings
from stages.hardware.probe import probe
from stages.hardware.targets import load_targets, working_target
from stages.models.rendering import Prompt, Renderer
from stages.tasks.task import Ask

ENGINE = "transformers"
"""The engine that every image of preprocess has."""


def drawings_enough(stage: Stage, task: Any, questions: list[Any]) -> dict[str, bool]:
    """By question id, whether its drawing is enough; without those of whom nobody is to say it.

    A model's answers are kept by what was asked and by the weights, so that the same question is asked once whatever
    else changes. transformers asks, as it is in every image that preprocess has.
    """
    found: dict[str, bool] = {}
    asks: dict[str, Ask] = {}
    for question in questions:
        said = task.classification(stage.run.recipe, question)
        if isinstance(said, Ask):
            asks[question.id] = said
        elif said is not None:
            found[question.id] = said
    if asks:
        texts = _answers(stage, list(asks.values()))
        found |= {name: task.read_classification(texts[_said(ask)]) for name, ask in asks.items()}
    stage.counts["drawing is enough"] = sum(found.values())
    return found


def _said(ask: Ask) -> str:
    return digest_of([ask.messages, ask.max_new_tokens])


def _answers(stage: Stage, asks: list[Ask]) -> dict[str, str]:
    """What the model wrote, by the digest of what it was asked."""
    recipe = stage.run.recipe
    model = stage.run.model(recipe.model.path, "model.path")
    weights, _ = FileHashes(stage.path(".hashes.json")).tree(model)
    with JsonlJournal(stage.cache_file("classifier", f"{weights}.jsonl")) as journal:
        known = {record["asked"]: str(record["text"]) for record in journal.records}
        missing = {_said(ask): ask for ask in asks if _said(ask) not in known}
        if not missing:
            return known
        renderer = Renderer(model)
        prompts = [renderer.render(key, ask.messages) for key, ask in missing.items()]
        limit = max(ask.max_new_tokens or recipe.infer.max_new_tokens for ask in asks)
        engine = _engine(stage, model, prompts, limit)

        def note(place: int, completion: Completion) -> None:
            key = prompts[place].id
            question = missing[key].messages[-1]["content"]
            journal.append([{"asked": key, "prompt": question, "text": completion.text}])
            known[key] = completion.text
            done = sum(prompt.id in known for prompt in prompts)
            stage.events.progress("classify questions", done, len(prompts), "questions")
            stage.stop.check()

        try:
            engine.generate(prompts, None, note)
        finally:
            engine.close()
    return known


def _engine(stage: Stage, model: Any, prompts: list[Prompt], limit: int) -> Any:
    recipe, target = stage.run.recipe, working_target(probe(), load_targets())
    stage.decide("classifier", recipe.model.path, f"{len(prompts)} questions, in {target.dtype}")
    return start_engine(
        ENGINE,
        EngineSettings(
            model=model,
            adapters={},
            dtype=target.dtype,
            max_new_tokens=limit,
            batch_size=16 if recipe.infer.batch_size == "auto" else recipe.infer.batch_size,
            max_length=max(prompt.length for prompt in prompts) + limit,
            seed=recipe.seed,
        ),
    )
