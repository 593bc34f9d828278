"""Does the work of `lorry tune`: looks, chooses, writes a recipe, plans, and runs it as `lorry run` or `lorry launch`
does.
"""

import importlib.util
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stages.contract.errors import DataError, DoesNotFitError, Exit, UsageError
from stages.contract.recipe import Recipe, Train, file_name, load_recipe, parse_override
from stages.contract.roots import Roots
from stages.engines import ENGINES, refuse_unserved_model
from stages.hardware.fit import Way, plan_training
from stages.hardware.memory import Lengths
from stages.hardware.pick import parse_wish
from stages.hardware.probe import probe
from stages.hardware.serve import plan_serving
from stages.hardware.speed import Workload
from stages.host import launching, planning
from stages.host.containers import find_engine
from stages.host.fetching import fetch
from stages.host.outcome import Lines, Note
from stages.host.planning import PlannedGpus, planned_gpus, usable_gpus
from stages.host.processes import run_all_stages
from stages.host.runs import open_run
from stages.host.tune.base import Base, find_model, read_base
from stages.host.tune.data import Seen, look_at
from stages.host.tune.recipe_text import recipe_text, yaml_text
from stages.host.tune.values import (
    LEAST_LENGTH,
    Machine,
    Value,
    Values,
    choose_values,
    held_text,
    learnt,
    least_inference_length,
)
from stages.models.shape import UnknownShapeError
from stages.tasks import settle_recipe

TASK = "chat"

GIB = 1024**3


@dataclass(frozen=True)
class Wanted:
    """What the user asks for."""

    data: str
    model: str
    run_name: str | None
    gpus: str | None
    """The value of GPUS, for the way of `lorry launch`; None: that of `lorry run`."""
    target: str | None
    form: str | None
    """The form of the data; None: it is found."""
    epochs: float | None
    overrides: tuple[str, ...]

    @property
    def asked(self) -> dict[str, Any]:
        """The values that the user sets, by full recipe key. Raises UsageError for an override of another form."""
        found: dict[str, Any] = {}
        if self.form is not None:
            found["preprocess.samples.form"] = self.form
        if self.epochs is not None:
            found["train.epochs"] = float(self.epochs)
        for override in self.overrides:
            value: Any = parse_override(override)
            key = override.partition("=")[0]
            for part in key.split("."):
                value = value[part]
            found[key] = value
        return found


def tune(wanted: Wanted) -> Lines:
    """Tune a model on conversations: write the recipe, unless it is here, and run it. Yields lines; returns the exit
    code.

    Raises the errors of `prepare` and `planning.plan`, and those of `lorry run` or `lorry launch`.
    """
    if wanted.target and wanted.gpus is None:
        os.environ["LORRY_TARGET"] = wanted.target
    options, workload = yield from prepare(wanted, Roots.from_environment())
    run = open_run(**options)
    run.refuse_other_job()
    count, target = _planned_count(wanted)
    try:
        code = yield from planning.plan(run, target, count, None, workload)
    except UnknownShapeError as error:
        yield Note(f"{error}")
        code = Exit.DONE
    if code:
        return code
    if wanted.gpus is None:
        code = yield from run_all_stages(options, force=False)
    else:
        code = yield from launching.launch("eval", options, wanted.gpus, wanted.target, force=False, shard=None)
    if not code:
        yield from next_lines(run.name)
    return code


def prepare(wanted: Wanted, roots: Roots) -> Generator[str, None, tuple[dict[str, Any], Workload | None]]:
    """Download the model, if it is not here, and write the recipe, unless it is. Yields lines; returns the options of
    the run (`open_run`), and what it learns from if the recipe is new.

    Raises UsageError for a model or data that are not here, and for a recipe of another job, DoesNotFitError for a
    model that is too large, and the errors of `look_at`, `read_base` and `fetch`.
    """
    data = _data_path(wanted.data, roots)
    path = find_model(wanted.model, roots)
    if path is None:
        path = wanted.model
        # a mistake in the data must not come after hours of a download
        look_at(_draft(wanted, data, path, None, roots), roots.data / data, roots.models / path, roots.runs)
        yield Note(f"{path}: not in {roots.models}, so it is downloaded first")
        for line in fetch(path, "huggingface", None, code=False):
            yield Note(line)
    base = read_base(path, roots)
    if wanted.gpus is not None and Path(path).is_absolute() and find_engine()[0] is not None:
        raise UsageError(
            f"--model {wanted.model}: outside of {roots.models}, which is all that containers see of models; set"
            " LORRY_MODELS to a folder that it is in"
        )
    name = wanted.run_name or file_name(f"{Path(data).stem}-{base.folder.name}")
    if name != Path(name).name:
        raise UsageError(f"--run {name}: not a name for one folder; choose a name without '/'")
    file, workload = Path(f"{name}.yaml"), None
    if file.exists():
        _refuse_other_recipe(file, data, path, roots, wanted)
        yield Note(f"{file}: here already, and used as it is; delete it for new values")
    else:
        workload = yield from _write_recipe(file, data, base, roots, wanted)
    outside = data if Path(data).is_absolute() else None
    options = {"recipe": str(file), "profile": None, "data": outside, "overrides": (), "run_name": name}
    return options, workload


