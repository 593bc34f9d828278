"""The process in which Data-Juicer runs: `python -m stages.preprocess.data_juicer_worker <job.json>`.

It runs the operators one after the other, on one chunk of records at a time, and saves every chunk:

<work>/read.jsonl           the records as read: id, text, images
<work>/NN/CCCCCC.jsonl      operator NN (from 1; 00 checks the pictures), chunk C: a line of counts, then its records
<work>/NN.jsonl, NN.json    records and counts of a finished operator; the previous operator's records are deleted

Operators that compare records (deduplicators, selectors) get all records as one chunk. With `executor: ray`, those that
do not support Ray run in local processes.

On a CPU, the result does not depend on the size of chunks or the number of processes: captions are sampled with a seed
from the record's id. On a GPU, records that are captioned together share one seed; with Ray on a GPU, captions have no
seed.
"""

import difflib
import functools
import inspect
import json
import logging
import multiprocessing
import os
import random
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.contract.errors import DataError, Exit, LorryError, UsageError
from stages.contract.files import read_json, read_jsonl, remove, write_json, write_jsonl
from stages.contract.machine_errors import raise_machine_fault
from stages.contract.stop import make_forks_die_with_parents
from stages.models.pictures import read_picture

Row = dict[str, Any]
"""`id`, `text`, `images` (relative to the data folder), `original_id` of an added record, and operators' own fields."""

BATCH = 100
"""Number of records that an operator without weights gets at once."""

FAILURES_BEFORE_GIVING_UP = 10
"""Number of failed records after which the stage fails, if the operator has processed none until then."""

META = "__dj__meta__"
"""Field for operators' tags. Other fields that begin with `__dj__` (statistics, hashes) are for one operator only."""


@dataclass
class Job:
    """The content of job.json, which `stages.preprocess.data_juicer` writes."""

    operators: list[tuple[str, dict[str, Any]]]
    executor: str
    workers: int | None
    cpus: int
    chunk_size: int
    seed: int
    data: str
    work: str
    scratch: str
    channel: int
    """File descriptor for messages to the stage."""

    @property
    def processes(self) -> int:
        """Number of processes for an operator."""
        return self.workers or self.cpus

    def send(self, **fields: Any) -> None:
        """Send one message to the stage, as a line of JSON."""
        os.write(self.channel, (json.dumps(fields) + "\n").encode())


Step = Callable[[list[Row]], list[Row]]
"""A function that processes a chunk and returns its rows, those of one record together. It raises any exception if it
cannot process a row."""


def main() -> None:
    """Run the operators of the job that the command line names, then exit with code 0. After a LorryError, sends it to
    the stage and exits with its exit code."""
    job = Job(**read_json(Path(sys.argv[1])))
    make_forks_die_with_parents()  # operators' workers, and Ray
    try:
        _forbid_installs_and_downloads()
        operators = _load_operators(job)
        rows = _check_pictures(job)
        for number, operator in enumerate(operators, start=1):
            rows = _run_operator(job, number, operator, rows)
    except LorryError as error:
        traceback.print_exc()
        job.send(error=int(error.exit_code), text=str(error))
        sys.exit(error.exit_code)
    sys.exit(Exit.DONE)


# -- steps, their chunks and their files ---------------------------------------------------------------------------


def _check_pictures(job: Job) -> list[Row]:
    """Return the records whose pictures can all be read, or none if the first operator is finished, too.

    Without this step, Data-Juicer would drop the whole batch that contains an unreadable picture.
    """
    rows = read_jsonl(Path(job.work, "read.jsonl")) if not _is_done(job, 0) else []
    with multiprocessing.Pool(job.processes) as pool:
        return _run_step(
            job, 0, "check pictures", rows, job.chunk_size, functools.partial(_drop_damaged_rows, job, pool)
        )


def _drop_damaged_rows(job: Job, pool: Any, rows: list[Row], problems: list[Row]) -> list[Row]:
    """Return the rows whose pictures can all be read, and add a problem for each other row to `problems`."""
    paths = sorted({image for row in rows for image in row["images"]})
    damage = dict(zip(paths, pool.map(_damage_reason, [os.path.join(job.data, path) for path in paths]), strict=True))  # noqa: PTH118
    good = []
    for row in rows:
        broken = [image for image in row["images"] if damage[image]]
        if broken:
            problems.append(_problem(row, "picture cannot be read", f"{broken[0]}: {damage[broken[0]]}"))
        else:
            good.append(row)
    return good


