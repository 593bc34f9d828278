"""The losses of given answers: how probable base and adapters find what the test samples' own answers say.

The tokens that count are those that training would learn of the same conversation. Base and adapters therefore have
their losses on the same tokens.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.contract.errors import DataError, UsageError
from stages.contract.files import digest_of, write_jsonl
from stages.contract.recipe import Recipe
from stages.contract.records import PLACE, Message, Sample, escape_places
from stages.engines.engine import GivenAnswer, predicted_places
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
