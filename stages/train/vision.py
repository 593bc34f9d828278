"""Pictures of a pass: read from files, embedded by the model's vision tower, and put where their placeholders are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.models.pictures import Picture, PictureRules, Rules
from stages.train.samples import TokenSequence


class PictureReader:
    """Reads the pictures of sequences at the sizes that they were encoded with."""

    def __init__(self, model: Path, rules: Rules, run: Path, dtype: torch.dtype) -> None:
        """`model` is the model's folder; picture names are relative to the folder `run`."""
        from transformers import AutoImageProcessor

        self._processor = AutoImageProcessor.from_pretrained(model, local_files_only=True)
        self._run, self._dtype = run, dtype
        # pictures for the Qwen2-VL family already have their size; LLaVA's own processor crops them to a square
        self._sized = {"do_resize": False} if isinstance(rules, PictureRules) else {}

    def read(self, sequences: Sequence[TokenSequence]) -> dict[str, torch.Tensor]:
        """The model's input tensors for all pictures of packed sequences, by the processor's names, on the CPU. Empty
        without pictures. Raises DataError for a file that cannot be read."""
        files = [picture for sequence in sequences for picture in sequence.pictures]
        if not files:
            return {}
        opened = [Picture(self._run / one.path, one.width, one.height, one.tokens).load() for one in files]
        found = self._processor(images=opened, return_tensors="pt", **self._sized)
        return {
            name: value.to(self._dtype if value.is_floating_point() else value.dtype) for name, value in found.items()
        }


def embed(base: Any, tokens: torch.Tensor, pictures: dict[str, torch.Tensor], placeholder: int | None) -> torch.Tensor:
    """The embeddings of a pass, [1, tokens, size], with those of its pictures in the places of `placeholder`.

    `tokens` [tokens] are ids, `pictures` the tensors that `PictureReader.read` returned, on the model's device.
    """
    embedded: torch.Tensor = base.get_input_embeddings()(tokens)
    if pictures and placeholder is not None:
        seen = base.base_model.get_image_features(**pictures)
        seen = getattr(seen, "pooler_output", seen)  # transformers 4 returns the features themselves
        if isinstance(seen, list | tuple):
            seen = torch.cat(tuple(seen))
        places = torch.eq(tokens, placeholder).unsqueeze(1).expand_as(embedded)
        embedded = embedded.masked_scatter(places, seen.reshape(-1, embedded.shape[1]).to(embedded.dtype))
    return embedded[None]


def text_decoder(base: Any) -> Any:
    """The part of a model that reads embeddings: all of a language model, the language model of a vision-language
    model."""
    return getattr(base.base_model, "language_model", None) or base.get_decoder()


def decoder_layers(decoder: Any) -> Any:
    """The list of a decoder's layers, by the name that its model has for it: Falcon's is `h`."""
    return next(getattr(decoder, name) for name in ("layers", "h") if hasattr(decoder, name))


def three_places(sequence: TokenSequence, placeholder: int, factor: int) -> torch.Tensor:
    """The time, row and column of each token of a sequence; shape [3, length], int64.

    By the rule of the Qwen2-VL family (arXiv:2409.12191, section 2.1): a text token has the same number three times. A
    picture's tokens have the number of its first token as time, and count rows and columns from there; the text after
    it goes on from the largest of them. `factor` is the side of a token in pixels.
    """
    is_picture = np.asarray(sequence.tokens) == placeholder
    parts, place, start = [], 0, 0
    for picture in sequence.pictures:
        first = place + int(np.argmax(is_picture[place:]))
        parts.append(np.arange(start, start + first - place)[None].repeat(3, 0))
        start += first - place
        rows, columns = picture.height // factor, picture.width // factor
        grid = np.indices((rows, columns)).reshape(2, -1)
        parts.append(np.concatenate([np.zeros((1, rows * columns), int), grid]) + start)
        start += max(rows, columns)
        place = first + rows * columns
    parts.append(np.arange(start, start + sequence.length - place)[None].repeat(3, 0))
    return torch.from_numpy(np.concatenate(parts, 1).astype(np.int64))
