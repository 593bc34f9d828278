"""The five recipes' real profiles, whole, with models of the published shapes and few samples.

    LORRY_MODELS=models LORRY_RUNS=runs python -m benchmarks.jobs [tiny] JOB [STAGE...] [KEY=VALUE...]
    LORRY_MODELS=models LORRY_RUNS=runs python -m benchmarks.jobs [tiny] disturb JOB [train] [infer]
    LORRY_MODELS=models LORRY_RUNS=runs python -m benchmarks.jobs by-hand JOB
    LORRY_MODELS=models LORRY_RUNS=runs python -m benchmarks.jobs plan

JOB is a name in JOBS, STAGE one of `models`, `data`, preprocess, train, infer, eval and `ablate`; by default all of
them. Each stage is the command that a user runs, with the job's overrides of the recipe and then those given here.
Needs an NVIDIA GPU of 141 GB and SmolLM2's tokenizer; for the jobs that have `free`, another process holds the rest of
the GPU's memory. `tiny` takes small models of the same architectures, to try the benchmark on a CPU.

A stage's row has its seconds; its start-up, up to the first rendered page, optimizer step or token; speed, share of the
peak and memory against the estimate; disk; and the share of time in which the GPU computed nothing, by NVML at 20 Hz,
between the first and the last page, step or token. The weights are random (`job_models`), and `job_hooks` fixes the
lengths of completions at their limits. `disturb` stops and kills train and infer of a job that is done, lets them go on
in another run, and compares adapters and answers. `by-hand` gives vLLM the prompts of a job's infer stage directly.
`plan` prints what `lorry plan` says of each job for other cards; it needs no GPU, and makes models without contents:
give it a LORRY_MODELS of its own.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import yaml

from benchmarks import job_models
from benchmarks.made_data import load_maker
from benchmarks.rows import write_rows
from benchmarks.training import Follower, memory_held
from stages.contract.files import read_json, read_jsonl, write_json
from stages.contract.roots import Roots
from stages.hardware.peaks import share_of_peak
from stages.hardware.probe import probe
from stages.models.shape import planned_shape, read_header

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
HOOKS = HERE / "job_hooks"
ROOTS = Roots.from_environment()
OUT = Path(os.environ.get("OUT", ROOTS.runs))
"""Folder of a second copy of each row, and of what NVML said."""
GB = 1_000_000_000
STAGES = ("preprocess", "train", "infer", "eval")
TARGETS = (("v100", 1), ("rtx4090", 1), ("a800", 1), ("v100", 8), ("rtx4090", 8), ("a800", 8))


# -- data ----------------------------------------------------------------------------------------------------------


def make_patents(folder: Path, tiny: bool) -> None:
    """Write 24 documents of about 18 pages, each of four of the demo's, and four questions on each."""
    import pymupdf

    source = RECIPES / "data" / "patent-qa"
    papers = sorted((source / "documents").glob("*.pdf"))
    asked: list[dict[str, Any]] = list(read_jsonl(source / "questions.jsonl"))
    (folder / "documents").mkdir(parents=True)
    questions = []
    for number in range(8 if tiny else 24):
        first = papers[number % len(papers)]
        name = f"P{number:02}A"
        others = [papers[(7 * number + place) % len(papers)] for place in ((2,) if tiny else (2, 3, 5))]
        with pymupdf.open() as whole:
            for paper in (first, *others):
                with pymupdf.open(paper) as part:
                    whole.insert_pdf(part)
            whole.save(folder / "documents" / f"{name}.pdf")
        own = [one for one in asked if one["document"] == first.name][number // len(papers) :: 2][:4]
        questions += [{**one, "id": f"{name}-{one['id']}", "document": f"{name}.pdf"} for one in own]
    _write_lines(folder / "questions.jsonl", questions)


def make_data_sets(folder: Path, tiny: bool) -> None:
    """Write three data sets of 160 questions, two on each context."""
    maker = load_maker("extractive_qa")
    maker.CONTEXTS = 20 if tiny else 80
    folder.mkdir(parents=True)
    kinds = maker.kinds(maker.random.Random(maker.SEED))
    for name in ("museum", "harbour", "harbour-zh"):
        _write_lines(folder / f"{name}.jsonl", maker.make_records(name, kinds[name]))


def make_puzzles(folder: Path, tiny: bool) -> None:
    """Write closed-world puzzles, of which a quarter is for the test."""
    few = {"train": 24, "test": 4, "more": 8} if tiny else {"train": 56, "test": 8, "more": 12}
    load_maker("logic_choice").make(folder, 3, **few, answers=False)


def make_pictures(folder: Path, tiny: bool) -> None:
    """Write captions, conversations, and the questions of TextVQA and MMBench."""
    few = {"records": 32, "finetune": 32, "textvqa": 8, "mmbench": 4, "size": 64}
    enough = {"records": 1280, "finetune": 640, "textvqa": 16, "mmbench": 16, "size": 160}
    load_maker("better_synth").make(folder, 2, **(few if tiny else enough))


def make_cabinets(folder: Path, tiny: bool) -> None:
    """Write cabinets of up to five boxes; the recipe adds three turned copies of each for training."""
    few = (6, 3) if tiny else (64, 32)
    load_maker("articulation").make(folder, 4, *few, loops=1, most_boxes=3 if tiny else 5)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _small_mixes(count: int, most: int) -> str:
    """The first `count` of logic-choice's adapters, as an override, with at most so many samples of a counted part."""
    adapters = yaml.safe_load((RECIPES / "logic-choice.yaml").read_text(encoding="utf-8"))["train"]["adapters"][:count]
    for adapter in adapters:
        for place, part in enumerate(adapter["data"]):
            if isinstance(part, dict) and "count" in part:
                part["count"] = most
            elif "#" in str(part):
                adapter["data"][place] = part.partition("#")[0] + f"#{most}"
    return f"train.adapters={json.dumps(adapters)}"


# -- jobs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A recipe to run whole."""

    recipe: str
    model: str
    make_data: Callable[[Path, bool], None]
    sets: tuple[str, ...]
    """Overrides that make the job short."""
    profile: str | None = None
    embedder: str | None = None
    free: int | None = None
    """Bytes that another process leaves on the GPU; None: all."""
    tiny: tuple[str, ...] = ()
    """Further overrides with `tiny`."""
    environment: dict[str, str] = field(default_factory=dict)
    ablate: str | None = None
    """Override of a second infer and eval, `ablate`, on the finished run."""


ON_CPU = ("infer.engine=transformers", "infer.batch_size=8", "infer.max_new_tokens=4")
PATENTS = Job(
    recipe="patent-qa",
    model="Qwen2.5-VL-32B-Instruct",
    make_data=make_patents,
    sets=("data.test_fraction=0.34", "train.epochs=1", "train.checkpoint_every=2"),
    embedder="gme-Qwen2-VL-7B-Instruct",
    tiny=(
        *(*ON_CPU, "preprocess.pages.max_pixels=100352", "preprocess.retrieval.max_pixels=50176"),
        *("preprocess.samples.pages_pixels=50176", "preprocess.samples.page_pixels=100352"),
        "infer.passes={refine: true, page_tokens: 4, refine_tokens: 4, classify_tokens: 2}",
        *("train.max_pixels=50176", "infer.chunk_size=16", "train.effective_batch=4"),
    ),
    ablate="infer.ablate=[retrieval]",
)
LOGIC = Job(
    recipe="logic-choice",
    model="Qwen2.5-32B-Instruct-GPTQ-Int4",
    make_data=make_puzzles,
    sets=(
        *("data.test_fraction=0.25", "train.epochs=1", "train.checkpoint_every=4", "infer.vote.second_round=true"),
        _small_mixes(9, 12),
    ),
    free=32 * GB,
    tiny=(*ON_CPU, "infer.chunk_size=16", "train.precision=auto"),
    environment={"LORRY_JOBS_LETTERS": "3"},  # two that every question has, and one that some have to ask again
)
SYNTH = Job(
    recipe="better-synth",
    model="llava-1.5-7b-hf",
    make_data=make_pictures,
    sets=("train.checkpoint_every=2",),
    profile="baseline",
    free=24 * GB,
    tiny=(*ON_CPU, "train.connector.effective_batch=8", "train.effective_batch=8", "infer.chunk_size=16"),
)
CABINETS = Job(
    recipe="articulation",
    model="CodeLlama-7b-Instruct-hf",
    make_data=make_cabinets,
    sets=("train.epochs=1", "train.checkpoint_every=3"),
    tiny=(*ON_CPU, "train.effective_batch=4"),
)
JOBS = {
    "patent-qa": PATENTS,
    "patent-qa-two": replace(PATENTS, sets=(*PATENTS.sets, "infer.tensor_parallel=2"), ablate=None),
    "extractive-qa": Job(
        recipe="extractive-qa",
        model="Qwen2.5-7B-Instruct",
        make_data=make_data_sets,
        sets=("data.test_fraction=0.07", "train.checkpoint_every=2"),
        free=24 * GB,
        tiny=(*ON_CPU, "train.effective_batch=16", "infer.chunk_size=16"),
    ),
    "logic-choice": LOGIC,
    "logic-choice-v100": replace(
        LOGIC,
        sets=(*LOGIC.sets[:-1], _small_mixes(2, 12), "train.precision=float16"),
        environment={
            **LOGIC.environment,
            **{
                "LORRY_JOBS_KERNEL": "efficient",
                "LORRY_JOBS_VLLM": '{"dtype": "half", "attention_backend": "TRITON_ATTN"}',
            },
        },
    ),
    "better-synth": SYNTH,
    "better-synth-mgm": replace(
        SYNTH, model=job_models.MGM, profile="mgm", sets=(*SYNTH.sets, "preprocess.data_juicer=null")
    ),
    "articulation": CABINETS,
    **{
        f"articulation-{mode}": replace(CABINETS, sets=(*CABINETS.sets, f"preprocess.samples.mode={mode}"))
        for mode in ("obb_rot", "absolute")
    },
}


@dataclass(frozen=True)
class Named:
    """A job with its name, in small or in full, and how it is run."""

    name: str
    job: Job
    tiny: bool
    more: tuple[str, ...] = ()
    """Overrides after all others."""
    suffix: str = ""

    @property
    def run(self) -> str:
        """Name of the run."""
        return f"{'tiny-' if self.tiny else ''}jobs-{self.name}{self.suffix}"

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return ROOTS.runs / self.run

    @property
    def data(self) -> Path:
        """Folder of the data, which jobs on the same data share."""
        return ROOTS.runs / "jobs-data" / f"{'tiny-' if self.tiny else ''}{self.job.make_data.__name__}"

    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return [name for name in (self.job.model, self.job.embedder) if name]

    @property
    def sets(self) -> list[str]:
        """All overrides of the recipe."""
        paths = [f"model.path={job_models.model_name(self.job.model, self.tiny)}"]
        if self.job.embedder:
            paths.append(f"preprocess.retrieval.embedder={job_models.model_name(self.job.embedder, self.tiny)}")
        return [*paths, "train.log_every=1", *self.job.sets, *(self.job.tiny if self.tiny else ()), *self.more]

    def command(self, stage: str, *more: str) -> list[str]:
        """The command of a stage, with further overrides."""
        profile = ["--profile", self.job.profile] if self.job.profile else []
        words = [word for one in (*self.sets, *more) for word in ("--set", one)]
        module = [sys.executable, "-m", f"entrypoints.{stage}", self.job.recipe, *profile]
        return [*module, "--run", self.run, "--data", str(self.data), *words]

    def notes(self, called: str) -> Path:
        """The file of the hooks' notes of a stage."""
        return ROOTS.runs / f"{self.run}-{called}.notes.jsonl"

    def prompts(self, called: str) -> Path:
        """The file of the prompts that an engine got in a stage."""
        return ROOTS.runs / f"{self.run}-{called}.prompts.jsonl"

    def environment(self, called: str) -> dict[str, str]:
        """The environment of a stage's processes: with `job_hooks`, whose files are new."""
        files = {"LORRY_JOBS_NOTES": self.notes(called), "LORRY_JOBS_PROMPTS": self.prompts(called)}
        for file in files.values():
            file.unlink(missing_ok=True)
        path = os.pathsep.join(filter(None, (str(HOOKS), os.environ.get("PYTHONPATH"))))
        own = {"PYTHONPATH": path, "LORRY_JOBS": "1", **{key: str(file) for key, file in files.items()}}
        return {**os.environ, **own, **self.job.environment}

    def events(self, stage: str, since: float) -> list[dict[str, Any]]:
        """A stage's events from a time on; none while the last line is not complete."""
        path = self.folder / stage / "events.jsonl"
        with suppress(OSError, json.JSONDecodeError):
            return [one for one in read_jsonl(path) if one["time"] >= since]
        return []


# -- models and data -----------------------------------------------------------------------------------------------


def make_models(named: Named) -> dict[str, Any]:
    """Write the models, each in a process of its own, which may use the GPU. Returns the row."""
    began = time.monotonic()
    for name in named.models:
        code = f"from benchmarks.job_models import make; make({name!r}, {named.tiny})"
        subprocess.run([sys.executable, "-c", code], check=True)
    seconds = time.monotonic() - began
    folders = [ROOTS.models / job_models.model_name(name, named.tiny) for name in named.models]
    return {
        "seconds": round(seconds, 1),
        "billion parameters": [round(planned_shape(folder)[0].parameters / 1e9, 2) for folder in folders],
        "GB of weights": [round(planned_shape(folder)[0].disk_bytes / 1e9, 1) for folder in folders],
        "GB on the disk": [round(_disk_bytes(folder) / 1e9, 1) for folder in folders],
        "GB/s of sha256": _hash_speed(folders[0]),
    }


def _hash_speed(folder: Path) -> float:
    """GB of a model's weights that sha256 reads per second; each stage that reads a model does so once."""
    path = max(folder.glob("*.safetensors"), key=lambda one: one.stat().st_size)
    began, digest, size = time.monotonic(), hashlib.sha256(), 0
    with path.open("rb") as file:
        while size < 2 * GB and (part := file.read(1 << 24)):
            digest.update(part)
            size += len(part)
    return round(size / 1e9 / (time.monotonic() - began), 2)


def _disk_bytes(folder: Path) -> int:
    """Bytes that the files of a folder take on the disk."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def save_digests(named: Named) -> None:
    """Give the stages digests of the weights, so that they do not read tens of GB on a machine lent by the minute.

    A digest is that of a file's header here; `models` says how fast real ones are computed.
    """
    known = {}
    for name in named.models:
        for path in (ROOTS.models / job_models.model_name(name, named.tiny)).glob("*.safetensors"):
            stat = path.stat()
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            text = json.dumps([[weight.name, weight.shape] for weight in read_header(path)])
            known[str(path.resolve())] = [*stamp, hashlib.sha256(text.encode()).hexdigest()]
    for stage in STAGES[:3]:
        if not (file := named.folder / stage / ".hashes.json").is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, known)


def make_data(named: Named) -> dict[str, Any]:
    """Write the data, unless they are there. Returns the row."""
    began = time.monotonic()
    if not named.data.is_dir():
        new = named.data.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        new.parent.mkdir(parents=True, exist_ok=True)
        named.job.make_data(new, named.tiny)
        new.rename(named.data)
    return {"seconds": round(time.monotonic() - began, 1), "MB": round(_disk_bytes(named.data) / 1e6, 1)}


# -- stages --------------------------------------------------------------------------------------------------------


class Watch(Follower):
    """Follows the GPUs' load and memory by NVML, at 20 Hz, while a stage runs. Use it as a context."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, list[int], list[int]]] = []
        """Time, percent of the last moments in which each GPU computed something, and bytes in use on each."""
        self.before: list[int] = []

    def __enter__(self) -> Self:
        import pynvml

        self._handles: list[Any] = []
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        self.before = self._used()
        return super().__enter__()

    def _used(self) -> list[int]:
        """Bytes in use on each GPU."""
        import pynvml

        return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in self._handles]

    def look(self) -> None:
        """Add what NVML says now; nothing without a GPU."""
        import pynvml

        if self._handles:
            load = [int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) for handle in self._handles]
            self.seen.append((time.time(), load, self._used()))

    def columns(self, first: float | None, last: float | None) -> dict[str, Any]:
        """Columns on memory, and on idle time between two times. Empty without a GPU."""
        if not self.seen:
            return {}
        used = zip(*(memory for _, _, memory in self.seen), strict=True)
        peaks = [max(each) - before for each, before in zip(used, self.before, strict=True)]
        found: dict[str, Any] = {"measured bytes": max(peaks), "of each GPU": peaks}
        if first is not None and last is not None:
            between = [load for at, loads, _ in self.seen if first <= at <= last for load in loads]
            if between:
                found["percent idle"] = round(100 - sum(between) / len(between), 1)
                found["percent of looks at an idle GPU"] = round(100 * between.count(0) / len(between), 1)
        return found

    def save(self, name: str) -> None:
        """Write all that was seen."""
        OUT.mkdir(parents=True, exist_ok=True)
        rows = [[round(at, 2), *load, *(used // 2**20 for used in memory)] for at, load, memory in self.seen]
        if rows:
            write_json(OUT / f"{name}.nvml.json", rows)


def run_stage(named: Named, stage: str, *more: str, called: str | None = None) -> dict[str, Any]:
    """Run a stage's command. Returns its row, with what it said if it failed."""
    save_digests(named)
    log = ROOTS.runs / f"{named.run}.log"
    environment = named.environment(called or stage)
    with memory_held(named.job.free), Watch() as watch, log.open("ab") as output:
        place, began = output.tell(), time.time()
        code = subprocess.run(
            named.command(stage, *more), stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
        seconds = time.time() - began
    watch.save(f"{named.run}-{called or stage}")
    row: dict[str, Any] = {"exit code": code, "seconds": round(seconds, 1)}
    if code:
        inside = named.folder / stage / "log.txt"
        row["said"] = log.read_bytes()[place:].decode(errors="replace").strip().splitlines()[-6:]
        row["log"] = inside.read_text(errors="replace").splitlines()[-12:] if inside.is_file() else []
    manifest = read_json(named.folder / stage / "manifest.json") or {}
    columns = {"preprocess": _preprocess_columns, "train": _train_columns, "infer": _infer_columns}
    first = last = None
    if stage in columns:
        first, last, found = columns[stage](named, manifest, began, called or stage)
        row |= found
        row["start-up seconds"] = first and round(first - began, 1)
    row |= watch.columns(first, last)
    if (estimate := manifest.get("estimate")) and row.get("measured bytes"):
        row["estimate over measured, percent"] = round(100 * (estimate["total"] / row["measured bytes"] - 1), 1)
    row["MB of the run"] = round(_disk_bytes(named.folder) / 1e6, 1)
    row["host GB"] = manifest and round(manifest.get("peak_memory_bytes", 0) / 1e9, 1)
    row["decisions"] = {made["what"]: made["value"] for made in manifest.get("decisions", [])}
    return row


Found = tuple[float | None, float | None, dict[str, Any]]
"""Times of the first and the last page, step or token, and further columns of a stage's row."""


def _preprocess_columns(named: Named, manifest: dict[str, Any], began: float, _called: str) -> Found:
    """Of preprocess: pages per second of each activity. The times are those of the activities with the model."""
    activities: dict[str, list[dict[str, Any]]] = {}
    for event in named.events("preprocess", began):
        if event["event"] == "progress":
            activities.setdefault(event["activity"], []).append(event)
    found: dict[str, Any] = {"counts": manifest.get("counts")}
    for name, events in activities.items():
        done = events[-1]["step"] - events[0]["step"]
        span = events[-1]["time"] - events[0]["time"]
        found[name] = {
            "from second": round(events[0]["time"] - began, 1),
            "to second": round(events[-1]["time"] - began, 1),
            "done": events[-1]["step"],
            "per second": round(done / span, 2) if span else None,
        }
    on_gpu = [event["time"] for name, events in activities.items() if "render" not in name for event in events]
    return min(on_gpu, default=None), max(on_gpu, default=None), found


def _train_columns(named: Named, manifest: dict[str, Any], began: float, _called: str) -> Found:
    """Of train: speed by adapter, and the seconds between one adapter's last step and the next one's first."""
    losses = [event for event in named.events("train", began) if event["event"] == "loss"]
    times = [event["time"] for event in losses]
    between = [round(b["time"] - a["time"], 1) for a, b in pairwise(losses) if a["adapter"] != b["adapter"]]
    found = {
        "tokens/s": manifest.get("tokens_per_second"),
        "of the peak": manifest.get("share_of_peak"),
        "steps": {name: value for name, value in manifest.get("counts", {}).items() if "step" in name},
        "losses": [round(event["loss"], 3) for event in losses][:12],
        "seconds between adapters": between,
        "estimate": manifest.get("estimate"),
        "connector estimate": manifest.get("connector_estimate"),
        "torch says": manifest.get("gpu_memory"),
    }
    return min(times, default=None), max(times, default=None), found


def _infer_columns(named: Named, manifest: dict[str, Any], _began: float, called: str) -> Found:
    """Of infer: each call of the engine, tokens per second, and the lengths of completions."""
    file = named.notes(called)
    notes: list[dict[str, Any]] = list(read_jsonl(file)) if file.is_file() else []
    calls = [note for note in notes if note["what"] == "generate"]
    firsts = [note["time"] for note in notes if note["what"] == "first token"]
    seconds = sum(call["time"] - call["began"] for call in calls)
    shape, _ = planned_shape(ROOTS.models / job_models.model_name(named.job.model, named.tiny))
    asked, written = (sum(call[name] for call in calls) for name in ("prompt_tokens", "tokens"))
    share = share_of_peak(probe().gpus, shape, (asked + written) / seconds, 1) if seconds else None
    found = {
        "engine start seconds": manifest.get("engine_start_seconds"),
        "prompts": sum(call["prompts"] for call in calls),
        "prompts/s": round(sum(call["prompts"] for call in calls) / seconds, 2) if seconds else None,
        "prompt tokens/s": round(asked / seconds) if seconds else None,
        "written tokens/s": round(written / seconds) if seconds else None,
        "of the peak": share and round(share / 2, 3),  # forward only
        "calls": [
            {
                **{key: call[key] for key in ("adapter", "prompts", "prompt_tokens", "tokens", "shortest", "longest")},
                "seconds": round(call["time"] - call["began"], 2),
            }
            for call in calls
        ],
        "counts": manifest.get("counts"),
        "vote": manifest.get("vote"),
    }
    return min(firsts, default=None), max((call["time"] for call in calls), default=None), found


def run_job(named: Named, stages: list[str]) -> Iterator[dict[str, Any]]:
    """Run a job's models, data and stages, or those named. Yields the rows; ends with the first that fails."""
    wanted = stages or ["models", "data", *STAGES, *(["ablate"] if named.job.ablate else [])]
    for stage in wanted:
        if stage in ("models", "data"):
            row = {"models": make_models, "data": make_data}[stage](named)
        elif stage == "ablate":
            assert named.job.ablate is not None
            row = run_stage(named, "infer", named.job.ablate, called="ablate")
            row["eval"] = run_stage(named, "eval", named.job.ablate, called="ablate-eval")
        else:
            row = run_stage(named, stage)
        yield {"part": f"{named.name}: {stage}", "job": named.name, "stage": stage, **row}
        if row.get("exit code"):
            return


# -- stops and kills -----------------------------------------------------------------------------------------------


def disturb(named: Named, stages: list[str]) -> Iterator[dict[str, Any]]:
    """Stop and kill train and infer of a job that is done, in a run of its own, and compare what they make.

    Yields a row for each stage; `stages` has one of the two if they run in calls of their own. On several GPUs, the
    second start has only the first of them.
    """
    other = replace(named, suffix="-disturbed")
    if "infer" not in stages or "train" in stages:
        shutil.rmtree(other.folder, ignore_errors=True)
        other.folder.mkdir(parents=True)
        shutil.copytree(named.folder / "preprocess", other.folder / "preprocess")
    for stage in stages or ("train", "infer"):
        starts = [_start_and_signal(other, stage, sig) for sig in (signal.SIGTERM, signal.SIGKILL)]
        last = run_stage(other, stage)
        row = {"starts": starts, "last start": last, **_compare(named, other, stage)}
        yield {"part": f"{named.name}: disturbed {stage}", "job": named.name, "stage": f"disturbed {stage}", **row}
        if last["exit code"]:
            return


def _start_and_signal(named: Named, stage: str, sig: signal.Signals) -> dict[str, Any]:
    """Start a stage, and send it a signal after two steps or a call of the engine. Returns what happened."""
    save_digests(named)
    environment = named.environment(stage)
    if sig is signal.SIGKILL and len(probe().gpus) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = "0"
    began, sent = time.time(), None
    with memory_held(named.job.free), (ROOTS.runs / f"{named.run}.log").open("ab") as log:
        process = subprocess.Popen(named.command(stage), stdout=log, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None and sent is None:
            time.sleep(0.02)
            if _has_begun(named, stage, began):
                process.send_signal(sig)
                sent = time.time()
        code = process.wait()
    return {
        "signal": sig.name if sent else None,
        "after seconds": sent and round(sent - began, 1),
        "ended seconds later": sent and round(time.time() - sent, 2),
        "exit code": code,
    }


def _has_begun(named: Named, stage: str, began: float) -> bool:
    """Whether a stage has done two steps since `began`, or its engine an answer that the journals have."""
    if stage == "train":
        return sum(event["event"] == "loss" for event in named.events(stage, began)) >= 2
    notes = named.notes(stage)
    if not notes.is_file() or '"generate"' not in notes.read_text(encoding="utf-8"):
        return False
    return any(path.stat().st_size for path in (named.folder / stage / "partial").glob("*"))


def _compare(one: Named, other: Named, stage: str) -> dict[str, Any]:
    """Columns on what a stage of two runs made: adapters and losses, or answers."""
    if stage == "train":
        found: dict[str, Any] = {}
        for name in sorted(path.name for path in (one.folder / "train" / "adapters").iterdir()):
            files = [run.folder / "train" / "adapters" / name / "adapter_model.safetensors" for run in (one, other)]
            digests = {hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None for file in files}
            found[name] = "the same bytes" if len(digests) == 1 else "other bytes"
        rows = [list(read_jsonl(run.folder / "train" / "metrics.jsonl")) for run in (one, other)]
        losses = [{(r["adapter"], r["step"]): r["loss"] for r in each if "loss" in r} for each in rows]
        apart = [abs(losses[0][key] - losses[1][key]) for key in losses[0].keys() & losses[1].keys()]
        return {
            "adapters": found,
            "steps": [len(each) for each in losses],
            "largest difference": max(apart, default=None),
        }
    answers = {}
    for path in sorted((one.folder / "infer" / "predictions").glob("*.jsonl")):
        texts = [
            {record["id"]: record["text"] for record in read_jsonl(run.folder / "infer" / "predictions" / path.name)}
            for run in (one, other)
        ]
        answers[path.stem] = {
            "answers": [len(each) for each in texts],
            "differ": sum(texts[0][name] != texts[1].get(name) for name in texts[0]),
        }
    return {"answers": answers}


# -- vLLM by hand, and plans ---------------------------------------------------------------------------------------


def by_hand(named: Named) -> dict[str, Any]:
    """Give vLLM the prompts of a job's infer stage, call by call, with its own `generate`. Returns the row."""
    began = time.monotonic()
    from stages.engines.vllm_options import ENVIRONMENT

    os.environ |= ENVIRONMENT
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    from stages.models.pictures import Picture

    notes = list(read_jsonl(named.notes("infer")))
    arguments = next(note["arguments"] for note in notes if note["what"] == "arguments")
    llm = LLM(**arguments, disable_log_stats=False)
    row: dict[str, Any] = {"engine start seconds": round(time.monotonic() - began, 1), "calls": []}
    numbers: dict[str, int] = {}
    prompts = seconds = 0.0
    for call in read_jsonl(named.prompts("infer")):
        adapter = call["adapter"]
        request = adapter and LoRARequest(adapter, numbers.setdefault(adapter, len(numbers) + 1), call["folder"])
        at = time.monotonic()
        asked = []
        for one in call["prompts"]:
            prompt = TokensPrompt(prompt_token_ids=one["tokens"])
            if one["pictures"]:
                pictures = [Picture(Path(path), *sizes).load() for path, *sizes in one["pictures"]]
                prompt["multi_modal_data"] = {"image": pictures}
            asked.append(prompt)
        limits = [
            SamplingParams(temperature=0, max_tokens=one["limit"], min_tokens=one["limit"], ignore_eos=True)
            for one in call["prompts"]
        ]
        llm.generate(asked, limits, lora_request=request, use_tqdm=False)
        took = time.monotonic() - at
        row["calls"].append({"adapter": adapter, "prompts": len(asked), "seconds": round(took, 2)})
        prompts, seconds = prompts + len(asked), seconds + took
    row["prompts/s"] = round(prompts / seconds, 2)
    stage = [note for note in notes if note["what"] == "generate"]
    took = sum(note["time"] - note["began"] for note in stage)
    row["prompts/s of the stage"] = round(sum(note["prompts"] for note in stage) / took, 2)
    row["stage over by hand"] = round(row["prompts/s of the stage"] / row["prompts/s"], 3)
    for metric in llm.get_metrics():
        if metric.name in ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits"):
            row[metric.name.removeprefix("vllm:")] = getattr(metric, "value", None)
    return row


def print_plans(named: Named) -> Iterator[dict[str, Any]]:
    """Yield a row for each target: what `lorry plan` says of a job as the recipe stands."""
    profile = ["--profile", named.job.profile] if named.job.profile else []
    model = ["--set", f"model.path={named.job.model}"]
    for name in named.models:
        job_models.make(name, tiny=False, has_contents=False)
    for target, count in TARGETS:
        command = [sys.executable, "-m", "entrypoints.lorry", "plan", named.job.recipe, *profile, *model]
        done = subprocess.run(
            [*command, "--target", target, "--gpus", str(count)], capture_output=True, text=True, check=False
        )
        said = (done.stdout + done.stderr).strip().splitlines()
        yield {"part": f"{named.name}: plan", "job": named.name, "target": f"{count} x {target}",
               "exit code": done.returncode, "said": said}  # fmt: skip


def _without_paths(row: dict[str, Any]) -> dict[str, Any]:
    """A row in which the folders of this machine have the names that they have in a checkout."""
    text = json.dumps(row, ensure_ascii=False)
    for folder, name in ((ROOTS.runs, "runs"), (ROOTS.models, "models"), (HERE.parent, ".")):
        text = text.replace(str(folder), name)
    found: dict[str, Any] = json.loads(text)
    return found


def main() -> None:
    """Do what the command line asks for, and write the rows as they come."""
    words = [word for word in sys.argv[1:] if word != "tiny" and "=" not in word]
    tiny, more = "tiny" in sys.argv[1:], tuple(word for word in sys.argv[1:] if "=" in word)
    rows: list[dict[str, Any]] = []
    what = words[0] if words[0] in ("disturb", "by-hand", "plan") else "run"
    planned = ["patent-qa", "extractive-qa", "logic-choice", "better-synth", "better-synth-mgm", "articulation"]
    names = planned if what == "plan" else [words[what != "run"]]
    for name in names:
        named = Named(name, JOBS[name], tiny, more)
        made: Iterator[dict[str, Any]] = (
            disturb(named, words[2:])
            if what == "disturb"
            else iter([{"part": f"{name}: by hand", "job": name, "stage": "by hand", **by_hand(named)}])
            if what == "by-hand"
            else print_plans(named)
            if what == "plan"
            else run_job(named, words[1:])
        )
        for found in made:
            rows.append(row := _without_paths(found))
            print(json.dumps(row, ensure_ascii=False)[:3000], flush=True)
            OUT.mkdir(parents=True, exist_ok=True)
            with (OUT / "jobs.json_lines").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if not tiny:
        write_rows("jobs", rows, "python -m benchmarks.jobs JOB", by="part")
    if any(row.get("exit code") for row in rows if what == "run"):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
