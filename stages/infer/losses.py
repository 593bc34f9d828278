"""The losses of given answers: how probable base and adapters find what the test samples' own answers say.

The tokens that count are those that training would learn of the same conversation. Base and adapters therefore have
their losses on the same tokens.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.contract.errors import DataError, UsageError
from stages.contract.events import Events
from stages.contract.files import digest_of, write_jsonl
from stages.contract.machine_errors import machine_error
from stages.contract.recipe import Recipe
from stages.contract.records import PLACE, Message, Sample, escape_places
from stages.contract.stop import StopRequest
from stages.engines.engine import Engine, GivenAnswer, predicted_places
from stages.infer.journal import Journals, Question
from stages.infer.prompts import EngineLimits
from stages.infer.rounds import Round, Variant
from stages.models.cutting import cut_conversation
from stages.models.pictures import Picture, open_picture
from stages.models.rendering import Renderer, TrainingSequence

LOSS = "loss"
"""In place of a pass's name in the journals."""


class GivenAnswers:
    """The test samples' own answers for one model, each rendered once."""

    def __init__(self, recipe: Recipe, run_folder: Path, renderer: Renderer) -> None:
        """`renderer` is that of the model. Pictures are relative to `run_folder`."""
        self._recipe, self._run_folder, self._renderer = recipe, run_folder, renderer
        self._rendered: dict[str, list[GivenAnswer] | str] = {}

    def render(self, sample: Sample) -> list[GivenAnswer] | str:
        """What of a sample counts, as the sequences that training makes of it. Without any, a text that says why it has
        no loss."""
        name = sample["id"]
        if name not in self._rendered:
            try:
                self._rendered[name] = self._render(sample)
            except (DataError, UsageError) as error:
                self._rendered[name] = str(error)
        return self._rendered[name]

    def question(self, sample: Sample) -> Question:
        """The key of a sample's loss in the journals."""
        content = {key: value for key, value in sample.items() if key not in ("id", "meta")}
        train = self._recipe.train
        limits = [train.max_length if "text" in sample else None, self._recipe.infer.max_length if self._cuts else None]
        return sample["id"], LOSS, digest_of([content, _answer(sample), train.max_pixels, train.learn, limits])

    @property
    def _cuts(self) -> bool:
        """Whether a conversation that is too long is cut between turns."""
        return self._recipe.train.too_long == "cut"

    def engine_limits(self, chunks: Mapping[Variant, list[list[Sample]]]) -> EngineLimits:
        """The limits that the given answers of these samples stay within."""
        samples = (sample for members in chunks.values() for chunk in members for sample in chunk)
        given = [one for sample in samples if not isinstance(found := self.render(sample), str) for one in found]
        pictures = [picture for one in given for picture in one.pictures]
        return EngineLimits(
            max((one.length + 1 for one in given), default=0),  # vLLM writes one token more
            max((len(one.pictures) for one in given), default=0),
            max((picture.width * picture.height for picture in pictures), default=0),
        )

    def shortest_others(self, sample_id: str, count: int) -> list[list[GivenAnswer]]:
        """The `count` shortest samples rendered so far, without the sample `sample_id`."""
        others = [given for name, given in self._rendered.items() if name != sample_id and not isinstance(given, str)]
        return sorted(others, key=lambda given: max(one.length for one in given))[:count]

    def _render(self, sample: Sample) -> list[GivenAnswer] | str:
        """Render a sample, bypassing the cache. Raises DataError for a picture that cannot be read, and UsageError for
        a conversation that the chat template refuses."""
        if "error" in sample["meta"]:
            return sample["meta"]["error"]
        if (text := sample.get("text")) is not None:
            found = self._learnt_parts(
                sample["id"], self._renderer.text_sequences(text, self._recipe.train.max_length), ()
            )
        elif (answer := _answer(sample)) is not None:
            messages = [*sample["messages"], answer]
            found = self._conversation(sample, messages, sample["images"])
            if self._cuts and not self._fits(found):
                cut = cut_conversation(
                    messages, sample["images"], lambda *part: self._fits(self._conversation(sample, *part))
                )
                found = self._conversation(sample, *cut) if cut else found
        else:
            found = []
        if not found:
            return "has no answer whose loss could be computed"
        if not self._fits(found):
            longest, limit = max(one.length for one in found), self._recipe.infer.max_length
            return f"infer.max_length: {limit} is too short for a conversation of {longest} tokens; raise it"
        return found

    def _fits(self, given: list[GivenAnswer]) -> bool:
        """Whether an engine can read these sequences, with one token more, which vLLM writes."""
        return all(one.length < self._recipe.infer.max_length for one in given)

    def _conversation(self, sample: Sample, messages: list[Message], images: list[str]) -> list[GivenAnswer]:
        """The given answers of these messages, which are a sample's or a part of them, with its answer."""
        pictures = [
            open_picture(self._run_folder / name, self._renderer.rules, self._recipe.train.max_pixels)
            for name in images
        ]
        only_last = self._recipe.train.learn == "last"
        sequences = self._renderer.training_sequences(messages, only_last, bool(pictures), sample.get("tools"))
        if pictures and (places := sequences[-1].tokens.count(self._renderer.picture_token)) != len(pictures):
            raise DataError(f"has {len(pictures)} pictures but {places} {PLACE}; run preprocess again")
        return self._learnt_parts(sample["id"], sequences, pictures)

    def _learnt_parts(
        self, name: str, sequences: Sequence[TrainingSequence], pictures: Sequence[Picture]
    ) -> list[GivenAnswer]:
        """Sequences up to the last token that counts: what comes after it does not change a loss. Leaves out those in
        which none counts."""
        found = []
        for sequence in sequences:
            places = predicted_places(sequence)
            if places:
                tokens, labels = sequence.tokens[: places[-1] + 1], sequence.labels[: places[-1] + 1]
                # an earlier answer's sequence has only the pictures before it
                shown = tuple(pictures[: tokens.count(self._renderer.picture_token)]) if pictures else ()
                found.append(GivenAnswer(name, TrainingSequence(tokens, labels), shown))
        return found


