"""LoRA's dropout as a function of the sample: the mask is computed from numbers, not drawn and kept.

Whether an input of LoRA is dropped depends on the seed, the step, the sample, the token's place in the sample, the
module and the feature, and on nothing else. So the mask needs no memory, is the same when the backward pass makes it
again, and does not depend on how samples are packed or shared over GPUs; and no random state has to be saved.

The hash is the finalizer of MurmurHash3 (public domain, Austin Appleby), over 32 bits. `kernels.py` has it in Triton.
"""

import random
from dataclasses import dataclass

import torch

FEATURE = -1640531535
"""Odd factor of the feature's number (0x9E3779B1, the golden ratio's) as a signed 32-bit integer."""
_FIRST, _SECOND = -2048144789, -1028477387  # MurmurHash3's factors 0x85EBCA6B and 0xC2B2AE35, signed


@dataclass(frozen=True)
class Dropout:
    """Dropout in one pass."""

    probability: float
    rows: torch.Tensor
    """A number for each token of the pass; shape [tokens], int32. `row_numbers` makes it."""

    @property
    def threshold(self) -> int:
        """A hash, counted from the smallest, is kept from this number on."""
        return int(self.probability * 2**32)

    @property
    def upscale(self) -> float:
        """Factor of an input that is kept."""
        return 1 / (1 - self.probability)

    def keep(self, salt: int, features: int) -> torch.Tensor:
        """Which inputs of a module are kept; shape [tokens, features], bool. `salt` is the module's own number."""
        number = torch.arange(features, dtype=torch.int32, device=self.rows.device) * FEATURE + salt
        hashed = _mix(self.rows[:, None] ^ number[None, :])
        # the numbers are signed, the threshold counts from the smallest
        return hashed >= self.threshold - 2**31

    def for_rows(self, rows: int) -> "Dropout":
        """The same dropout for a module that reads `rows` rows; in a vision tower these are patches, not tokens. Which
        of them are dropped depends on the pass."""
        if rows == len(self.rows):
            return self
        places = torch.arange(rows, dtype=torch.int32, device=self.rows.device)
        return Dropout(self.probability, _mix(self.rows[0] ^ (places * FEATURE)))

    def apply(self, x: torch.Tensor, salt: int) -> torch.Tensor:
        """The inputs of a module with those dropped that `keep` drops, and the others scaled up; shape as `x`,
        [tokens, features]."""
        return torch.where(self.keep(salt, x.shape[1]), x, 0.0) * self.upscale


def row_numbers(lengths: list[int], keys: list[int]) -> torch.Tensor:
    """A number for each token of a pass; shape [tokens], int32. `lengths` and `keys` are those of its samples."""
    places = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])
    numbers = torch.tensor(keys, dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    return _mix(numbers ^ (places * FEATURE))


def sample_key(seed: int, step: int, place: int) -> int:
    """The key of a sample in a step, for `row_numbers`. `place` is the sample's place in the step."""
    return random.Random(f"{seed} {step} {place}").getrandbits(32) - 2**31


def _mix(numbers: torch.Tensor) -> torch.Tensor:
    """Spread every bit of each number over all its bits; shape and type (int32) stay."""
    numbers = numbers ^ (numbers >> 16).bitwise_and_(0xFFFF)  # int32's shift copies the sign
    numbers *= _FIRST
    numbers ^= (numbers >> 13).bitwise_and_(0x7FFFF)
    numbers *= _SECOND
    return numbers.bitwise_xor_((numbers >> 16).bitwise_and_(0xFFFF))
