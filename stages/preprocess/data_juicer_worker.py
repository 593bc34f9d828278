"""The process that Data-Juicer runs in: `python -m stages.preprocess.data_juicer_worker <job.json>`.

It does the operators one after the other, a chunk of records at a time, and saves every chunk:

<work>/read.jsonl           the records as they were read: id, text, images
<work>/NN/CCCCCC.jsonl      operator NN (from 1; 00 looks at the pictures), chunk C: a line of counts, then its records
<work>/NN.jsonl, NN.json    the same once the operator is done; the records of the operator before it are then deleted

Operators that compare records (deduplicators, selectors) get all of them as one chunk; on Ray, too, they run in
processes of this machine, unless they know Ray themselves.

The same records give the same result, in whatever chunks and processes. Captions are sampled, and so drawn for each
record by its id; on a card records that are captioned together share a draw, and a card's captions on Ray have no seed.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.contract.errors import DataError, Exit, UsageError
from stages.contract.files import read_json, read_jsonl, remove, write_json, write_jsonl
from stages.contract.stop import forks_die_with_parents

Row = dict[str, Any]
"""`id`, `text`, `images` (relative to the data folder), `original_id` of an added one, and what operators put there."""

BATCH = 100
"""Records that an operator without weights gets at once."""

HOPELESS = 10
"""Records failing one after the other, with none done yet, before an operator is given up."""

META = "__dj__meta__"
"""Where operators leave tags. All else that begins so (statistics, hashes) is of one operator only."""


@dataclass
class Job:
    """See `data_juicer._run`, which writes it."""

    operators: list[tuple[str, dict[str, Any]]]
    executor: str
    workers: int | None
    cpus: int
    chunk_size: int
    seed: int
    data: str
    work: str
    scratch: str
    reports: int

    @property
    def processes(self) -> int:
        return self.workers or self.cpus

    def report(self, **fields: Any) -> None:
        os.write(self.reports, (json.dumps(fields) + "\n").encode())


Step = Callable[[list[Row]], list[Row]]
"""Does a chunk: the rows that come out of it, those of one record together. Raises anything for a row it cannot do."""


def main() -> None:
    job = Job(**read_json(Path(sys.argv[1])))
    forks_die_with_parents()  # operators' workers, and Ray
    try:
        _refuse_to_install()
        operators = _load(job)
        rows = _pictures(job)
        for number, operator in enumerate(operators, start=1):
            rows = _operator(job, number, operator, rows)
    except (UsageError, DataError) as error:
        traceback.print_exc()
        job.report(error="usage" if isinstance(error, UsageError) else "data", text=str(error))
        sys.exit(error.exit_code)
    sys.exit(Exit.DONE)


# -- steps, their chunks and what they save ------------------------------------------------------------------------


def _pictures(job: Job) -> list[Row]:
    """The records whose pictures can be read; Data-Juicer itself would drop a whole batch for one that cannot."""
    rows = read_jsonl(Path(job.work, "read.jsonl")) if not _done(job, 0) else []
    with multiprocessing.Pool(job.processes) as pool:
        return _step(job, 0, "look at pictures", rows, job.chunk_size, functools.partial(_with_pictures, job, pool))


def _with_pictures(job: Job, pool: Any, rows: list[Row], problems: list[Row]) -> list[Row]:
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
    """What is wrong with a picture; empty for nothing."""
    from PIL import Image, ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = False  # Data-Juicer sets it
    try:
        with Image.open(path) as picture:
            picture.load()
    except Exception as error:  # noqa: BLE001 - decoders raise anything
        return str(error).replace(path, Path(path).name)[:200] or type(error).__name__
    return ""


def _operator(job: Job, number: int, operator: Any, rows: list[Row]) -> list[Row]:
    from data_juicer.ops.base_op import Filter, Mapper

    run = functools.partial(_run_on_ray if _on_ray(job, operator) else _run_here, job, operator)
    if isinstance(operator, Mapper | Filter):
        name = f"{number}/{len(job.operators)} {operator._name}"
        return _step(job, number, name, rows, job.chunk_size, _Patient(run, operator._name))
    name = f"{number}/{len(job.operators)} {operator._name}"

    def whole(rows: list[Row], _problems: list[Row]) -> list[Row]:
        try:
            return run(rows)
        except Exception as error:
            raise DataError(f"{operator._name} fails: {_words(error)}") from error

    return _step(job, number, name, rows, max(len(rows), 1), whole)


class _Patient:
    """Does a chunk, and where that fails the halves of it, down to the records at fault."""

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
            if self._failed >= HOPELESS and not self._one_done:
                raise DataError(f"{self._name} fails on every record: {_words(error)}") from error
            problems.append(_problem(rows[0], f"{self._name} failed", _words(error)))
            return []
        self._one_done = True
        return done


def _step(
    job: Job, number: int, name: str, rows: list[Row], size: int, work: Callable[[list[Row], list[Row]], list[Row]]
) -> list[Row]:
    """Do the chunks of a step that are not saved yet; returns its rows."""
    whole = Path(job.work, f"{number:02}.jsonl")
    if _done(job, number):
        return read_jsonl(whole) if whole.exists() else []
    folder = whole.with_suffix("")
    total: Counter[str] = Counter()
    problems: list[Row] = []
    every: list[Row] = []
    for first in range(0, len(rows), size):
        path = folder / f"{first // size:06}.jsonl"
        if not path.exists():
            write_jsonl(path, _chunk(number, rows[first : first + size], work))
        head, *out = read_jsonl(path)
        problems += head.pop("problems")
        total.update(head)
        every += out
        job.report(activity=name, step=min(first + size, len(rows)), total=len(rows))
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


def _done(job: Job, number: int) -> bool:
    return Path(job.work, f"{number:02}.json").exists()


def _chunk(number: int, rows: list[Row], work: Callable[[list[Row], list[Row]], list[Row]]) -> list[Row]:
    """A chunk's counts, then its rows in the order of the input. Rows of one id but the first get ids of their own."""
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


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


