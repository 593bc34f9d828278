"""How an optimizer step is computed: in passes over packed samples, shared by any number of processes."""

from dataclasses import dataclass

LEAST_ROUNDING = 128
"""Tokens to whose multiple `rounded_up` rounds at least."""


@dataclass(frozen=True)
class StepPlan:
    """How a step is computed. Only `effective_batch` changes what is learnt; the rest changes memory and speed."""

    effective_batch: int
    """Samples of a step, over all processes: exactly the recipe's, whatever their number."""
    processes: int
    pass_tokens: int
    """Most tokens of a pass, which holds whole samples; a longer sample has a pass of its own."""
    checkpointed_layers: int = 0
    """Number of decoder layers that compute their activations again in the backward pass: the first ones."""

    @property
    def samples_of_a_process(self) -> int:
        """The most samples of a step that one process gets, if all are of the same length."""
        return -(-self.effective_batch // self.processes)

    def __str__(self) -> str:
        by = f" by {self.processes} processes" if self.processes > 1 else ""
        layers = f", with {self.checkpointed_layers} checkpointed layers" if self.checkpointed_layers else ""
        return (
            f"{count_samples(self.effective_batch)} a step in passes of at most {self.pass_tokens:,} tokens{by}{layers}"
        )


def rounded_up(number: int) -> int:
    """The tokens of a short pass with its padding: a multiple of 128, or of a sixteenth of the power of two below. Few
    shapes occur then, and at most 6% of a pass of 2,000 tokens is padding."""
    return number + -number % max(LEAST_ROUNDING, 1 << max(number.bit_length() - 5, 0))


def rounded_targets(targets: int, tokens: int) -> int:
    """The targets of a short pass with padding: a power of two, at least 128, or all of its `tokens`. Coarser than
    `rounded_up`, as the two numbers of a pass vary independently; only the head computes for them."""
    return min(max(LEAST_ROUNDING, 1 << (targets - 1).bit_length() if targets else 0), tokens)


def count_samples(number: int) -> str:
    """A number of samples in words, such as `1 sample`."""
    return f"{number:,} sample{'' if number == 1 else 's'}"
