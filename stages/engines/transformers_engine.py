"""The transformers engine: padded batches on any device that torch supports.

For cards without vLLM kernels, and for small jobs that end before vLLM has started.
"""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

import stages.models.mgm  # noqa: F401 - registers it with transformers
from stages.engines.batch_size import best_batch_size
from stages.engines.engine import Completion, Done, EngineSettings
from stages.models import gptq
from stages.models.pictures import PictureRules, rules_of
from stages.models.rendering import Prompt, load_tokenizer

TRIED_TOKENS = 16
"""Tokens of a completion in trials of batch sizes: prompts take most of the time and memory."""


class TransformersEngine:
    """All adapters on one base; each batch switches to its adapter in place."""

    continuous = False

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self.batch_size = settings.batch_size
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = load_tokenizer(settings.model)
        config = AutoConfig.from_pretrained(settings.model, local_files_only=True)
        kind: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        # over several GPUs layer by layer: they compute one after the other, but hold a model too large for one of them
        spread = torch.cuda.device_count() > 1 and importlib.util.find_spec("accelerate") is not None
        # MGM's two towers meet in its connectors and must be on one GPU; its 3 billion parameters fit any
        spread = spread and config.model_type != "mgm"
        quantised = gptq.is_gptq(settings.model)  # where its weights are loaded decides its kernel
        with gptq.patch_gptq_kernels(settings.model, on_card=self._device == "cuda", training=False):
            model: Any = kind.from_pretrained(
                settings.model,
                dtype=getattr(torch, settings.dtype),
                local_files_only=True,
                device_map="auto" if spread else {"": self._device} if quantised else None,
            )
            for name, folder in settings.adapters.items():
                if isinstance(model, PeftModel):
                    model.load_adapter(str(folder), adapter_name=name)
                else:
                    model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        self._picture_token: int = getattr(config, "image_token_id", -1)
        self._processor: Any = None
        self._end_tokens = _end_tokens(model, self._tokenizer)
        model.generation_config = GenerationConfig()  # the folder's own would add penalties
        self._model = (model if spread else model.to(self._device)).eval()

    def generate(self, prompts: list[Prompt], adapter: str | None, done: Done | None = None) -> list[Completion]:
        """Completions. The prompts form batches of `batch_size`, longest first, padded on the left."""
        found: dict[int, Completion] = {}
        for batch in self._batches(prompts):
            for place, completion in zip(
                batch, self._batch_or_halves([prompts[i] for i in batch], adapter), strict=True
            ):
                found[place] = completion
                if done is not None:
                    done(place, completion)
        return [found[i] for i in range(len(prompts))]

    def _batches(self, prompts: list[Prompt]) -> Iterator[list[int]]:
        """Places of the prompts of each batch: prompts with the same limit share batches, the longest first."""
        order = sorted(range(len(prompts)), key=lambda i: (-self._limit(prompts[i]), -prompts[i].length, i))
        while order:
            limit = self._limit(prompts[order[0]])
            batch = [i for i in order[: self.batch_size] if self._limit(prompts[i]) == limit]
            yield batch
            order = order[len(batch) :]

    def _limit(self, prompt: Prompt) -> int:
        return prompt.max_new_tokens or self._settings.max_new_tokens

    def find_batch_size(self, prompts: list[Prompt]) -> tuple[int, str]:
        """Decode these prompts in ever larger batches, with short completions. If there are adapters, one of them
        answers, because it takes more memory than the base alone."""
        if not prompts:  # all are too long to be asked
            self.batch_size = 1
            return 1, "no prompt to try"
        tried = [replace(prompt, max_new_tokens=min(TRIED_TOKENS, self._limit(prompt))) for prompt in prompts]
        adapter = next(iter(self._settings.adapters), None)

        def attempt(size: int) -> None:
            self._batch(list(islice(cycle(tried), size)), adapter)

        self.batch_size, why = best_batch_size(attempt, most=2 * len(prompts))
        return self.batch_size, why

    def _batch_or_halves(self, prompts: list[Prompt], adapter: str | None) -> list[Completion]:
        """The completions of a batch, computed in halves if it runs out of memory."""
        try:
            return self._batch(prompts, adapter)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise
        torch.cuda.empty_cache()  # not in the handler: the error's traceback holds the batch's memory
        half = len(prompts) // 2
        print(f"out of memory with {len(prompts)} sequences: retrying with {half} and {len(prompts) - half}")
        return [c for part in (prompts[:half], prompts[half:]) for c in self._batch_or_halves(part, adapter)]

    def _batch(self, prompts: list[Prompt], adapter: str | None) -> list[Completion]:
        pictures = self._pictures(prompts)
        rows = [self._expand(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        pad = self._end_tokens[0]
        # left padding: a decoder continues at the last position, which must be the prompt's own
        tokens = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=self._device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self._device)
        if "image_grid_thw" in pictures:  # picture tokens have two-dimensional positions
            pictures["mm_token_type_ids"] = tokens.eq(self._picture_token).int()
        config = GenerationConfig(
            max_new_tokens=self._limit(prompts[0]),
            do_sample=False,
            eos_token_id=self._end_tokens,
            pad_token_id=pad,
        )
        with torch.inference_mode(), self._switched_to(adapter):
            output = self._model.generate(
                input_ids=tokens,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([_Sampling(prompts)]),
                **pictures,
            )
        return [self._completion(row[longest:].tolist()) for row in output]

    def _pictures(self, prompts: list[Prompt]) -> dict[str, Any]:
        """The model's inputs for the pictures of all prompts, with grids of patches if the model uses them; empty if no
        prompt has a picture."""
        opened = [picture.load() for prompt in prompts for picture in prompt.pictures]
        if not opened:
            return {}
        if self._processor is None:
            from transformers import AutoImageProcessor

            self._processor = AutoImageProcessor.from_pretrained(self._settings.model, local_files_only=True)
        # pictures for the Qwen2-VL family already have their size; LLaVA's own processor makes them square
        sized = {"do_resize": False} if isinstance(rules_of(self._settings.model), PictureRules) else {}
        found = self._processor(images=opened, return_tensors="pt", **sized)
        dtype = getattr(torch, self._settings.dtype)
        return {
            name: value.to(self._device, dtype if value.is_floating_point() else value.dtype)
            for name, value in found.items()
        }

    def _expand(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens, each picture's placeholder repeated for every token of the picture."""
        if not prompt.pictures:
            return prompt.tokens
        return prompt.repeat_placeholders([picture.tokens for picture in prompt.pictures], self._picture_token)

    def _switched_to(self, adapter: str | None) -> Any:
        """A context in which the model answers as an adapter, or as the base."""
        if not isinstance(self._model, PeftModel):
            return nullcontext()
        if adapter is None:
            return self._model.disable_adapter()
        self._model.set_adapter(adapter)
        return nullcontext()

    def _completion(self, tokens: list[int]) -> Completion:
        ends = [i for i, token in enumerate(tokens) if token in self._end_tokens]
        length = ends[0] if ends else len(tokens)
        text = self._tokenizer.decode(tokens[:length], skip_special_tokens=True)
        if not ends:
            # the limit may cut a character's bytes in two; vLLM leaves out the half, too
            text = text.rstrip("\ufffd")
        return Completion(text, length, "stop" if ends else "length")

    def close(self) -> None:
        del self._model
        if self._device == "cuda":
            torch.cuda.empty_cache()


class _Sampling(LogitsProcessor):  # type: ignore[misc]
    """Samples the next token of prompts with a temperature, each from random numbers of its own: a prompt's completion
    does not depend on its batch.

    The largest of logit / temperature + Gumbel noise is a draw from the softmax (Maddison et al. 2014, 'A* sampling').
    """

    def __init__(self, prompts: list[Prompt]) -> None:
        self._sampled = [
            (row, prompt.temperature, torch.Generator().manual_seed(prompt.seed))
            for row, prompt in enumerate(prompts)
            if prompt.temperature
        ]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        for row, temperature, generator in self._sampled:
            uniform = torch.rand(scores.shape[1], generator=generator, dtype=torch.float64)
            noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
            scores[row] = scores[row].float() / temperature + noise.to(scores.device, torch.float32)
        return scores


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a completion: the tokenizer's and those of the generation config. Raises ValueError if none."""
    configured = model.generation_config.eos_token_id
    found = configured if isinstance(configured, list) else [configured]
    ends = [token for token in dict.fromkeys([tokenizer.eos_token_id, *found]) if token is not None]
    if not ends:
        raise ValueError(
            f"{model.name_or_path}: neither tokenizer nor generation config has an end token; set eos_token_id in"
            f" generation_config.json (config: {json.dumps(model.config.to_dict())[:200]})"
        )
    return ends
