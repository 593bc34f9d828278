"""LoRA on a 4-bit GPTQ base on a GPU: losses, the adapter loaded in an engine, and memory against the estimate.

    LORRY_MODELS=... LORRY_RUNS=... python -m benchmarks.gptq [NAME...]

Needs an NVIDIA GPU of 80 GB, gptqmodel and SmolLM2's tokenizer. The base has Qwen2.5-7B's shape and random integers
(benchmarks.random_models). Each setting is one training by the train command, as in benchmarks.memory. Then the
transformers engine loads the adapter: the loss of a validation sample should be near training's last validation
loss, and the answers should differ from the base's. Nothing is asserted: the rows have the numbers.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.memory import ROOTS, STEPS, Setting, measure
from benchmarks.random_models import CONFIGS, make_model
from benchmarks.rows import write_rows
from stages.contract.files import read_json, read_jsonl
from stages.contract.run import Run
from stages.host.runs import open_run

BASE = "Qwen2.5-7B-GPTQ-Int4"
EPOCHS = 5
"""Epochs, of STEPS steps each, of the settings that measure learning; the others measure only memory."""
LEARN = (
    *(f"train.epochs={EPOCHS}", "train.learning_rate=5e-4", "train.lora_plus_ratio=null", "train.log_every=1"),
    *(f"train.checkpoint_every={STEPS * EPOCHS}", "train.warmup_ratio=0.1"),
)
SETTINGS = (
    Setting("GPTQ 7B, 2048, no checkpointing", BASE, 2048, 64, 1, ("train.gradient_checkpointing=false",)),
    Setting("GPTQ 7B, 2048", BASE, 2048, 64, 1, LEARN),
    Setting("GPTQ 7B, 512, whole sample learnt", BASE, 512, 480, 1, LEARN),  # lengths of extractive-qa
    Setting("GPTQ 7B, 4 x 2048", BASE, 2048, 512, 4),
    Setting("GPTQ 7B, 2048, float16", BASE, 2048, 64, 1, (*LEARN, "train.precision=float16")),
)
PROMPTS = ("What is a lever?", "Name a part of a pump.", "the the the", "Where is part 12?")


def losses(run: Run) -> dict[str, Any]:
    """Return columns from a run's log: the first and the last logged training loss, and the last validation loss.

    `steps` is the number of logged training losses. The validation loss is None if there was no validation.
    """
    log = list(read_jsonl(run.path("train", "metrics.jsonl")))
    steps = [entry["loss"] for entry in log if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return {
        "steps": len(steps),
        "loss first": steps[0],
        "loss last": steps[-1],
        "loss falls": steps[-1] < steps[0],
        "validation loss": evaluated[-1] if evaluated else None,
    }


def measure_served_adapter(setting: Setting, name: str) -> dict[str, Any]:
    """Load the adapter of the run `name` in the transformers engine, and answer PROMPTS with and without it.

    Returns columns: the class of a GPTQ module, the number of answers that differ between adapter and base, and the
    loss of the first validation sample with (`tuned`) and without (`base`) the adapter.
    """
    import torch

    from stages.engines.engine import EngineSettings
    from stages.engines.transformers_engine import TransformersEngine
    from stages.models.rendering import Renderer

    run = open_run("patent-qa", "text", None, setting.overrides, name)
    model, adapter = ROOTS.models / setting.model, run.path("train", "adapters", "tuned")
    decided = read_json(run.path("train", "manifest.json"))["decisions"]
    dtype = next(made["value"] for made in decided if made["what"] == "precision")
    engine = TransformersEngine(EngineSettings(model, {"tuned": adapter}, dtype, 16, 4, setting.length + 64, 0))
    renderer = Renderer(model)
    prompts = [renderer.render(text, [{"role": "user", "content": text}]) for text in PROMPTS]
    tuned, base = engine.generate(prompts, "tuned"), engine.generate(prompts, None)
    network: Any = engine._model
    kernel = network.base_model.model.model.layers[0].mlp.up_proj.base_layer
    sample = next(iter(read_jsonl(run.path("preprocess", "samples", "validation.jsonl"))))
    tokens, labels = _tokens_and_labels(renderer, sample["messages"])
    batch = {
        "input_ids": torch.tensor([tokens], device=engine._device),
        "labels": torch.tensor([labels], device=engine._device),
    }
    found = {}
    with torch.inference_mode(), torch.autocast(engine._device, getattr(torch, dtype), enabled=dtype != "float32"):
        for who in ("tuned", None):
            with engine._adapter_context(who):
                found[who or "base"] = round(float(network(**batch).loss), 4)
    return {
        "kernel": type(kernel).__name__,
        "validation loss in the engine": found,
        "answers that differ from the base's": sum(one.text != two.text for one, two in zip(tuned, base, strict=True)),
        "of answers": len(prompts),
    }


def _tokens_and_labels(renderer: Any, messages: list[Any]) -> tuple[list[int], list[int]]:
    """Return a conversation's tokens and labels, which are -100 for all tokens without a loss.

    Only the answer, its end token and the line break that ms-swift's template chatml appends have a loss.
    """
    prompt = renderer.render("x", messages[:-1]).tokens
    answer = renderer.tokenizer.encode(messages[-1]["content"], add_special_tokens=False)
    answer += [renderer.tokenizer.eos_token_id, *renderer.tokenizer.encode("\n", add_special_tokens=False)]
    return [*prompt, *answer], [*[-100] * len(prompt), *answer]


def add_losses(settings: list[Setting], rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield each of `rows`, with the training's losses added if the training succeeded.

    If its setting measures learning, the row also gets the columns of `measure_served_adapter`, which runs in a new
    process, or the end of that process's error output. `settings` are those that `measure` ran, in the same order.
    """
    number = {one.name: place for place, one in enumerate(settings)}
    for row in rows:
        if row.get("exit code") != 0:
            yield row
            continue
        place = number[row["setting"]]
        name = f"memory-{place:02}"
        run = open_run("patent-qa", "text", None, settings[place].overrides, name)
        more = losses(run)
        if not set(LEARN) <= set(settings[place].sets):
            yield {**row, **more}
            continue
        command = [sys.executable, "-m", "benchmarks.gptq", "--reload", settings[place].name, name]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        if done.returncode:
            print(done.stderr[-1500:], flush=True)
        more |= json.loads(lines[-1]) if not done.returncode else {"reload failed": done.stderr.strip()[-300:]}
        print(json.dumps({"setting": row["setting"], **more}), flush=True)
        yield {**row, **more}


def main() -> None:
    """Measure all settings, or those named as arguments, and write a row for each.

    With `--reload SETTING RUN`, which `add_losses` uses, only print the columns of `measure_served_adapter` as JSON.
    """
    if sys.argv[1:2] == ["--reload"]:
        print(json.dumps(measure_served_adapter(next(one for one in SETTINGS if one.name == sys.argv[2]), sys.argv[3])))
        return
    wanted = [one for one in SETTINGS if not sys.argv[1:] or one.name in sys.argv[1:]]
    for model in dict.fromkeys(one.model for one in wanted):
        if not (Path(ROOTS.models) / model / "model.safetensors.index.json").is_file():
            make_model(ROOTS.models / model, CONFIGS[model])
    rows: list[dict[str, Any]] = []
    try:
        measured = measure(wanted)
        rows += measured
        rows = list(add_losses(wanted, measured))
    finally:
        write_rows("gptq", rows, f"python -m benchmarks.gptq {' '.join(sys.argv[1:])}".strip(), by="setting")


if __name__ == "__main__":
    main()
