"""Speed, losses and memory of the training loop, for models of real shapes with random weights.

    LORRY_MODELS=... python -m benchmarks.training [tiny] [PART...]
    torchrun --nproc-per-node 2 -m benchmarks.training two

Needs an NVIDIA GPU of 141 GB and SmolLM2's tokenizer; `two` needs two. Each setting is one training by `Loop`, as a
training process runs it: samples in files, passes and checkpointed layers by the plan for the memory that is free,
float32 LoRA of rank 8 on all linear layers. Weights are made on the GPU, except for the parts that read a folder.

`qa` has questions of lognormal length, 150 tokens in the mean and 2,048 at most, of which 24 are learnt; `docs` has
samples of 2,000 to 4,000 tokens, of which 24 are learnt, or all of them. Speed is that of the steps after the first
`Setting.skipped`, in which kernels are compiled and passes captured. `of the peak` is as in `stages.hardware.peaks`:
four operations for each token and weight that it is multiplied by. `measured bytes` is what the driver says that this
process took at most.
`tiny` takes shapes that a CPU can train, to try the script.
"""

import gc
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Self
from unittest.mock import patch

from benchmarks.random_models import CONFIGS, make_model
from benchmarks.rows import write_rows
from stages.contract.files import write_jsonl
from stages.contract.recipe import Adapter, Model, Train
from stages.contract.roots import Roots
from stages.contract.stop import StopRequest
from stages.hardware.fit import plan_training
from stages.hardware.memory import Lengths
from stages.hardware.peaks import share_of_peak
from stages.hardware.probe import probe
from stages.models.rendering import Renderer
from stages.models.shape import planned_shape
from stages.train.job import Job, Progress

if TYPE_CHECKING:
    import torch

    from stages.train.samples import TokenSequence

GIB = 1024**3
LEARNT = 24
TEMPLATE = 16
"""Tokens of a sample besides its words, at most."""
PAGE = (980, 1036)
"""Width and height of a page's picture in pixels: 1 MP, 1,295 tokens."""
QWEN_32B = {
    **CONFIGS["Qwen2.5-14B"],
    **{"intermediate_size": 27648, "num_hidden_layers": 64},
}
SHAPES = {**CONFIGS, "Qwen2.5-32B": QWEN_32B}
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
"""What `tiny` replaces in every shape."""


@dataclass(frozen=True)
class Setting:
    """One training to measure."""

    name: str
    data: str = "qa"
    """`qa`, `docs`, `whole` (docs, learnt as a whole), `pages` or `fixed` (samples of `length` tokens)."""
    model: str = "Qwen2.5-7B"
    dropout: float = 0.0
    steps: int = 20
    skipped: int = 5
    """Steps at the start that do not count for the speed."""
    batch: int = 16
    dtype: str = "bfloat16"
    length: int = 0
    free: int | None = None
    """Bytes that another process leaves on the GPU; None: all."""
    folder: bool = False
    """Whether the base is read from its folder in LORRY_MODELS, which has its weights."""
    sets: dict[str, Any] = field(default_factory=dict)
    """Settings of `train`."""
    kernel: str | None = None
    """Attention kernel to take in place of the fastest."""
    sharding: str = "none"


PARTS: dict[str, tuple[Setting, ...]] = {
    "speed": (
        Setting("qa", "qa", steps=200, skipped=100),
        Setting("docs", "docs", skipped=2),
        Setting("qa, dropout 0.05", "qa", dropout=0.05, steps=200, skipped=100),
        Setting("docs, dropout 0.05", "docs", dropout=0.05, steps=6, skipped=2),
        Setting("docs, whole sample learnt", "whole", steps=6, skipped=2),
    ),
    "small": (Setting("docs in 24 GB", "docs", steps=8, skipped=2, free=24_000_000_000),),
    "pages": (Setting("VL-7B, a page of 1 MP in each sample", "pages", "Qwen2.5-VL-7B", steps=8, skipped=2),),
    "nf4": (
        Setting("qa, NF4", folder=True, sets={"load_in_4bit": True}, steps=60, skipped=30),
        Setting("docs, NF4", "docs", folder=True, sets={"load_in_4bit": True}, steps=6, skipped=2),
    ),
    "gptq": (
        Setting("qa, GPTQ", "qa", "Qwen2.5-7B-GPTQ-Int4", folder=True, steps=60, skipped=30),
        Setting("docs, GPTQ", "docs", "Qwen2.5-7B-GPTQ-Int4", folder=True, steps=6, skipped=2),
    ),
    "large": (Setting("docs, 32B", "docs", "Qwen2.5-32B", steps=4, skipped=2),),
    "v100": (
        Setting("qa, float16, memory-efficient attention", dtype="float16", kernel="efficient"),
        Setting(
            "docs, float16, memory-efficient attention",
            "docs",
            dtype="float16",
            kernel="efficient",
            steps=4,
            skipped=2,
        ),
    ),
    "two": (
        Setting("docs, batch 64", "docs", batch=64, steps=5, skipped=2),
        Setting("qa, batch 64", batch=64, steps=60, skipped=30),
    ),
    "sharded": (
        Setting("docs, batch 64, ZeRO-3", "docs", batch=64, steps=3, skipped=1, sharding="zero3", folder=True),
    ),
    "memory": (
        Setting("0.5B, 2048", "fixed", "Qwen2.5-0.5B", length=2048, steps=4, skipped=1),
        Setting("7B, 512, rank 64", "fixed", length=512, steps=4, skipped=1, sets={"rank": 64}),
        Setting("7B, 8192", "fixed", length=8192, steps=2, skipped=1, batch=4),
        Setting("7B, all layers checkpointed", "docs", steps=2, skipped=1, sets={"gradient_checkpointing": True}),
        Setting("14B, docs", "docs", "Qwen2.5-14B", steps=2, skipped=1),
    ),
}
PARTS_BY_NAME = {one.name: (one,) for part in PARTS.values() for one in part}


