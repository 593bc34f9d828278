"""The process that Data-Juicer runs in: `python -m stages.preprocess.data_juicer_worker <job.json>`.

It runs the operators one after the other, a chunk of records at a time, and saves every chunk:

<work>/read.jsonl           the records as read: id, text, images
<work>/NN/CCCCCC.jsonl      operator NN (from 1; 00 checks the pictures), chunk C: a line of counts, then its records
<work>/NN.jsonl, NN.json    records and counts of a finished operator; the records of the operator before are deleted

Operators that compare records (deduplicators, selectors) get all of them as one chunk. With `executor: ray` they still
run in local processes, unless they support Ray.

The result does not depend on chunks and processes. Captions are sampled: the id of the record seeds them. On a GPU,
records that are captioned together share one seed; captions on a GPU with Ray have no seed.
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

from stages.contract.errors import DataError, Exit, UsageError
from stages.contract.files import read_json, read_jsonl, remove, write_json, write_jsonl
from stages.contract.stop import make_forks_die_with_parents

Row = dict[str, Any]
"""`id`, `text`, `images` (relative to the data folder), `original_id` of an added record, and operators' own fields."""

BATCH = 100
"""Records that an operator without weights gets at once."""

FAILURES_BEFORE_GIVING_UP = 10
"""Failed records after which an operator that has not done a single one is given up."""

META = "__dj__meta__"
"""Field for operators' tags. Other fields that begin with `__dj__` (statistics, hashes) serve one operator only."""


@dataclass
class Job:
    """The content of job.json, which `data_juicer._run` writes."""

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
        return self.workers or self.cpus

    def send(self, **fields: Any) -> None:
        """Send the stage a message."""
        os.write(self.channel, (json.dumps(fields) + "\n").encode())


Step = Callable[[list[Row]], list[Row]]
"""Processes a chunk. Returns its rows, those of one record together. Raises any exception for a row that it cannot
process."""


def main() -> None:
    job = Job(**read_json(Path(sys.argv[1])))
    make_forks_die_with_parents()  # operators' workers, and Ray
    try:
        _refuse_to_install()
        operators = _load(job)
        rows = _check_pictures(job)
        for number, operator in enumerate(operators, start=1):
            rows = _run_operator(job, number, operator, rows)
    except (UsageError, DataError) as error:
        traceback.print_exc()
        job.send(error="usage" if isinstance(error, UsageError) else "data", text=str(error))
        sys.exit(error.exit_code)
    sys.exit(Exit.DONE)


# -- steps, their chunks and their files ---------------------------------------------------------------------------


def _check_pictures(job: Job) -> list[Row]:
    """Return the records whose pictures can be read. For an unreadable one, Data-Juicer would drop the whole batch."""
    rows = read_jsonl(Path(job.work, "read.jsonl")) if not _is_done(job, 0) else []
    with multiprocessing.Pool(job.processes) as pool:
        return _run_step(job, 0, "check pictures", rows, job.chunk_size, functools.partial(_drop_damaged, job, pool))


def _drop_damaged(job: Job, pool: Any, rows: list[Row], problems: list[Row]) -> list[Row]:
    paths = sorted({image for row in rows for image in row["images"]})
    damage = dict(zip(paths, pool.map(_damage, [os.path.join(job.data, path) for path in paths]), strict=True))  # noqa: PTH118
    good = []
    for row in rows:
        broken = [image for image in row["images"] if damage[image]]
        if broken:
            problems.append(_problem(row, "picture cannot be read", f"{broken[0]}: {damage[broken[0]]}"))
        else:
            good.append(row)
    return good


def _damage(path: str) -> str:
    """Say why a picture cannot be read; empty if it can."""
    from PIL import Image, ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = False  # Data-Juicer sets it
    try:
        with Image.open(path) as picture:
            picture.load()
    except Exception as error:  # noqa: BLE001 - decoders raise anything
        return str(error).replace(path, Path(path).name)[:200] or type(error).__name__
    return ""


def _run_operator(job: Job, number: int, operator: Any, rows: list[Row]) -> list[Row]:
    from data_juicer.ops.base_op import Filter, Mapper

    run = functools.partial(_run_on_ray if _supports_ray(job, operator) else _run_here, job, operator)
    name = f"{number}/{len(job.operators)} {operator._name}"
    if isinstance(operator, Mapper | Filter):
        return _run_step(job, number, name, rows, job.chunk_size, _Bisecting(run, operator._name))

    def whole(rows: list[Row], _problems: list[Row]) -> list[Row]:
        try:
            return run(rows)
        except Exception as error:
            raise DataError(f"{operator._name} fails: {_error_text(error)}") from error

    return _run_step(job, number, name, rows, max(len(rows), 1), whole)


