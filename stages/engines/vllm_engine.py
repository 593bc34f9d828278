"""The engine of every target: vLLM offline, base and adapters on one load, continuous batching."""

import os
from pathlib import Path
from typing import Any

from stages.contract.errors import DoesNotFitError
from stages.contract.files import read_json
from stages.engines.engine import Completion, EngineSettings, Prompt

MOST_OF_A_CARD, SPARE = 0.9, 0.02
"""Shares of a card's memory: what vLLM takes at most (its own default), and what is left free of a card that others
use, too. vLLM counts the share of the whole card and refuses to start where less is free."""


class VllmEngine:
    """Adapters are LoRA requests on one base; prefixes that prompts share are computed once."""

    def __init__(self, settings: EngineSettings) -> None:
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",  # it would report over the network
            "DO_NOT_TRACK": "1",
            "VLLM_PLUGINS": "",  # ms-swift plugs itself in where both are installed, and breaks it without torchvision
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            # the engine core in this process: in one of its own it would outlive a SIGKILL, and keep its memory
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # else a CPU build leaves one of two processors idle
        }
        import torch
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        ranks = [read_json(folder / "adapter_config.json")["r"] for folder in settings.adapters.values()]
        options: dict[str, Any] = {}
        if ranks:
            options = {"enable_lora": True, "max_loras": len(ranks), "max_lora_rank": _supported_rank(max(ranks))}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            share = min(MOST_OF_A_CARD, free / total - SPARE)
            if share < SPARE:
                raise DoesNotFitError(
                    f"the GPU has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free: take another (make: GPUS=...)"
                )
            options["gpu_memory_utilization"] = round(share, 3)
        else:
            options["kv_cache_memory_bytes"] = _kv_cache_bytes(settings)
            options["enforce_eager"] = True  # compiling for a CPU needs g++ and takes longer than it saves
        self._llm = LLM(
            model=str(settings.model),
            dtype=settings.dtype,  # type: ignore[arg-type]
            max_model_len=settings.max_length,
            max_num_seqs=settings.batch_size,
            enable_prefix_caching=True,
            seed=settings.seed,
            disable_log_stats=True,
            **options,
        )
        self._sampling = SamplingParams(temperature=0, max_tokens=settings.max_new_tokens)
        self._requests = {
            name: LoRARequest(name, number, str(Path(folder)))
            for number, (name, folder) in enumerate(settings.adapters.items(), start=1)
        }

    def generate(self, prompts: list[Prompt], adapter: str | None) -> list[Completion]:
        """Greedy completions; all prompts are submitted at once and the engine batches them."""
        request = self._requests[adapter] if adapter is not None else None
        from vllm.inputs import TokensPrompt

        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=prompt.tokens) for prompt in prompts],
            self._sampling,
            lora_request=request,
            use_tqdm=False,
        )
        return [
            Completion(out.text, len(out.token_ids) - (out.finish_reason == "stop"), str(out.finish_reason))
            for out in (output.outputs[0] for output in outputs)
        ]

    def close(self) -> None:
        del self._llm  # ends the engine's process


def _kv_cache_bytes(settings: EngineSettings) -> int:
    """Bytes of keys and values for a full batch, in float32.

    On a CPU vLLM would take nine tenths of all memory for them, and refuse to start where others use some.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(settings.model, local_files_only=True).get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * 4
    block = 128  # tokens; the last block of each sequence is partly empty
    return int(token * settings.batch_size * (settings.max_length + block))


def _supported_rank(rank: int) -> int:
    """vLLM takes these ranks only; a larger one than needed wastes memory and time."""
    return next((allowed for allowed in (1, 8, 16, 32, 64, 128, 256, 320, 512) if allowed >= rank), rank)
