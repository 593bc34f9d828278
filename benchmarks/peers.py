"""Speed of other ways to train the same model on samples of the same lengths, beside `benchmarks.training`.

    LORRY_MODELS=... python -m benchmarks.peers [tiny] prototype|unsloth [PART...]
    LORRY_MODELS=... python -m benchmarks.peers [tiny] landed FOLDER [PART...]

Each needs an NVIDIA GPU of 141 GB, and all but `prototype` the model's folder, which `training` writes (`write_base`).
Parts are `qa`, `docs` and `small`: docs on a GPU of which another process holds all but 24 GB.

- `prototype`: packs of samples through torch's `varlen_attn`, LoRA in one autograd function, logits only of learnt
  tokens, and the other parts by Liger or by torch.compile. The least that a loop of one's own can do.
- `unsloth`: Unsloth with trl's SFTTrainer, padded and packed, as its own notebooks train. All tokens are learnt.
- `landed`: Lorry before it had a loop, in FOLDER: `git worktree add FOLDER da6deed`.

Speed counts the samples' own tokens, without padding, in the steps after the first `Peer.skipped`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rows import write_rows
from benchmarks.training import (
    GIB,
    LEARNT,
    Setting,
    free_memory,
    lengths_of,
    memory_held,
    random_base,
    sequences_of,
    shape_folder,
    write_base,
    write_questions,
)
from stages.contract.roots import Roots
from stages.hardware.peaks import share_of_peak
from stages.hardware.probe import probe
from stages.models.shape import planned_shape

if TYPE_CHECKING:
    import torch

    from stages.train.samples import TokenSequence

BATCH = 16
PACK = 8192
FREE = 24_000_000_000


@dataclass(frozen=True)
class Peer:
    """One way to train."""

    name: str
    part: str
    """`qa`, `docs` or `small`."""
    steps: int
    skipped: int
    sets: dict[str, Any] = field(default_factory=dict)

    @property
    def setting(self) -> Setting:
        """The samples and the free memory."""
        small = self.part == "small"
        return Setting(self.name, "docs" if small else self.part, steps=self.steps, free=FREE if small else None)


PEERS = {
    "prototype": (
        Peer("qa, prototype, torch.compile", "qa", 12, 3, {"compiled": True}),
        Peer("qa, prototype, Liger", "qa", 12, 3, {"liger": True}),
        Peer("docs, prototype, Liger", "docs", 5, 2, {"liger": True}),
        Peer("docs in 24 GB, prototype, Liger, checkpointed", "small", 5, 2, {"liger": True, "checkpointed": True}),
    ),
    "unsloth": (
        Peer("qa, Unsloth, 16 samples a pass", "qa", 10, 3, {"samples": 16}),
        Peer("qa, Unsloth, packed", "qa", 8, 3, {"packing": True}),
        Peer("docs, Unsloth, one sample a pass", "docs", 4, 2, {"samples": 1}),
        Peer("docs, Unsloth, packed", "docs", 4, 2, {"packing": True}),
        Peer("docs in 24 GB, Unsloth, its checkpointing", "small", 4, 2, {"samples": 4, "checkpointed": True}),
    ),
    "landed": (
        Peer("qa, before the loop", "qa", 20, 3, {"samples": 4}),
        Peer("docs, before the loop", "docs", 6, 1, {"samples": 1}),
        Peer("docs in 24 GB, before the loop", "small", 4, 1, {"samples": 1, "checkpointed": True}),
    ),
}


def steps_of(peer: Peer, model: Path, tiny: bool) -> list[list["TokenSequence"]]:
    """The samples of each step."""
    with tempfile.TemporaryDirectory() as folder:
        made = [one for (one,) in sequences_of(peer.setting, _lengths(peer, tiny), model, Path(folder))]
    return [made[place : place + BATCH] for place in range(0, len(made), BATCH)]


def _lengths(peer: Peer, tiny: bool) -> list[int]:
    """The lengths of all samples in tokens."""
    lengths = lengths_of(peer.setting, BATCH * peer.steps)
    return [max(length // 20, 64) for length in lengths] if tiny else lengths


def row_of(peer: Peer, model: Path, seconds: Sequence[float], tokens: Sequence[int], **more: Any) -> dict[str, Any]:
    """The row of a peer by the seconds and tokens of its steps."""
    speed = sum(tokens[peer.skipped :]) / sum(seconds[peer.skipped :])
    share = share_of_peak(probe().gpus, planned_shape(model)[0], speed, 1)
    return {
        "setting": peer.name,
        "tokens/s": round(speed),
        "of the peak": share and round(share, 3),
        **more,
        "seconds": [round(second, 3) for second in seconds],
        "tokens": list(tokens),
    }


def reserved_gib() -> float:
    """The most memory that torch took from the GPU, in GiB."""
    import torch

    return round(torch.cuda.max_memory_reserved() / GIB, 1) if torch.cuda.is_available() else 0.0


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


# -- the prototype ---------------------------------------------------------------------------------------------------


def measure_prototype(peer: Peer, tiny: bool) -> dict[str, Any]:
    """Train by packs in this process. Liger's layers stay in it."""
    import torch

    model = shape_folder(peer.setting.model, tiny)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bounds: dict[str, Any] = {}
    net = _prototype(model, device, peer.sets, bounds)
    trained = [weight for weight in net.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    seconds, tokens, losses = [], [], []
    padding = 512 if peer.sets.get("compiled") else 1  # few shapes, as each is compiled
    for step in steps_of(peer, model, tiny):
        synchronize()
        began, loss = time.monotonic(), torch.zeros((), device=device)
        learnt = sum(sequence.targets for sequence in step)
        for packed in _first_fit(step, PACK):
            ids, labels, places, ends = _packed(packed, padding)
            bounds.update(ends=ends.to(device), longest=4096 if padding > 1 else max(one.length for one in packed))
            hidden = net.model(input_ids=ids.to(device), position_ids=places.to(device)).last_hidden_state[0, :-1]
            wanted = labels[1:].to(device)
            part = torch.nn.functional.cross_entropy(
                net.lm_head(hidden[wanted >= 0]).float(), wanted[wanted >= 0], reduction="sum"
            )
            (part / learnt).backward()
            loss += part.detach() / learnt
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.monotonic() - began)
        tokens.append(sum(sequence.length for sequence in step))
        losses.append(round(float(loss), 4))
    return row_of(peer, model, seconds, tokens, losses=losses, **{"reserved GiB": reserved_gib()})