# -- samples -------------------------------------------------------------------------------------------------------


def lengths_of(setting: Setting, number: int) -> list[int]:
    """Lengths in tokens of `number` samples, the same at each call."""
    draw = random.Random(1)
    if setting.data == "fixed":
        return [setting.length] * number
    if setting.data == "qa":
        return [min(max(int(draw.lognormvariate(math.log(150) - 0.32, 0.8)), 64), 2048) for _ in range(number)]
    return [draw.randrange(2000, 4000) for _ in range(number)]


def write_questions(path: Path, lengths: list[int], model: Path) -> None:
    """Write samples of about these lengths in tokens as preprocess writes them, with random words of one token each."""
    tokenizer = Renderer(model).tokenizer
    words = [text for token, text in _words(tokenizer) if len(token) > 1]
    draw = random.Random(2)
    samples = []
    for number, length in enumerate(lengths):
        chosen = draw.choices(words, k=length - TEMPLATE)
        answer, question = chosen[: LEARNT - 2], chosen[LEARNT - 2 :]
        contents = {"system": "s", "user": "".join(question).strip(), "assistant": "".join(answer).strip()}
        messages = [{"role": role, "content": content} for role, content in contents.items()]
        meta = {"group": "all", "source": "all"}
        samples.append({"id": str(number), "messages": messages, "images": [], "references": [], "meta": meta})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, samples)


def _words(tokenizer: Any) -> Iterator[tuple[str, str]]:
    """Yield the tokens of a tokenizer that are a blank and a word in small letters, each with its text."""
    for token in sorted(tokenizer.get_vocab()):
        text = tokenizer.convert_tokens_to_string([token])
        if text.startswith(" ") and text[1:].isascii() and text[1:].isalpha() and text[1:].islower():
            yield token, text


def sequences_of(setting: Setting, lengths: list[int], model: Path, folder: Path) -> "Iterator[list[TokenSequence]]":
    """Yield the samples of a setting: questions as `write_questions` writes them, or pages with random words."""
    import numpy as np

    from stages.contract.files import read_jsonl
    from stages.train.samples import SizedPicture, TokenSequence

    if setting.data == "pages":
        draw = np.random.default_rng(2)
        pages = _draw_pages(folder)
        placeholder = int(json.loads((model / "config.json").read_text())["image_token_id"])
        tokens = PAGE[0] // 28 * (PAGE[1] // 28)
        for number, _ in enumerate(lengths):
            ids = np.concatenate([draw.integers(10, 40_000, 20), np.full(tokens, placeholder)])
            ids = np.concatenate([ids, draw.integers(10, 40_000, 200)]).astype(np.int32)
            picture = SizedPicture(pages[number % len(pages)], *PAGE, tokens)
            yield [TokenSequence(ids, np.arange(len(ids)) >= len(ids) - LEARNT, (picture,))]
        return
    if not (folder / "train.jsonl").is_file():
        write_questions(folder / "train.jsonl", lengths, model)
    renderer = Renderer(model)
    for sample in read_jsonl(folder / "train.jsonl"):
        for one in renderer.training_sequences(sample["messages"]):
            learnt = np.array(one.labels) >= 0
            yield [TokenSequence(np.array(one.tokens, np.int32), learnt | (setting.data == "whole"))]