class _Bisecting:
    """Processes a chunk. If that fails, processes its halves, and so on down to the records at fault."""

    def __init__(self, run: Step, name: str) -> None:
        self._run, self._name = run, name
        self._one_done, self._failed = False, 0

    def __call__(self, rows: list[Row], problems: list[Row]) -> list[Row]:
        try:
            done = self._run(rows)
        except Exception as error:
            if len(rows) > 1:
                middle = len(rows) // 2
                return self(rows[:middle], problems) + self(rows[middle:], problems)
            traceback.print_exc()
            self._failed += 1
            if self._failed >= FAILURES_BEFORE_GIVING_UP and not self._one_done:
                raise DataError(f"{self._name} fails on every record: {_error_text(error)}") from error
            problems.append(_problem(rows[0], f"{self._name} failed", _error_text(error)))
            return []
        self._one_done = True
        return done


def _run_step(
    job: Job, number: int, name: str, rows: list[Row], size: int, work: Callable[[list[Row], list[Row]], list[Row]]
) -> list[Row]:
    """Process the chunks of a step that are not saved yet. Returns all its rows."""
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
    return Path(job.work, f"{number:02}.json").exists()


def _process_chunk(number: int, rows: list[Row], work: Callable[[list[Row], list[Row]], list[Row]]) -> list[Row]:
    """Return a chunk's counts, then its rows in the order of the input. Of rows with one id, all but the first get an
    id of their own."""
    began = time.monotonic()
    problems: list[Row] = []
    out = work(rows, problems)
    seconds = time.monotonic() - began
    place = {row["id"]: index for index, row in enumerate(rows)}
    out.sort(key=lambda row: place[row["id"]])  # stable: rows of one record stay in the operator's order
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
    return {"id": row.get("original_id", row["id"]), "reason": reason, "detail": detail}