# -- operators -----------------------------------------------------------------------------------------------------


def _refuse_to_install() -> None:
    """Data-Juicer installs packages and fetches weights when an operator turns out to need them. Not here."""
    from data_juicer.utils import model_utils
    from data_juicer.utils.lazy_loader import LazyLoader
    from loguru import logger

    logger.remove()  # of what it tells per chunk, only warnings are of use
    logger.add(sys.stderr, level="WARNING")

    def install(package: str, _arguments: Any = None) -> None:
        raise ImportError(f"it needs the package {package}, which is not installed; nothing is installed at run time")

    def fetch(name: str, **_: Any) -> None:
        raise FileNotFoundError(f"it needs {name}, which is not here; nothing is fetched at run time")

    LazyLoader._install_package = staticmethod(install)
    model_utils.check_model = fetch


def _load(job: Job) -> list[Any]:
    """The operators. Raises UsageError, with the place in the recipe, for one that cannot be had."""
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
            raise UsageError(f"{where}.{name}: {_words(error)}") from error
        if isinstance(operator, base_op.Mapper):
            operator.process = _prepared(operator.process, f"{job.seed} {number}")
        loaded.append(operator)
    if any(operator._accelerator == "cuda" for operator in loaded):
        import torch  # noqa: F401 - once here, not in each of the workers that are forked for each chunk
        import transformers  # noqa: F401
    else:
        base_op.free_models = lambda: None  # loads torch, to find that no model was loaded
    return loaded


