"""Training on packs against PEFT and transformers alone, one sample at a time: losses and weights after 50 steps.

    LORRY_MODELS=models python -m benchmarks.parity [STEPS]

SmolLM2-135M-Instruct in float32 on a CPU, LoRA of rank 8 on all linear modules, the recipes' learning rate 1e-4 and no
dropout. The samples are questions with two sentences of their contexts as answers, 8 in a step and all of them in one
pass. The other side is written here: PEFT's layers, transformers' attention, the loss over all logits, torch's AdamW.
Needs `make setup` and seven minutes of one core.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict
from torch.nn import functional

from benchmarks.rows import write_rows
from stages.contract.files import read_jsonl
from stages.contract.recipe import load_recipe
from stages.contract.stop import StopRequest
from stages.models.gptq import patch_gptq_kernels
from stages.models.rendering import Renderer
from stages.train.base import add_lora, load_base, load_trainee
from stages.train.job import Job, Progress
from stages.train.loop import Loop
from stages.train.packing import Steps, pack
from stages.train.samples import Facts, Samples, TokenSequence, write_samples
from stages.train.schedule import rate_factor
from stages.train.together import Together

REPOSITORY = Path(__file__).parents[1]
CPU = torch.device("cpu")
SAMPLES, BATCH = 80, 8

Trained = tuple[list[float], dict[str, torch.Tensor]]
"""The loss of each step, and the adapter by PEFT's names."""


def main() -> None:
    """Measure one row and write it."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), steps)
        write_samples(job.work / "samples", ([one] for one in sequences(job.model)), Facts())
        samples = Samples(job.work / "samples")
        began = time.monotonic()
        packed, per_pass = train_packed(job, samples)
        between = time.monotonic()
        alone = train_alone(job, samples)
        seconds = {"s, packed": between - began, "s, one at a time": time.monotonic() - between}
    initial = get_peft_model_state_dict(load_adapted(job))
    differences = [(packed[1][name].detach() - weight).abs().max() for name, weight in alone[1].items()]
    moved = [(weight - initial[name]).abs().max() for name, weight in alone[1].items()]
    row = {
        "model": job.model.name,
        "steps": steps,
        "samples a step": BATCH,
        "samples a pass, fewest": per_pass,
        "learning rate": job.settings.learning_rate,
        "loss of the first and the last step": [round(alone[0][0], 3), round(alone[0][-1], 3)],
        "largest difference of a step's loss": max(
            abs(one - other) for one, other in zip(packed[0], alone[0], strict=True)
        ),
        "largest difference of a weight": float(max(differences)),
        "largest move of a weight": float(max(moved)),
        **{what: round(value) for what, value in seconds.items()},
    }
    write_rows("parity", [row], "python -m benchmarks.parity")


def make_job(folder: Path, steps: int) -> Job:
    """A training of SmolLM2 for so many steps."""
    epochs = steps / (SAMPLES // BATCH)
    changes = ("train.target_modules=[all-linear]", f"train.effective_batch={BATCH}", f"train.epochs={epochs}")
    rates = ("train.learning_rate=1e-4", "train.log_every=1", "train.checkpoint_every=1000")
    recipe = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny", (*changes, *rates))
    model = Path(os.environ.get("LORRY_MODELS", REPOSITORY / "models")) / recipe.model.path
    return Job(
        **{"model": model, "work": folder / "work", "scratch": folder, "adapter": folder / "adapter", "run": folder},
        **{"train": [], "validation": [], "cards": [], "key": "", "seed": 0, "dtype": "float32", "sharding": "none"},
        **{"pass_tokens": 4096, "evaluation_tokens": 4096, "processes": 1, "evaluate": False, "use_cpu": True},
        **{"mix": recipe.train.adapters[0], "model_settings": recipe.model, "settings": recipe.train},
        progress=os.open(os.devnull, os.O_WRONLY),
    )


def sequences(model: Path) -> list[TokenSequence]:
    """Questions of recipes/data as sequences."""
    found = []
    renderer = Renderer(model)
    for asked in read_jsonl(REPOSITORY / "recipes" / "data" / "extractive-qa" / "harbour.jsonl")[:SAMPLES]:
        answer = ". ".join(asked["context"].split(". ")[:2])
        turns = {"system": "Answer.", "user": asked["question"], "assistant": f"{answer}."}
        messages = [{"role": role, "content": said} for role, said in turns.items()]
        (one,) = renderer.training_sequences(messages, has_pictures=False)  # type: ignore[arg-type]
        found.append(TokenSequence(np.array(one.tokens, np.int32), np.array(one.labels) >= 0))
    return found


def train_packed(job: Job, samples: Samples) -> tuple[Trained, int]:
    """Train by the loop. Returns also the fewest samples of a pass."""
    trainee = load_trainee(job, CPU, samples.probes())
    loop = Loop(job, trainee, samples, samples, Together(1, True), Progress(job.progress), StopRequest())
    loop.run()
    steps = ([samples[number][0].length for number in loop.steps.samples_of(step)] for step in range(loop.steps.total))
    fewest = min(len(one) for lengths in steps for one in pack(lengths, job.pass_tokens)[0])
    return ([entry["loss"] for entry in loop.state.log], dict(trainee.weights)), fewest


def load_adapted(job: Job) -> Any:
    """The base with PEFT's layers, before training."""
    with patch_gptq_kernels(job.model, on_card=False, training=True):  # PEFT would import gptqmodel
        return add_lora(load_base(job, CPU), job.settings, job.seed)


def train_alone(job: Job, samples: Samples) -> Trained:
    """Train one sample at a time, with PEFT and transformers alone."""
    settings = job.settings
    model = load_adapted(job).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, settings.adam_beta2), weight_decay=settings.weight_decay)
    steps = Steps(len(samples), settings.effective_batch, settings.epochs, job.seed)
    losses = []
    for step in range(steps.total):
        chosen = [samples[number][0] for number in steps.samples_of(step)]
        learnt = sum(sequence.targets for sequence in chosen)
        losses.append(0.0)
        for sequence in chosen:
            tokens = torch.from_numpy(sequence.tokens.astype(np.int64))
            labels = torch.where(torch.from_numpy(np.array(sequence.learnt)), tokens, -100)
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
            loss = functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100) / learnt
            loss.backward()
            losses[-1] += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * rate_factor(step, steps.total, settings.warmup_ratio)
        optimizer.step()
        optimizer.zero_grad()
    return losses, get_peft_model_state_dict(model)


if __name__ == "__main__":
    main()
