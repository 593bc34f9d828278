"""The vLLM engine: it loads base and adapters once and uses continuous batching. It needs no server."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from stages.engines import vllm_children
from stages.engines.engine import Completion, Done, DoneLoss, EngineSettings, GivenAnswer, Shown, predicted_places
from stages.engines.vllm_options import AUTO_BATCH, AUTO_BATCH_ON_CPU, ENVIRONMENT, vllm_arguments
from stages.models.reasoning import marked_text
from stages.models.rendering import Prompt, picture_token

IN_FLIGHT = 2
"""Prompts submitted to the engine per sequence that it decodes at once. Enough that it never waits for prompts, and few
enough that memory never holds the pictures of all prompts, which are read shortly before a prompt is submitted."""

READERS, AHEAD = 8, 16
"""Number of threads that read pictures, and of prompts whose pictures are read in advance."""

P = TypeVar("P", Prompt, GivenAnswer)


class VllmEngine:
    """An offline vLLM with all adapters on one base. It computes shared prefixes of prompts once."""

    continuous = True

    def __init__(self, settings: EngineSettings) -> None:
        """Start vLLM. Raises DoesNotFitError if a GPU has hardly any free memory."""
        os.environ |= ENVIRONMENT
        import torch

        # on a GPU, the engine's core gets its own process and computes while this one prepares pictures; but only with
        # the plugin: without it, that process could outlive this one. On a CPU, a second process is not faster
        apart = torch.cuda.is_available() and vllm_children.is_installed()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(apart))
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self._settings = settings
        self.batch_size = settings.batch_size or (AUTO_BATCH if torch.cuda.is_available() else AUTO_BATCH_ON_CPU)
        memory = None
        if torch.cuda.is_available():
            memory = [torch.cuda.mem_get_info(gpu) for gpu in range(settings.tensor_parallel)]
        self._llm = LLM(**vllm_arguments(settings, self.batch_size, memory), disable_log_stats=True)
        self._streams = count()
        self._requests = {
            name: LoRARequest(name, number, str(Path(folder)))
            for number, (name, folder) in enumerate(settings.adapters.items(), start=1)
        }

    def generate(self, prompts: list[Prompt], adapter: str | None, done: Done | None = None) -> list[Completion]:
        """Complete the prompts with an adapter (None: the base). Returns the completions in the prompts' order."""
        found: dict[int, Completion] = {}
        for place, output in self._stream(prompts, adapter, self._submit_prompt):
            found[place] = self._completion(output.outputs[0])
            if done is not None:
                done(place, found[place])
        return [found[place] for place in range(len(prompts))]

    def losses(self, answers: list[GivenAnswer], adapter: str | None, done: DoneLoss | None = None) -> list[float]:
        """The losses of given answers with an adapter (None: the base), in their order. Raises RuntimeError if vLLM
        reads other tokens than those of an answer."""
        found: dict[int, float] = {}
        for place, output in self._stream(answers, adapter, self._submit_answer):
            found[place] = self._loss(answers[place], output)
            if done is not None:
                done(place, found[place])
        return [found[place] for place in range(len(answers))]

    def find_batch_size(self, prompts: list[Prompt]) -> tuple[int, str]:
        """Return the batch size, unchanged, and the reason. vLLM lets prompts wait until its KV cache has room."""
        return self.batch_size, "vLLM's own choice"

    def stream(self, prompts: list[Prompt], adapter: str | None, shown: Shown) -> list[Completion]:
        """Complete the prompts together, and call `shown` each time that a text grows. Returns the completions in their
        order."""
        from vllm.sampling_params import RequestOutputKind

        engine, request = self._llm.llm_engine, self._request(adapter)
        found = {place: Completion("", 0, "stop") for place in range(len(prompts))}
        places: dict[str, int] = {}
        try:
            for place, (prompt, pictures) in enumerate(_read_pictures(prompts)):
                name = f"stream-{next(self._streams)}"
                sampling = self._sampling(prompt)
                sampling.output_kind = RequestOutputKind.CUMULATIVE
                engine.add_request(name, _tokens_prompt(prompt.tokens, pictures), sampling, lora_request=request)
                places[name] = place
            while places:
                outputs: list[Any] = engine.step()
                for output in (output for output in outputs if output.request_id in places):
                    place = places[output.request_id]
                    before, found[place] = found[place].text, self._completion(output.outputs[0])
                    goes_on = found[place].text == before or shown(place, found[place].text)
                    if output.finished or not goes_on:
                        del places[output.request_id]
                    if not goes_on:
                        found[place] = replace(found[place], finish_reason="stop")
                        engine.abort_request([output.request_id])
        finally:
            if places:
                engine.abort_request(list(places))
        return [found[place] for place in range(len(prompts))]

    def _request(self, adapter: str | None) -> Any:
        """vLLM's LoRARequest for an adapter; None for the base."""
        return self._requests[adapter] if adapter is not None else None

    def _stream(
        self, asked: Sequence[P], adapter: str | None, submit: Callable[[P, list[Any], Any], str]
    ) -> Iterator[tuple[int, Any]]:
        """Yield the index of each prompt or given answer and vLLM's output, in the order in which they finish.

        `submit` adds one, with its opened pictures and vLLM's LoRARequest (None: the base), to vLLM's queue, and
        returns the id of its output.
        """
        request, engine = self._request(adapter), self._llm.llm_engine
        places: dict[str, int] = {}
        waiting = enumerate(_read_pictures(asked))
        left = len(asked)
        try:
            while left:
                while len(places) < IN_FLIGHT * self.batch_size and (new := next(waiting, None)) is not None:
                    places[submit(*new[1], request)] = new[0]
                finished: list[Any] = [output for output in engine.step() if output.finished]
                left -= len(finished)
                for output in finished:
                    yield places.pop(output.request_id), output
        finally:
            if places:  # after an error or a stop, so that the next call does not get the outputs of these prompts
                engine.abort_request(list(places))

    def _submit_prompt(self, prompt: Prompt, pictures: list[Any], request: Any) -> str:
        """Submit a prompt to be completed. See `_stream`."""
        return self._submit(prompt.tokens, self._sampling(prompt), pictures, request)

    def _sampling(self, prompt: Prompt) -> Any:
        """vLLM's SamplingParams for a prompt."""
        from vllm import SamplingParams

        return SamplingParams(
            temperature=prompt.temperature,
            top_p=prompt.top_p,
            seed=prompt.seed if prompt.temperature else None,
            max_tokens=prompt.max_new_tokens or self._settings.max_new_tokens,
        )

    def _submit_answer(self, answer: GivenAnswer, pictures: list[Any], request: Any) -> str:
        """Submit a given answer, whose tokens get their own log probabilities. See `_stream`.

        vLLM then reads no cached prefix, which has none, and has to write one token more.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        return self._submit(answer.sequence.tokens, sampling, pictures, request)

    def _submit(self, token_ids: list[int], sampling: Any, pictures: list[Any], request: Any) -> str:
        """Add tokens with their pictures to vLLM's queue. Returns the id of their output."""
        tokens = _tokens_prompt(token_ids, pictures)
        (name,) = self._llm.enqueue([tokens], sampling, lora_request=request, use_tqdm=False)
        return str(name).partition("-")[0]  # vLLM appends a hyphen and a suffix

    def _loss(self, answer: GivenAnswer, output: Any) -> float:
        """The loss of a given answer, from the log probabilities in vLLM's output."""
        sequence = answer.whole_sequence(picture_token(self._settings.model)) if answer.pictures else answer.sequence
        if list(output.prompt_token_ids) != sequence.tokens:
            raise RuntimeError(
                f"{answer.sample_id}: vLLM reads {len(output.prompt_token_ids)} tokens where training reads"
                f" {len(sequence.tokens)}"
            )
        places = predicted_places(sequence)
        return -math.fsum(output.prompt_logprobs[place][sequence.tokens[place]].logprob for place in places)

    def _completion(self, output: Any) -> Completion:
        """The completion in vLLM's output. Its end token is not counted."""
        length = len(output.token_ids) - (output.finish_reason == "stop")
        text = marked_text(self._llm.get_tokenizer(), output.token_ids[:length])
        return Completion(output.text if text is None else text, length, str(output.finish_reason))

    def close(self) -> None:
        """End vLLM's processes and free its memory."""
        self._llm.llm_engine.engine_core.shutdown()  # waits for the engine's processes, if it has any
        del self._llm


def _tokens_prompt(token_ids: list[int], pictures: list[Any]) -> Any:
    """vLLM's TokensPrompt for tokens with their opened pictures."""
    from vllm.inputs import TokensPrompt

    tokens = TokensPrompt(prompt_token_ids=token_ids)
    if pictures:
        tokens["multi_modal_data"] = {"image": pictures}
    return tokens


def _read_pictures(prompts: Sequence[P]) -> Iterator[tuple[P, list[Any]]]:
    """Yield each prompt with its pictures. Threads read and scale the pictures of the next AHEAD prompts in advance.

    Raises DataError for a picture that cannot be read.
    """
    with ThreadPoolExecutor(READERS) as readers:
        ahead: deque[list[Future[Any]]] = deque()
        for place, prompt in enumerate(prompts):
            for next_one in prompts[place + len(ahead) : place + AHEAD]:
                ahead.append([readers.submit(picture.load) for picture in next_one.pictures])
            yield prompt, [future.result() for future in ahead.popleft()]
