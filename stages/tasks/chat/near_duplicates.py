"""Near-duplicates among many texts, found in time linear in their length.

A text is the set of its runs of GRAM bytes. Two texts are near-duplicates if the sets' Jaccard similarity is high: the
share of the runs in either that both have. Candidates are found by MinHash with one permutation (Li, Owen and Zhang
2012), its empty bins filled from their neighbours (Shrivastava and Li 2014), in bands (Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, chapter 3). The similarity of each candidate pair is then counted.

What many texts share, such as the words of one instruction, says nothing: runs that more than `most` texts have do not
count.
"""

from collections.abc import Iterator

import numpy as np

from stages.tasks.common.groups import Groups

GRAM = 16
"""Bytes of a run: 16 Latin letters or 5 Chinese characters."""
MOST_GRAMS = 2**25
"""Runs that are kept in all, 4 bytes each; with more text, a sample of them by their hash."""
LEAST_GRAMS = 8
"""Runs that a text must have left for a comparison."""
BINS, ROWS = 64, 4
"""Hashes in a text's signature, and in each band of it."""
TOLERANCE = 0.2
"""How far below a pair's similarity its share of equal bins may be; the standard error is 0.06 at most."""
NEIGHBOURS = 3
"""Further texts of a band with the same hashes to which each is compared."""
PIECE = 2**20
"""Bytes of a text that are hashed at a time."""
_FACTOR, _MIX, _MASK = 0x9E3779B97F4A7C15, np.uint64(0xBF58476D1CE4E5B9), 2**64 - 1


class NearDuplicates:
    """Texts, of which the pairs of near-duplicates are to be found."""

    def __init__(self, characters: int) -> None:
        """`characters`: about how many all texts will have."""
        self._bits = max(0, (characters // MOST_GRAMS).bit_length())
        self._hashes: list[np.ndarray] = []

    def add(self, text: str) -> None:
        """Add the next text."""
        data = text.encode()
        pieces = [_hashes(data[at : at + PIECE + GRAM - 1]) for at in range(0, max(len(data) - GRAM + 1, 0), PIECE)]
        sampled = [piece[piece & np.uint64(2**self._bits - 1) == 0] >> np.uint64(32) for piece in pieces]
        found = np.concatenate(sampled).astype(np.uint32) if sampled else np.zeros(0, np.uint32)
        self._hashes.append(np.unique(found))

    def pairs(self, threshold: float, most: float) -> Iterator[tuple[int, int]]:
        """Yield pairs of texts, by the order in which they were added, so that joining them joins all near-duplicates:
        texts whose similarity is at least `threshold`. Forgets the texts."""
        kept = self._without_common(int(most))
        self._hashes = []
        usable = np.flatnonzero([len(one) >= LEAST_GRAMS for one in kept])
        if len(usable) < 2:
            return
        signatures = _signatures([kept[place] for place in usable])
        joined = Groups()
        for one, other in _candidates(signatures, threshold - TOLERANCE):
            first, second = int(usable[one]), int(usable[other])
            if joined.name_of(str(first)) == joined.name_of(str(second)):
                continue
            shared = len(np.intersect1d(kept[first], kept[second], assume_unique=True))
            if shared >= threshold * (len(kept[first]) + len(kept[second]) - shared):
                joined.join(str(first), str(second))
                yield first, second

    def _without_common(self, most: int) -> list[np.ndarray]:
        """The hashes of each text, without those that more than `most` texts have."""
        if not self._hashes:
            return []
        everything = np.concatenate(self._hashes)
        everything.sort()  # in place: this is most of what the search takes in memory
        later, earlier = everything[most:], everything[: max(len(everything) - most, 0)]
        common = np.unique(later[later == earlier])
        del everything, later, earlier
        if not len(common):
            return self._hashes
        places = (np.minimum(np.searchsorted(common, one), len(common) - 1) for one in self._hashes)
        return [one[common[place] != one] for one, place in zip(self._hashes, places, strict=True)]


def _hashes(data: bytes) -> np.ndarray:
    """The hash (uint64) of each run of GRAM bytes, computed for runs of 2, 4, 8 and 16 bytes from those half as
    long."""
    found = np.frombuffer(data, np.uint8).astype(np.uint64) + np.uint64(1)
    step, factor = 1, _FACTOR
    while step < GRAM:
        found = found[:-step] * np.uint64(factor) + found[step:]
        step, factor = 2 * step, factor * factor & _MASK
    found ^= found >> np.uint64(29)
    found *= _MIX
    found ^= found >> np.uint64(32)
    return found


def _signatures(hashes: list[np.ndarray]) -> np.ndarray:
    """The signature of each text, uint32 of shape [texts, BINS]: the smallest hash in each bin, by the first bits of a
    hash. An empty bin gets that of the next one that is not."""
    found, filled = np.zeros((len(hashes), BINS), np.uint32), np.zeros((len(hashes), BINS), bool)
    for row, one in enumerate(hashes):
        bins, first = np.unique(one >> np.uint32(32 - BINS.bit_length() + 1), return_index=True)
        found[row, bins], filled[row, bins] = one[first], True  # a text's hashes are in order
    while len(rows := np.flatnonzero(~filled.all(axis=1))):
        some, full = found[rows], filled[rows]
        beside, beside_full = np.roll(some, -1, axis=1), np.roll(full, -1, axis=1)
        found[rows], filled[rows] = np.where(full, some, beside), full | beside_full
    return found


def _candidates(signatures: np.ndarray, least: float) -> Iterator[tuple[int, int]]:
    """Yield pairs of texts with the same hashes in a band, each once, whose signatures are equal in at least the share
    `least` of the bins."""
    count, found = len(signatures), []
    for band in range(0, BINS, ROWS):
        key = np.zeros(count, np.uint64)
        for row in range(band, band + ROWS):
            key = key * np.uint64(_FACTOR) + signatures[:, row]
        order = np.argsort(key, kind="stable")
        key = key[order]
        for ahead in range(1, min(NEIGHBOURS, count - 1) + 1):
            same = np.flatnonzero(key[ahead:] == key[:-ahead])
            found.append(order[same] * count + order[same + ahead])
    codes = np.unique(np.concatenate(found))
    for at in range(0, len(codes), PIECE // BINS):
        one, other = np.divmod(codes[at : at + PIECE // BINS], count)
        alike = (signatures[one] == signatures[other]).mean(axis=1) >= least
        yield from zip(one[alike].tolist(), other[alike].tolist(), strict=True)
