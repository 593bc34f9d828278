"""A running engine at work: it answers samples, or computes the losses of given answers, chunk by chunk.

What happens if the engine fails is the same for both. Each member that is still missing is tried alone. If one fails
again, others are tried. If one of them works, the error is that of the sample, and the journals get it; else it is the
engine's, and is raised.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from stages.contract.events import Events
from stages.contract.machine_errors import machine_error
from stages.contract.records import Sample
from stages.contract.stop import StopRequest
from stages.engines.engine import Completion, Engine, GivenAnswer
from stages.infer.journal import Journals, Question
from stages.infer.losses import GivenAnswers
from stages.infer.prompts import Prompts, Step
from stages.infer.rounds import Round, Variant
from stages.models.rendering import Prompt

OTHERS = 3
"""Members that are tried, the shortest ones, to find whether the engine still works."""

Member = TypeVar("Member")
"""What the engine gets of one sample."""


class _Work(Protocol[Member]):
    """What an engine does with the members of a chunk."""

    def name(self, member: Member) -> str:
        """The id of a member's sample."""

    def ask(self, members: list[Member]) -> None:
        """Ask the engine for members. What it computes goes into the journals, unless they have it."""

    def is_missing(self, member: Member) -> bool:
        """Whether the journals still lack a member."""

    def add_error(self, member: Member, why: str) -> None:
        """Add the error of a member to the journals."""

    def others(self, member: Member) -> Sequence[Member]:
        """Members of other samples, OTHERS at most."""

    def try_one(self, member: Member) -> None:
        """Ask the engine for one member, and keep nothing."""


@dataclass
class EngineSession:
    """A running engine that serves `models` (None: base), and what is needed to use it."""

    engine: Engine
    models: set[str | None]
    journals: Journals
    events: Events
    stop: StopRequest

    def answer(self, asked: Round, prompts: Prompts) -> None:
        """Answer the passes of a round that need these models: variant by variant, pass by pass, chunk by chunk.

        Skips chunks without an unanswered sample. An engine that computes in padded batches gets all samples of a
        chunk, even those that are answered already, but not those that failed. Raises the errors of `answer_round`.
        """
        for variant, chunks in asked.chunks.items():
            for name in prompts.passes:
                if prompts.answering_model(variant, name) in self.models:
                    activity = f"{name} {'' if variant.without else 'with '}{variant.name}"
                    self._go_through(activity, chunks, partial(self._answer_chunk, prompts, variant, name))

    def compute_losses(self, asked: Round, given: GivenAnswers) -> None:
        """Compute the losses of a round that need these models, and add them to the journals: variant by variant, chunk
        by chunk. A sample without a loss gets the reason instead.

        An engine that computes in padded batches gets all samples of a chunk, even those with a known loss. Raises the
        errors of `answer_round`.
        """
        for variant, chunks in asked.chunks.items():
            model = variant.adapter
            if model in self.models:
                self._go_through(f"losses of {variant.name}", chunks, partial(self._loss_chunk, given, model))

    def _go_through(
        self, activity: str, chunks: list[list[Sample]], work: Callable[[list[Sample]], int | None]
    ) -> None:
        """Do the work of all chunks and report the progress. `work` returns a number of tokens; None: nothing to do."""
        done, total = 0, sum(map(len, chunks))
        for chunk in chunks:
            began = time.monotonic()
            tokens = work(chunk)
            done += len(chunk)
            if tokens is not None:
                rate = round(tokens / (time.monotonic() - began), 1)
                self.events.report_progress(activity, done, total, "samples", tokens_per_second=rate)
            self.stop.check()

    def _answer_chunk(self, prompts: Prompts, variant: Variant, name: str, chunk: list[Sample]) -> int | None:
        """Answer a chunk's unanswered samples in the pass `name`. Returns the number of tokens written; None if the
        engine was not asked.

        If a prompt cannot be used, the journals get the reason as its error.
        """
        missing: dict[str, Step] = {}
        members: list[Prompt] = []
        for sample in chunk:
            steps = prompts.steps(variant, sample, self.journals)
            step = next((step for step in steps if step.name == name), None)
            if step is None or (step.record and (self.engine.continuous or step.record["error"] is not None)):
                continue
            prompt = prompts.render(sample["id"], step.ask)
            if isinstance(prompt, str):
                self.journals.add(step.model, step.question, None, prompt)
                continue
            members.append(prompt)
            if step.record is None:
                missing[sample["id"]] = step
        if not missing:
            return None
        (model,) = {step.model for step in missing.values()}
        before = self.journals.completion_tokens
        self._do(_Completions(self, model, missing, prompts), members)
        return self.journals.completion_tokens - before

    def _loss_chunk(self, given: GivenAnswers, model: str | None, chunk: list[Sample]) -> int | None:
        """Compute the missing losses of a chunk. Returns the number of tokens that the engine read; None if it was not
        asked."""
        missing: dict[str, Question] = {}
        members: list[list[GivenAnswer]] = []
        for sample in chunk:
            question = given.question(sample)
            record, answers = self.journals.find(model, question), given.render(sample)
            if record and (self.engine.continuous or record["error"] is not None):
                continue
            if isinstance(answers, str):
                self.journals.add_loss(model, question, None, 0, answers)
                continue
            members.append(answers)
            if record is None:
                missing[sample["id"]] = question
        if not missing:
            return None
        self._do(_Losses(self, model, missing, given), members)
        return sum(one.length for answers in members for one in answers)

    def _do(self, work: _Work[Member], members: list[Member]) -> None:
        """Let the engine do its work on members, so that none is missing.

        Raises a LorryError if the machine is the cause of a failure, the engine's error if no other member works
        either, and InterruptedRunError if the stage is asked to stop.
        """
        try:
            work.ask(members)
        except Exception as error:
            self.stop.check()  # a Ctrl-C also ends the engine's processes, so it may be the cause of the error
            explained = machine_error(error)
            if explained is not None:
                raise explained from error
            left = [member for member in members if work.is_missing(member)]
            if len(members) > 1:
                for member in left:
                    self._do(work, [member])
                return
            for member in left:
                print(f"infer: sample {work.name(member)} failed: {error!r}")  # for the log
                if not _does_another(work, member):
                    raise
                work.add_error(member, f"{type(error).__name__}: {error}")