def next_lines(run: str) -> Sequence[str]:
    """What to do with a run that is scored."""
    return (
        f"lorry chat {run}     # ask base and tuned model side by side",
        f"lorry serve {run}    # OpenAI's interface for programs",
        f"lorry export {run} --merged FOLDER    # an ordinary model folder",
    )


def _data_path(data: str, roots: Roots) -> str:
    """The recipe's `data.path` for data as a user names them: relative to the data mount if they are below it, else
    absolute. Raises UsageError if there is no such file or folder, or an empty file."""
    here, below = Path(data), roots.data / data
    path = here if here.exists() else below
    if not path.exists():
        raise UsageError(f"{data}: no such file or folder, neither here nor in {roots.data}; name a file of chats")
    if path.is_file() and path.stat().st_size == 0:
        raise UsageError(f"{data}: an empty file; name a file of chats")
    found = path.resolve() if ".." in path.parts else path.absolute()
    return str(found.relative_to(roots.data)) if found.is_relative_to(roots.data) else str(found)


def _refuse_other_recipe(file: Path, data: str, path: str, roots: Roots, wanted: Wanted) -> None:
    """Raise UsageError if a recipe that is here is for another job, or lacks what the user asks for."""
    here = load_recipe(file)
    before = (here.task, (roots.data / here.data.path).resolve(), (roots.models / here.model.path).resolve())
    if before != (TASK, (roots.data / data).resolve(), (roots.models / path).resolve()):
        raise UsageError(
            f"{file}: here already, for {here.data.path} and {here.model.path}; give this job a name of its own: --run"
            " NAME"
        )
    settings = tuple(f"{key}={yaml_text(value)}" for key, value in wanted.asked.items())
    if load_recipe(file, overrides=settings) != here:
        raise UsageError(
            f"{file}: here already, without {' '.join(settings)}; set that there, delete the file for new values, or"
            " give this job a name of its own: --run NAME"
        )


# -- the recipe ----------------------------------------------------------------------------------------------------


def _write_recipe(file: Path, data: str, base: Base, roots: Roots, wanted: Wanted) -> Generator[str, None, Workload]:
    """Look at data and machine, choose the values, and write the recipe. Yields a line on each; returns what is
    learnt from."""
    count, target = _planned_count(wanted)
    asked = wanted.asked
    gpus = planned_gpus(target, count, None, asked.get("train.precision", "auto"))
    recipe = _draft(wanted, data, base.path, base.chat_template, roots)
    seen, sentences = look_at(recipe, roots.data / data, base.folder, roots.runs)
    yield from map(Note, sentences)
    if seen.conversations < 2:
        raise DataError(
            f"{wanted.data}: one conversation alone; add others, as one is scored and the others are learnt"
        )
    if seen.pictures and not base.sees:
        raise UsageError(f"--model {base.path}: sees no pictures, but the data show some; name a vision-language model")
    machine = Machine(gpus.count if gpus.memory else 0, *_engine(base, gpus, in_containers=wanted.gpus is not None))
    values = choose_values(seen, base, machine, asked)
    if gpus.memory is None:
        _refuse_large_on_cpu(base)
    else:
        fit_values(values, seen, base, gpus)
    title = f"Tunes {base.path} on {data}."
    heads = [
        Value("description", f"{base.folder.name} tuned on {Path(data).name}", ""),
        Value("task", TASK, ""),
        Value("seed", 42, ""),
        Value("data.path", data, "the conversations; below the data mount, or absolute"),
    ]
    file.write_text(recipe_text(str(file), title, [*heads, *values.all()]), encoding="utf-8")
    yield Note(f"{file}: written; keep it and edit it")
    for value in values.all():
        yield Note(f"  {value.key} {yaml_text(value.value)}: {value.why}")
    return learnt(values, seen)


def _draft(wanted: Wanted, data: str, path: str, chat_template: str | None, roots: Roots) -> Recipe:
    """A recipe with which the task reads the data, and with all that the user sets. Raises UsageError for a wrong or
    unknown key."""
    values = {
        "task": TASK,
        "model": {"path": path, "chat_template": chat_template},
        "data": {"path": data},
        "preprocess": {"samples": {"form": wanted.form} if wanted.form else {}},
        "train": {"adapters": [{"name": "tuned"}]},
    }
    with TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml_text(values), encoding="utf-8")
        recipe = load_recipe(file, overrides=wanted.overrides)
    return settle_recipe(recipe, f"--data-form {wanted.form}" if wanted.form else "--set", roots.data)


