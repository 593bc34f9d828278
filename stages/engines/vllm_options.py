"""How vLLM is started: its environment and arguments, the same for the engine and for its server."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.contract.errors import DoesNotFitError, UsageError
from stages.contract.files import read_json
from stages.engines import vllm_children
from stages.engines.engine import EngineSettings
from stages.models.pictures import PictureRules, rules_of

MOST_OF_A_GPU, SPARE = 0.9, 0.02
"""Shares of a GPU's memory: the most that vLLM uses (its own default), and what stays free if other programs use the
GPU too. vLLM reserves a share of the whole GPU and refuses to start if less is free."""

AUTO_BATCH, AUTO_BATCH_ON_CPU = 256, 16
"""Number of sequences decoded together with `batch_size: auto`, on a GPU and on a CPU. If they do not fit the KV cache,
vLLM lets some wait."""

MOST_ADAPTERS = 16
"""Largest number of adapters on the GPU at once. infer uses one after the other; loading one takes half a second."""

LOSS_CHUNK = 512
"""Largest number of tokens of one prompt in a step of an engine that computes losses. vLLM computes the logits of all
these tokens in float32, and its plan of memory does not count them: 0.3 GB with a vocabulary of 152,000."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's `max_lora_rank` may have (vllm/config/lora.py)."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",  # else vLLM reports its use over the network
    "DO_NOT_TRACK": "1",
    # no other plugin: ms-swift's breaks vLLM without torchvision
    "VLLM_PLUGINS": vllm_children.NAME,
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # else a CPU build leaves one of two cores idle
}
"""Environment variables for vLLM and all its processes."""


def vllm_arguments(
    settings: EngineSettings, batch_size: int, memory: Sequence[tuple[int, int]] | None
) -> dict[str, Any]:
    """The arguments of vLLM's engine, by the names of its EngineArgs.

    `memory` has the free and total bytes of each GPU that it uses; None: it computes on the CPU. Raises DoesNotFitError
    if a GPU has hardly any free memory.
    """
    found: dict[str, Any] = {
        "model": str(settings.model),
        "dtype": settings.dtype,
        "trust_remote_code": settings.trust_remote_code,  # vLLM's processes do not know what this one has settled
        "max_model_len": settings.max_length,
        "max_num_seqs": batch_size,
        "enable_prefix_caching": True,
        "seed": settings.seed,
    }
    ranks = [read_json(folder / "adapter_config.json")["r"] for folder in settings.adapters.values()]
    if ranks:
        held = min(len(ranks), MOST_ADAPTERS)
        found |= {"enable_lora": True, "max_loras": held, "max_lora_rank": supported_rank(max(ranks))}
    if settings.max_pictures:
        found["limit_mm_per_prompt"] = {"image": settings.max_pictures}
        if isinstance(rules_of(settings.model), PictureRules):
            found["limit_mm_per_prompt"]["video"] = 0
            # infer's pictures already have their size, so vLLM needs memory for the largest, not for the model's limit
            if settings.max_pixels:
                found["mm_processor_kwargs"] = {"max_pixels": settings.max_pixels}
    if settings.computes_losses:
        found |= _options_for_losses(settings)
    if memory is not None:
        found["tensor_parallel_size"] = settings.tensor_parallel
        found["gpu_memory_utilization"] = round(_usable_memory_share(memory), 3)
    else:
        found["kv_cache_memory_bytes"] = _kv_cache_bytes(settings.model, settings.max_length, batch_size)
        found["enforce_eager"] = True  # compiling for a CPU needs g++ and costs more time than it saves
    return found


def _options_for_losses(settings: EngineSettings) -> dict[str, Any]:
    """vLLM's options with which log probabilities of prompts are right and fit.

    With LoRA on all modules, as is its default, vLLM 0.32 wraps the head too, and gives the tokens of a prompt the
    adapters of other prompts (PunicaWrapper.add_lora_logits), or fails. Raises UsageError for an adapter of the head.
    """
    from safetensors import safe_open

    options: dict[str, Any] = {"long_prefill_token_threshold": min(LOSS_CHUNK, settings.max_length)}
    adapted: set[str] = set()
    for name, folder in settings.adapters.items():
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            modules = [key.rpartition(".lora_")[0].split(".") for key in file.keys()]  # noqa: SIM118 - not a dict
        adapted |= {module[-1] for module in modules} | {"experts" for module in modules if "experts" in module}
        if "lm_head" in adapted:
            raise UsageError(
                f"train.target_modules: adapter {name} adapts lm_head, and vllm computes no losses with it;"
                " set infer.merged to true, infer.engine to transformers, or infer.losses to false"
            )
    return {**options, "lora_target_modules": sorted(adapted)} if adapted else options


def _usable_memory_share(memory: Sequence[tuple[int, int]]) -> float:
    """The share, 0..1, of each GPU's memory that vLLM may use; `memory` has their free and total bytes.

    Raises DoesNotFitError if a GPU has hardly any free memory.
    """
    free, total = min(memory, key=lambda one: one[0] / one[1])
    share = min(MOST_OF_A_GPU, free / total - SPARE)
    if share < SPARE:
        raise DoesNotFitError(
            f"GPUS: the fullest GPU has only {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; choose other GPUs"
        )
    return share


def _kv_cache_bytes(model: Path, max_length: int, batch_size: int) -> int:
    """The bytes of the KV cache for a full batch in float32, on a CPU.

    By default, vLLM takes nine tenths of the machine's memory, and refuses to start if other programs use part of it.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, local_files_only=True).get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * 4
    block = 128  # tokens: the last block of a sequence is partly empty
    return int(token * batch_size * (max_length + block))


def supported_rank(rank: int) -> int:
    """The smallest `max_lora_rank` that vLLM accepts for `rank`; above the last of RANKS, `rank` itself. A larger value
    would waste memory and time."""
    return next((allowed for allowed in RANKS if allowed >= rank), rank)