def _prototype(model: Path, device: "torch.device", sets: dict[str, Any], bounds: dict[str, Any]) -> Any:
    """The model with LoRA of rank 8. Its attention reads `ends` and `longest` of `bounds`, which each pass sets."""
    import torch
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if sets.get("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2(rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=False)

    class Lora(torch.autograd.Function):
        """A frozen product and LoRA's, with the input kept once."""

        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, bias: Any, a: Any, b: Any) -> Any:
            inner = x @ a.to(x.dtype).t()
            ctx.save_for_backward(x, weight, a, b, inner)
            return torch.nn.functional.linear(x, weight, bias) + inner @ b.to(x.dtype).t()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            x, weight, a, b, inner = ctx.saved_tensors
            (dy,) = gradients
            d_inner = dy @ b.to(dy.dtype)
            dx = dy @ weight + d_inner @ a.to(dy.dtype)
            flat = [one.flatten(0, -2) for one in (x, dy, inner, d_inner)]
            return dx, None, None, (flat[3].t() @ flat[0]).to(a.dtype), (flat[1].t() @ flat[2]).to(b.dtype)

    class LoraLinear(torch.nn.Module):
        """A linear module with LoRA of rank 8; alpha is part of B."""

        def __init__(self, linear: Any) -> None:
            super().__init__()
            self.weight, self.bias = linear.weight, linear.bias
            made: dict[str, Any] = {"device": device, "dtype": torch.float32}
            self.a = torch.nn.Parameter(torch.randn(8, linear.in_features, **made) * 0.01)
            self.b = torch.nn.Parameter(torch.zeros(linear.out_features, 8, **made))

        def forward(self, x: Any) -> Any:
            return Lora.apply(x, self.weight, self.bias, self.a, self.b)

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> Any:
        parts = [one.transpose(1, 2).flatten(0, 1) for one in (query, key, value)]
        if device.type == "cpu":
            ends = bounds["ends"].tolist()
            pieces = [slice(*pair) for pair in pairwise(ends) if pair[0] < pair[1]]
            attention = torch.nn.functional.scaled_dot_product_attention
            found = [
                attention(*(one[:, :, piece] for one in (query, key, value)), is_causal=True, enable_gqa=True)
                for piece in pieces
            ]
            return torch.cat(found, 2).transpose(1, 2), None
        from torch.nn.attention.varlen import varlen_attn

        ends, longest = bounds["ends"], bounds["longest"]
        window: dict[str, Any] = {"window_size": (-1, 0)}
        if "enable_gqa" in signature(varlen_attn).parameters:  # torch 2.11 does it unasked
            window["enable_gqa"] = True
        return varlen_attn(*parts, ends, ends, longest, longest, **window).unsqueeze(0), None

    ALL_ATTENTION_FUNCTIONS.register("prototype", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("prototype", lambda *_, **__: None)
    job: Any = type("Named", (), {"model": model, "dtype": "bfloat16" if device.type == "cuda" else "float32"})
    net = random_base(job, device).requires_grad_(False)
    net.config._attn_implementation = "prototype"
    if sets.get("checkpointed"):
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        net.enable_input_require_grads()
    for layer in net.model.layers:
        for holder in (layer.self_attn, layer.mlp):
            for name, linear in list(holder.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(holder, name, LoraLinear(linear))
        if sets.get("compiled") and device.type == "cuda":
            layer.forward = torch.compile(layer.forward)
    return net.train()


def _first_fit(sequences: list["TokenSequence"], tokens: int) -> list[list["TokenSequence"]]:
    """Packs of at most so many tokens, the longest sequences first."""
    packs: list[list[TokenSequence]] = []
    for one in sorted(sequences, key=lambda one: -one.length):
        room = (pack for pack in packs if sum(other.length for other in pack) + one.length <= tokens)
        fits = next(room, None)
        packs.append([one]) if fits is None else fits.append(one)
    return packs


def _packed(sequences: list["TokenSequence"], padding: int) -> tuple[Any, Any, Any, Any]:
    """Token ids [1, tokens], labels [tokens], places [1, tokens] and ends of a pack, padded to a multiple."""
    import torch

    ids = torch.cat([torch.from_numpy(one.tokens).long() for one in sequences])
    labels = ids.clone()
    firsts = [torch.arange(one.length) for one in sequences]
    places = torch.cat(firsts)
    learnt = torch.cat([torch.from_numpy(one.learnt.copy()) for one in sequences])
    labels[~learnt | (places == 0)] = -100
    more = -len(ids) % padding
    ends = torch.tensor([0, *(one.length for one in sequences), *([more] if more else [])]).cumsum(0).int()
    pad = torch.nn.functional.pad
    return (
        pad(ids, (0, more))[None],
        pad(labels, (0, more), value=-100),
        torch.cat([places, torch.arange(more)])[None],
        ends,
    )


# -- Unsloth -----------------------------------------------------------------------------------------------------------


def measure_unsloth(peer: Peer, tiny: bool) -> dict[str, Any]:
    """Train by Unsloth in this process."""
    quiet = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "UNSLOTH_DISABLE_STATISTICS")
    os.environ.update(dict.fromkeys(quiet, "1"), WANDB_DISABLED="true", UNSLOTH_RETURN_LOGITS="0")
    import unsloth  # before transformers, which it patches
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    seconds: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Takes the seconds of each step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize()
            seconds.append(-time.monotonic())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            seconds[-1] += time.monotonic()

    folder, packing = write_base(peer.setting.model, tiny), bool(peer.sets.get("packing"))
    longest = PACK if packing else 4096
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=longest, dtype=None, load_in_4bit=False, local_files_only=True
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=8,
        lora_alpha=32,
        lora_dropout=0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth" if peer.sets.get("checkpointed") else False,
        random_state=0,
    )
    enough = replace(peer, steps=3 * peer.steps) if packing else peer
    rows = [{"input_ids": one.tokens.tolist()} for step in steps_of(enough, folder, tiny) for one in step]
    passes = (6 if peer.setting.data == "docs" else 1) if packing else BATCH // peer.sets["samples"]
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=1 if packing else peer.sets["samples"],
        gradient_accumulation_steps=passes,
        max_steps=peer.steps,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=True,
        packing=packing,
        max_length=longest,
        optim="adamw_torch_fused",
        dataset_num_proc=1,
        seed=0,
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        args=arguments,
        callbacks=[Clock()],
    )
    collate: Callable[..., Any] = trainer.data_collator

    def counted(features: Any) -> Any:
        """A batch, whose tokens are counted."""
        batch = collate(features)
        mask = batch.get("attention_mask")
        tokens.append(int(mask.sum()) if mask is not None and mask.dim() == 2 else batch["input_ids"].numel())
        return batch

    trainer.data_collator = counted
    trainer.train()
    of_steps = [sum(tokens[place * passes : (place + 1) * passes]) for place in range(len(seconds))]
    losses = [round(one["loss"], 4) for one in trainer.state.log_history if "loss" in one]
    more = {"losses": losses, "reserved GiB": reserved_gib(), "version": unsloth.__version__}
    return row_of(peer, folder, seconds, of_steps, **more)