def _planned_count(wanted: Wanted) -> tuple[int, str | None]:
    """The number of GPUs to plan for, and their target's name; None: those here, or the CPU. Raises UsageError if
    GPUs are asked for, and none is here."""
    if wanted.gpus is None:
        return max(len(usable_gpus()), 1), None
    wish, here = parse_wish(wanted.gpus), len(usable_gpus())
    if not here and wanted.target is None:
        raise UsageError(
            f"--gpus {wanted.gpus}: this machine has no GPU that Lorry may use; leave it out to use the CPU, or name"
            " their --target if the Docker engine is on another machine"
        )
    return len(wish.names) or wish.count or max(here, 1), wanted.target


def _engine(base: Base, gpus: PlannedGpus, in_containers: bool) -> tuple[str, str]:
    """The engine that answers, and why: vllm where it works, else transformers."""
    if gpus.memory is None:
        return "transformers", "on a CPU it starts sooner than vllm, and answers few questions as fast"
    (vllm,) = (kind for kind in ENGINES if kind.name == "vllm")
    try:
        refuse_unserved_model(vllm, base.folder)
    except UsageError:
        return "transformers", "vllm cannot serve this model"
    if not in_containers and importlib.util.find_spec("vllm") is None:
        return "transformers", "vllm is not installed here"
    return "vllm", "the faster one on a GPU"


def _refuse_large_on_cpu(base: Base) -> None:
    """Raise DoesNotFitError if the base, in float32, takes more than this machine's memory."""
    if base.shape is None:
        return
    needed, here = 4 * base.shape.parameters, probe().memory_bytes
    if needed > here:
        raise DoesNotFitError(
            f"--model {base.path}: {base.shape.parameters / 1e9:.1f} billion parameters take {needed / GIB:.0f} GiB in"
            f" float32, as on a CPU, and this machine has {here / GIB:.0f}; name GPUs (--gpus), or a smaller model"
        )


def fit_values(values: Values, seen: Seen, base: Base, gpus: PlannedGpus) -> None:
    """Keep the base in 4 bits, or train on shorter conversations, if training does not fit the GPUs otherwise.

    Settings that the user asked for stay. Nothing is changed for a base whose memory cannot be estimated. Raises
    DoesNotFitError if no such change fits, or if the answers would not fit.
    """
    shape, memory = base.shape, gpus.memory
    if shape is None or memory is None:
        return

    def way(in_4bit: bool, length: int) -> Way:
        """How training would fit with these settings."""
        settings = Train.model_validate(
            {
                "adapters": [{"name": "tuned"}],
                **{key: values.value(f"train.{key}") for key in ("rank", "alpha", "effective_batch", "target_modules")},
                **{"max_length": length, "load_in_4bit": in_4bit},
            }
        )
        if not gpus.target.deepspeed:
            settings = settings.model_copy(update={"sharding": "none"})
        return plan_training(shape, settings, gpus.count, gpus.dtype, memory, Lengths(length, length))

    full = values.value("train.max_length")
    kernels = "bitsandbytes" in gpus.target.quantisation and shape.quantisation is None
    bits = [False, True] if kernels else [False]
    if values.is_asked("train.load_in_4bit"):
        bits = [bool(values.asked_value("train.load_in_4bit"))]
    lengths = [full] if values.is_asked("train.max_length") else _shorter(full)
    tried = [(length, in_4bit) for length in lengths for in_4bit in bits]
    found = next((each for each in tried if way(each[1], each[0]).fits(memory)), None)
    room = f"{memory / GIB:.1f} GiB of each GPU"
    if found is None:
        least = min(way(in_4bit, lengths[-1]).estimate.total for in_4bit in bits)
        raise DoesNotFitError(
            f"--model {base.path}: training takes at least {least / GIB:.1f} of {room}"
            f"{', even in 4 bits' if True in bits else ''}; use more or larger GPUs (--gpus, --target), or a smaller"
            " model"
        )
    length, in_4bit = found
    if in_4bit and not values.is_asked("train.load_in_4bit"):
        whole = way(False, full).estimate.total
        values.choose("train.load_in_4bit", True, f"in {gpus.dtype} it takes {whole / GIB:.1f} of {room}")
    if length != full:
        values.replace("train.max_length", length, f"{held_text(seen, length)}; longer ones do not fit {room}")
    if values.value("infer.engine") == "vllm":
        free = [memory] * gpus.count
        try:
            plan_serving(shape, free, None, gpus.target.dtype, values.value("infer.max_length"))
        except DoesNotFitError:
            if values.is_asked("infer.max_length"):
                raise
            least = least_inference_length(values, base)
            plan_serving(shape, free, None, gpus.target.dtype, least)
            values.replace("infer.max_length", least, "tokens of prompt and answer; more may not fit the GPUs")


def _shorter(length: int) -> list[int]:
    """The length, three quarters of it, and so on, in multiples of 64 down to LEAST_LENGTH."""
    found = [length]
    while (length := length * 3 // 4 // 64 * 64) >= LEAST_LENGTH:
        found.append(length)
    return found
