"""Let the model decide which questions a page's drawing alone answers, once for each question and model."""

from typing import Any

from stages.contract.files import FileHashes, JsonlJournal, digest_of
from stages.contract.stage import Stage
from stages.engines import start_engine
from stages.engines.engine import Completion, EngineSettings
from stages.hardware.probe import probe
from stages.hardware.targets import load_targets, working_target
from stages.models.chat_settings import chat_settings
from stages.models.remote_code import settle_remote_code
from stages.models.rendering import Prompt, Renderer
from stages.tasks.task import Ask

ENGINE = "transformers"
"""The engine that answers: every preprocess image has it."""


def classify_drawings(stage: Stage, task: Any, questions: list[Any]) -> dict[str, bool]:
    """Return, by question id, whether a page's drawing alone answers the question. Counts the questions for which it
    does.

    Questions that the task does not classify are left out.

    Completions are cached by the digests of prompt and weights, so a question is asked again only if one of these
    changes. Raises InterruptedRunError if the stage is asked to stop.
    """
    found: dict[str, bool] = {}
    asks: dict[str, Ask] = {}
    for question in questions:
        verdict = task.classification(stage.run.recipe, question)
        if isinstance(verdict, Ask):
            asks[question.id] = verdict
        elif verdict is not None:
            found[question.id] = verdict
    if asks:
        texts = _completions(stage, list(asks.values()))
        found |= {name: task.read_classification(texts[_prompt_digest(ask)]) for name, ask in asks.items()}
    stage.counts["drawing is enough"] = sum(found.values())
    return found


def _prompt_digest(ask: Ask) -> str:
    """The digest of a prompt's messages and its token limit: the key of its completion in the cache."""
    return digest_of([ask.messages, ask.max_new_tokens])


def _completions(stage: Stage, asks: list[Ask]) -> dict[str, str]:
    """The model's completions of these prompts, and all others in its cache, by the digest of the prompt.

    Asks the model only for completions that are not cached. Raises InterruptedRunError if the stage is asked to stop.
    """
    recipe = stage.run.recipe
    model = stage.run.model(recipe.model.path, "model.path")
    weights, _ = FileHashes(stage.path(".hashes.json")).tree_digest(model)
    settings = chat_settings(stage.run)
    name = digest_of([weights, settings.facts]) if settings.facts else weights
    with JsonlJournal(stage.cache_file("classifier", f"{name}.jsonl")) as journal:
        known = {record["asked"]: str(record["text"]) for record in journal.records}
        missing = {_prompt_digest(ask): ask for ask in asks if _prompt_digest(ask) not in known}
        if not missing:
            return known
        settle_remote_code(model, recipe.model.trust_remote_code)
        renderer = Renderer(model, settings)
        prompts = [renderer.render(key, ask.messages) for key, ask in missing.items()]
        limit = max(ask.max_new_tokens or recipe.infer.max_new_tokens for ask in asks)
        engine = _start_engine(stage, model, prompts, limit)

        def save_completion(place: int, completion: Completion) -> None:
            """Add the completion of `prompts[place]` to the cache, and report progress. Raises InterruptedRunError if
            the stage is asked to stop."""
            key = prompts[place].id
            question = missing[key].messages[-1]["content"]
            journal.append([{"asked": key, "prompt": question, "text": completion.text}])
            known[key] = completion.text
            done = sum(prompt.id in known for prompt in prompts)
            stage.events.report_progress("classify questions", done, len(prompts), "questions")
            stage.stop.check()

        try:
            engine.generate(prompts, None, save_completion)
        finally:
            engine.close()
    return known


def _start_engine(stage: Stage, model: Any, prompts: list[Prompt], limit: int) -> Any:
    """Return an engine, started for these prompts, and record the decision. `limit` is the largest number of tokens of
    a completion."""
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
            trust_remote_code=recipe.model.trust_remote_code,
        ),
    )