# -- before the loop ---------------------------------------------------------------------------------------------------


def measure_landed(peer: Peer, tiny: bool, checkout: Path) -> dict[str, Any]:
    """Train by another checkout of Lorry, in processes of its own."""
    folder = write_base(peer.setting.model, tiny)
    samples = Roots.from_environment().models / f"{peer.part}-{'tiny' if tiny else 'samples'}.jsonl"
    write_questions(samples, _lengths(peer, tiny), folder)
    script = Path(__file__).parent / "peer_worker.py"
    settings = {"batch": BATCH, "samples": peer.sets["samples"], "checkpointed": peer.sets.get("checkpointed", False)}
    path = f"{checkout}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(samples), json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=checkout,  # which `python -m` searches first
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"event"')]
    steps = [one for one in events if one["event"] == "step"]
    more = {
        "losses": [round(one["loss"], 4) for one in events if one["event"] == "loss"][:20],
        "reserved GiB": round(max(one.get("memory") or 0 for one in steps) / GIB, 1),
    }
    return row_of(peer, folder, [one["seconds"] for one in steps], [one["tokens"] for one in steps], **more)


def main() -> None:
    """Measure the parts of one peer, and write a row for each."""
    words = [word for word in sys.argv[1:] if word != "tiny"]
    tiny, kind = "tiny" in sys.argv[1:], words.pop(0)
    checkout = Path(words.pop(0)).absolute() if kind == "landed" else Path()
    measure = {
        "prototype": measure_prototype,
        "unsloth": measure_unsloth,
        "landed": lambda peer, tiny: measure_landed(peer, tiny, checkout),
    }[kind]
    rows = []
    for peer in _chosen(kind, words, tiny):
        try:
            with memory_held(peer.setting.free):
                row = measure(peer, tiny)
        except Exception as error:  # noqa: BLE001 - the other peers still count
            traceback.print_exc()
            row = {"setting": peer.name, "not run": f"{type(error).__name__}: {error}"[-500:]}
        rows.append({**row, "learnt tokens a sample": "all" if kind == "unsloth" else LEARNT})
        print(json.dumps(rows[-1]), flush=True)
        free_memory()
    if not tiny:
        write_rows("training", rows, f"python -m benchmarks.peers {' '.join(sys.argv[1:])}", by="setting")


def _chosen(kind: str, parts: list[str], tiny: bool) -> Iterator[Peer]:
    """The rows of a peer that belong to these parts; all of them if none is named."""
    for peer in PEERS[kind]:
        if not parts or peer.part in parts:
            yield replace(peer, steps=3, skipped=1) if tiny else peer


if __name__ == "__main__":
    main()