def _draw_pages(folder: Path) -> list[str]:
    """Write 32 drawn pages of PAGE's size as PNG. Returns their names relative to the folder."""
    from PIL import Image

    from benchmarks.drawn_pages import draw_page

    names = []
    for number in range(32):
        draw_page((folder, 0, number, PAGE[0] * PAGE[1]))
        drawn = Image.open(folder / "D0" / f"{number}.jpg").resize(PAGE)
        drawn.save(folder / f"{number}.png")
        names.append(f"{number}.png")
    return names


# -- the base ------------------------------------------------------------------------------------------------------


def shape_folder(name: str, tiny: bool) -> Path:
    """The folder of a model; without weights unless something has written them."""
    roots = Roots.from_environment()
    folder = roots.models / (f"tiny-{name}" if tiny else name)
    if not (folder / "config.json").is_file():
        with patch("benchmarks.random_models._write_weights"):
            make_model(folder, config_of(name, tiny))
    return folder


def config_of(name: str, tiny: bool) -> dict[str, Any]:
    """The config of a shape."""
    config = dict(SHAPES[name])
    if tiny:
        config |= {**TINY, "num_key_value_heads": min(config["num_key_value_heads"], 2)}
        if "vision_config" in config:
            small = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 128}
            config["vision_config"] = {**config["vision_config"], **small, "fullatt_block_indexes": [1]}
            config["rope_scaling"] = {"type": "mrope", "mrope_section": [4, 6, 6]}
    return config


def random_base(job: Job, device: "torch.device") -> Any:
    """The model of a job's folder with random weights, made on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(job.model, local_files_only=True)
    kind: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    torch.manual_seed(0)
    with device:
        model = kind.from_config(config, dtype=getattr(torch, job.dtype), attn_implementation="sdpa")
    model.config.use_cache = False
    return model.eval()


def write_base(name: str, tiny: bool) -> Path:
    """Write the folder of a model with weights as transformers initialises them, unless it has some. Returns it."""
    import torch

    folder = shape_folder(name, tiny)
    if any(folder.glob("*.safetensors")):
        return folder
    if "GPTQ" in name:
        make_model(folder, config_of(name, tiny))
        return folder
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job: Any = type("Named", (), {"model": folder, "dtype": "bfloat16"})
    model = random_base(job, device)
    model.config.use_cache = True
    model.save_pretrained(folder, max_shard_size="4GB")
    return folder


# -- trainings -----------------------------------------------------------------------------------------------------


class Follower:
    """Looks at something every 50 ms, in a thread, within its context."""

    def __enter__(self) -> Self:
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ends.set()
        self._thread.join()

    def _follow(self) -> None:
        """Look until the context ends."""
        while not self._ends.wait(0.05):
            self.look()

    def look(self) -> None:
        """Look once."""
        raise NotImplementedError


class MemoryPeak(Follower):
    """Follows the memory of this process's GPU, as the driver counts it. Use it as a context."""

    def __init__(self, before: int) -> None:
        """`before`: bytes in use before this process began to use the GPU."""
        self.bytes, self._before = 0, before

    def look(self) -> None:
        """Update the peak."""
        self.bytes = max(self.bytes, used_bytes() - self._before)