def _damage_reason(path: str) -> str:
    """Return the reason why a picture cannot be read, in at most 200 characters; empty if it can be read."""
    from PIL import ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = False  # Data-Juicer sets it
    try:
        read_picture(Path(path))
    except DataError as error:
        cause = error.__cause__
        return str(cause).replace(path, Path(path).name)[:200] or type(cause).__name__
    return ""


def _run_operator(job: Job, number: int, operator: Any, rows: list[Row]) -> list[Row]:
    """Run one operator over all rows. Returns its output rows, or none if the next operator is finished, too.

    Raises DataError if a mapper or filter fails on each of the first FAILURES_BEFORE_GIVING_UP records, or if an
    operator of another kind fails at all.
    """
    from data_juicer.ops.base_op import Filter, Mapper

    run = functools.partial(_run_on_ray if _supports_ray(job, operator) else _run_here, job, operator)
    name = f"{number}/{len(job.operators)} {operator._name}"
    where = f"preprocess.data_juicer.process[{number - 1}].{operator._name}"
    if isinstance(operator, Mapper | Filter):
        return _run_step(job, number, name, rows, job.chunk_size, _Bisection(run, where))

    def process_all(rows: list[Row], _problems: list[Row]) -> list[Row]:
        """Process all rows as one chunk. Returns the operator's rows. Raises DataError if the operator fails."""
        try:
            return run(rows)
        except Exception as error:
            raise_machine_fault(error)
            raise DataError(f"{where}: fails ({_error_text(error)}); remove it, or correct the data") from error

    return _run_step(job, number, name, rows, max(len(rows), 1), process_all)


class _Bisection:
    """Processes a chunk. If that fails, processes its halves, and so on down to the records that cause the failure."""

    def __init__(self, run: Step, where: str) -> None:
        """`run` is the operator's step, `where` its key in the recipe, which ends with its name."""
        self._run, self._where, self._name = run, where, where.rpartition(".")[2]
        self._one_done, self._failed = False, 0

    def __call__(self, rows: list[Row], problems: list[Row]) -> list[Row]:
        """Return the operator's rows, and add a problem to `problems` for each record on which the operator fails.

        Raises DataError if the operator fails on each of the first FAILURES_BEFORE_GIVING_UP records.
        """
        try:
            done = self._run(rows)
        except Exception as error:
            if len(rows) > 1:
                middle = len(rows) // 2
                return self(rows[:middle], problems) + self(rows[middle:], problems)
            raise_machine_fault(error)
            traceback.print_exc()
            self._failed += 1
            if self._failed >= FAILURES_BEFORE_GIVING_UP and not self._one_done:
                raise DataError(
                    f"{self._where}: fails on each of the first {self._failed} records ({_error_text(error)}); remove"
                    " it, or correct its parameters"
                ) from error
            problems.append(_problem(rows[0], f"{self._name} failed", _error_text(error)))
            return []
        self._one_done = True
        return done


def _run_step(
    job: Job, number: int, name: str, rows: list[Row], size: int, work: Callable[[list[Row], list[Row]], list[Row]]
) -> list[Row]:
    """Process the chunks of a step that are not saved yet, `size` rows each. Returns the rows of all chunks, or none if
    the next step is finished, too.

    `work` processes one chunk: it returns the rows, and adds the records that fail to the list of problems. After the
    last chunk, writes the step's rows and counts, and deletes its chunks and the previous step's rows.
    """
    whole = Path(job.work, f"{number:02}.jsonl")
    if _is_done(job, number):
        return read_jsonl(whole) if whole.exists() else []
    folder = whole.with_suffix("")
    total: Counter[str] = Counter()
    problems: list[Row] = []
    every: list[Row] = []
    for first in range(0, len(rows), size):
        path = folder / f"{first // size:06}.jsonl"
        if not path.exists():
            write_jsonl(path, _process_chunk(number, rows[first : first + size], work))
        head, *out = read_jsonl(path)
        problems += head.pop("problems")
        total.update(head)
        every += out
        job.send(activity=name, step=min(first + size, len(rows)), total=len(rows))
    operator = job.operators[number - 1][0] if number else name
    counts = {key: total[key] for key in ("read", "kept", "dropped", "changed", "added", "failed")}
    write_jsonl(whole, every)
    write_json(
        whole.with_suffix(".json"),
        {"operator": operator, **counts, "seconds": round(total["seconds"], 2), "problems": problems},
    )
    remove(folder)
    if number:
        remove(Path(job.work, f"{number - 1:02}.jsonl"))
    return every


