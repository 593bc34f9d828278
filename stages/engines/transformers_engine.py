"""The engine of last resort: transformers, padded batches, on whatever torch runs on.

For cards where vLLM has no kernels, and for small jobs, which are done before vLLM has started.
"""

import json
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from stages.engines.engine import Completion, EngineSettings, Prompt, load_tokenizer


class TransformersEngine:
    """All adapters on one base; each batch switches in place to the one it asks for."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = load_tokenizer(settings.model)
        model: Any = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=getattr(torch, settings.dtype), local_files_only=True
        )
        self._end_tokens = _end_tokens(model, self._tokenizer)
        for name, folder in settings.adapters.items():
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        self._model = model.to(self._device).eval()

    def generate(self, prompts: list[Prompt], adapter: str | None) -> list[Completion]:
        """Greedy completions. The prompts form batches of `batch_size`, longest first, padded on the left."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].tokens), i))
        done: dict[int, Completion] = {}
        size = self._settings.batch_size
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            done |= zip(batch, self._batch([prompts[i].tokens for i in batch], adapter), strict=True)
        return [done[i] for i in range(len(prompts))]

    def _batch(self, prompts: list[list[int]], adapter: str | None) -> list[Completion]:
        longest = max(map(len, prompts))
        pad = self._end_tokens[0]
        # left padding: a decoder writes on from the last position, which must be the prompt's own
        tokens = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        config = GenerationConfig(
            max_new_tokens=self._settings.max_new_tokens,
            do_sample=False,
            eos_token_id=self._end_tokens,
            pad_token_id=pad,
        )
        with torch.inference_mode(), self._speaking_as(adapter):
            output = self._model.generate(input_ids=tokens, attention_mask=mask, generation_config=config)
        return [self._completion(row[longest:].tolist()) for row in output]

    def _speaking_as(self, adapter: str | None) -> Any:
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
            text = text.rstrip(
                "\ufffd"
            )  # the limit may cut a character's bytes in two; vLLM leaves such a half out too
        return Completion(text, length, "stop" if ends else "length")

    def close(self) -> None:
        del self._model


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the generation config's, and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    found = configured if isinstance(configured, list) else [configured]
    ends = [token for token in dict.fromkeys([tokenizer.eos_token_id, *found]) if token is not None]
    if not ends:
        raise ValueError(
            f"the model in {model.name_or_path} names no end token: {json.dumps(model.config.to_dict())[:200]}"
        )
    return ends
