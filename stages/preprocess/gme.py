"""GME: embeds texts and pictures into one space with a model of Qwen2-VL's architecture (arXiv:2412.16855).

The vectors are those of its authors' gme_inference.py, but computed in batches. The input is a chat with the text or
picture as the user's message, and `<|endoftext|>` at the end. Positions count token by token, unlike in generation,
where pictures have two-dimensional positions. The vector is the last token's hidden state, scaled to length one. With
the default pixel budget, a picture has 256 to 1,280 tokens.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stages.contract.errors import UsageError
from stages.models.control_words import ControlWords
from stages.models.pictures import Picture, PictureRules, open_picture, read_rules
from stages.preprocess.passages import Window, read_tokenizer

Vectors = npt.NDArray[np.float32]

BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
AFTER = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
SHOWN = "<|vision_start|>", "<|vision_end|>"

MAX_LENGTH = 1800
"""Largest number of tokens of the whole input. A longer text is cut, as in GME's training."""
MIN_TOKENS = 256
"""Smallest number of tokens of a picture, unless the pixel budget is below it. Smaller pictures are enlarged."""
READERS = 8
"""Number of threads that read pictures while the GPU computes."""


def text_window(folder: Path) -> Window:
    """The window of GME: how many tokens of a text it reads, given the chat around it."""
    tokenizer = read_tokenizer(folder)
    around = [tokenizer.encode(part, add_special_tokens=False).ids for part in (BEFORE, AFTER)]
    return Window(tokenizer, MAX_LENGTH - sum(map(len, around)))


