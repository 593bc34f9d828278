"""Turns an adapter's samples into token sequences, on all cores, and keeps them for later starts."""

import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from stages.contract.errors import DataError, DoesNotFitError
from stages.contract.files import digest_of, read_json, read_jsonl, remove, write_json
from stages.contract.mixes import samples_with_pictures, training_samples, validation_samples
from stages.contract.records import Message
from stages.models.cutting import cut_conversation
from stages.models.pictures import is_read_in_training, open_picture
from stages.models.rendering import Renderer
from stages.train.job import Job
from stages.train.samples import NOT_LEARNT, Facts, Samples, SizedPicture, TokenSequence, write_samples
from stages.train.swift import SwiftReader

SPLITS = ("train", "validation")

BATCH = 64
"""Samples that a process encodes at a time."""
MOST_PROCESSES = 32
"""A container may have fewer cores than it sees."""


def encode_samples(job: Job, renderer: Renderer) -> None:
    """Write the sequences of both splits below the job's work folder, unless they are there.

    They depend on the samples, the model's tokenizer and template, max_length, max_pixels, learn and too_long; if one
    of these changes, they are written again. Raises DataError for a sample without an answer to learn.
    """
    folder = job.work / "samples"
    chosen = {split: _chosen(job, split) for split in SPLITS}
    splits = {split: samples for split, (samples, _) in chosen.items()}
    names = [job.model_settings.swift_type, job.model_settings.swift_template]
    settings = job.settings
    learnt = [settings.max_length, settings.max_pixels, settings.learn, settings.too_long]
    key = digest_of([_model_files(job.model), names, job.chat.facts, learnt, splits])
    if (read_json(folder / "key.json") or {}).get("key") == key:
        return
    remove(folder)
    for split, samples in splits.items():
        found = Facts()
        write_samples(folder / split, _encoded(job, renderer, samples, found), found)
    write_json(folder / "key.json", {"key": key, "unused": chosen["train"][1]})


def read_encoded(job: Job) -> tuple[Samples, Samples, dict[str, int]]:
    """The training and the validation samples that `encode_samples` wrote, and for a connector the number of unused
    training samples by reason."""
    folder = job.work / "samples"
    train, validation = (Samples(folder / split) for split in SPLITS)
    return train, validation, read_json(folder / "key.json")["unused"]


