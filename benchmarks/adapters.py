"""Nine adapters in one engine against nine engines with one adapter each: wall time and engine starts.

    python -m benchmarks.adapters                 # on a GPU: Qwen2.5-7B's shape, random weights, vLLM
    python -m benchmarks.adapters small           # SmolLM2 on the transformers engine, to test the benchmark itself

Prompts are random words, as long as a problem with its question and options. Every completion has the maximal length,
since random weights do not learn to stop. The time of one adapter is measured in an engine of its own, with room for
one. Both ways answer the same prompts, and the prefix cache is emptied between adapters, so that neither way profits
from earlier prompts. `small` writes the same row file.
"""

import random
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.random_adapters import make_adapter
from benchmarks.random_models import CONFIGS, make_model
from benchmarks.rows import write_rows
from stages.contract.roots import Roots
from stages.engines import start_engine
from stages.engines.engine import Engine, EngineSettings
from stages.models.rendering import Prompt, Renderer

ADAPTERS, RANK, PROMPTS, WORDS, NEW_TOKENS = 9, 16, 256, 220, 16
ROOTS = Roots.from_environment()


def make_prompts(model: Path, count: int) -> list[Prompt]:
    """Return `count` prompts of random words, about as long as a problem with its question and options.

    Each message starts with its own number, so that no two prompts share more than the start of the chat template.
    """
    renderer, words = Renderer(model), random.Random(0)
    vocabulary = ("red", "cup", "stands", "left", "of", "box", "seven", "and", "nobody", "taller", "than", "Ann", "is")
    prompts = []
    for number in range(count):
        text = " ".join(words.choice(vocabulary) for _ in range(WORDS))
        prompts.append(renderer.render(f"p{number}", [{"role": "user", "content": f"{number}. {text}\nA. yes\nB. no"}]))
    return prompts


def time_start(model: Path, adapters: dict[str, Path], small: bool) -> tuple[Engine, float]:
    """Start an engine with these adapters. Returns the engine, and the seconds that it took to start.

    The engine is vLLM in bfloat16, or transformers in float32 if `small`.
    """
    settings = EngineSettings(
        model=model,
        adapters=adapters,
        dtype="float32" if small else "bfloat16",
        max_new_tokens=NEW_TOKENS,
        batch_size=8 if small else 256,
        max_length=1024,
        seed=0,
    )
    began = time.perf_counter()
    engine = start_engine("transformers" if small else "vllm", settings)
    return engine, time.perf_counter() - began


def time_answers(engine: Engine, prompts: list[Prompt], adapter: str) -> tuple[float, list[str]]:
    """Answer all prompts with an adapter. Returns the seconds and the texts of the completions.

    Empties vLLM's prefix cache first, which does not count as time. The transformers engine has no such cache.
    """
    if hasattr(engine, "_llm"):
        engine._llm.reset_prefix_cache()
    began = time.perf_counter()
    texts = [completion.text for completion in engine.generate(prompts, adapter)]
    return time.perf_counter() - began, texts


def _wait_for_memory(patience: float = 60.0) -> None:
    """Wait until 90% of the GPU's memory is free, for at most `patience` seconds. Without a GPU, do not wait.

    A closed engine's memory is not free at once, and the next engine needs it.
    """
    import torch

    until = time.monotonic() + patience
    while torch.cuda.is_available() and time.monotonic() < until:
        free, total = torch.cuda.mem_get_info()
        if free > 0.9 * total:
            return
        time.sleep(0.5)


def main(small: bool) -> None:
    """Measure nine adapters in one engine and one adapter in its own engine. Write their rows and a row of ratios.

    `small` uses eight prompts and SmolLM2 on the transformers engine, which suits a CPU.
    """
    model = ROOTS.models / ("SmolLM2-135M-Instruct" if small else "Qwen2.5-7B")
    if not model.is_dir():
        make_model(model, CONFIGS["Qwen2.5-7B"])
    count, names = (8 if small else PROMPTS), [f"mix-{number}" for number in range(1, ADAPTERS + 1)]
    folder = ROOTS.runs / "benchmark-adapters"
    adapters = {name: folder / name for name in names}
    for number, path in enumerate(adapters.values()):
        make_adapter(path, model, RANK, number)
    prompts = make_prompts(model, count)
    shown = {"model": model.name, "prompts": count, "tokens a prompt": round(sum(p.length for p in prompts) / count)}
    shown |= {"tokens an answer": NEW_TOKENS, "rank": RANK, "engine": "transformers" if small else "vllm"}
    rows: list[dict[str, Any]] = []

    engine, start = time_start(model, adapters, small)
    time_answers(engine, prompts, names[0])  # warm-up: the first call compiles and loads
    before = time.perf_counter()
    taken = {name: time_answers(engine, prompts, name) for name in names}  # eight adapters are read from disk meanwhile
    first = time.perf_counter() - before
    before = time.perf_counter()
    for name in names:
        time_answers(engine, prompts, name)
    together = time.perf_counter() - before
    engine.close()
    del engine
    _wait_for_memory()
    different = len({tuple(texts) for _, texts in taken.values()})
    rows.append(
        {
            "what": "nine adapters, one engine",
            **shown,
            "engine starts": 1,
            "start seconds": round(start, 1),
            "seconds": round(together, 2),
            "seconds, adapters read on the way": round(first, 2),
            "adapters that answer otherwise than the others": different,
        }
    )
    write_rows("adapters", rows, "python -m benchmarks.adapters")

    engine, start = time_start(model, {names[0]: adapters[names[0]]}, small)
    time_answers(engine, prompts, names[0])
    singles = [time_answers(engine, prompts, names[0]) for _ in range(3)]
    engine.close()
    alone = min(taken for taken, _ in singles)
    same = sum(a == b for a, b in zip(singles[0][1], taken[names[0]][1], strict=True))
    rows.append(
        {
            "what": "one adapter, an engine of its own",
            **shown,
            "engine starts": 1,
            "start seconds": round(start, 1),
            "seconds": round(alone, 2),
            "answers as in the engine of nine": f"{same} of {count}",
        }
    )
    rows.append(
        {
            "what": "one engine against nine",
            **shown,
            "nine adapters over nine times one": round(together / (ADAPTERS * alone), 3),
            "the same, adapters read on the way": round(first / (ADAPTERS * alone), 3),
            "engine starts saved": ADAPTERS - 1,
            "seconds saved by starts": round((ADAPTERS - 1) * start, 1),
            "whole, nine engines over one": round(
                ADAPTERS * (start + alone) / (rows[0]["start seconds"] + together), 2
            ),
        }
    )
    write_rows("adapters", rows, "python -m benchmarks.adapters")


if __name__ == "__main__":
    main("small" in sys.argv[1:])
