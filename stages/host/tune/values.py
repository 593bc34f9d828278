"""Chooses the values of a recipe from what the data and the model are, each with its reason.

Sources: LoRA on all linear modules learns as well as all weights do where its rank holds the data, with about ten times
their learning rate, and bears large batches less well (Schulman and Thinking Machines Lab, "LoRA Without Regret",
2025). 2e-4 up to 13 billion parameters and 1e-4 above are QLoRA's (arXiv:2305.14314). The higher rates for small models
are those of the recipes here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from statistics import fmean
from typing import Any

from stages.hardware.speed import Workload
from stages.host.tune.base import Base
from stages.host.tune.data import OF_A_PICTURE, Seen

LEAST_TESTED, MOST_ASKED, MOST_ASKED_ON_CPU = 30, 300, 50
"""Conversations to hold out: at least so many where that is a fifth of them or less; at most so many, as base and
adapter both answer each of them."""

HELD = 0.995
"""Share of the conversations that train.max_length holds."""

LENGTH_IN_USE = 4096
"""infer.max_length to choose where conversations are shorter: people who chat with the model write more."""

LEAST_LENGTH = 256
"""Lowest train.max_length to choose: passes are packed, so that a lower one saves nothing."""


ASKED = "as asked for"
"""The reason for a value that the user set."""


@dataclass(frozen=True)
class Value:
    """A value of the recipe."""

    key: str
    """The full recipe key."""
    value: Any
    why: str
    """The reason, in one line."""


@dataclass(frozen=True)
class Machine:
    """What the values depend on besides data and model."""

    gpus: int
    """Number of GPUs; 0: a CPU."""
    engine: str
    """`infer.engine`."""
    engine_why: str

    @property
    def is_cpu(self) -> bool:
        """Whether there is no GPU."""
        return not self.gpus


class Values:
    """Values by full key, in the order in which they were chosen. What the user asked for comes before any choice."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self._asked = dict(asked)
        self._found: dict[str, Value] = {}

    def choose(self, key: str, value: Any, why: str) -> Any:
        """Choose a value, unless the user asked for another. Returns the one that counts."""
        if key in self._asked:
            value, why = self._asked.pop(key), ASKED
        self._found[key] = Value(key, value, why)
        return value

    def replace(self, key: str, value: Any, why: str) -> None:
        """Choose another value for a key that may have one."""
        self._found[key] = Value(key, value, why)

    def is_asked(self, key: str) -> bool:
        """Whether the user asked for this key's value."""
        return key in self._asked or (key in self._found and self._found[key].why == ASKED)

    def asked_value(self, key: str) -> Any:
        """The value that the user asked for, of a key that nothing was chosen for."""
        return self._asked[key]

    def value(self, key: str) -> Any:
        """The value that was chosen for a key."""
        return self._found[key].value

    def all(self) -> list[Value]:
        """All values: those that were chosen, then what else the user asked for."""
        return [*self._found.values(), *(Value(key, value, ASKED) for key, value in self._asked.items())]


def choose_values(seen: Seen, base: Base, machine: Machine, asked: Mapping[str, Any]) -> Values:
    """The values of a recipe for these data and this model. `asked` are those that the user set, by full key."""
    values = Values(asked)
    _choose_model(values, seen, base)
    trained = _choose_split(values, seen, machine)
    _choose_training(values, seen, base, machine, trained)
    _choose_inference(values, seen, base, machine)
    return values


def _choose_model(values: Values, seen: Seen, base: Base) -> None:
    """How the model is prompted."""
    values.choose("model.path", base.path, "the base; below the models mount, or absolute")
    if base.chat_template is not None:
        has = "its tokenizer has <|im_end|>" if base.chat_template == "chatml" else "its tokenizer has no <|im_end|>"
        values.choose("model.chat_template", base.chat_template, f"a base model without a chat template; {has}")
    if base.may_think and base.chat_template is None:
        has = "have thoughts" if seen.thinks else "have no thoughts"
        values.choose("model.enable_thinking", seen.thinks, f"a model that may think before it answers; the data {has}")