def _chosen(job: Job, split: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The adapter's samples of a split, by its data mix; for a connector, also the number of unused ones by reason."""
    sources = job.train if split == "train" else job.validation
    samples = [sample for source in sources for sample in read_jsonl(source)]
    chosen = validation_samples(samples, job.mix) if split != "train" else training_samples(samples, job.mix, job.seed)
    if not job.settings.trains_connector:
        return chosen, {}
    assert job.settings.connector is not None
    return samples_with_pictures(chosen, job.settings.connector.most_samples, job.seed)


def _model_files(model: Path) -> list[Any]:
    """What of a model folder decides how samples are encoded: sizes and times of its small text files."""
    files = sorted(path for path in model.iterdir() if path.suffix in (".json", ".jinja", ".txt", ".model"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


@dataclass(frozen=True)
class Encoded:
    """What encoding makes of a sample."""

    sample: str
    """The sample's id."""
    sequences: list[TokenSequence]
    """Empty if one is longer than max_length, and its conversation cannot or must not be cut."""
    control_words: dict[str, int]
    """How often it says each control word."""
    note: str | None = None
    """A sentence for the log."""
    is_cut: bool = False
    """Whether a conversation begins at a later turn, to fit max_length."""
    is_text: bool = False


@dataclass(frozen=True)
class SampleEncoder:
    """Encodes one sample; each process that shares the work has a copy."""

    renderer: Renderer
    run: Path
    max_length: int
    max_pixels: int | None
    swift: SwiftReader | None = None
    """Reads pictures in place of the renderer's rules; None: the renderer has rules."""
    only_last: bool = False
    """Whether only the last answer of a conversation is learnt."""
    cuts: bool = False
    """Whether a conversation that is too long is cut between turns."""

    def __call__(self, sample: dict[str, Any]) -> Encoded:
        """A sample's sequences; none if it is too long.

        Raises DataError for a picture that is missing or cannot be read, and for a sample without an answer to learn.
        """
        name = str(sample["id"])
        if sample.get("text") is not None:
            found = self.renderer.text_sequences(sample["text"], self.max_length)
            said = self.renderer.control_words_in(sample)
            return Encoded(name, [_token_sequence(one.tokens, one.labels) for one in found], dict(said), is_text=True)
        sequences, note = self._sequences(sample)
        if not any(sequence.targets for sequence in sequences):
            raise DataError(f"sample {name}: has no answer to learn; run preprocess again")
        is_cut = False
        if not self._fits(sequences):
            cut = self._cut(sample) if self.cuts else None
            if cut is None:
                return Encoded(name, [], {}, note)
            (sequences, note), sample, is_cut = self._sequences(cut), cut, True
        said = self.renderer.control_words_in(sample)
        return Encoded(name, sequences, dict(said), note, is_cut)

    def _cut(self, sample: dict[str, Any]) -> dict[str, Any] | None:
        """A conversation from a later turn on; None if not even its last exchange fits."""

        def with_turns(messages: list[Message], images: list[str]) -> dict[str, Any]:
            return {**sample, "messages": messages, "images": images}

        found = cut_conversation(
            sample["messages"],
            sample.get("images") or [],
            lambda messages, images: self._fits(self._sequences(with_turns(messages, images))[0]),
        )
        return with_turns(*found) if found else None

    def _fits(self, sequences: list[TokenSequence]) -> bool:
        """Whether no sequence is too long."""
        return max(sequence.length for sequence in sequences) <= self.max_length

    def _sequences(self, sample: dict[str, Any]) -> tuple[list[TokenSequence], str | None]:
        """The sequences of a conversation, of any length, and a sentence for the log."""
        name, files, tools = str(sample["id"]), sample.get("images") or [], sample.get("tools")
        if files and self.swift is not None:
            sequence, note = self.swift.encode(self.renderer, sample, self.only_last)
            return [sequence], note
        found = self.renderer.training_sequences(sample["messages"], self.only_last, bool(files), tools)
        if not files:
            return [_token_sequence(one.tokens, one.labels) for one in found], None
        pictures = [self._picture(file, name) for file in files]
        token = self.renderer.picture_token
        sequences = []
        for one in found:  # an earlier answer's sequence has only the pictures before it
            shown = pictures[: one.tokens.count(token)]
            whole = one.repeat_placeholders([picture.tokens for picture in shown], token)
            sequences.append(_token_sequence(whole.tokens, whole.labels, tuple(shown)))
        if len(shown) != len(pictures):
            raise DataError(
                f"sample {name}: has {len(pictures)} pictures but {len(shown)} <image>; run preprocess again"
            )
        return sequences, None

    def _picture(self, file: str, sample: str) -> SizedPicture:
        """A sample's picture at the size that the model reads. Reads only the file's header."""
        path = self.run / file
        try:
            found = open_picture(path, self.renderer.rules, self.max_pixels)
        except DataError as error:
            raise DataError(
                f"{path}: missing or not a picture, but sample {sample} needs it; run preprocess again"
            ) from error
        return SizedPicture(file, found.width, found.height, found.tokens)


def _token_sequence(tokens: list[int], labels: list[int], pictures: tuple[SizedPicture, ...] = ()) -> TokenSequence:
    """A sequence with its learnt tokens marked."""
    return TokenSequence(np.array(tokens, np.int32), np.array(labels, np.int64) != NOT_LEARNT, pictures)


def _encoded(
    job: Job, renderer: Renderer, samples: list[dict[str, Any]], facts: Facts
) -> Iterator[list[TokenSequence]]:
    """Yield the sequences of each sample that fits max_length, in order. Adds to `facts`."""
    settings = job.settings
    swift = None
    if not is_read_in_training(job.model) and any(sample.get("images") for sample in samples):
        swift = SwiftReader(job.model, job.model_settings, job.run, settings.max_pixels)
        swift.load()
    only_last, cuts = settings.learn == "last", settings.too_long == "cut"
    encode = SampleEncoder(renderer, job.run, settings.max_length, settings.max_pixels, swift, only_last, cuts)
    processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES, -(-len(samples) // BATCH))
    if processes <= 1:
        yield from _kept(map(encode, samples), facts)
        return
    renderer.tokenizer  # noqa: B018 - loaded once, before these processes are forked
    # they use no GPU, even where this one does; each gets the encoder once, not with each batch
    try:
        with ProcessPoolExecutor(processes, get_context("fork"), _begin_to_encode, (encode,)) as pool:
            yield from _kept(pool.map(_encode_in_pool, samples, chunksize=BATCH), facts)
    except BrokenProcessPool as error:
        raise DoesNotFitError(
            f"{job.work}: a process that encodes samples was ended from outside, as when the machine's memory runs out;"
            " free memory and run the same command again"
        ) from error


_ENCODERS: list[SampleEncoder] = []
"""The encoder of this process, if it is one of those that share the work."""


def _begin_to_encode(encoder: SampleEncoder) -> None:
    """Prepare a process that shares the work. It leaves Ctrl-C to its parent, with which it dies, and ends at once at
    a SIGTERM: only that ends the others if one of them dies."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _ENCODERS.append(encoder)


def _encode_in_pool(sample: dict[str, Any]) -> Encoded:
    """A sample's sequences, by this process's encoder."""
    return _ENCODERS[0](sample)


def _kept(results: Iterable[Encoded], facts: Facts) -> Iterator[list[TokenSequence]]:
    """Yield the sequences of the samples that have some; add the others, the control words and notes to `facts`."""
    for one in results:
        if one.note is not None and one.note not in facts.notes:
            facts.notes.append(one.note)
        if not one.sequences:
            facts.left_out.append(one.sample)
            continue
        if one.control_words:
            facts.control_words.append(one.control_words)
        if one.is_cut:
            facts.cut.append(one.sample)
        if one.is_text and len(one.sequences) > 1:
            facts.pieces[one.sample] = len(one.sequences)
        yield one.sequences