def used_bytes() -> int:
    """Bytes in use on this process's GPU, by all processes; 0 without a GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    handle = pynvml.nvmlDeviceGetHandleByIndex(int(os.environ.get("LOCAL_RANK", "0")))
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


@contextmanager
def memory_held(free: int | None) -> Iterator[None]:
    """Within this context, another process holds all memory of the GPU but `free` bytes; None: nothing."""
    if free is None or not probe().gpus:
        yield
        return
    code = (
        "import sys, torch; at, all_ = torch.cuda.mem_get_info();"
        f"held = [torch.empty(min(at - {free} - place, 1 << 30), dtype=torch.uint8, device='cuda')"
        f" for place in range(0, at - {free}, 1 << 30)];"
        "print('held', flush=True); sys.stdin.read()"
    )
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        try:
            holder.stdout.readline()
            yield
        finally:
            holder.stdin.close()
            holder.wait()


def measure(setting: Setting, tiny: bool, before: int, together: Any) -> dict[str, Any]:
    """Train one setting in this process, from samples and weights made for it. Returns its row.

    `before`: bytes in use on the GPU before this process began to use it. `together`: the training processes.
    """
    began = time.monotonic()
    if tiny:
        setting = replace(setting, batch=8, steps=3, skipped=1)
    processes, rank = processes_and_rank()
    model = shape_folder(setting.model, tiny) if not setting.folder else write_base(setting.model, tiny)
    lengths = lengths_of(setting, setting.batch * setting.steps)
    lengths = [max(length // 20, 64) for length in lengths] if tiny else lengths
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        samples = _written_samples(setting, lengths, model, folder)
        stack.enter_context(memory_held(setting.free if rank == 0 else None))
        job, way = make_job(setting, model, samples, folder, processes)
        before = max(before, used_bytes()) if setting.free else before
        peak = stack.enter_context(MemoryPeak(before))
        trainee, loaded, steps = _train(setting, job, samples, together, stack)
    seconds = [one["seconds"] for one in steps if one["event"] == "step"]
    tokens = [one["tokens"] for one in steps if one["event"] == "step"]
    counted = slice(setting.skipped, None)
    speed = sum(tokens[counted]) / sum(seconds[counted])
    share = share_of_peak(probe().gpus, planned_shape(model)[0], speed, processes)
    reserved = max((one["memory"] or 0 for one in steps if one["event"] == "step"), default=0)
    measured = peak.bytes
    row = {
        "setting": setting.name if processes == 1 else f"{setting.name}, {processes} GPUs",
        "tokens/s": round(speed),
        "of the peak": share and round(share, 3),
        "tokens/s of all steps": round(sum(tokens) / sum(seconds)),
        "processes": processes,
        "reserved GiB": round(reserved / GIB, 1),
        "estimated bytes": way.estimate.total,
        "measured bytes": measured,
        "estimate over measured, percent": round(100 * (way.estimate.total / measured - 1), 1) if measured else None,
        "attention": trainee.attention_facts,
        "lengths": asdict(lengths_in(samples)),
        "pass tokens": job.pass_tokens,
        "checkpointed layers": job.checkpointed_layers,
        "sharding": job.sharding,
        "graphs": len(trainee._graphs),
        "seconds to load": round(loaded, 1),
        "seconds in all": round(time.monotonic() - began, 1),
        "losses": [round(one["entry"]["loss"], 4) for one in steps if "loss" in one.get("entry", {})][:20],
        "seconds": [round(second, 3) for second in seconds],
        "tokens": tokens,
    }
    trainee = None
    free_memory()
    return row


def _written_samples(setting: Setting, lengths: list[int], model: Path, folder: Path) -> Any:
    """Write a setting's samples to a folder as `encode_samples` does, and open them."""
    from stages.train.samples import Facts, Samples, write_samples

    write_samples(folder / "samples", sequences_of(setting, lengths, model, folder), Facts())
    return Samples(folder / "samples")


def lengths_in(samples: Any) -> Lengths:
    """The lengths of samples, as the plan takes them."""
    lengths = [sequence.length for sample in samples for sequence in sample]
    learnt = max(sequence.targets for sample in samples for sequence in sample)
    return Lengths(max(lengths), learnt, fmean(lengths), pstdev(lengths), min(lengths))


def train_settings(setting: Setting, longest: int) -> Train:
    """The settings of `train`, for samples of at most `longest` tokens."""
    values = {
        **{"adapters": [Adapter(name="tuned")], "dropout": setting.dropout, "effective_batch": setting.batch},
        **{"log_every": 1, "checkpoint_every": 10**6, "max_length": longest, "sharding": setting.sharding},
        **setting.sets,
    }
    return Train(**values)


def make_job(setting: Setting, model: Path, samples: Any, folder: Path, processes: int) -> tuple[Job, Any]:
    """The job of a setting, and the way that the plan chose for it."""
    many = lengths_in(samples)
    settings = train_settings(setting, many.longest)
    gpus = probe().gpus
    free = min((gpu.memory_free for gpu in gpus), default=None)
    shape, _ = planned_shape(model)
    way = plan_training(shape, settings, processes, setting.dtype, free, many)
    dtype = setting.dtype if gpus else "float32"
    job = Job(
        model=model,
        work=folder / "work",
        scratch=folder / "scratch",
        adapter=folder / "adapter",
        run=folder,
        key="",
        mix=Adapter(name="tuned"),
        train=[],
        validation=[],
        seed=0,
        dtype=dtype,
        sharding=way.sharding,
        pass_tokens=way.step.pass_tokens,
        processes=processes,
        evaluation_tokens=way.step.pass_tokens,
        evaluate=False,
        use_cpu=not gpus,
        cards=[str(gpu) for gpu in gpus],
        model_settings=Model(path=str(model), swift_type="x"),
        settings=settings,
        progress=-1,
        checkpointed_layers=way.step.checkpointed_layers,
    )
    return job, way


