"""Step 2 of infer: the engine answers the unanswered samples of a round and computes missing losses. Journals keep all
completions and losses."""

import time
from dataclasses import dataclass

from stages.contract.events import Events
from stages.contract.machine_errors import machine_error
from stages.contract.records import Sample
from stages.contract.stop import StopRequest
from stages.engines.engine import Completion, Engine
from stages.infer.journal import Journals
from stages.infer.losses import GivenAnswers, LossSession, missing_losses
from stages.infer.prompts import EngineLimits, Prompts, Step
from stages.infer.rounds import Round, Variant
from stages.infer.serving import Engines
from stages.models.rendering import Prompt

NO_LOSSES = Round({}, {}, {})
"""A round without samples."""


def answer_round(
    asked: Round,
    prompts: Prompts,
    journals: Journals,
    engines: Engines,
    events: Events,
    stop: StopRequest,
    losses: Round = NO_LOSSES,
    given: GivenAnswers | None = None,
) -> None:
    """Answer the unanswered samples of a round and add the completions to the journals. Do the same for the missing
    losses of the round `losses`, whose answers `given` renders. Loads no model if nothing is missing.

    If the engine fails on a sample but completes another, the journals get the error. If it completes no other, raises
    the engine's error. Raises a LorryError at once if the machine is the cause, such as a full disk. Raises
    InterruptedRunError if the stage is asked to stop, UsageError if the engine cannot serve the model or an adapter,
    and DoesNotFitError if the weights do not fit. The journals then have all completions up to the error.
    """
    if not asked.chunks and not losses.chunks:
        return
    missing = {v: _missing_models(v, chunks, prompts, journals) for v, chunks in asked.chunks.items()}
    models: set[str | None] = set().union(*missing.values())
    if given is not None:
        models |= missing_losses(losses, given, journals)
    adapters = sorted(model for model in models if model)
    if not models:
        engines.record_batch_size()
        return
    engines.refuse_unserved(adapters)
    limits = prompts.engine_limits(asked.chunks)
    if given is not None:
        limits = EngineLimits(*map(max, limits, given.engine_limits(losses.chunks)))
    for engine, served in engines.serve(adapters, None in models, limits, prompts.longest_prompts):
        _EngineSession(engine, served, prompts, journals, events, stop).answer(asked)
        if given is not None:
            LossSession(engine, served, given, journals, events, stop).compute(losses)


def _missing_models(
    variant: Variant, chunks: list[list[Sample]], prompts: Prompts, journals: Journals
) -> set[str | None]:
    """The models that the samples' next unanswered passes need (None: base). Empty if every sample is answered or
    failed."""
    steps = (step for chunk in chunks for sample in chunk for step in prompts.steps(variant, sample, journals))
    return {step.model for step in steps if step.record is None}


@dataclass
class _EngineSession:
    """A running engine that serves `models` (None: base), and what is needed to use it."""

    engine: Engine
    models: set[str | None]
    prompts: Prompts
    journals: Journals
    events: Events
    stop: StopRequest

    def answer(self, asked: Round) -> None:
        """Answer the passes of a round that need these models: variant by variant, pass by pass, chunk by chunk.

        Skips chunks without an unanswered sample. An engine that computes in padded batches gets all samples of a
        chunk, even those that are answered already, but not those that failed.
        """
        for variant, chunks in asked.chunks.items():
            for name in self.prompts.passes:
                if self.prompts.answering_model(variant, name) not in self.models:
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
        """Answer a chunk's unanswered samples in the pass `name`. Returns whether the engine was asked.

        If a prompt cannot be used, the journals get the reason as its error.
        """
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
        """Complete these prompts and add the completions of those in `missing` to the journals. Empties `missing`.

        If the engine fails, tries each missing prompt alone and adds the error of those that fail again. Raises a
        LorryError instead if the machine is the cause, and the engine's error if it completes no other prompt either.
        Raises InterruptedRunError if the stage is asked to stop.
        """
        (model,) = {step.model for step in missing.values()}
        clock = time.monotonic()

        def add_completion(place: int, completion: Completion) -> None:
            """Add the completion of prompt number `place` to the journals, unless they have it.

            With a continuous engine, raises InterruptedRunError if the stage is asked to stop.
            """
            nonlocal clock
            before, clock = clock, time.monotonic()
            prompt = prompts[place]
            step = missing.pop(prompt.id, None)
            if step is not None:
                completion = self.prompts.complete_reasoning(prompt, completion)
                self.journals.add(model, step.question, completion, None, prompt.length, clock - before)
            if self.engine.continuous:
                self.stop.check()

        try:
            self.engine.generate(prompts, model, add_completion)
        except Exception as error:
            self.stop.check()  # a Ctrl-C also ends the engine's processes, so it may be the cause of the error
            explained = machine_error(error)
            if explained is not None:
                raise explained from error
            left = [prompt for prompt in prompts if prompt.id in missing]
            if len(prompts) > 1:
                for prompt in left:
                    self._generate([prompt], {prompt.id: missing.pop(prompt.id)})
                return
            for prompt in left:
                print(f"infer: sample {prompt.id} failed: {error!r}")  # for the log
                if not self._answers_another(model, prompt):
                    raise
                why = f"{type(error).__name__}: {error}"
                self.journals.add(model, missing.pop(prompt.id).question, None, why, prompt.length)

    def _answers_another(self, model: str | None, failed: Prompt) -> bool:
        """Whether the engine still completes at least one of the three shortest prompts of other samples."""
        for prompt in self.prompts.shortest_other_prompts(failed.id, 3):
            try:
                self.engine.generate([prompt], model)
            except Exception as error:  # noqa: BLE001 - whatever the error, the engine does not answer
                print(f"infer: after sample {failed.id}, sample {prompt.id} failed too: {error!r}")
            else:
                return True
        return False