def _is_done(job: Job, number: int) -> bool:
    """Return whether a step is finished."""
    return Path(job.work, f"{number:02}.json").exists()


def _process_chunk(number: int, rows: list[Row], work: Callable[[list[Row], list[Row]], list[Row]]) -> list[Row]:
    """Process a chunk. Returns one row with its counts, seconds and problems, then its rows in the order of the input.

    If an operator returns several rows for one id, all except the first get a new id.
    """
    began = time.monotonic()
    problems: list[Row] = []
    out = work(rows, problems)
    seconds = time.monotonic() - began
    place = {row["id"]: index for index, row in enumerate(rows)}
    out.sort(key=lambda row: place[row["id"]])  # stable: a record's rows stay in the operator's order
    seen: Counter[str] = Counter()
    changed = 0
    for row in out:
        before = rows[place[row["id"]]]
        if "original_id" in before:
            row["original_id"] = before["original_id"]
        again = seen[row["id"]]
        seen[row["id"]] += 1
        if again:
            row["original_id"] = before.get("original_id", before["id"])
            row["id"] = f"{row['id']}+{number}.{again}"
        elif row != before:
            changed += 1
    counts = {"read": len(rows), "kept": len(out), "changed": changed, "added": len(out) - len(seen)}
    counts |= {"failed": len(problems), "dropped": len(rows) - len(seen) - len(problems)}
    return [{**counts, "seconds": seconds, "problems": problems}, *out]


def _problem(row: Row, reason: str, detail: str) -> Row:
    """Return the entry for a record that failed. Its id is that of the input record that the row comes from."""
    return {"id": row.get("original_id", row["id"]), "reason": reason, "detail": detail}