def processes_and_rank() -> tuple[int, int]:
    """The number of training processes, and the rank of this one."""
    return int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


def _train(
    setting: Setting, job: Job, samples: Any, together: Any, stack: ExitStack
) -> tuple[Any, float, list[dict[str, Any]]]:
    """Load the base of a job, and train it. Returns what is trained, the seconds to load, and progress messages."""
    import torch

    from stages.train import base
    from stages.train.attention import KERNELS
    from stages.train.loop import Loop

    if not setting.folder:
        stack.enter_context(patch.object(base, "load_base", random_base))
    if setting.kernel and not job.use_cpu:
        stack.enter_context(patch.dict(KERNELS, {setting.kernel: KERNELS[setting.kernel]}, clear=True))
    place = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu") if job.use_cpu else torch.device("cuda", place)
    if not job.use_cpu:
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats()
    job.work.mkdir(parents=True)
    messages = job.work / "progress.jsonl"
    progress = Progress(os.open(messages, os.O_WRONLY | os.O_CREAT))
    began = time.monotonic()
    trainee = base.load_trainee(job, device, samples.probes())
    loop = Loop(job, trainee, samples, samples[:0], together, progress, StopRequest())
    loaded = time.monotonic() - began
    loop.run()
    return trainee, loaded, [json.loads(line) for line in messages.read_text().splitlines()]


def free_memory() -> None:
    """Free the memory of the last training, and count the peak from here on."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# -- the start of a training ---------------------------------------------------------------------------------------


def measure_start(tiny: bool) -> dict[str, Any]:
    """Run the train command for two adapters of a 7B. Returns the seconds from the command to the first step, and from
    the end of the first adapter to the first step of the second."""
    from benchmarks import memory
    from stages.contract.files import read_jsonl

    folder = write_base("Qwen2.5-7B", tiny)
    two = "train.adapters=[{name: first}, {name: second}]"
    one = memory.Setting("start", folder.name, 2048, LEARNT, 1, (two, "train.log_every=1", "train.epochs=1"))
    memory.prepare(one, "start")
    sets = [word for each in one.overrides for word in ("--set", each)]
    data = str(Path("recipes/data/patent-qa").absolute())
    command = [sys.executable, "-m", "entrypoints.train", "patent-qa", "--profile", "text", "--run", "start"]
    began = time.time()
    done = subprocess.run([*command, "--data", data, *sets], capture_output=True, text=True, check=False)
    seconds = time.time() - began
    folder = Roots.from_environment().runs / "start" / "train"
    events = list(read_jsonl(folder / "events.jsonl")) if (folder / "events.jsonl").is_file() else []
    losses = [(one["adapter"], one["time"] - began) for one in events if one["event"] == "loss"]
    of_second = [at for name, at in losses if name == "second"]
    of_first = [at for name, at in losses if name == "first"]
    return {
        "setting": "start",
        "exit code": done.returncode,
        "seconds to the first step": round(of_first[0], 1) if of_first else None,
        "seconds from the first's last step to the second's first": round(of_second[0] - of_first[-1], 1)
        if of_first and of_second
        else None,
        "seconds in all": round(seconds, 1),
        "said": done.stdout.strip().splitlines()[-12:] + done.stderr.strip().splitlines()[-5:],
    }


def main() -> None:
    """Measure the parts that the command line names, or all that need one GPU, and write a row for each setting."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as a training process
    tiny = "tiny" in sys.argv[1:]
    wanted = [word for word in sys.argv[1:] if word != "tiny"] or [*PARTS, "start"]
    before = used_bytes()
    from stages.train.together import Together  # torch is imported only now

    processes, rank = processes_and_rank()
    together, is_first = Together(processes, use_cpu=not probe().gpus), rank == 0
    rows = []
    settings = [one for part in wanted for one in PARTS.get(part, ()) or PARTS_BY_NAME.get(part, ())]
    try:
        for setting in settings:
            try:
                row = measure(setting, tiny, before, together)
            except Exception as error:  # noqa: BLE001 - the other settings still count
                traceback.print_exc()
                row = {"setting": setting.name, "not run": f"{type(error).__name__}: {error}"[:500]}
                free_memory()
            rows.append(row)
            if is_first:
                print(json.dumps(row), flush=True)
        if "start" in wanted:
            rows.append(measure_start(tiny))
            print(json.dumps(rows[-1]), flush=True)
    finally:
        together.leave()
        if is_first and not tiny:
            write_rows(
                "training", rows, f"python -m benchmarks.training {' '.join(sys.argv[1:])}".strip(), by="setting"
            )


if __name__ == "__main__":
    main()
