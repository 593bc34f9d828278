"""The vLLM engine: it loads base and adapters once and uses continuous batching. It needs no server."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stages.contract.errors import DoesNotFitError
from stages.contract.files import read_json
from stages.engines import vllm_children
from stages.engines.engine import Completion, Done, EngineSettings
from stages.models.pictures import PictureRules, rules_of
from stages.models.reasoning import marked_text
from stages.models.rendering import Prompt

MOST_OF_A_GPU, SPARE = 0.9, 0.02
"""Shares of a GPU's memory: the most that vLLM uses (its own default), and what stays free if other programs use the
GPU too. vLLM reserves a share of the whole GPU and refuses to start if less is free."""

IN_FLIGHT = 2
"""Prompts submitted to the engine per sequence that it decodes at once. Enough that it never waits for prompts, and few
enough that memory never holds the pictures of all prompts, which are read shortly before a prompt is submitted."""

AUTO_BATCH, AUTO_BATCH_ON_CPU = 256, 16
"""Number of sequences decoded together with `batch_size: auto`, on a GPU and on a CPU. If they do not fit the KV cache,
vLLM lets some wait."""

MOST_ADAPTERS = 16
"""Largest number of adapters on the GPU at once. infer uses one after the other; loading one takes half a second."""

READERS, AHEAD = 8, 16
"""Number of threads that read pictures, and of prompts whose pictures are read in advance."""


class VllmEngine:
    """An offline vLLM with all adapters on one base. It computes shared prefixes of prompts once."""

    continuous = True

    def __init__(self, settings: EngineSettings) -> None:
        """Start vLLM. Raises DoesNotFitError if a GPU has hardly any free memory."""
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",  # else vLLM reports its use over the network
            "DO_NOT_TRACK": "1",
            # no other plugin: ms-swift's breaks vLLM without torchvision
            "VLLM_PLUGINS": vllm_children.NAME,
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # else a CPU build leaves one of two cores idle
        }
        import torch

        # on a GPU, the engine's core gets its own process and computes while this one prepares pictures; but only with
        # the plugin: without it, that process could outlive this one. On a CPU, a second process is not faster
        apart = torch.cuda.is_available() and vllm_children.is_installed()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(apart))
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self._settings = settings
        self.batch_size = settings.batch_size or (AUTO_BATCH if torch.cuda.is_available() else AUTO_BATCH_ON_CPU)
        ranks = [read_json(folder / "adapter_config.json")["r"] for folder in settings.adapters.values()]
        options: dict[str, Any] = {}
        if ranks:
            held = min(len(ranks), MOST_ADAPTERS)
            options = {"enable_lora": True, "max_loras": held, "max_lora_rank": supported_rank(max(ranks))}
        if settings.max_pictures:
            options["limit_mm_per_prompt"] = {"image": settings.max_pictures}
            if isinstance(rules_of(settings.model), PictureRules):
                options["limit_mm_per_prompt"]["video"] = 0
                # pictures already have their size, so vLLM needs memory for the largest, not for the model's limit
                options["mm_processor_kwargs"] = {"max_pixels": settings.max_pixels}
        if torch.cuda.is_available():
            options["tensor_parallel_size"] = settings.tensor_parallel
            options["gpu_memory_utilization"] = round(_usable_memory_share(settings.tensor_parallel), 3)
        else:
            options["kv_cache_memory_bytes"] = _kv_cache_bytes(settings, self.batch_size)
            options["enforce_eager"] = True  # compiling for a CPU needs g++ and costs more time than it saves
        self._llm = LLM(
            model=str(settings.model),
            dtype=settings.dtype,  # type: ignore[arg-type]
            trust_remote_code=settings.trust_remote_code,  # vLLM's processes do not know what this one has settled
            max_model_len=settings.max_length,
            max_num_seqs=self.batch_size,
            enable_prefix_caching=True,
            seed=settings.seed,
            disable_log_stats=True,
            **options,
        )
        self._requests = {
            name: LoRARequest(name, number, str(Path(folder)))
            for number, (name, folder) in enumerate(settings.adapters.items(), start=1)
        }

    def generate(self, prompts: list[Prompt], adapter: str | None, done: Done | None = None) -> list[Completion]:
        """Complete the prompts with an adapter (None: the base). Returns the completions in the prompts' order."""
        found: dict[int, Completion] = {}
        for place, completion in self._stream(prompts, adapter):
            found[place] = completion
            if done is not None:
                done(place, completion)
        return [found[place] for place in range(len(prompts))]

    def find_batch_size(self, prompts: list[Prompt]) -> tuple[int, str]:
        """Return the batch size, unchanged, and the reason. vLLM lets prompts wait until its KV cache has room."""
        return self.batch_size, "vLLM's own choice"

    def _stream(self, prompts: list[Prompt], adapter: str | None) -> Iterator[tuple[int, Completion]]:
        """Yield each prompt's index and completion, in the order in which the completions finish."""
        request = self._requests[adapter] if adapter is not None else None
        engine = self._llm.llm_engine
        places: dict[str, int] = {}
        waiting = enumerate(_read_pictures(prompts))
        left = len(prompts)
        try:
            while left:
                while len(places) < IN_FLIGHT * self.batch_size and (new := next(waiting, None)) is not None:
                    places[self._submit(*new[1], request)] = new[0]
                finished: list[Any] = [output for output in engine.step() if output.finished]
                left -= len(finished)
                for output in finished:
                    yield places.pop(output.request_id), self._completion(output.outputs[0])
        finally:
            if places:  # after an error or a stop, so that the next call does not get the outputs of these prompts
                engine.abort_request(list(places))

    def _submit(self, prompt: Prompt, pictures: list[Any], request: Any) -> str:
        """Add one prompt with its opened pictures to vLLM's queue. Returns the id of its output.

        `request` is vLLM's LoRARequest for the adapter; None: the base.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        sampling = SamplingParams(
            temperature=prompt.temperature,
            seed=prompt.seed if prompt.temperature else None,
            max_tokens=prompt.max_new_tokens or self._settings.max_new_tokens,
        )
        tokens = TokensPrompt(prompt_token_ids=prompt.tokens)
        if pictures:
            tokens["multi_modal_data"] = {"image": pictures}
        (name,) = self._llm.enqueue([tokens], sampling, lora_request=request, use_tqdm=False)
        return str(name).partition("-")[0]  # vLLM appends a hyphen and a suffix

    def _completion(self, output: Any) -> Completion:
        """The completion in vLLM's output. Its end token is not counted."""
        length = len(output.token_ids) - (output.finish_reason == "stop")
        text = marked_text(self._llm.get_tokenizer(), output.token_ids[:length])
        return Completion(output.text if text is None else text, length, str(output.finish_reason))

    def close(self) -> None:
        """End vLLM's processes and free its memory."""
        self._llm.llm_engine.engine_core.shutdown()  # waits for the engine's processes, if it has any
        del self._llm