def _error_text(error: BaseException) -> str:
    """Return an exception as one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


# -- operators -----------------------------------------------------------------------------------------------------


def _forbid_installs_and_downloads() -> None:
    """Patch Data-Juicer to raise an error when it would install a package or download weights. Also limits its log to
    warnings."""
    from data_juicer.utils import model_utils
    from data_juicer.utils.lazy_loader import LazyLoader
    from loguru import logger

    logger.remove()  # Data-Juicer logs several lines for each chunk
    logger.add(sys.stderr, level="WARNING")

    def refuse_install(package: str, _arguments: Any = None) -> None:
        """Raise ImportError. The message names the package."""
        raise ImportError(
            f"needs the package {package}, which is not installed; install it first, as Lorry installs"
            " nothing at run time"
        )

    def refuse_download(name: str, **_: Any) -> None:
        """Raise FileNotFoundError. The message names the weights."""
        raise FileNotFoundError(
            f"needs the weights {name}, which do not exist; put them there, as Lorry downloads nothing at run time"
        )

    LazyLoader._install_package = staticmethod(refuse_install)
    model_utils.check_model = refuse_download


def _load_operators(job: Job) -> list[Any]:
    """Return the loaded operators, with mappers seeded by record. Imports their models if any operator can use a GPU.
    Raises UsageError, with the key in the recipe, for an operator that cannot be loaded."""
    from data_juicer.ops import OPERATORS, base_op

    loaded = []
    for number, (name, given) in enumerate(job.operators):
        where = f"preprocess.data_juicer.process[{number}]"
        if name not in OPERATORS.modules:
            near = difflib.get_close_matches(name, OPERATORS.modules, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "choose one from Data-Juicer's list of operators"
            raise UsageError(f"{where}: Data-Juicer has no operator {name!r}; {hint}")
        kind = OPERATORS.modules[name]
        _refuse_unusable_operator(job, kind, f"{where}.{name}", given)
        try:
            operator = kind(**_parameters_with_defaults(job, kind, given))
        except Exception as error:
            raise_machine_fault(error)
            raise UsageError(
                f"{where}.{name}: cannot be loaded ({_error_text(error)}); correct its parameters, or remove it"
            ) from error
        if isinstance(operator, base_op.Mapper):
            operator.process = _seed_each_call(operator.process, f"{job.seed} {number}")
        loaded.append(operator)
    if any(operator._accelerator == "cuda" for operator in loaded):
        _import_models(job)
    else:
        base_op.free_models = lambda: None  # it would import torch although there is no model to free
    return loaded


def _import_models(job: Job) -> None:
    """Import torch and the classes of the operators' models before workers are forked. Otherwise each worker of each
    chunk would import them, because transformers imports its modules on first use."""
    import torch  # noqa: F401
    import transformers

    for _, given in job.operators:
        for folder in (value for key, value in given.items() if key.startswith("hf_")):
            for name in (read_json(Path(folder, "config.json")) or {}).get("architectures") or []:
                with suppress(ImportError, RuntimeError):  # the operator itself reports what it lacks
                    getattr(transformers, name, None)


def _refuse_unusable_operator(job: Job, kind: Any, where: str, given: dict[str, Any]) -> None:
    """Raise UsageError for an operator that Lorry cannot run, or whose parameters are wrong or missing.

    `where` is its key in the recipe, `given` its parameters.
    """
    from data_juicer.core.preflight import PipelineConfigError, pre_instantiation_check
    from data_juicer.ops.base_op import Deduplicator, Filter, Mapper, Selector

    if not issubclass(kind, Mapper | Filter | Deduplicator | Selector):
        raise UsageError(f"{where}: does not turn records into records; use a mapper, filter, deduplicator or selector")
    if job.executor not in kind._supported_exec_modes and "default" not in kind._supported_exec_modes:
        raise UsageError(
            f"{where}: does not run with executor {job.executor}; set preprocess.data_juicer.executor to"
            f" {kind._supported_exec_modes[0]}, or remove the operator"
        )
    try:
        pre_instantiation_check([{where.rpartition(".")[2]: given}])
    except PipelineConfigError as error:
        found = ", ".join(str(one) for one in error.errors)
        raise UsageError(f"{where}: {found}; correct its parameters") from error
    for key, parameter in inspect.signature(kind.__init__).parameters.items():
        if key in given or not isinstance(parameter.default, str):
            continue
        if key.startswith("hf_"):
            raise UsageError(
                f"{where}: no {key}; set it to the folder of the weights, relative to the model mount (Lorry does not"
                f" download the default, {parameter.default})"
            )
        if key.startswith("api_model"):
            raise UsageError(f"{where}: asks a model over the network, but no stage uses the network; remove it")
        if key in ("flagged_words_dir", "stopwords_dir"):
            raise UsageError(
                f"{where}: no {key}; set it to a folder, relative to data.path, with {key.removesuffix('_dir')}.json,"
                " a list of words per language"
            )


def _parameters_with_defaults(job: Job, kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return an operator's parameters with Lorry's defaults for those that the recipe leaves out: processes, GPUs, and
    records per call."""
    from data_juicer.utils.resource_utils import is_cuda_available

    weights = kind._accelerator == "cuda"
    on_card = weights and given.get("accelerator") != "cpu" and is_cuda_available()
    found = {"num_proc": job.processes, **given}
    if job.executor != "ray" and job.processes == 1 and not on_card:
        found = {"auto_op_parallelism": False, **found, "num_proc": given.get("num_proc")}  # in this process
    if job.executor == "ray":
        found["auto_op_parallelism"] = False
        if on_card:
            found = {"num_gpus": 1, **found}
    if not on_card:
        # with weights, one record at a time: only the record then decides the seed, and batches are no faster on a CPU
        found = {"batch_size": 1 if weights else BATCH, **found}
    return found


def _seed_each_call(function: Any, seed: str) -> Any:
    """Return a mapper's function, wrapped so that each call first seeds the random generators from `seed` and the id of
    its first record.

    Otherwise sampled captions would depend on the process.
    """

    @functools.wraps(function)  # Data-Juicer finds the operator through __wrapped__
    def call_with_seed(samples: Any, *arguments: Any, **named: Any) -> Any:
        """Seed Python, numpy and torch, make BLIP-2 keep its picture token, then call the mapper's function."""
        import numpy as np

        first = samples["id"][0] if not isinstance(samples["id"], str) else samples["id"]
        number = zlib.crc32(f"{seed} {first}".encode())
        random.seed(number)
        np.random.seed(number)
        if "torch" in sys.modules:
            sys.modules["torch"].manual_seed(number)
        _keep_picture_token()
        return function(samples, *arguments, **named)

    return call_with_seed


