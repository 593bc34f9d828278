"""Step 2 of infer: the engine answers the unanswered samples of a round and computes missing losses. Journals keep all
completions and losses."""

from stages.contract.events import Events
from stages.contract.records import Sample
from stages.contract.stop import StopRequest
from stages.infer.journal import Journals
from stages.infer.losses import GivenAnswers, missing_losses
from stages.infer.prompts import EngineLimits, Prompts
from stages.infer.rounds import Round, Variant
from stages.infer.serving import Engines
from stages.infer.session import EngineSession

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
        session = EngineSession(engine, served, journals, events, stop)
        session.answer(asked, prompts)
        if given is not None:
            session.compute_losses(losses, given)


def _missing_models(
    variant: Variant, chunks: list[list[Sample]], prompts: Prompts, journals: Journals
) -> set[str | None]:
    """The models that the samples' next unanswered passes need (None: base). Empty if every sample is answered or
    failed."""
    steps = (step for chunk in chunks for sample in chunk for step in prompts.steps(variant, sample, journals))
    return {step.model for step in steps if step.record is None}