def _read_pictures(prompts: list[Prompt]) -> Iterator[tuple[Prompt, list[Any]]]:
    """Yield each prompt with its pictures. Threads read and scale the pictures of the next AHEAD prompts in advance.

    Raises DataError for a picture that cannot be read.
    """
    with ThreadPoolExecutor(READERS) as readers:
        ahead: deque[list[Future[Any]]] = deque()
        for place, prompt in enumerate(prompts):
            for next_one in prompts[place + len(ahead) : place + AHEAD]:
                ahead.append([readers.submit(picture.load) for picture in next_one.pictures])
            yield prompt, [future.result() for future in ahead.popleft()]


def _usable_memory_share(gpus: int) -> float:
    """The share, 0..1, of each GPU's memory that vLLM may use, on the first `gpus` GPUs.

    Raises DoesNotFitError if a GPU has hardly any free memory.
    """
    import torch

    free, total = min((torch.cuda.mem_get_info(gpu) for gpu in range(gpus)), key=lambda one: one[0] / one[1])
    share = min(MOST_OF_A_GPU, free / total - SPARE)
    if share < SPARE:
        raise DoesNotFitError(
            f"GPUS: the fullest GPU has only {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; choose other GPUs"
        )
    return share


def _kv_cache_bytes(settings: EngineSettings, batch_size: int) -> int:
    """The bytes of the KV cache for a full batch in float32, on a CPU.

    By default, vLLM takes nine tenths of the machine's memory, and refuses to start if other programs use part of it.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(settings.model, local_files_only=True).get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * 4
    block = 128  # tokens: the last block of a sequence is partly empty
    return int(token * batch_size * (settings.max_length + block))


RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's `max_lora_rank` may have (vllm/config/lora.py)."""


def supported_rank(rank: int) -> int:
    """The smallest `max_lora_rank` that vLLM accepts for `rank`; above the last of RANKS, `rank` itself. A larger value
    would waste memory and time."""
    return next((allowed for allowed in RANKS if allowed >= rank), rank)
