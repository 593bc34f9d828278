"""A pass: packed sequences as tensors, and the sum of their losses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from stages.hardware.step import rounded_targets, rounded_up
from stages.models.head import Head
from stages.train.dropout import row_numbers
from stages.train.head import loss_sum
from stages.train.samples import NOT_LEARNT, TokenSequence
from stages.train.swift import SwiftReader
from stages.train.vision import PictureReader, embed, text_decoder, three_places


@dataclass(frozen=True)
class PassTensors:
    """The inputs of a pass."""

    tokens: torch.Tensor
    """Token ids of all sequences; shape [tokens], int64."""
    places: torch.Tensor
    """Place of each token in its sequence; shape [tokens], int64. Shape [4, tokens] for the Qwen2-VL family: the rows
    of `three_places` follow."""
    bounds: torch.Tensor
    """Where each sequence begins, and the number of tokens; shape [sequences + 1], int32."""
    sources: torch.Tensor
    """Places in `tokens` of the tokens before each target, whose outputs predict it; shape [targets], int64."""
    targets: torch.Tensor
    """Ids of the learnt tokens; shape [targets], int64. NOT_LEARNT in padding."""
    rows: torch.Tensor
    """A number for each token, for dropout; shape [tokens], int32."""
    predicts: torch.Tensor
    """For each token, the place in `targets` of what its output predicts; -1: nothing. Shape [tokens], int64."""
    pictures: dict[str, Any] = field(default_factory=dict)
    """As the reader of `Vision` returns them."""

    def to(self, device: torch.device) -> "PassTensors":
        """The same tensors on a device. Does not wait for the copies to a GPU."""

        def moved(tensor: Any) -> Any:
            """A tensor on the device; anything else as it is."""
            if not isinstance(tensor, torch.Tensor):
                return tensor
            if device.type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        own = {name: moved(getattr(self, name)) for name in TENSORS}
        return PassTensors(**own, pictures={name: moved(tensor) for name, tensor in self.pictures.items()})

    def copy_from(self, other: "PassTensors") -> None:
        """Overwrite these tensors with those of another pass of the same shapes, without pictures."""
        for name in TENSORS:
            getattr(self, name).copy_(getattr(other, name), non_blocking=True)


TENSORS = ("tokens", "places", "bounds", "sources", "targets", "rows", "predicts")
"""The fields of PassTensors that every pass has."""


def pass_tensors(
    sequences: Sequence[TokenSequence], keys: Sequence[int] | None, vision: "Vision | None" = None
) -> PassTensors:
    """The tensors of packed sequences, on the CPU. `keys` are the sequences' keys for dropout, from `sample_key`; None
    if nothing is dropped. `vision`: how a vision-language model reads pictures. Raises DataError for a picture that
    cannot be read."""
    lengths = [sequence.length for sequence in sequences]
    tokens = torch.from_numpy(np.concatenate([sequence.tokens for sequence in sequences]).astype(np.int64))
    places = torch.cat([torch.arange(length) for length in lengths])
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    is_target = np.concatenate([sequence.learnt for sequence in sequences])
    is_target[bounds[:-1].numpy()] = False  # nothing in its own sequence predicts a first token
    targets = torch.from_numpy(is_target.nonzero()[0])
    rows = row_numbers(lengths, list(keys) if keys is not None else [0] * len(lengths))
    pictures: dict[str, Any] = {}
    if vision is not None:
        pictures = vision.reader.read(sequences)
        if vision.factor is not None and vision.placeholder is not None:
            three = [three_places(sequence, vision.placeholder, vision.factor) for sequence in sequences]
            places = torch.cat([places[None], torch.cat(three, 1)])
    predicts = torch.full_like(tokens, -1)
    predicts[targets - 1] = torch.arange(len(targets))
    return PassTensors(tokens, places, bounds, targets - 1, tokens[targets], rows, predicts, pictures)


def padded(tensors: PassTensors, sequences: int) -> PassTensors:
    """A pass with rounded numbers of tokens and targets, and with room for `sequences` sequences.

    The additional tokens are a sequence of their own, without targets, and the remaining sequences are empty.
    """
    length = rounded_up(len(tensors.tokens))
    targets = rounded_targets(len(tensors.targets), length)
    more, more_targets = length - len(tensors.tokens), targets - len(tensors.targets)
    pad = torch.nn.functional.pad
    return PassTensors(
        pad(tensors.tokens, (0, more)),
        torch.cat([tensors.places, torch.arange(more).expand(*tensors.places.shape[:-1], more)], -1),
        torch.cat([tensors.bounds, torch.full((sequences + 2 - len(tensors.bounds),), length, dtype=torch.int32)]),
        pad(tensors.sources, (0, more_targets)),
        pad(tensors.targets, (0, more_targets), value=NOT_LEARNT),
        pad(tensors.rows, (0, more)),
        pad(tensors.predicts, (0, more), value=-1),
    )


@dataclass(frozen=True)
class Vision:
    """How a vision-language model reads pictures."""

    reader: PictureReader | SwiftReader
    placeholder: int | None
    """Id of the token that marks a picture's tokens; None: the reader returns all inputs of the model's own forward
    pass, for one sequence."""
    factor: int | None = None
    """Side of a token in pixels, for models whose tokens have three places; None for others."""


def hidden_states(
    model: Any, tensors: PassTensors, longest: int | None, placeholder: int | None = None
) -> torch.Tensor:
    """The last hidden states of a pass, [tokens, size].

    `model` is a model of transformers. `longest` is at least the length of the longest sequence, for a model with
    `use_packed_attention`; None: the pass has one sequence, and the attention is the model's own. `placeholder` is the
    token of a picture.
    """
    places = tensors.places
    bounds = {"cu_seq_lens_q": tensors.bounds, "max_length_q": longest} if longest else {}
    hidden: torch.Tensor = text_decoder(model)(
        inputs_embeds=embed(model, tensors.tokens, tensors.pictures, placeholder),
        position_ids=places[None] if places.dim() == 1 else places[:, None],
        use_cache=False,
        **bounds,
    ).last_hidden_state[0]
    return hidden


def pass_sums(
    model: Any, head: Head, tensors: PassTensors, longest: int | None, placeholder: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses of a pass's targets, and the number of those with the highest logit; scalars in float32.

    `head` is the model's; the others are as in `hidden_states`.
    """
    hidden = hidden_states(model, tensors, longest, placeholder)
    vocabulary = model.config.get_text_config().vocab_size
    chosen: torch.Tensor = _Chosen.apply(hidden, tensors.sources, tensors.predicts)
    return loss_sum(chosen, head, tensors.targets, vocabulary)


