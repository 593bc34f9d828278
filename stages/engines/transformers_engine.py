"""The transformers engine: padded batches on any device that torch supports.

It serves cards for which vLLM has no kernels, and small jobs, which it finishes before vLLM would have started.
"""

import importlib.util
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
from stages.models.end_tokens import end_tokens
from stages.models.pictures import PictureRules, rules_of
from stages.models.reasoning import marked_text
from stages.models.rendering import Prompt, load_tokenizer

TRIED_TOKENS = 16
"""Largest number of tokens in a completion during trials of batch sizes: prompts use most of the time and memory."""


class TransformersEngine:
    """An engine with all adapters on one base. Each batch switches to its adapter without loading it."""

    continuous = False

    def __init__(self, settings: EngineSettings) -> None:
        """Load base and adapters. Raises UsageError if the base has no end token."""
        self._settings = settings
        self.batch_size = settings.batch_size
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = load_tokenizer(settings.model)
        config = AutoConfig.from_pretrained(settings.model, local_files_only=True)
        kind: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        # spread the layers over all GPUs: they compute in turn, but hold a model that is too large for one
        spread = torch.cuda.device_count() > 1 and importlib.util.find_spec("accelerate") is not None
        # MGM's connectors read both towers, so the whole model must be on one GPU; its 3 billion parameters fit any
        spread = spread and config.model_type != "mgm"
        quantised = gptq.is_gptq(settings.model)  # must be loaded directly on its device, which decides the kernel
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
        self._end_tokens = end_tokens(settings.model, self._tokenizer)
        model.generation_config = GenerationConfig()  # the one in the folder may add penalties
        self._model = (model if spread else model.to(self._device)).eval()

    def generate(self, prompts: list[Prompt], adapter: str | None, done: Done | None = None) -> list[Completion]:
        """Complete the prompts in batches of at most `batch_size`. Returns the completions in the order of the prompts.
        Raises torch.OutOfMemoryError if a prompt does not fit alone."""
        found: dict[int, Completion] = {}
        for batch in self._batches(prompts):
            for place, completion in zip(
                batch, self._complete_or_halve([prompts[i] for i in batch], adapter), strict=True
            ):
                found[place] = completion
                if done is not None:
                    done(place, completion)
        return [found[i] for i in range(len(prompts))]

    def _batches(self, prompts: list[Prompt]) -> Iterator[list[int]]:
        """Yield the indices of each batch's prompts, which share a token limit. Prompts with the highest limit come
        first, and among those the longest."""
        order = sorted(range(len(prompts)), key=lambda i: (-self._token_limit(prompts[i]), -prompts[i].length, i))
        while order:
            limit = self._token_limit(prompts[order[0]])
            batch = [i for i in order[: self.batch_size] if self._token_limit(prompts[i]) == limit]
            yield batch
            order = order[len(batch) :]

    def _token_limit(self, prompt: Prompt) -> int:
        """The largest number of tokens of a prompt's completion."""
        return prompt.max_new_tokens or self._settings.max_new_tokens

    def find_batch_size(self, prompts: list[Prompt]) -> tuple[int, str]:
        """Find the batch size by completing these prompts in growing batches. Returns it and the reason.

        Completions have at most TRIED_TOKENS tokens. The first adapter completes the prompts, because it needs more
        memory than the base; without adapters, the base does. Without prompts, the batch size is 1. Raises
        torch.OutOfMemoryError if the longest prompt does not fit alone.
        """
        if not prompts:  # every prompt is too long for infer.max_length
            self.batch_size = 1
            return 1, "no prompt to try"
        tried = [replace(prompt, max_new_tokens=min(TRIED_TOKENS, self._token_limit(prompt))) for prompt in prompts]
        adapter = next(iter(self._settings.adapters), None)

        def attempt(size: int) -> None:
            """Complete `size` prompts together; if there are fewer, some of them are repeated."""
            self._complete_batch(list(islice(cycle(tried), size)), adapter)

        self.batch_size, why = best_batch_size(attempt, most=2 * len(prompts))
        return self.batch_size, why

    def _complete_or_halve(self, prompts: list[Prompt], adapter: str | None) -> list[Completion]:
        """Complete a batch or, if memory runs out, its halves one after the other. Returns the completions. Raises
        torch.OutOfMemoryError if one prompt alone does not fit."""
        try:
            return self._complete_batch(prompts, adapter)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise
        torch.cuda.empty_cache()  # not inside the handler, where the error's traceback still holds the batch's memory
        half = len(prompts) // 2
        print(f"infer: out of memory with {len(prompts)} sequences; retries with {half} and {len(prompts) - half}")
        return [c for part in (prompts[:half], prompts[half:]) for c in self._complete_or_halve(part, adapter)]

    def _complete_batch(self, prompts: list[Prompt], adapter: str | None) -> list[Completion]:
        """Complete prompts as one batch, all with the token limit of the first. Returns the completions in order."""
        pictures = self._picture_inputs(prompts)
        rows = [self._input_tokens(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        pad = self._end_tokens[0]
        # pad on the left: a decoder continues after the last position, which must be the prompt's last token
        tokens = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=self._device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self._device)
        if "image_grid_thw" in pictures:  # picture tokens have two-dimensional positions
            pictures["mm_token_type_ids"] = tokens.eq(self._picture_token).int()
        config = GenerationConfig(
            max_new_tokens=self._token_limit(prompts[0]),
            do_sample=False,
            eos_token_id=self._end_tokens,
            pad_token_id=pad,
        )
        with torch.inference_mode(), self._adapter_context(adapter):
            output = self._model.generate(
                input_ids=tokens,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([_Sampling(prompts)]),
                **pictures,
            )
        return [self._completion(row[longest:].tolist()) for row in output]

    def _picture_inputs(self, prompts: list[Prompt]) -> dict[str, Any]:
        """The model's input tensors for all prompts' pictures, by the processor's names. Empty without pictures."""
        opened = [picture.load() for prompt in prompts for picture in prompt.pictures]
        if not opened:
            return {}
        if self._processor is None:
            from transformers import AutoImageProcessor

            self._processor = AutoImageProcessor.from_pretrained(self._settings.model, local_files_only=True)
        # pictures for the Qwen2-VL family already have their size; LLaVA's own processor crops them to a square
        sized = {"do_resize": False} if isinstance(rules_of(self._settings.model), PictureRules) else {}
        found = self._processor(images=opened, return_tensors="pt", **sized)
        dtype = getattr(torch, self._settings.dtype)
        return {
            name: value.to(self._device, dtype if value.is_floating_point() else value.dtype)
            for name, value in found.items()
        }

    def _input_tokens(self, prompt: Prompt) -> list[int]:
        """The prompt's token ids, with the placeholder of each picture repeated once per visual token."""
        if not prompt.pictures:
            return prompt.tokens
        return prompt.repeat_placeholders([picture.tokens for picture in prompt.pictures], self._picture_token)

    def _adapter_context(self, adapter: str | None) -> Any:
        """Switch the model to this adapter, and return a context to call it in.

        If `adapter` is None, the context disables all adapters, so that the base alone answers.
        """
        if not isinstance(self._model, PeftModel):
            return nullcontext()
        if adapter is None:
            return self._model.disable_adapter()
        self._model.set_adapter(adapter)
        return nullcontext()

    def _completion(self, tokens: list[int]) -> Completion:
        """The completion in the tokens after a prompt, up to the first end token."""
        ends = [i for i, token in enumerate(tokens) if token in self._end_tokens]
        length = ends[0] if ends else len(tokens)
        text = marked_text(self._tokenizer, tokens[:length])
        if text is None:
            text = str(self._tokenizer.decode(tokens[:length], skip_special_tokens=True))
        if not ends:
            # the limit may cut a character in two; vLLM drops the incomplete one, too
            text = text.rstrip("\ufffd")
        return Completion(text, length, "stop" if ends else "length")

    def close(self) -> None:
        """Free the model's memory."""
        del self._model
        if self._device == "cuda":
            torch.cuda.empty_cache()


class _Sampling(LogitsProcessor):  # type: ignore[misc]
    """Samples the next token of prompts with a temperature. Each prompt has its own random numbers, so its completion
    does not depend on its batch.

    The token with the largest logit / temperature + Gumbel noise is a sample from the softmax (Maddison et al. 2014,
    'A* sampling', arXiv:1411.0030).
    """

    def __init__(self, prompts: list[Prompt]) -> None:
        """Seed the random numbers of each prompt with a temperature. `prompts` are the rows of the batch."""
        self._sampled = [
            (row, prompt.temperature, torch.Generator().manual_seed(prompt.seed))
            for row, prompt in enumerate(prompts)
            if prompt.temperature
        ]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Divide logits by the temperature of their prompt and add noise, in place, except where the temperature is 0.
        Returns all logits, (prompts, vocabulary)."""
        for row, temperature, generator in self._sampled:
            uniform = torch.rand(scores.shape[1], generator=generator, dtype=torch.float64)
            noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
            scores[row] = scores[row].float() / temperature + noise.to(scores.device, torch.float32)
        return scores
