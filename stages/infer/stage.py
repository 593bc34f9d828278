"""infer: the base model and every adapter answer the test samples.

It takes three steps. rounds.py finds the unanswered samples. answers.py lets the engine answer them and keeps each
completion in a journal. predictions.py writes predictions and submissions. With `infer.vote` the adapters then vote. A
second round of the vote takes the same three steps. With `infer.losses`, losses.py also has the engine compute the loss
of the samples' own answers.
"""

from collections.abc import Mapping

from stages.contract.files import FileHashes, remove, write_jsonl
from stages.contract.records import Sample
from stages.contract.stage import Stage
from stages.engines.weights import trained_adapters
from stages.infer.answers import answer_round
from stages.infer.journal import Journals, journal_names
from stages.infer.losses import GivenAnswers, LossRecord, loss_records, missing_notes, write_losses
from stages.infer.predictions import WrittenFiles, predict_round, write_predictions
from stages.infer.prompts import Prompts
from stages.infer.rounds import (
    Variant,
    cut_into_chunks,
    first_round,
    samples_by_variant,
    samples_for_losses,
    second_round,
)
from stages.infer.serving import Engines
from stages.infer.voting import (
    VOTE,
    count_votes,
    describe_election,
    election_reason,
    hold_election,
    refuse_impossible_vote,
    samples_to_vote_again,
    vote_predictions,
)
from stages.models.connector import trained_connector
from stages.models.control_words import said_note
from stages.models.remote_code import settle_base
from stages.models.rendering import checked_renderer
from stages.tasks import load_task


def work(stage: Stage) -> None:
    """Answer the samples with base and adapters, then hold the vote if the recipe has one. `run_stage` calls this.

    A shard answers only its own chunks. It writes predictions, but no submissions and no vote.
    """
    run, recipe, vote = stage.run, stage.run.recipe, stage.run.recipe.infer.vote
    samples, size = samples_by_variant(run), recipe.infer.chunk_size
    chunks = cut_into_chunks(samples, size)
    loss_samples = samples_for_losses(run)
    loss_chunks = cut_into_chunks(loss_samples, size)
    if stage.has_nothing_to_do(len(chunks) + len(loss_chunks), "chunks of samples"):
        return
    names = [adapter.name for adapter in trained_adapters(run)]
    if vote is not None:
        compared = max(len(members) for variant, members in samples.items() if variant.asks == "validation")
        refuse_impossible_vote(vote, names, compared)
    task, model = load_task(recipe.task), run.model(recipe.model.path, "model.path")
    settle_base(stage)
    renderer = checked_renderer(stage)
    adapters = {name: run.path("train", "adapters", name) for name in names}
    files = journal_names(run, model, names, FileHashes(stage.path(".hashes.json")))
    prompts, given = Prompts(recipe, run.folder, renderer), GivenAnswers(recipe, run.folder, renderer)
    _report_control_words(stage, prompts, samples[Variant(None)])
    with (
        Journals(stage.path("partial"), files, stage.key) as journals,
        Engines(recipe, model, adapters, trained_connector(run), stage.folder, stage.decide) as engines,
    ):
        shards = stage.finished_shards
        first = first_round(samples, chunks, stage.does_piece, shards)
        losses = first_round(
            loss_samples,
            loss_chunks,
            lambda number: stage.does_piece(len(chunks) + number),
            shards,
            lambda variant: variant.losses,
        )
        answer_round(first, prompts, journals, engines, stage.events, stage.stop, losses, given)
        predictions, took = predict_round(first, prompts, journals, task)
        written = write_predictions(run, stage.folder, predictions, stage.shard is None, stage.events.say)
        _record_output(stage, engines, written)
        if losses.samples:
            _write_losses(stage, loss_records(losses, given, journals))
        if took:
            stage.facts["answering"] = took
        if vote is not None and stage.shard is None:
            tested = samples[Variant(None)]
            election = hold_election(recipe, task, samples, predictions, stage.events.say)
            again = samples_to_vote_again(recipe, task, tested, election, stage.events.say)
            second = second_round(election.voters, again, size)
            answer_round(second, prompts, journals, engines, stage.events, stage.stop)
            rows = count_votes(election, tested, again, predict_round(second, prompts, journals, task)[0])
            stage.outputs["votes.jsonl"] = write_jsonl(stage.path("votes.jsonl"), rows)
            stage.decide("voters", ", ".join(election.voters), election_reason(vote, election))
            stage.facts["vote"] = describe_election(vote, election, rows, len(again))
            votes = {VOTE: vote_predictions(rows)}
            written = write_predictions(run, stage.folder, votes, True, stage.events.say)
            _record_output(stage, engines, written)
        journals.remove_others()
        if prompts.cut:
            stage.counts["prompts that begin at a later turn"] = len(prompts.cut)
            stage.events.say(f"{len(prompts.cut)} prompts are longer than infer.max_length and begin at a later turn")
    remove(stage.path("merged"))


def _report_control_words(stage: Stage, prompts: Prompts, tested: list[Sample]) -> None:
    """Record and print which control words of the model occur in the test samples. Prompts have them as text."""
    if said := prompts.control_words(tested):
        stage.facts["control_words"] = said
        stage.events.say(said_note(said))


def _write_losses(stage: Stage, records: Mapping[Variant, list[LossRecord]]) -> None:
    """Write the losses, count them and the samples without one, and print why those have none."""
    stage.outputs |= write_losses(stage.folder, records)
    rows = [row for found in records.values() for row in found]
    failed = sum("error" in row for row in rows)
    stage.counts.update({"losses": len(rows) - failed} | ({"without a loss": failed} if failed else {}))
    for line in missing_notes(records):
        stage.events.say(line)


def _record_output(stage: Stage, engines: Engines, written: WrittenFiles) -> None:
    """Add the outputs and counts of a round, and the seconds of the engine's starts, to the manifest."""
    if engines.start_seconds is not None:
        stage.facts["engine_start_seconds"] = engines.start_seconds
    stage.outputs |= written.outputs
    stage.counts.update(written.counts)
    if written.submissions:
        stage.facts.setdefault("submission", {}).update(written.submissions)