def _answer(sample: Sample) -> Message | None:
    """The message that answers a test sample; None if its data have none."""
    meta = sample["meta"]
    if "answer" in meta:
        return meta["answer"]
    target = meta.get("target", next(iter(sample["references"]), None))
    return None if target is None else {"role": "assistant", "content": escape_places(target)}


@dataclass
class LossSession:
    """A running engine that serves `models` (None: base), and what is needed to compute losses with it."""

    engine: Engine
    models: set[str | None]
    given: GivenAnswers
    journals: Journals
    events: Events
    stop: StopRequest

    def compute(self, asked: Round) -> None:
        """Compute the losses of a round that need these models, and add them to the journals: variant by variant, chunk
        by chunk. A sample without a loss gets the reason instead.

        Raises the errors of `answer_round`.
        """
        for variant, chunks in asked.chunks.items():
            if variant.adapter not in self.models:
                continue
            done, total = 0, sum(map(len, chunks))
            for chunk in chunks:
                began = time.monotonic()
                tokens = self._compute_chunk(variant.adapter, chunk)
                done += len(chunk)
                if tokens:
                    rate = round(tokens / (time.monotonic() - began), 1)
                    activity = f"losses of {variant.name}"
                    self.events.report_progress(activity, done, total, "samples", tokens_per_second=rate)
                self.stop.check()

    def _compute_chunk(self, model: str | None, chunk: list[Sample]) -> int:
        """Compute the missing losses of a chunk. Returns the number of tokens that the engine read.

        An engine that computes in padded batches gets all samples of a chunk, even those with a known loss.
        """
        missing: dict[str, Question] = {}
        asked: list[list[GivenAnswer]] = []
        for sample in chunk:
            question = self.given.question(sample)
            record, given = self.journals.find(model, question), self.given.render(sample)
            if record and (self.engine.continuous or record["error"] is not None):
                continue
            if isinstance(given, str):
                self.journals.add_loss(model, question, None, 0, given)
                continue
            asked.append(given)
            if record is None:
                missing[sample["id"]] = question
        if not missing:
            return 0
        self._compute(model, asked, missing)
        return sum(one.length for given in asked for one in given)

    def _compute(self, model: str | None, asked: list[list[GivenAnswer]], missing: dict[str, Question]) -> None:
        """Compute the losses of these samples and add those in `missing`, by sample id, to the journals. Empties
        `missing`.

        If the engine fails, tries each missing sample alone and adds the error of those that fail again. Raises a
        LorryError instead if the machine is the cause, and the engine's error if it computes no other sample either.
        """
        answers = [one for given in asked for one in given]
        left = Counter(one.sample_id for one in answers)
        sums: dict[str, dict[int, float]] = {name: {} for name in left}

        def add_loss(place: int, loss: float) -> None:
            """Keep the loss of answer number `place`, and add that of its sample to the journals once it is whole."""
            name = answers[place].sample_id
            sums[name][place] = loss
            left[name] -= 1
            if not left[name] and (question := missing.pop(name, None)) is not None:
                tokens = sum(answers[one].learnt for one in sums[name])
                # in the order of the sequences, whatever the order in which they were computed
                total = sum(sums[name][one] for one in sorted(sums[name]))
                self.journals.add_loss(model, question, total, tokens, None)
            if self.engine.continuous:
                self.stop.check()

        try:
            self.engine.losses(answers, model, add_loss)
        except Exception as error:
            self.stop.check()  # a Ctrl-C also ends the engine's processes, so it may be the cause of the error
            explained = machine_error(error)
            if explained is not None:
                raise explained from error
            undone = [given for given in asked if given[0].sample_id in missing]
            if len(asked) > 1:
                for given in undone:
                    name = given[0].sample_id
                    self._compute(model, [given], {name: missing.pop(name)})
                return
            for given in undone:
                name = given[0].sample_id
                print(f"infer: the loss of sample {name} failed: {error!r}")  # for the log
                if not self._computes_another(model, name):
                    raise
                self.journals.add_loss(model, missing.pop(name), None, 0, f"{type(error).__name__}: {error}")

    def _computes_another(self, model: str | None, failed: str) -> bool:
        """Whether the engine still computes the loss of at least one of the three shortest other samples."""
        for given in self.given.shortest_others(failed, 3):
            try:
                self.engine.losses(given, model)
            except Exception as error:  # noqa: BLE001 - whatever the error, the engine does not answer
                print(f"infer: after sample {failed}, sample {given[0].sample_id} failed too: {error!r}")
            else:
                return True
        return False


