"""Samples as the model reads them, encoded once for an adapter and kept beside its checkpoints.

    <work>/samples/<split>/
        tokens.npy      token ids of all sequences, one after the other, int32
        learnt.npy      for each token, whether it is learnt, bool
        ends.npy        for each sequence, its end in the two arrays above, int64
        sequences.npy   for each sample, its end in `ends`: most samples are one sequence, int64
        facts.json      `Facts`, and the pictures or the row of each sequence that has some

A sample is one sequence, unless the chat template leaves out earlier thoughts (`stages.models.rendering`) or a text is
longer than max_length. The arrays are mapped, not read: every process and every later start uses the same pages of
memory.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stages.contract.files import flush, read_json, remove, write_json

NOT_LEARNT = -100
"""Label of a token that is not learnt, as in transformers."""


TRIED, PROBED = 64, 256
"""Samples among which `Samples.probes` looks, and tokens of text that it takes of each."""


@dataclass(frozen=True)
class SizedPicture:
    """A picture of a sequence, at the size that the model reads."""

    path: str
    """Relative to the run's folder."""
    width: int
    height: int
    tokens: int


@dataclass(frozen=True)
class TokenSequence:
    """Tokens that the model reads at once."""

    tokens: np.ndarray
    """Token ids, int32; shape [length]. A picture's placeholder is repeated for each of its tokens."""
    learnt: np.ndarray
    """Whether a token is learnt, bool; shape [length]."""
    pictures: tuple[SizedPicture, ...] = ()
    row: dict[str, Any] | None = None
    """The messages and the names of the pictures, for a model that reads pictures through ms-swift."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def targets(self) -> int:
        """Number of tokens with a loss. A first token has none: nothing before it predicts it."""
        return int(self.learnt[1:].sum())

    def unlearnt(self) -> "TokenSequence":
        """The same sequence without a token that is learnt."""
        return replace(self, learnt=np.zeros_like(self.learnt))


@dataclass
class Facts:
    """What encoding found out about the samples of a split."""

    left_out: list[str] = field(default_factory=list)
    """Ids of samples that are longer than max_length."""
    cut: list[str] = field(default_factory=list)
    """Ids of conversations that begin at a later turn, to fit max_length."""
    pieces: dict[str, int] = field(default_factory=dict)
    """By the id of each text that is longer than max_length, the number of sequences that it is cut into."""
    control_words: list[dict[str, int]] = field(default_factory=list)
    """How often each control word occurs as text in each kept sample that has some."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the log."""


class Samples(Sequence[list[TokenSequence]]):
    """The samples of one split, read from a folder that `write_samples` wrote."""

    def __init__(self, folder: Path) -> None:
        self._tokens, self._learnt, self._ends, self._sequences = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "learnt", "ends", "sequences")
        )
        values = read_json(folder / "facts.json")
        self.facts = Facts(**values["facts"])
        self._pictures, self._rows = (
            {int(place): value for place, value in values[name].items()} for name in ("pictures", "rows")
        )

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, number: Any) -> Any:
        """The sequences of a sample."""
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        first = int(self._sequences[number - 1]) if number else 0
        return [self._sequence(place) for place in range(first, int(self._sequences[number]))]

    def _sequence(self, place: int) -> TokenSequence:
        """One of all sequences."""
        begin, end = int(self._ends[place - 1]) if place else 0, int(self._ends[place])
        pictures = tuple(SizedPicture(**one) for one in self._pictures.get(place, ()))
        return TokenSequence(self._tokens[begin:end], self._learnt[begin:end], pictures, self._rows.get(place))

    @property
    def has_rows(self) -> bool:
        """Whether a sequence has pictures that are read through ms-swift."""
        return bool(self._rows)

    def probes(self) -> list[TokenSequence]:
        """Three of the first sequences, one with a picture if one of them has some, for a check of the model. Text
        beyond PROBED tokens is cut off."""
        first = [sequence for sample in self[:TRIED] for sequence in sample]
        seeing, reading = ([one for one in first if bool(one.pictures) == seen] for seen in (True, False))
        chosen = [*seeing[:1], *reading[:3]][:3] or first
        return [one if one.pictures else TokenSequence(one.tokens[:PROBED], one.learnt[:PROBED]) for one in chosen]

    @cached_property
    def longest(self) -> int:
        """Length of the longest sequence, in tokens; 0 without samples."""
        return int(np.diff(self._ends, prepend=0).max(initial=0))


def write_samples(folder: Path, samples: Iterable[list[TokenSequence]], facts: Facts) -> None:
    """Write the samples of a split to a folder, which appears when it is complete."""
    partial = folder.with_name(f".{folder.name}")
    remove(partial)
    partial.mkdir(parents=True)
    sequences: list[TokenSequence] = []
    counts = []
    for sample in samples:
        sequences += sample
        counts.append(len(sequences))
    none = np.zeros(0, np.int32)
    np.save(partial / "tokens.npy", np.concatenate([none, *(one.tokens for one in sequences)], dtype=np.int32))
    np.save(partial / "learnt.npy", np.concatenate([none.astype(bool), *(one.learnt for one in sequences)]))
    np.save(partial / "ends.npy", np.cumsum([one.length for one in sequences], dtype=np.int64))
    np.save(partial / "sequences.npy", np.array(counts, np.int64))
    pictures = {
        place: [asdict(picture) for picture in one.pictures] for place, one in enumerate(sequences) if one.pictures
    }
    rows = {place: one.row for place, one in enumerate(sequences) if one.row is not None}
    write_json(partial / "facts.json", {"facts": asdict(facts), "pictures": pictures, "rows": rows})
    flush(partial)
    remove(folder)
    partial.rename(folder)
