"""Choose the library and the kernel that compute with a GPTQ base.

transformers, PEFT and ms-swift load a GPTQ folder with auto-gptq (the image v100-gptq, transformers 4) or its successor
gptqmodel (all other images). By default they choose the kernel that is fastest in inference. These kernels pass no
gradient to their input, some with an error and some silently, so LoRA modules below them hardly learn. This module
chooses kernels with a backward pass. Training and inference use the same kernel, so an adapter is served with the
arithmetic that it was trained with:

* gptqmodel on a GPU: `gptq_triton`, which unpacks a module's weights with a Triton kernel and multiplies with torch.
  On a CPU, and for bit widths that the Triton kernel lacks: `gptq_torch`, which unpacks with torch.
* auto-gptq: torch's matmul on unpacked weights (its QuantLinear "cuda-old"), without the ExLlama kernels. Training
  also avoids its own kernel for fewer than 128 tokens, which has no backward pass.

Weights are unpacked with float16 scales and then cast to the model's dtype. GPTQ: https://arxiv.org/abs/2210.17323
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
    """Whether the weights in a model folder are in GPTQ's format, by its config.json."""
    return quantisation_method(model) == "gptq"


def quantisation_method(model: Path) -> str | None:
    """Return the quantisation method in a model folder's config.json, such as `gptq`, `awq` or `bitsandbytes`; None if
    the weights are not quantised."""
    config = read_json(model / "config.json") or {}
    return (config.get("quantization_config") or {}).get("quant_method")


def gptq_library(model: Path) -> str:
    """Return the name of the installed GPTQ library: `gptqmodel` or, without it, `auto_gptq`.

    Raises UsageError if neither is installed, or optimum is not.
    """
    found = next((name for name in ("gptqmodel", "auto_gptq") if importlib.util.find_spec(name)), "gptqmodel")
    missing = [name for name in (found, "optimum") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{model}: its GPTQ weights need {' and '.join(missing)}, which this Python lacks; run `pip install"
            " --no-deps -r requirements/gptq.txt`, or use an image for GPUs (there, infer.engine=vllm needs neither)"
        )
    return found


@contextmanager
def patch_gptq_kernels(model: Path, on_card: bool, training: bool) -> Iterator[None]:
    """Within this context, make transformers, PEFT and ms-swift load a GPTQ base with this module's choice of kernel.

    For a base that is not quantised, only keeps PEFT from importing gptqmodel. Does nothing for a base that is
    quantised with another method. `on_card`: the base is loaded on a GPU. `training`: it is loaded for training. Raises
    UsageError if a GPTQ base's library, or optimum, is not installed.
    """
    with ExitStack() as patches:
        if quantisation_method(model) is None:
            # PEFT would import gptqmodel anyway, which takes a second, prints, and changes CUDA's order of GPUs
            for kind in ("gptq", "awq"):
                name = f"peft.tuners.lora.{kind}.is_gptqmodel_available"
                patches.enter_context(patch(name, lambda: False, create=True))
        elif is_gptq(model):
            if gptq_library(model) == "gptqmodel":
                _patch_gptqmodel(patches, model, on_card, training)
            else:
                _patch_auto_gptq(patches, training)
        yield


def _patch_gptqmodel(patches: ExitStack, model: Path, on_card: bool, training: bool) -> None:
    """Patch how gptqmodel loads a base, until `patches` closes."""
    with redirect_stdout(StringIO()):  # the import prints a banner
        import gptqmodel  # noqa: F401

    bits = int(read_json(model / "config.json")["quantization_config"]["bits"])
    # gptqmodel would compile the unpacking of each module: this takes minutes, and no image has the compiler
    environment = {"TORCHDYNAMO_DISABLE": "1"}
    if not on_card and not training:  # unpacking a weight on a CPU takes far longer than using it for one token
        environment["GPTQ_TORCH_CACHE_WEIGHTS"] = "1"
    patches.enter_context(patch.dict(os.environ, environment))
    _choose_kernel(patches, backend="gptq_triton" if on_card and bits in (2, 4, 8) else "gptq_torch")


def _patch_auto_gptq(patches: ExitStack, training: bool) -> None:
    """Patch how auto-gptq loads a base, until `patches` closes."""
    _choose_kernel(patches, use_exllama=False)
    if training:
        from auto_gptq.nn_modules.qlinear import qlinear_cuda, qlinear_cuda_old

        for kernels in (qlinear_cuda, qlinear_cuda_old):
            patches.enter_context(patch.object(kernels, "_autogptq_cuda_available", False))


def _choose_kernel(patches: ExitStack, **kernel: Any) -> None:
    """Add these options to every new GPTQConfig, until `patches` closes. Neither ms-swift nor PEFT has an option for
    the kernel."""
    from transformers import GPTQConfig

    plain = GPTQConfig.__init__

    def initialise_with_kernel(self: Any, *arguments: Any, **named: Any) -> None:
        """Call GPTQConfig's own `__init__` with the kernel's options."""
        plain(self, *arguments, **{**named, **kernel})

    patches.enter_context(patch.object(GPTQConfig, "__init__", initialise_with_kernel))