def missing_losses(asked: Round, given: GivenAnswers, journals: Journals) -> set[str | None]:
    """The models (None: base) that a round's missing losses need. Samples that cannot have one need none."""
    return {
        variant.adapter
        for variant, chunks in asked.chunks.items()
        for chunk in chunks
        for sample in chunk
        if journals.find(variant.adapter, given.question(sample)) is None and not isinstance(given.render(sample), str)
    }


LossRecord = dict[str, Any]
"""A line of losses/<model>.jsonl: `id`, and `loss` (nats) and `tokens`, or `error`."""


def loss_records(asked: Round, given: GivenAnswers, journals: Journals) -> dict[Variant, list[LossRecord]]:
    """A round's records by variant, in the order of the samples. Requires that all losses are computed."""
    return {
        variant: [
            asked.from_shards[variant].get(sample["id"]) or _record(variant, sample, given, journals)
            for sample in samples
        ]
        for variant, samples in asked.samples.items()
    }


def _record(variant: Variant, sample: Sample, given: GivenAnswers, journals: Journals) -> LossRecord:
    """The record of one sample."""
    found = journals.find(variant.adapter, given.question(sample))
    if found is None:
        why = given.render(sample)
        assert isinstance(why, str), f"{sample['id']} of {variant.name} has no loss"
        return {"id": sample["id"], "error": why}
    if found["error"] is not None:
        return {"id": sample["id"], "error": found["error"]}
    return {"id": sample["id"], "loss": found["loss"], "tokens": found["tokens"]}


def write_losses(folder: Path, records: Mapping[Variant, list[LossRecord]]) -> dict[str, int]:
    """Write each variant's losses into the stage's folder. Returns the number of records in each file, by its name."""
    return {variant.losses: write_jsonl(folder / variant.losses, found) for variant, found in records.items()}


def missing_notes(records: Mapping[Variant, list[LossRecord]]) -> Iterator[str]:
    """Yield a line for each reason why samples have no loss, with the number of these samples."""
    without = {row["id"]: row["error"] for found in records.values() for row in found if "error" in row}
    reasons = Counter(error.partition(":")[0] for error in without.values())
    for reason, count in reasons.items():
        example = next(name for name, error in without.items() if error.partition(":")[0] == reason)
        yield f"{count} test samples have no loss, such as {example}: {without[example]}"