def _does_another(work: _Work[Member], failed: Member) -> bool:
    """Whether the engine still works for at least one other member."""
    for member in work.others(failed):
        try:
            work.try_one(member)
        except Exception as error:  # noqa: BLE001 - whatever the error, the engine does not answer
            print(f"infer: after sample {work.name(failed)}, sample {work.name(member)} failed too: {error!r}")
        else:
            return True
    return False


@dataclass
class _Completions:
    """Completes prompts."""

    session: EngineSession
    model: str | None
    missing: dict[str, Step]
    """What the journals lack, by sample id."""
    prompts: Prompts

    def name(self, member: Prompt) -> str:
        """As in `_Work`."""
        return member.id

    def ask(self, members: list[Prompt]) -> None:
        """As in `_Work`."""
        clock = time.monotonic()

        def add_completion(place: int, completion: Completion) -> None:
            """Add the completion of prompt number `place` to the journals, unless they have it.

            With a continuous engine, raises InterruptedRunError if the stage is asked to stop.
            """
            nonlocal clock
            before, clock = clock, time.monotonic()
            prompt = members[place]
            step = self.missing.pop(prompt.id, None)
            if step is not None:
                whole = self.prompts.complete_reasoning(prompt, completion)
                self.session.journals.add(self.model, step.question, whole, None, prompt.length, clock - before)
            if self.session.engine.continuous:
                self.session.stop.check()

        self.session.engine.generate(members, self.model, add_completion)

    def is_missing(self, member: Prompt) -> bool:
        """As in `_Work`."""
        return self.name(member) in self.missing

    def add_error(self, member: Prompt, why: str) -> None:
        """As in `_Work`."""
        self.session.journals.add(self.model, self.missing.pop(member.id).question, None, why, member.length)

    def others(self, member: Prompt) -> Sequence[Prompt]:
        """As in `_Work`."""
        return self.prompts.shortest_other_prompts(member.id, OTHERS)

    def try_one(self, member: Prompt) -> None:
        """As in `_Work`."""
        self.session.engine.generate([member], self.model)


@dataclass
class _Losses:
    """Computes the losses of given answers; those of one sample are one member."""

    session: EngineSession
    model: str | None
    missing: dict[str, Question]
    """What the journals lack, by sample id."""
    given: GivenAnswers

    def name(self, member: list[GivenAnswer]) -> str:
        """As in `_Work`."""
        return member[0].sample_id

    def ask(self, members: list[list[GivenAnswer]]) -> None:
        """As in `_Work`."""
        answers = [one for given in members for one in given]
        left = Counter(one.sample_id for one in answers)
        sums: dict[str, dict[int, float]] = {name: {} for name in left}

        def add_loss(place: int, loss: float) -> None:
            """Keep the loss of answer number `place`, and add that of its sample to the journals once it is whole.

            With a continuous engine, raises InterruptedRunError if the stage is asked to stop.
            """
            name = answers[place].sample_id
            sums[name][place] = loss
            left[name] -= 1
            if not left[name] and (question := self.missing.pop(name, None)) is not None:
                tokens = sum(answers[one].learnt for one in sums[name])
                # in the order of the sequences, whatever the order in which they were computed
                total = sum(sums[name][one] for one in sorted(sums[name]))
                self.session.journals.add_loss(self.model, question, total, tokens, None)
            if self.session.engine.continuous:
                self.session.stop.check()

        self.session.engine.losses(answers, self.model, add_loss)

    def is_missing(self, member: list[GivenAnswer]) -> bool:
        """As in `_Work`."""
        return self.name(member) in self.missing

    def add_error(self, member: list[GivenAnswer], why: str) -> None:
        """As in `_Work`."""
        self.session.journals.add_loss(self.model, self.missing.pop(self.name(member)), None, 0, why)

    def others(self, member: list[GivenAnswer]) -> Sequence[list[GivenAnswer]]:
        """As in `_Work`."""
        return self.given.shortest_others(self.name(member), OTHERS)

    def try_one(self, member: list[GivenAnswer]) -> None:
        """As in `_Work`."""
        self.session.engine.losses(member, self.model)
