"""Vision-language models whose rules for pictures Lorry does not have, through ms-swift: loading one, the modules that
see, and the inputs for a sample with pictures.

This module has all of Lorry's calls of ms-swift, which are public and of version 4.6. ms-swift has a loader and a
template with code for pictures for each of its families. Such a model reads one sample a pass, by its own forward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from stages.contract.errors import DataError, DoesNotFitError, LorryError, UsageError
from stages.contract.recipe import Model
from stages.contract.records import PLACE
from stages.hardware.memory import is_connector, is_vision_or_connector
from stages.models.pictures import read_picture
from stages.models.rendering import UNLEARNT, Renderer, TrainingSequence
from stages.train.samples import NOT_LEARNT, TokenSequence

NOT_INPUTS = ("labels", "loss_scale")
"""What ms-swift collates besides the model's inputs."""


@dataclass(frozen=True)
class SwiftReader:
    """Makes a model's inputs of samples, by ms-swift's template."""

    model: Path
    names: Model
    """The recipe's names of the model type and the template."""
    run: Path
    """The run's folder; names of pictures are relative to it."""
    max_pixels: int | None
    """Pixel budget of a picture; None: ms-swift's own."""
    dtype: str = "float32"
    """torch's name of the inputs' type."""
    _lock: Any = field(default_factory=Lock, repr=False, compare=False)

    def load(self) -> None:
        """Load the template, before processes are forked that use it. Raises UsageError if the recipe does not name
        one, and DoesNotFitError where ms-swift cannot be imported."""
        _ = self._template

    @cached_property
    def _template(self) -> Any:
        """ms-swift's template. Raises the errors of `load`."""
        for key in ("swift_type", "swift_template"):
            if getattr(self.names, key) is None:
                raise UsageError(
                    f"model.{key}: found null, but {self.model} reads pictures through ms-swift; set it to ms-swift's"
                    " name"
                )
        _import()
        from swift.model import get_processor
        from swift.template import get_template

        processor = get_processor(str(self.model), model_type=self.names.swift_type, download_model=False)
        # Lorry itself leaves out what is too long
        template = get_template(processor, max_length=2**31, template_type=self.names.swift_template)
        template.set_mode("train")
        return template

    def encode(
        self, renderer: Renderer, sample: Mapping[str, Any], only_last: bool = False
    ) -> tuple[TokenSequence, str | None]:
        """A sample with pictures as one sequence, and a sentence for the log if its prompt cannot be compared.

        With `only_last`, only its last answer is learnt. The tokens are ms-swift's, which has to write
        the same around pictures as the model's chat template; what is learnt is as inference needs it. Raises
        UsageError if ms-swift writes another prompt, and DataError for a sample that its template cannot write, or a
        picture that cannot be read.
        """
        row = {"messages": renderer.template.folded(sample["messages"]), "images": list(sample["images"])}
        encoded = self._encoded(row, str(sample["id"]))
        tokens = list(encoded["input_ids"])
        own, note = self._own_sequence(renderer, sample, only_last), None
        if own is None:
            labels = list(encoded["labels"])
            note = f"{self.model}: the chat template takes no pictures, so prompts with pictures are ms-swift's"
        else:
            found = self._labels(*own, tokens)
            if found is None:
                raise self._difference(renderer, sample, own[0].tokens, tokens)
            labels = found
        learnt = np.array(labels, np.int64) != NOT_LEARNT
        return TokenSequence(np.array(tokens, np.int32), learnt, row=row), note

    def _encoded(self, row: dict[str, Any], name: str = "") -> dict[str, Any]:
        """What ms-swift's template makes of a row. Raises DataError for a picture that cannot be read."""
        pictures = []
        for file in row["images"]:
            try:
                pictures.append(_within(read_picture(self.run / file), self.max_pixels))
            except DataError as error:
                raise DataError(
                    f"{self.run / file}: missing or not a picture, but sample {name} needs it; run preprocess again"
                ) from error
        messages = [{"role": one["role"], "content": one.get("content") or ""} for one in row["messages"]]
        encoded: dict[str, Any] = self._template.encode({"messages": messages, "images": pictures})
        return encoded

    def _own_sequence(
        self, renderer: Renderer, sample: Mapping[str, Any], only_last: bool
    ) -> tuple[TrainingSequence, list[list[int]]] | None:
        """A sample as the model's chat template writes it, and its tokens between the pictures; None if the template
        takes no pictures. Raises DataError if the sample needs several sequences."""
        messages, tools = sample["messages"], sample.get("tools")
        try:
            sequences = renderer.training_sequences(messages, only_last, has_pictures=True, tools=tools)
        except LorryError:
            return None
        if len(sequences) != 1:
            raise DataError(
                f"sample {sample['id']}: its answers need {len(sequences)} sequences, but ms-swift's template writes"
                " one; leave out its earlier thoughts"
            )
        (sequence,) = sequences
        count = sum((message.get("content") or "").count(PLACE) for message in messages)
        for marker in self._template.placeholder_tokens:
            if sequence.tokens.count(marker) == count:
                return sequence, _split(sequence.tokens, marker)
        return None

    def _labels(self, sequence: TrainingSequence, pieces: list[list[int]], tokens: list[int]) -> list[int] | None:
        """The labels of `sequence`, which is `pieces` with pictures between them, for ms-swift's tokens; None if these
        are not the same pieces. What follows the last learnt token may differ."""
        last = max(place for place, label in enumerate(sequence.labels) if label != UNLEARNT)
        labels, place, own = [UNLEARNT] * len(tokens), 0, 0
        for number, piece in enumerate(pieces):
            part = piece[: last + 1 - own]
            begin = _find(tokens, part, place + 1) if number else 0
            if begin is None or tokens[begin : begin + len(part)] != part:
                return None
            labels[begin : begin + len(part)] = sequence.labels[own : own + len(part)]
            place, own = begin + len(part), own + len(piece) + 1
        return labels

    def _difference(
        self, renderer: Renderer, sample: Mapping[str, Any], own: list[int], tokens: list[int]
    ) -> LorryError:
        """The error for a prompt of ms-swift's that is not the chat template's."""
        words = renderer.control_words_in(sample)
        if words:
            return DataError(
                f"sample {sample['id']}: says {next(iter(words))!r}, which ms-swift's template would read as the"
                " model's control word; leave the sample out"
            )
        decode = renderer.tokenizer.decode
        return UsageError(
            f"model.swift_template: {self.names.swift_template!r} renders sample {sample['id']} differently from the"
            f" chat template in {self.model} ({decode(tokens)[:300]!r} instead of {decode(own)[:300]!r}); set it to the"
            " template that matches"
        )

    def read(self, sequences: Sequence[TokenSequence]) -> dict[str, Any]:
        """The inputs of the model's forward pass for one sequence, on the CPU; those without pictures need no
        template's code. Raises DataError for a picture that cannot be read."""
        import torch

        (sequence,) = sequences
        row = sequence.row
        with self._lock:  # passes are read ahead by threads, which ms-swift does not expect
            encoded = {"input_ids": sequence.tokens.tolist()} if row is None else self._encoded(row)
            batch = self._template.data_collator([encoded])
        config = self._template.config
        if config.model_type == "gemma3":
            # with transformers 5, ms-swift 4.6 marks <start_of_image> alone, so a picture's tokens would not see each
            # other both ways
            batch["token_type_ids"] = batch["input_ids"].eq(config.image_token_id).long()
        dtype = getattr(torch, self.dtype)
        return {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in batch.items()
            if name not in NOT_INPUTS
        }

    def attach(self, model: Any) -> None:
        """Have ms-swift's template turn these inputs into those of `model` at each call: it knows what is embedded."""
        self._template.register_post_encode_hook([model])