def _error_text(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


# -- operators -----------------------------------------------------------------------------------------------------


def _refuse_to_install() -> None:
    """Keep Data-Juicer from installing packages and downloading weights that an operator lacks."""
    from data_juicer.utils import model_utils
    from data_juicer.utils.lazy_loader import LazyLoader
    from loguru import logger

    logger.remove()  # it logs several lines per chunk
    logger.add(sys.stderr, level="WARNING")

    def install(package: str, _arguments: Any = None) -> None:
        raise ImportError(f"needs the package {package}, which is not installed; Lorry installs nothing at run time")

    def fetch(name: str, **_: Any) -> None:
        raise FileNotFoundError(f"needs {name}, which does not exist; Lorry downloads nothing at run time")

    LazyLoader._install_package = staticmethod(install)
    model_utils.check_model = fetch


def _load(job: Job) -> list[Any]:
    """Load the operators. Raises UsageError, with the place in the recipe, for one that cannot be loaded."""
    from data_juicer.ops import OPERATORS, base_op

    loaded = []
    for number, (name, given) in enumerate(job.operators):
        where = f"preprocess.data_juicer.process[{number}]"
        if name not in OPERATORS.modules:
            near = difflib.get_close_matches(name, OPERATORS.modules, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "see Data-Juicer's list of operators"
            raise UsageError(f"{where}: Data-Juicer has no operator {name!r}; {hint}")
        kind = OPERATORS.modules[name]
        _refuse_unusable(job, kind, f"{where}.{name}", given)
        try:
            operator = kind(**_with_defaults(job, kind, given))
        except Exception as error:
            raise UsageError(f"{where}.{name}: {_error_text(error)}") from error
        if isinstance(operator, base_op.Mapper):
            operator.process = _seed_each_call(operator.process, f"{job.seed} {number}")
        loaded.append(operator)
    if any(operator._accelerator == "cuda" for operator in loaded):
        _import_models(job)
    else:
        base_op.free_models = lambda: None  # it would load torch, only to find no model to free
    return loaded


def _import_models(job: Job) -> None:
    """Import torch and the classes of the operators' models once, not in each worker that is forked for each chunk:
    transformers imports its modules on first use."""
    import torch  # noqa: F401
    import transformers

    for _, given in job.operators:
        for folder in (value for key, value in given.items() if key.startswith("hf_")):
            for name in (read_json(Path(folder, "config.json")) or {}).get("architectures") or []:
                with suppress(ImportError, RuntimeError):  # the operator itself says what it lacks
                    getattr(transformers, name, None)


def _refuse_unusable(job: Job, kind: Any, where: str, given: dict[str, Any]) -> None:
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
        raise UsageError(f"{where}: {'; '.join(str(one) for one in error.errors)}") from error
    for key, parameter in inspect.signature(kind.__init__).parameters.items():
        if key in given or not isinstance(parameter.default, str):
            continue
        if key.startswith("hf_"):
            raise UsageError(
                f"{where}: no {key}; set it to the folder of the weights, relative to the model mount (Lorry does not"
                f" download the default, {parameter.default})"
            )
        if key.startswith("api_model"):
            raise UsageError(f"{where}: asks a model over the network, and no stage uses the network; remove it")
        if key in ("flagged_words_dir", "stopwords_dir"):
            raise UsageError(
                f"{where}: no {key}; set it to a folder, relative to data.path, with {key.removesuffix('_dir')}.json,"
                " a list of words per language"
            )


def _with_defaults(job: Job, kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe's parameters, completed by the number of processes and of records at once."""
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
        # with weights one record at a time: its seed then depends on it alone, and a CPU gains nothing from batches
        found = {"batch_size": 1 if weights else BATCH, **found}
    return found


def _seed_each_call(function: Any, seed: str) -> Any:
    """Wrap a mapper's function so that the first record seeds each call: captions are sampled, and must not depend on
    the process."""

    @functools.wraps(function)  # Data-Juicer finds the operator through __wrapped__
    def call_with_seed(samples: Any, *arguments: Any, **named: Any) -> Any:
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
    """Let each BLIP-2 keep its own picture token. Data-Juicer gives all of them the token of those on OPT, 50265, which
    is outside Flan-T5's vocabulary and raises IndexError in transformers 5."""
    captioning: Any = sys.modules.get("data_juicer.ops.mapper.image_captioning_mapper")
    if captioning is None or hasattr(captioning.get_model, "__wrapped__"):
        return

    @functools.wraps(captioning.get_model)
    def get_model(*arguments: Any, **named: Any) -> Any:
        model, processor = get_model.__wrapped__(*arguments, **named)
        own = model.config.image_token_index
        if own is not None:
            kind = type(model.config)
            if not kind.__name__.startswith("Fixed"):
                fixed = property(lambda _: own, lambda *_: None)
                model.config.__class__ = type(f"Fixed{kind.__name__}", (kind,), {"image_token_index": fixed})
        return model, processor

    captioning.get_model = get_model


# -- running them --------------------------------------------------------------------------------------------------


def _supports_ray(job: Job, operator: Any) -> bool:
    """Whether the operator runs on Ray. Operators that compare all records mostly do not, and run in processes."""
    return job.executor == "ray" and "ray" in operator._supported_exec_modes


def _run_here(job: Job, operator: Any, rows: list[Row]) -> list[Row]:
    from data_juicer.core.data import NestedDataset
    from datasets import Dataset, disable_caching
    from pyarrow.ipc import new_stream

    disable_caching()
    # through a file: workers then write their results to files, too; from memory they return 40 records a second
    path = Path(job.scratch, "chunk.arrow")
    table = _table(job, rows)
    with new_stream(path, table.schema) as file:
        file.write_table(table)
    dataset = NestedDataset(Dataset.from_file(str(path)))
    return _rows(job, dataset.process([operator], open_monitor=False).to_list())


def _run_on_ray(job: Job, operator: Any, rows: list[Row]) -> list[Row]:
    _start_ray(job)
    import ray
    from data_juicer.core.data.ray_dataset import RayDataset
    from jsonargparse import Namespace

    table = _table(job, rows)
    size = min(BATCH, -(-len(rows) // job.processes))
    slices = [table.slice(first, size) for first in range(0, len(rows), size)]
    dataset = RayDataset(ray.data.from_arrow(slices), cfg=Namespace(auto_op_parallelism=False))
    done = dataset.process([operator]).data
    return _rows(job, [row for part in ray.get(done.to_arrow_refs()) for row in part.to_pylist()])


def _ray_options(job: Job) -> dict[str, Any]:
    """Arguments of `ray.init`: a local Ray that opens no port to other machines, or the one at RAY_ADDRESS."""
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
    import ray

    if ray.is_initialized():
        return
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # it logs two lines per chunk
    ray.init(**_ray_options(job), log_to_driver=False, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False


def _table(job: Job, rows: list[Row]) -> Any:
    """Rows as an Arrow table, pictures by absolute paths."""
    import pyarrow as pa

    columns: dict[str, Any] = {
        "id": pa.array([row["id"] for row in rows], pa.string()),
        "text": pa.array([row["text"] for row in rows], pa.string()),
        "images": pa.array([[str(Path(job.data, p)) for p in row["images"]] for row in rows], pa.list_(pa.string())),
    }
    others = sorted({key for row in rows for key in row} - {*columns, "original_id"})
    return pa.table({**columns, **{key: pa.array([row.get(key) for row in rows]) for key in others}})


def _rows(job: Job, samples: list[dict[str, Any]]) -> list[Row]:
    """An operator's output without statistics and hashes, pictures relative to the data folder again."""
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
