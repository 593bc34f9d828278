"""Speed of GME with pages in batches, against one picture per call.

    LORRY_MODELS=models LORRY_RUNS=runs python -m benchmarks.embedding [tiny]

Needs a GPU of 40 GB and SmolLM2's tokenizer; the model has GME-Qwen2-VL-7B's shape and random weights. `tiny` uses
models/tiny-gme instead, to test the benchmark itself. Three ways are compared:

    original    pages drawn at 600 DPI, opened, shrunk to 1,280 tokens, processed and embedded one per call, in float16
    one by one  pages drawn at the budget, one per call
    batched     the same pages through `stages.preprocess.gme`, in batches
"""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.drawn_pages import draw_page
from benchmarks.random_models import CONFIGS, make_model
from benchmarks.rows import write_rows
from stages.contract.roots import Roots

MODEL = "GME-Qwen2-VL-7B"
ROOTS = Roots.from_environment()
BUDGET = 1280 * 28 * 28
FINE = 4960 * 7016
"""Pixels of A4 at 600 DPI."""
FOLDER = ROOTS.runs / "embedding"


def draw_pages(tiny: bool) -> tuple[list[Path], list[Path]]:
    """Draw pages at the budget, and the first of them also at 600 DPI. Returns the paths of both.

    `tiny` draws fewer pages, and those at 600 DPI with a hundredth of the pixels.
    """
    count, few = (8, 4) if tiny else (128, 24)
    drawn = [(FOLDER / "budget", n // 8, n % 8 + 1, BUDGET) for n in range(count)]
    fine = [(FOLDER / "fine", n // 8, n % 8 + 1, FINE // (100 if tiny else 1)) for n in range(few)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(draw_page, drawn + fine))
    paths = [[folder / f"D{document}" / f"{page}.jpg" for folder, document, page, _ in some] for some in (drawn, fine)]
    return paths[0], paths[1]


class OneByOne:
    """Transformers' processor and model, which embed one picture per call, as in the original."""

    def __init__(self, model: Path, device: str) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        self._torch, self._device = torch, device
        dtype = torch.float16 if device == "cuda" else torch.float32
        self._network: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).to(device).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._processor = AutoImageProcessor.from_pretrained(model)

    def __call__(self, path: Path) -> Any:
        """Return the normalised vector of a picture, float32 of shape (dimensions,)."""
        from PIL import Image

        torch, network = self._torch, self._network.model
        picture = Image.open(path).convert("RGB")
        size = {"shortest_edge": 256 * 784, "longest_edge": BUDGET}
        found = self._processor(images=[picture], size=size, return_tensors="pt").to(self._device)
        count = int(found["image_grid_thw"].prod()) // 4
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            + "<|image_pad|>" * count
            + "<|vision_end|><|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
        )
        tokens = self._tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(self._device)
        with torch.no_grad():
            seen = network.visual(found["pixel_values"].to(network.dtype), grid_thw=found["image_grid_thw"])
            embedded = network.language_model.embed_tokens(tokens)
            embedded[tokens == self._network.config.image_token_id] = seen.pooler_output
            states = network.language_model(inputs_embeds=embedded).last_hidden_state
            return torch.nn.functional.normalize(states[0, -1].float(), dim=0).cpu().numpy()


def time_pages(what: str, count: int, work: Callable[[], Any], **more: Any) -> dict[str, Any]:
    """Run `work`, which embeds `count` pages. Returns the row, and prints it.

    The row has pages per second, `more` as further columns and, on a GPU, torch's peak memory in GB of 1e9 bytes.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    work()
    seconds = time.monotonic() - began
    row = {"way": what, "pages": count, "pages a second": round(count / seconds, 2), **more}
    if torch.cuda.is_available():
        row["peak GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    print(row, flush=True)
    return row


def measure_one_by_one(
    model: Path, device: str, fine: list[Path], few: list[Path]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Measure `original` with the pages `fine`, and `one by one` with the pages `few`.

    Returns the two rows, and the vectors of at most four pages, the first of `few`, to compare with those of `batched`.
    """
    embed = OneByOne(model, device)
    embed(fine[0])  # warm-up: the first call compiles and loads
    rows = [
        time_pages("original", len(fine), lambda: [embed(path) for path in fine]),
        time_pages("one by one", len(few), lambda: [embed(path) for path in few]),
    ]
    return rows, [embed(path) for path in few[:4]]


def main() -> None:
    """Measure all three ways, `batched` at four batch sizes, and write their rows and one that compares vectors."""
    import torch

    from stages.preprocess.gme import Gme

    tiny = sys.argv[1:] == ["tiny"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ROOTS.models / ("tiny-gme" if tiny else MODEL)
    if not (model / "config.json").is_file():
        make_model(model, CONFIGS[MODEL])
    at_budget, fine = draw_pages(tiny)
    few = at_budget[: len(at_budget) // 4]
    rows, vectors = measure_one_by_one(model, device, fine, few)
    gme = Gme(model, device, "bfloat16" if device == "cuda" else "float32", BUDGET)
    for size in (1, 8, 16, 32):
        batches = [at_budget[start : start + size] for start in range(0, len(at_budget), size)]
        list(gme.embed_pictures(batches[:1]))
        shown = batches[: max(1, len(batches) // 4)] if size == 1 else batches
        count = sum(map(len, shown))
        rows.append(time_pages("batched", count, lambda shown=shown: list(gme.embed_pictures(shown)), batch=size))
    same = [float(a @ b) for a, b in zip(vectors, next(iter(gme.embed_pictures([few[:4]]))), strict=True)]
    best = max(row["pages a second"] for row in rows if row["way"] == "batched")
    for row in rows[:2]:
        row["batched, at best, is times"] = round(best / row["pages a second"], 1)
    rows.append({"what": "cosine of batched in bfloat16 with one by one in float16", "least": round(min(same), 5)})
    write_rows("embedding-tiny" if tiny else "embedding", rows, "python -m benchmarks.embedding")


if __name__ == "__main__":
    main()