def _keep_picture_token() -> None:
    """Patch Data-Juicer so that each BLIP-2 keeps its own picture token.

    Data-Juicer sets it to 50265, which is right for OPT. It is outside Flan-T5's vocabulary, and transformers 5 then
    raises IndexError.
    """
    captioning: Any = sys.modules.get("data_juicer.ops.mapper.image_captioning_mapper")
    if captioning is None or hasattr(captioning.get_model, "__wrapped__"):
        return

    @functools.wraps(captioning.get_model)
    def get_model(*arguments: Any, **named: Any) -> Any:
        """Return model and processor as Data-Juicer does, but with a picture token that cannot be set afterwards."""
        model, processor = get_model.__wrapped__(*arguments, **named)
        own = model.config.image_token_index
        if own is not None:
            kind = type(model.config)
            if not kind.__name__.startswith("Fixed"):
                fixed = property(lambda _: own, lambda *_: None)
                model.config.__class__ = type(f"Fixed{kind.__name__}", (kind,), {"image_token_index": fixed})
        return model, processor

    captioning.get_model = get_model


# -- run them --------------------------------------------------------------------------------------------------


def _supports_ray(job: Job, operator: Any) -> bool:
    """Return whether the operator runs on Ray here: the recipe asks for it, and the operator supports it."""
    return job.executor == "ray" and "ray" in operator._supported_exec_modes


def _run_here(job: Job, operator: Any, rows: list[Row]) -> list[Row]:
    """Run an operator over rows in local processes. Returns its output rows."""
    from data_juicer.core.data import NestedDataset
    from datasets import Dataset, disable_caching
    from pyarrow.ipc import new_stream

    disable_caching()
    # through a file: workers then write their results to files too; from memory they return only 40 records a second
    path = Path(job.scratch, "chunk.arrow")
    table = _arrow_table(job, rows)
    with new_stream(path, table.schema) as file:
        file.write_table(table)
    dataset = NestedDataset(Dataset.from_file(str(path)))
    return _output_rows(job, dataset.process([operator], open_monitor=False).to_list())


def _run_on_ray(job: Job, operator: Any, rows: list[Row]) -> list[Row]:
    """Run an operator over rows on Ray. Returns its output rows."""
    _start_ray(job)
    import ray
    from data_juicer.core.data.ray_dataset import RayDataset
    from jsonargparse import Namespace

    table = _arrow_table(job, rows)
    size = min(BATCH, -(-len(rows) // job.processes))
    slices = [table.slice(first, size) for first in range(0, len(rows), size)]
    dataset = RayDataset(ray.data.from_arrow(slices), cfg=Namespace(auto_op_parallelism=False))
    done = dataset.process([operator]).data
    return _output_rows(job, [row for part in ray.get(done.to_arrow_refs()) for row in part.to_pylist()])


def _ray_options(job: Job) -> dict[str, Any]:
    """Return the arguments of `ray.init`: none if RAY_ADDRESS is set, else those that start a Ray on this machine
    only."""
    if os.environ.get("RAY_ADDRESS"):
        return {}
    return {
        "address": "local",
        "num_cpus": job.processes,
        "include_dashboard": False,
        "object_store_memory": 512 * 2**20,  # texts and paths of a chunk
        "_temp_dir": job.scratch,
        "_node_ip_address": "127.0.0.1",
    }


def _start_ray(job: Job) -> None:
    """Start Ray, or connect to the one at RAY_ADDRESS. Does nothing if that is done already."""
    import ray

    if ray.is_initialized():
        return
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # it logs two lines per chunk
    ray.init(**_ray_options(job), log_to_driver=False, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False


def _arrow_table(job: Job, rows: list[Row]) -> Any:
    """Return the rows as an Arrow table, with absolute paths of pictures and without `original_id`."""
    import pyarrow as pa

    columns: dict[str, Any] = {
        "id": pa.array([row["id"] for row in rows], pa.string()),
        "text": pa.array([row["text"] for row in rows], pa.string()),
        "images": pa.array([[str(Path(job.data, p)) for p in row["images"]] for row in rows], pa.list_(pa.string())),
    }
    others = sorted({key for row in rows for key in row} - {*columns, "original_id"})
    return pa.table({**columns, **{key: pa.array([row.get(key) for row in rows]) for key in others}})


def _output_rows(job: Job, samples: list[dict[str, Any]]) -> list[Row]:
    """Return an operator's output as rows, without statistics, hashes and empty fields, and with pictures relative to
    the data folder."""
    rows = []
    for sample in samples:
        row = {key: value for key, value in sample.items() if not key.startswith("__dj__") and value is not None}
        row["images"] = [os.path.relpath(path, job.data) for path in sample["images"] or []]
        if sample.get(META):
            row[META] = sample[META]
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
