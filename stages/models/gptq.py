"""Bases that are stored in GPTQ's integers: which library computes with them, and by which of its kernels.

transformers, PEFT and ms-swift load such a folder by themselves, with auto-gptq (the image v100-gptq, transformers 4)
or its successor gptqmodel (all others). What they would get wrong is the kernel. Both libraries choose the one that is
fastest in inference, and those lose the gradient of what they are given, some with an error and some without a word:
then LoRA below them hardly learns. Here is chosen what computes forward and backward, in training and in inference
alike, so that an adapter is asked as it was trained:

* gptqmodel on a card: `gptq_triton`, which unpacks a module's weights with a Triton kernel and leaves the rest to
  torch; on a CPU, and for widths that Triton's kernel has not: `gptq_torch`, which unpacks with torch.
* auto-gptq: torch's matmul on unpacked weights (its QuantLinear "cuda-old"), without the ExLlama kernels and, in
  training, without its own for fewer than 128 tokens, which has no backward either.

The weights are unpacked by float16 scales and then cast to what the model computes in.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from stages.contract.errors import UsageError
from stages.contract.files import read_json


def is_gptq(model: Path) -> bool:
    """Whether a model folder's config.json says that its weights are GPTQ's."""
    return stored_as(model) == "gptq"


def stored_as(model: Path) -> str | None:
    """How the weights of a model folder are quantised, in the words of its config.json: gptq, awq, bitsandbytes; None
    where they are not."""
    config = read_json(model / "config.json") or {}
    return (config.get("quantization_config") or {}).get("quant_method")


def library(model: Path) -> str:
    """`gptqmodel` or `auto_gptq`, whichever is here. Raises UsageError where none is, or not all that it needs."""
    found = next((name for name in ("gptqmodel", "auto_gptq") if importlib.util.find_spec(name)), "gptqmodel")
    missing = [name for name in (found, "optimum") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{model}: its weights are GPTQ's, which {' and '.join(missing)} would read here: pip install --no-deps -r"
            " requirements/gptq.txt, or train in an image for cards; there --set infer.engine=vllm answers without it"
        )
    return found


@contextmanager
def loading(model: Path, on_card: bool, training: bool) -> Iterator[None]:
    """While this lasts, transformers loads a GPTQ base with the right kernel, whoever calls it.

    Raises UsageError where no library for it is installed.
    """
    with ExitStack() as patches:
        if stored_as(model) is None:
            # PEFT would import gptqmodel all the same, which takes a second, prints and sets CUDA's order of cards
            for kind in ("gptq", "awq"):
                name = f"peft.tuners.lora.{kind}.is_gptqmodel_available"
                patches.enter_context(patch(name, lambda: False, create=True))
        elif is_gptq(model):
            if library(model) == "gptqmodel":
                _with_gptqmodel(patches, model, on_card, training)
            else:
                _with_auto_gptq(patches, training)
        yield


def _with_gptqmodel(patches: ExitStack, model: Path, on_card: bool, training: bool) -> None:
    with redirect_stdout(StringIO()):  # its banner
        import gptqmodel  # noqa: F401

    bits = int(read_json(model / "config.json")["quantization_config"]["bits"])
    # it would compile the unpacking of each module by itself: minutes, and with a compiler that no image has
    environment = {"TORCHDYNAMO_DISABLE": "1"}
    if not on_card and not training:  # a processor takes far longer to unpack a weight than to use it for a token
        environment["GPTQ_TORCH_CACHE_WEIGHTS"] = "1"
    patches.enter_context(patch.dict(os.environ, environment))
    _choose(patches, backend="gptq_triton" if on_card and bits in (2, 4, 8) else "gptq_torch")


def _with_auto_gptq(patches: ExitStack, training: bool) -> None:
    _choose(patches, use_exllama=False)
    if training:
        from auto_gptq.nn_modules.qlinear import qlinear_cuda, qlinear_cuda_old

        for kernels in (qlinear_cuda, qlinear_cuda_old):
            patches.enter_context(patch.object(kernels, "_autogptq_cuda_available", False))


def _choose(patches: ExitStack, **kernel: Any) -> None:
    """Have every config.json's quantization_config read as if it said so: neither ms-swift nor PEFT can be told."""
    from transformers import GPTQConfig

    plain = GPTQConfig.__init__

    def with_kernel(self: Any, *arguments: Any, **named: Any) -> None:
        plain(self, *arguments, **{**named, **kernel})

    patches.enter_context(patch.object(GPTQConfig, "__init__", with_kernel))
