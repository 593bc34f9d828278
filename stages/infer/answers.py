"""Step 2 of infer: the engine answers what is missing of a round, and the journals keep every answer."""

import time
from dataclasses import dataclass

from stages.contract.events import Events
from stages.contract.files import machine_error
from stages.contract.records import Sample
from stages.contract.stop import StopRequest
from stages.engines.engine import Completion, Engine
from stages.infer.journal import Journals
from stages.infer.prompts import Prompts, Step
from stages.infer.rounds import Round, Variant
from stages.infer.serving import Engines
from stages.models.rendering import Prompt


def answer_round(
    asked: Round, prompts: Prompts, journals: Journals, engines: Engines, events: Events, stop: StopRequest
) -> None:
    """Answer what is missing of a round into the journals. Loads no model if nothing is missing.

    A sample that fails is kept as failed. Raises InterruptedRunError when the stage is asked to stop, and whatever the
    engine raises if it fails on every sample; the answers so far are kept.
    """
    if not asked.chunks:
        return
    missing = {v: _missing_models(v, chunks, prompts, journals) for v, chunks in asked.chunks.items()}
    adapters = sorted({variant.adapter for variant, models in missing.items() if models and variant.adapter})
    if not any(missing.values()):
        engines.record_batch_size()
        return
    engines.refuse_unserved(adapters)
    asks_base = any(None in models for models in missing.values())
    room = prompts.room_for(asked.chunks)
    for engine, models in engines.serve(adapters, asks_base, room, prompts.longest):
        _Conversation(engine, models, prompts, journals, events, stop).answer(asked)


def _missing_models(
    variant: Variant, chunks: list[list[Sample]], prompts: Prompts, journals: Journals
) -> set[str | None]:
    """The models that the samples' next unanswered passes are asked of; empty where all is answered."""
    steps = (step for chunk in chunks for sample in chunk for step in prompts.steps(variant, sample, journals))
    return {step.model for step in steps if step.record is None}


@dataclass
class _Conversation:
    """An engine that serves `models`, and what is asked of it."""

    engine: Engine
    models: set[str | None]
    prompts: Prompts
    journals: Journals
    events: Events
    stop: StopRequest

    def answer(self, asked: Round) -> None:
        """Answer the passes of a round that these models answer.

        Pass by pass over all chunks of a variant, chunk by chunk: where the engine computes in batches, the same
        samples are always submitted together, whatever is known of them.
        """
        for variant, chunks in asked.chunks.items():
            for name in self.prompts.passes:
                if self.prompts.model_of(variant, name) not in self.models:
                    continue
                done, total = 0, sum(map(len, chunks))
                for chunk in chunks:
                    before, tokens = time.monotonic(), self.journals.completion_tokens
                    was_asked = self._answer_chunk(variant, name, chunk)
                    done += len(chunk)
                    if was_asked:
                        new = self.journals.completion_tokens - tokens
                        rate = round(new / (time.monotonic() - before), 1)
                        activity = f"{name} {'' if variant.without else 'with '}{variant.name}"
                        self.events.report_progress(activity, done, total, "samples", tokens_per_second=rate)
                    self.stop.check()

    def _answer_chunk(self, variant: Variant, name: str, chunk: list[Sample]) -> bool:
        """Answer what is missing of a chunk in a pass. Returns whether the engine was asked."""
        missing: dict[str, Step] = {}
        prompts: list[Prompt] = []
        for sample in chunk:
            steps = self.prompts.steps(variant, sample, self.journals)
            step = next((step for step in steps if step.name == name), None)
            if step is None or (step.record and (self.engine.continuous or step.record["error"] is not None)):
                continue
            prompt = self.prompts.render(sample["id"], step.ask)
            if isinstance(prompt, str):
                self.journals.add(step.model, step.question, None, prompt)
                continue
            prompts.append(prompt)
            if step.record is None:
                missing[sample["id"]] = step
        if not missing:
            return False
        self._generate(prompts, missing)
        return True

    def _generate(self, prompts: list[Prompt], missing: dict[str, Step]) -> None:
        """Submit these prompts and keep the answers to the missing ones, which this removes from `missing`.

        If the engine fails on them, each is tried alone, and those that fail again are kept as failed. A fault of the
        machine or of the engine is raised instead.
        """
        (model,) = {step.model for step in missing.values()}
        clock = time.monotonic()

        def keep(place: int, completion: Completion) -> None:
            nonlocal clock
            before, clock = clock, time.monotonic()
            prompt = prompts[place]
            step = missing.pop(prompt.id, None)
            if step is not None:
                self.journals.add(model, step.question, completion, None, prompt.length, clock - before)
            if self.engine.continuous:
                self.stop.check()

        try:
            self.engine.generate(prompts, model, keep)
        except Exception as error:
            self.stop.check()  # a Ctrl-C reaches an engine's own processes too
            explained = machine_error(error)
            if explained is not None:
                raise explained from error
            left = [prompt for prompt in prompts if prompt.id in missing]
            if len(prompts) > 1:
                for prompt in left:
                    self._generate([prompt], {prompt.id: missing.pop(prompt.id)})
                return
            for prompt in left:
                print(f"sample {prompt.id} failed: {error!r}")  # into the log
                if not self._answers_another(model, prompt):
                    raise
                why = f"{type(error).__name__}: {error}"
                self.journals.add(model, missing.pop(prompt.id).question, None, why, prompt.length)

    def _answers_another(self, model: str | None, failed: Prompt) -> bool:
        """Whether the engine still answers one of the three shortest other prompts."""
        for prompt in self.prompts.shortest_without(failed.id, 3):
            try:
                self.engine.generate([prompt], model)
            except Exception as error:  # noqa: BLE001 - any failure means that it does not
                print(f"after {failed.id}, {prompt.id} failed too: {error!r}")
            else:
                return True
        return False