class Gme:
    """A GME model on one device."""

    def __init__(self, folder: Path, device: str, dtype: str, max_pixels: int) -> None:
        """Load the model in `folder`. `device` and `dtype` are torch's names, `max_pixels` limits a picture's size.

        Raises UsageError if weights are missing, or the model is not of Qwen2-VL's architecture.
        """
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        own = read_rules(folder)
        least = min(MIN_TOKENS * own.factor**2, max_pixels)
        self._rules = PictureRules(own.factor, least, max_pixels)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._words = ControlWords(tokenizer)
        load: Any = AutoModelForImageTextToText.from_pretrained
        network, loaded = load(folder, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True)
        lacking = sorted(name for name in loaded["missing_keys"] if not name.startswith("lm_head"))
        if lacking:  # transformers has initialised them at random: the vectors would be meaningless
            raise UsageError(
                f"{folder}: {len(lacking)} of the network's parameters are missing, such as {lacking[0]}; copy a whole"
                " model of Qwen2-VL's architecture there"
            )
        self._network = network.model.to(device).eval()  # without the head: GME generates no tokens
        self._picture = int(network.config.image_token_id)
        self._device, self._dtype = device, getattr(torch, dtype)
        self._patches = _Patches(folder, device)
        self._before, self._after, self._start, self._end = (
            self._words.encode(part) for part in (BEFORE, AFTER, *SHOWN)
        )

    def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """Return the unit vectors of texts: float32, shape (texts, dimensions). The end of a text is cut off if the
        input would exceed MAX_LENGTH."""
        room = MAX_LENGTH - len(self._before) - len(self._after)
        encoded = [self._words.encode(self._words.hide(text)) for text in texts]
        return self._embed([[*self._before, *tokens[:room], *self._after] for tokens in encoded], None)

    def embed_pictures(self, batches: Sequence[Sequence[Path]]) -> Iterator[Vectors]:
        """Yield the unit vectors of each batch of pictures: float32, shape (pictures, dimensions).

        Threads read the next batch while the model computes one. Raises DataError for a file that is not a picture.
        """
        with ThreadPoolExecutor(READERS) as readers:

            def start_reading(paths: Sequence[Path]) -> list[Any]:
                """Start to read a batch of pictures in threads. Returns one future for each picture."""
                return [readers.submit(self._read_pixels, path) for path in paths]

            ahead = start_reading(batches[0]) if batches else []
            for number in range(len(batches)):
                batch = [future.result() for future in ahead]
                ahead = start_reading(batches[number + 1]) if number + 1 < len(batches) else []
                yield self._embed_batch(batch)

    def _read_pixels(self, path: Path) -> tuple[Picture, npt.NDArray[np.uint8]]:
        """Return a picture and its pixels: uint8, shape (height, width, 3)."""
        picture = open_picture(path, self._rules)
        return picture, np.asarray(picture.load())

    def _embed_batch(self, batch: list[tuple[Picture, npt.NDArray[np.uint8]]]) -> Vectors:
        """Return the unit vectors of a batch of pictures: float32, shape (pictures, dimensions)."""
        rows = [
            [*self._before, *self._start, *[self._picture] * picture.tokens, *self._end, *self._after]
            for picture, _ in batch
        ]
        patches, grids = zip(*[self._patches.cut_picture(pixels) for _, pixels in batch], strict=True)
        seen = self._run_tower(torch.cat(patches).to(self._dtype), torch.tensor(grids, device=self._device))
        return self._embed(rows, seen)

    @torch.inference_mode()
    def _run_tower(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Return the vision tower's output: shape (tokens of all pictures, hidden size).

        `patches` has one row for each patch of all pictures, as `_Patches.cut_picture` returns them.
        `grids` has (1, rows, columns) of patches for each picture.
        """
        output = self._network.visual(patches, grid_thw=grids)
        found: torch.Tensor = getattr(output, "pooler_output", output)
        return found

    @torch.inference_mode()
    def _embed(self, rows: list[list[int]], seen: torch.Tensor | None) -> Vectors:
        """Return the unit vectors of inputs: float32, shape (inputs, dimensions).

        `rows` has the token ids of each input. `seen` replaces the tokens of pictures, in order: shape (tokens of all
        pictures, hidden size); None: no input has a picture.
        """
        longest = max(map(len, rows))
        # pad on the right, as in GME's training: the padding is masked, and no token attends to later ones
        tokens = torch.tensor([row + [self._after[-1]] * (longest - len(row)) for row in rows], device=self._device)
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        mask = torch.arange(longest, device=self._device)[None, :] < lengths[:, None]
        language = self._network.language_model
        embedded = language.embed_tokens(tokens)
        if seen is not None:
            embedded = embedded.masked_scatter((tokens == self._picture)[..., None], seen.to(embedded.dtype))
        positions = torch.arange(longest, device=self._device).expand(3, len(rows), -1)
        output = language(
            inputs_embeds=embedded,
            attention_mask=None if bool(mask.all()) else mask.long(),
            position_ids=positions,
            use_cache=False,
        )
        last = output.last_hidden_state[torch.arange(len(rows), device=self._device), lengths - 1]
        found: Vectors = torch.nn.functional.normalize(last.float(), dim=1).cpu().numpy()
        return found


class _Patches:
    """Cuts pictures into patches on the device. The values are those of transformers' processor, computed faster."""

    def __init__(self, folder: Path, device: str) -> None:
        """Read patch size and normalisation from the model's preprocessor_config.json. `device` is torch's name."""
        import json

        values = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        self._patch, self._merge = int(values["patch_size"]), int(values["merge_size"])
        self._frames = int(values.get("temporal_patch_size", 2))
        mean, deviation = (torch.tensor(values[key], device=device) for key in ("image_mean", "image_std"))
        scale = float(values.get("rescale_factor", 1 / 255))
        self._factor, self._shift = (scale / deviation)[:, None, None], (mean / deviation)[:, None, None]
        self._device = device

    def cut_picture(self, pixels: npt.NDArray[np.uint8]) -> tuple[torch.Tensor, list[int]]:
        """Return a picture's patches, float32, shape (rows x columns, channels x frames x side x side), and their grid:
        [1, rows, columns].

        `pixels`: (height, width, 3), both sides multiples of patch size times merge size.
        """
        picture = torch.from_numpy(pixels.copy()).to(self._device).permute(2, 0, 1).float()
        picture = picture * self._factor - self._shift
        rows, columns = picture.shape[1] // self._patch, picture.shape[2] // self._patch
        side, merge = self._patch, self._merge
        patches = picture.reshape(3, rows // merge, merge, side, columns // merge, merge, side)
        patches = patches.permute(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]  # a still picture fills all frames
        patches = patches.expand(-1, -1, -1, -1, -1, self._frames, -1, -1)
        return patches.reshape(rows * columns, -1), [1, rows, columns]
