"""Check that Triton and inductor work with the C compiler of the stage images, tcc behind images/base/cc.

    PATH=<a folder without gcc and clang> CC=images/base/cc python -m benchmarks.triton_compiler

Needs a GPU, tcc and Python.h. Prints one JSON row; results/triton_compiler.json has the row of an H100. Triton compiles
a C stub for every new kernel signature; inductor's kernels, which vLLM runs, are Triton kernels.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path


def main() -> None:
    """Measure with the compilers' caches in a temporary folder, and print the row."""
    with tempfile.TemporaryDirectory() as caches:
        os.environ |= {"TRITON_CACHE_DIR": f"{caches}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
        print(json.dumps(measure(Path(caches))))


def measure(caches: Path) -> dict[str, object]:
    """Compile a small model and a loss with inductor.

    Returns the row: the GPU, versions, CC, other C compilers on PATH, the number of compiled stubs in `caches`, the
    largest difference between the compiled and the eager model's logits, and whether the loss has a finite gradient.
    """
    import torch
    import triton
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, vocab_size=1000
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    compiled = torch.compile(model.forward, dynamic=True)
    differences = []
    for length in (64, 100, 33):
        tokens = torch.randint(0, 1000, (2, length), device="cuda")
        with torch.no_grad():
            differences.append((compiled(tokens).logits - model(tokens).logits).abs().max().item())
    logits = torch.randn(64, 1000, device="cuda", requires_grad=True)
    torch.compile(torch.nn.functional.cross_entropy)(logits, torch.randint(0, 1000, (64,), device="cuda")).backward()
    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "CC": os.environ.get("CC"),
        "other compilers": [name for name in ("gcc", "clang", "cc", "g++") if shutil.which(name)],
        "stubs compiled": len(list(caches.glob("**/*.so"))),
        "inductor against eager, largest difference of logits": max(differences),
        "gradient is finite": bool(logits.grad.isfinite().all()),
    }


if __name__ == "__main__":
    main()