class _Chosen(torch.autograd.Function):
    """The hidden states that predict something. torch's own backward pass of this would sort the places each time, so
    that it adds up in a fixed order; here each gradient has one place."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, sources: torch.Tensor, predicts: torch.Tensor) -> torch.Tensor:
        """The rows `sources` of `hidden` [tokens, size]."""
        ctx.save_for_backward(predicts)
        return hidden.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient of `hidden`."""
        (predicts,) = ctx.saved_tensors
        if not len(gradients[0]):  # a pass that only keeps step with other processes
            return gradients[0].new_zeros(len(predicts), gradients[0].shape[1]), None, None
        spread = gradients[0].index_select(0, predicts.clamp(min=0))
        return spread.masked_fill_((predicts < 0).unsqueeze(1), 0.0), None, None


def own_sums(model: Any, tensors: PassTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """As `pass_sums`, for one sequence by the model's own forward pass, whose inputs are `tensors.pictures`."""
    chooses = "logits_to_keep" in signature(model.forward).parameters
    logits = model(**tensors.pictures, **({"logits_to_keep": tensors.sources} if chooses else {})).logits[0]
    logits = (logits if chooses else logits.index_select(0, tensors.sources)).float()
    loss = functional.cross_entropy(logits, tensors.targets, reduction="sum")
    return loss, torch.eq(logits.argmax(1), tensors.targets).sum()