def load_base(
    model: Path, names: Model, dtype: Any, device: Any, quantisation: Any
) -> tuple[Any, Callable[[str], bool], Callable[[str], bool]]:
    """Load a base by ms-swift, in torch's type `dtype`. Returns it, and two functions of a module's path: whether it is
    part of a vision tower or connector, and whether of a connector. Raises DoesNotFitError where ms-swift cannot be
    imported."""
    _import()
    from swift.model import get_model_processor

    base, _ = get_model_processor(
        str(model),
        torch_dtype=dtype,
        device_map={"": device},
        model_type=names.swift_type,
        quantization_config=quantisation,
        download_model=False,
    )
    arch = base.model_meta.model_arch
    towers, connectors = ([f".{part}." for part in getattr(arch, kind, None) or []] for kind in _PARTS)

    def connects(name: str) -> bool:
        return is_connector(name) or any(part in f".{name}." for part in connectors)

    def sees(name: str) -> bool:
        return is_vision_or_connector(name) or connects(name) or any(part in f".{name}." for part in towers)

    return base, sees, connects


_PARTS = ("vision_tower", "aligner")
"""ms-swift's names of lists of modules that see."""


def _import() -> None:
    """Import ms-swift. Raises DoesNotFitError where the installed torch is too old for it."""
    try:
        import swift.model  # noqa: F401
    except ImportError as error:
        raise DoesNotFitError(
            f"model.path: ms-swift, which reads this model's pictures, cannot be loaded here ({error}); use another"
            " target, or a model of the Qwen2-VL family, a LLaVA or an MGM"
        ) from error


def _within(picture: Any, max_pixels: int | None) -> Any:
    """A picture scaled down to at most `max_pixels` pixels, in the same aspect ratio; unchanged if it is small
    enough."""
    width, height = picture.size
    if max_pixels is None or width * height <= max_pixels:
        return picture
    shrink = (max_pixels / (width * height)) ** 0.5
    return picture.resize((max(int(width * shrink), 1), max(int(height * shrink), 1)))


def _split(tokens: list[int], marker: int) -> list[list[int]]:
    """The tokens between the markers: one list more than there are markers."""
    pieces: list[list[int]] = [[]]
    for token in tokens:
        if token == marker:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return pieces


def _find(tokens: list[int], part: list[int], first: int) -> int | None:
    """Where a part is in tokens for the first time from `first` on; None if it is not."""
    places = range(first, len(tokens) - len(part) + 1)
    return next((place for place in places if tokens[place : place + len(part)] == part), None)