def _choose_split(values: Values, seen: Seen, machine: Machine) -> int:
    """What is held out. Returns how many conversations are trained on."""
    number = seen.conversations
    if seen.held_out:
        values.choose("data.test_fraction", 0, f"the data state their test split: {seen.held_out:,} conversations")
        tested = seen.held_out
    else:
        most = MOST_ASKED_ON_CPU if machine.is_cpu else MOST_ASKED
        wanted = max(ceil(number / 10), min(LEAST_TESTED, number // 5), 1)
        tested = min(wanted, most)
        limit = f"; not more, as base and adapter answer each{' on a CPU' if machine.is_cpu else ''}"
        values.choose(
            "data.test_fraction",
            _fraction(tested, number),
            f"about {tested:,} of {number:,} conversations are scored and never trained on"
            f"{limit if wanted > most else ''}",
        )
        if values.is_asked("data.test_fraction"):
            tested = ceil(number * values.value("data.test_fraction"))
    others = max(number - tested, 1)
    validated = min(round(others / 20), 100) if others >= 200 else 0
    values.choose(
        "data.validation_fraction",
        _fraction(validated, others),
        f"about {validated:,} more give the curve of the validation loss" if validated else "too few for a validation",
    )
    return others - validated


def learnt(values: Values, seen: Seen) -> Workload:
    """What the adapter learns from: conversations that are not held out and not too long, or are cut to the length."""
    shares = [1 - values.value(f"data.{name}_fraction") for name in ("test", "validation")]
    length, cut = values.value("train.max_length"), values.value("train.too_long") == "cut"
    lengths = [min(one, length) for one in seen.lengths if cut or one <= length] or [length]
    number = (seen.conversations - seen.held_out) * prod(shares) * len(lengths) / len(seen.lengths)
    return Workload(max(round(number), 1), fmean(lengths))


def _fraction(part: int, whole: int) -> float:
    """The shortest share with which the split takes `part` of `whole` conversations."""
    shares = [float(f"{part / whole:.{digits}g}") for digits in (1, 2, 3, 4)]
    exact = (part - 0.25) / whole if part else 0.0
    return next((share for share in shares if ceil(whole * share) == round(whole * share) == part), exact)


def _choose_training(values: Values, seen: Seen, base: Base, machine: Machine, trained: int) -> None:
    """How much and how fast the adapter learns."""
    epochs = 5 if trained < 200 else 3 if trained < 5_000 else 2 if trained < 30_000 else 1
    epochs = values.choose("train.epochs", epochs, f"passes over {trained:,} conversations: the fewer, the more often")
    batch = 4 if trained < 100 else 8 if trained < 1_000 else 16 if trained < 10_000 else 32
    batch = max(batch, machine.gpus)  # a sample for each GPU
    steps = max(ceil(trained * epochs / batch), 1)
    batch = values.choose(
        "train.effective_batch", batch, f"gives {steps:,} steps; LoRA learns less well in large batches"
    )
    steps = max(ceil(trained * epochs / batch), 1)
    size = base.shape.parameters if base.shape else 7_000_000_000
    rate = 1e-3 if size < 3e8 else 5e-4 if size < 1e9 else 2e-4 if size < 2e10 else 1e-4
    billions = f"{size / 1e9:.2g} billion parameters"
    values.choose("train.learning_rate", rate, f"usual for LoRA on a model of {billions}; the smaller, the higher")
    _choose_length(values, seen, base)
    values.choose("train.too_long", "leave out", "longer conversations; cut: their first turns are cut off instead")
    values.choose("train.learn", "all", "every answer of the assistant; last: only that of each conversation's end")
    if seen.pictures:
        why = f"pixels: a picture takes at most {OF_A_PICTURE:,} tokens where 28 x 28 pixels are one"
        values.choose("train.max_pixels", OF_A_PICTURE * 28 * 28, why)
    rank = 32 if trained >= 30_000 else 16
    rank = values.choose("train.rank", rank, "holds what so many conversations teach; higher: more memory, no faster")
    values.choose("train.alpha", 2 * rank, "twice the rank, as is usual: it scales what is learnt")
    values.choose("train.target_modules", ["all-linear"], "attention and MLP: attention alone learns less")
    if epochs > 1:
        values.choose("train.dropout", 0.05, "against learning by heart in several epochs")
    else:
        values.choose("train.dropout", 0.0, "what is seen once is not learnt by heart")
    every = min(max(steps // 10, 10), 200)
    values.choose("train.checkpoint_every", every, "steps between two checkpoints: a kill loses no more")
    values.choose("train.log_every", 1 if steps < 100 else 5, "steps between two points of the loss curve")
    values.choose("train.adapters", [{"name": "tuned"}], "one adapter, trained on all data")


def _choose_length(values: Values, seen: Seen, base: Base) -> None:
    """train.max_length: the smallest that holds HELD of the conversations, and all if these are not much longer."""
    held = seen.lengths[min(ceil(HELD * len(seen.lengths)), len(seen.lengths)) - 1]
    if seen.longest <= 1.25 * held:
        held = seen.longest
    length = max(rounded_length(held), LEAST_LENGTH)
    why = "" if base.context is None or length <= base.context else f", the model's context is {base.context:,}"
    length = length if base.context is None else min(length, base.context)
    values.choose("train.max_length", length, f"{held_text(seen, length)}{why}")


def held_text(seen: Seen, length: int) -> str:
    """How many of the conversations have at most so many tokens, in words."""
    if seen.longest <= length:
        return f"tokens: all conversations are shorter, the longest has about {seen.longest:,}"
    return (
        f"tokens: {100 * seen.share(length):.1f} % of the conversations are shorter; train.too_long is for the others"
    )


def rounded_length(tokens: int) -> int:
    """A number of tokens, rounded up to a multiple of 64, of 256 above 1,024, and of 1,024 above 8,192."""
    step = 64 if tokens <= 1024 else 256 if tokens <= 8192 else 1024
    return -(-tokens // step) * step


def _choose_inference(values: Values, seen: Seen, base: Base, machine: Machine) -> None:
    """How the held-out conversations are answered."""
    values.choose("infer.engine", machine.engine, machine.engine_why)
    answers = seen.answers or (1,)
    usual = answers[min(ceil(0.99 * len(answers)), len(answers)) - 1]
    most = 256 if machine.is_cpu else 2048
    most = most if base.context is None else min(most, base.context // 2)
    new = min(max(-(-usual // 32) * 32 + 32, 32), most)
    why = f"99 of 100 answers in the data have at most {usual:,} tokens"
    new = values.choose("infer.max_new_tokens", new, why if new < most else f"{why}; more would take long")
    longest = max(least_inference_length(values, base), LENGTH_IN_USE)
    longest = longest if base.context is None else max(min(longest, base.context), new + 16)
    values.choose("infer.max_length", longest, "tokens of prompt and answer; `lorry chat` and `lorry serve` keep to it")
    values.choose("infer.losses", True, "base and tuned model are also compared by the loss of the data's own answers")


def least_inference_length(values: Values, base: Base) -> int:
    """The lowest infer.max_length with which the longest conversation can be answered."""
    new = int(values.value("infer.max_new_tokens"))
    longest = rounded_length(values.value("train.max_length") + new)
    return longest if base.context is None else max(min(longest, base.context), new + 16)
