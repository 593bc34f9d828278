"""The transformers engine: padded batches on any device that torch supports.

It serves cards for which vLLM has no kernels, and small jobs, which it finishes before vLLM would have started.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import cycle, islice
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import stages.models.mgm  # noqa: F401 - registers it with transformers
from stages.engines.batch_size import best_batch_size
from stages.engines.engine import Completion, Done, DoneLoss, EngineSettings, GivenAnswer, Shown, predicted_places
from stages.models import gptq
from stages.models.end_tokens import end_tokens
from stages.models.head import Head
from stages.models.pictures import PictureRules, rules_of
from stages.models.reasoning import marked_text
from stages.models.rendering import Prompt, load_tokenizer

T = TypeVar("T")
R = TypeVar("R")

LOSS_TOKENS = 8192
"""Most tokens, with padding, of a batch whose losses are computed; a longer conversation is a batch of its own."""

MOST_DIFFERENCE = 0.02
"""Most that a head's logits may differ from the model's own, as a share of their norm: 16 bits round."""

MOST_LOGITS = 32 * 1024**2
"""Most logits that are computed at a time for losses: 128 MiB in float32."""

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
        return _in_batches(prompts, self._batches(prompts), lambda part: self._complete_batch(part, adapter), done)

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

    def stream(self, prompts: list[Prompt], adapter: str | None, shown: Shown) -> list[Completion]:
        """Complete the prompts as one batch, and call `shown` each time that a text grows. Returns the completions in
        order. Each prompt has its own limit of tokens. Raises torch.OutOfMemoryError if the batch does not fit."""
        following = _Following(prompts, [self._token_limit(prompt) for prompt in prompts], self._completion, shown)
        longest = max(prompts, key=self._token_limit)
        self._complete_batch(
            [replace(prompt, max_new_tokens=self._token_limit(longest)) for prompt in prompts], adapter, following
        )
        return following.completions

    def _complete_batch(
        self, prompts: list[Prompt], adapter: str | None, following: "_Following | None" = None
    ) -> list[Completion]:
        """Complete prompts as one batch, all with the token limit of the first. Returns the completions in order.

        `following` sees each token as it is written, and can end completions.
        """
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
                stopping_criteria=StoppingCriteriaList([] if following is None else [following]),
                **pictures,
            )
        return [self._completion(row[longest:].tolist()) for row in output]

    def losses(self, answers: list[GivenAnswer], adapter: str | None, done: DoneLoss | None = None) -> list[float]:
        """The losses of given answers, in their order, from one forward pass over each batch of similar length. Raises
        torch.OutOfMemoryError if one does not fit alone."""
        return _in_batches(answers, self._loss_batches(answers), lambda part: self._batch_losses(part, adapter), done)

    def _loss_batches(self, answers: list[GivenAnswer]) -> Iterator[list[int]]:
        """Yield the indices of each batch's answers, the longest first."""
        order = sorted(range(len(answers)), key=lambda i: (-answers[i].length, i))
        while order:
            most = LOSS_TOKENS // max(answers[order[0]].length, 1) if self._head is not None else 1
            batch, order = order[: max(most, 1)], order[max(most, 1) :]
            yield batch

    def _batch_losses(self, answers: list[GivenAnswer], adapter: str | None) -> list[float]:
        """The losses of given answers, as one batch. Logits are computed where they count, some positions at a time."""
        sequences = [answer.whole_sequence(self._picture_token) for answer in answers]
        longest = max(len(sequence.tokens) for sequence in sequences)
        # padding on the right needs no mask: a decoder's tokens see only those before them
        padded = [one.tokens + [self._end_tokens[0]] * (longest - len(one.tokens)) for one in sequences]
        tokens = torch.tensor(padded, device=self._device)
        inputs = self._picture_inputs(answers)
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = tokens.eq(self._picture_token).int()
        places = [(row, place) for row, one in enumerate(sequences) for place in predicted_places(one)]
        totals = torch.zeros(len(answers), dtype=torch.float64)
        with torch.inference_mode(), self._adapter_context(adapter):
            head = self._head
            if head is None:
                states = self._base(input_ids=tokens, use_cache=False, **inputs).logits
            else:
                states = self._base.base_model(input_ids=tokens, use_cache=False, **inputs).last_hidden_state
            chunk = max(MOST_LOGITS // self._base.config.get_text_config().vocab_size, 1)
            for first in range(0, len(places), chunk):
                rows, columns = torch.tensor(places[first : first + chunk]).unbind(1)
                before = states[rows.to(states.device), columns.to(states.device) - 1]
                logits = before.float() if head is None else head.logits(before)
                targets = tokens[rows.to(tokens.device), columns.to(tokens.device)].to(logits.device)
                losses = functional.cross_entropy(logits, targets, reduction="none")
                totals.index_add_(0, rows, losses.double().cpu())
        return [float(total) for total in totals]

    @property
    def _base(self) -> Any:
        """The model of transformers, in whose layers PEFT has put the adapters."""
        return self._model.get_base_model() if isinstance(self._model, PeftModel) else self._model

    @cached_property
    def _head(self) -> Head | None:
        """How the model makes logits of its last hidden states; None if not in a way that Lorry knows. Its own logits
        are then computed of all tokens, one conversation at a time."""
        tokens = torch.arange(8, device=self._device)[None]
        with torch.inference_mode():
            own = self._base(input_ids=tokens, use_cache=False).logits[0].float()
            states = getattr(self._base.base_model(input_ids=tokens, use_cache=False), "last_hidden_state", None)
            if states is None:
                return None
            head = Head.of(self._base)
            off = (head.logits(states[0]) - own.to(states.device)).norm() / own.norm().to(states.device)
        return head if off <= MOST_DIFFERENCE else None

    def _picture_inputs(self, prompts: Sequence[Prompt | GivenAnswer]) -> dict[str, Any]:
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


def _in_batches(
    members: Sequence[T],
    batches: Iterable[list[int]],
    compute: Callable[[list[T]], list[R]],
    done: Callable[[int, R], None] | None,
) -> list[R]:
    """What `compute` returns for each of the members, in their order. `batches` has the indices of each batch. Calls
    `done` with the index and result of each member of a batch. Raises the error of `_all_or_halves`."""
    found: dict[int, R] = {}
    for batch in batches:
        for place, result in zip(batch, _all_or_halves(compute, [members[i] for i in batch]), strict=True):
            found[place] = result
            if done is not None:
                done(place, result)
    return [found[i] for i in range(len(members))]


def _all_or_halves(compute: Callable[[list[T]], list[R]], members: list[T]) -> list[R]:
    """What `compute` returns for all members of a batch or, if memory runs out, for its halves one after the other.
    Raises torch.OutOfMemoryError if one member alone does not fit."""
    try:
        return compute(members)
    except torch.OutOfMemoryError:
        if len(members) == 1:
            raise
    torch.cuda.empty_cache()  # not inside the handler, where the error's traceback still holds the batch's memory
    half = len(members) // 2
    print(f"infer: out of memory with {len(members)} sequences; retries with {half} and {len(members) - half}")
    return [found for part in (members[:half], members[half:]) for found in _all_or_halves(compute, part)]


class _Sampling(LogitsProcessor):  # type: ignore[misc]
    """Samples the next token of prompts with a temperature. Each prompt has its own random numbers, so its completion
    does not depend on its batch.

    The token with the largest logit / temperature + Gumbel noise is a sample from the softmax (Maddison et al. 2014,
    'A* sampling', arXiv:1411.0030).
    """

    def __init__(self, prompts: list[Prompt]) -> None:
        """Seed the random numbers of each prompt with a temperature. `prompts` are the rows of the batch."""
        self._sampled = [
            (row, prompt, torch.Generator().manual_seed(prompt.seed))
            for row, prompt in enumerate(prompts)
            if prompt.temperature
        ]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Divide logits by the temperature of their prompt and add noise, in place, except where the temperature is 0.
        Returns all logits, (prompts, vocabulary)."""
        for row, prompt, generator in self._sampled:
            uniform = torch.rand(scores.shape[1], generator=generator, dtype=torch.float64)
            noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
            logits = _nucleus(scores[row].float() / prompt.temperature, prompt.top_p)
            scores[row] = logits + noise.to(scores.device, torch.float32)
        return scores


def _nucleus(logits: Any, top_p: float) -> Any:
    """Logits, (vocabulary), with -inf for all tokens but the likeliest that together have the probability `top_p`
    (Holtzman et al. 2019, 'The Curious Case of Neural Text Degeneration', arXiv:1904.09751)."""
    if top_p >= 1:
        return logits
    ordered, places = logits.softmax(-1).sort(descending=True)
    others = places[ordered.cumsum(-1) - ordered >= top_p]
    return logits.index_fill(0, others, float("-inf"))


class _Following(StoppingCriteria):  # type: ignore[misc]
    """Shows the completions of a batch while they are written, and ends each at its own limit.

    transformers calls it after each token of the batch, and drops the rows that it ends.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        limits: list[int],
        completion: Callable[[list[int]], Completion],
        shown: Shown,
    ) -> None:
        """`limits` are the prompts' largest numbers of tokens. `completion` makes a completion of the tokens after a
        prompt."""
        self._limits, self._completion, self._shown = limits, completion, shown
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._open = set(range(len(prompts)))
        self.completions = [Completion("", 0, "length") for _ in prompts]
        """The completions so far, in the prompts' order."""

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Take the last token of each unfinished row of `input_ids`, (prompts, tokens). Returns which rows are
        finished, (prompts)."""
        last = input_ids[:, -1].tolist()
        for row in sorted(self._open):
            self._tokens[row].append(last[row])
            found, before = self._completion(self._tokens[row]), self.completions[row]
            self.completions[row] = found
            goes_on = found.text == before.text or self._shown(row, found.text)
            if found.finish_reason == "stop" or not goes_on or len(self._tokens[row]) >= self._limits[row]:
                self._open.discard(row)
            if not goes_on:
                self.completions[row] = replace(found, finish_reason="stop")
        finished = [row not in self._open for row in range(len(last))]
        return torch.tensor(finished, device=input_ids.device)