def _refuse_unusable(job: Job, kind: Any, where: str, given: dict[str, Any]) -> None:
    from data_juicer.core.preflight import PipelineConfigError, pre_instantiation_check
    from data_juicer.ops.base_op import Deduplicator, Filter, Mapper, Selector

    if not issubclass(kind, Mapper | Filter | Deduplicator | Selector):
        raise UsageError(f"{where}: not an operator from records to records (a mapper, filter, deduplicator, selector)")
    if job.executor not in kind._supported_exec_modes and "default" not in kind._supported_exec_modes:
        raise UsageError(f"{where}: runs with `executor: {kind._supported_exec_modes[0]}` only")
    try:
        pre_instantiation_check([{where.rpartition(".")[2]: given}])
    except PipelineConfigError as error:
        raise UsageError(f"{where}: {'; '.join(str(one) for one in error.errors)}") from error
    for key, parameter in inspect.signature(kind.__init__).parameters.items():
        if key in given or not isinstance(parameter.default, str):
            continue
        if key.startswith("hf_"):
            raise UsageError(
                f"{where}: say where its weights are: {key}, a folder relative to the model mount (by itself it would"
                f" fetch {parameter.default})"
            )
        if key.startswith("api_model"):
            raise UsageError(f"{where}: it asks a model over the network, which no stage does")
        if key in ("flagged_words_dir", "stopwords_dir"):
            raise UsageError(
                f"{where}: say where its words are: {key}, a folder relative to data.path with"
                f" {key.removesuffix('_dir')}.json, a list of words by language"
            )


def _with_defaults(job: Job, kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Parameters with what the recipe leaves open: processes, and records at once."""
    from data_juicer.utils.resource_utils import is_cuda_available

    weights = kind._accelerator == "cuda"
    on_card = weights and given.get("accelerator") != "cpu" and is_cuda_available()
    found = {"num_proc": job.processes, **given}
    if job.executor != "ray" and job.processes == 1 and not on_card:
        found = {"auto_op_parallelism": False, **found, "num_proc": given.get("num_proc")}  # in this very process
    if job.executor == "ray":
        found["auto_op_parallelism"] = False
        if on_card:
            found = {"num_gpus": 1, **found}
    if not on_card:
        # with weights one by one: what is drawn for a record then depends on it alone, and a CPU gains nothing
        found = {"batch_size": 1 if weights else BATCH, **found}
    return found


def _prepared(function: Any, seed: str) -> Any:
    """A mapper's work, drawing the same for the same records in whatever process (captions are sampled)."""

    @functools.wraps(function)  # Data-Juicer looks through __wrapped__ for the operator
    def prepared(samples: Any, *arguments: Any, **named: Any) -> Any:
        import numpy as np

        first = samples["id"][0] if not isinstance(samples["id"], str) else samples["id"]
        number = zlib.crc32(f"{seed} {first}".encode())
        random.seed(number)
        np.random.seed(number)
        if "torch" in sys.modules:
            sys.modules["torch"].manual_seed(number)
        _keep_picture_token()
        return function(samples, *arguments, **named)

    return prepared


def _keep_picture_token() -> None:
    """Data-Juicer gives every BLIP-2 the picture token of those on OPT, 50265: outside of Flan-T5's vocabulary, and so
    an IndexError with the transformers of today. Have each keep its own."""
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


def _on_ray(job: Job, operator: Any) -> bool:
    """Whether Ray does it. Operators that compare all records, and know no Ray, run in processes beside it."""
    return job.executor == "ray" and "ray" in operator._supported_exec_modes


def _run_here(job: Job, operator: Any, rows: list[Row]) -> list[Row]:
    from data_juicer.core.data import NestedDataset
    from datasets import Dataset, disable_caching
    from pyarrow.ipc import new_stream

    disable_caching()
    # by way of files, in which workers leave what they make: from memory, they hand it back at 40 records a second
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
    """For `ray.init`: a Ray of this machine that opens nothing to others, or that of RAY_ADDRESS."""
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
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # two lines for each chunk
    ray.init(**_ray_options(job), log_to_driver=False, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False


def _table(job: Job, rows: list[Row]) -> Any:
    """Rows as an Arrow table, pictures by whole paths."""
    import pyarrow as pa

    columns: dict[str, Any] = {
        "id": pa.array([row["id"] for row in rows], pa.string()),
        "text": pa.array([row["text"] for row in rows], pa.string()),
        "images": pa.array([[str(Path(job.data, p)) for p in row["images"]] for row in rows], pa.list_(pa.string())),
    }
    others = sorted({key for row in rows for key in row} - {*columns, "original_id"})
    return pa.table({**columns, **{key: pa.array([row.get(key) for row in rows]) for key in others}})


def _rows(job: Job, samples: list[dict[str, Any]]) -> list[Row]:
    """What an operator left, without its statistics and hashes, pictures relative to the data folder again."""
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
