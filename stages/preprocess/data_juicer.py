"""Filter and rewrite records with the recipe's Data-Juicer operators (arXiv:2309.02033), offline.

Data-Juicer runs in a child process (`data_juicer_worker.py`), because its import changes global state and an operator
may crash. The child saves every chunk of every operator, so a kill loses at most one chunk.
"""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from stages.contract.errors import DataError, DoesNotFitError, Exit, InterruptedRunError, LorryError, UsageError
from stages.contract.files import read_json, read_jsonl, remove, write_json, write_jsonl
from stages.contract.recipe import DataJuicer
from stages.contract.run import Run
from stages.contract.stage import Stage
from stages.contract.stop import die_with_parent
from stages.models.remote_code import names_python_files
from stages.tasks.common.json_lines import BadRecordError, is_given, lines_in, object_in, text_of
from stages.tasks.common.skips import Skips

WORKER = "stages.preprocess.data_juicer_worker"
IMAGE = "<__dj__image>"
"""Marks the place of a picture in a text."""

WORDS = ("flagged_words_dir", "stopwords_dir")
"""Parameters that name a folder of word lists: JSON files, each with one list per language."""

Records = dict[str, tuple[str, dict[str, Any]]]
"""Records by id, each with its file and line."""


def run_operators(stage: Stage, records: Path) -> Path:
    """Run the recipe's operators over a JSON Lines file of records. Returns the file of the records that they keep.

    A record has `id`, `text` and `images` (paths relative to the data folder); other fields are copied. The output
    keeps the order of the input. A record that an operator adds (such as a second caption) follows its source record.
    It has a new id, and the source's id as `original_id`.

    Writes into <run>/preprocess/records: kept.jsonl, operators.json with each operator's seconds and the numbers of
    records that it read, kept, dropped, changed, added and failed on, and failed.jsonl. Skips unusable records and
    those that an operator fails on. Raises UsageError for an operator, a parameter or weights that do not exist,
    DataError if no record is usable or left, or an operator fails on the data, InterruptedRunError if the stage is
    asked to stop, and LorryError if the child process fails without a message.
    """
    settings = stage.run.recipe.preprocess.data_juicer
    assert settings is not None
    _refuse_missing_packages(settings)
    operators = [
        _operator_with_absolute_paths(stage.run, name, given, number)
        for number, (name, given) in enumerate(settings.operators())
    ]
    known = _usable_records(records, stage)
    kept, done, failed = (stage.path("records", name) for name in ("kept.jsonl", "operators.json", "failed.jsonl"))
    if not done.exists():  # written last: if it exists, an earlier start has written the other two
        work = stage.path("records", "work")
        _run_child(stage, settings, operators, known, work)
        results = [read_json(work / f"{number:02}.json") for number in range(len(operators) + 1)]
        rows = read_jsonl(work / f"{len(operators):02}.jsonl")
        write_jsonl(kept, (_kept_record(row, known) for row in rows))
        write_jsonl(failed, (one for result in results for one in result.pop("problems")))
        write_json(done, results[1:])
        remove(work)
    for one in read_jsonl(failed):
        stage.skip(known[one["id"]][0], one["reason"], one["detail"])
    _report_counts(stage, read_json(done), len(known), kept)
    return kept


def _report_counts(stage: Stage, operators: list[dict[str, Any]], read: int, kept: Path) -> None:
    """Print each operator's numbers of records. Add the numbers read and kept, and the output files, to the stage.
    Raises DataError if no record is left.

    `operators` is the content of operators.json, `read` the number of records before the first, `kept` the output file.
    """
    left = operators[-1]["kept"]
    for one in operators:
        stage.events.say(
            f"{one['operator']}: {one['read']} read, {one['kept']} kept, {one['dropped']} dropped,"
            f" {one['changed']} changed" + (f", {one['added']} added" if one["added"] else "")
        )
    if not left:
        raise DataError(
            f"{kept}: Data-Juicer kept none of {read} records; relax the operator that dropped them"
            f" ({kept.with_name('operators.json')})"
        )
    stage.counts["records"] = read
    stage.counts["records kept"] = left
    stage.outputs["records/kept.jsonl"] = left
    stage.outputs["records/operators.json"] = None


# -- before any work -------------------------------------------------------------------------------------------------


def _refuse_missing_packages(settings: DataJuicer) -> None:
    """Raise UsageError if Data-Juicer, or Ray for its executor, is not installed."""
    for package, what, needed in (
        ("data_juicer", "Data-Juicer", True),
        ("ray", "Ray, for `executor: ray`,", settings.executor == "ray"),
    ):
        if needed and importlib.util.find_spec(package) is None:
            raise UsageError(
                f"preprocess.data_juicer: {what} is not installed here; run `make setup`, or use a preprocess image"
            )


def _refuse_python_files(weights: Path, where: str) -> None:
    """Raise UsageError if weights name Python files: several operators run them without being asked to."""
    if names_python_files(weights):
        raise UsageError(
            f"{where}: {weights} names Python files (auto_map), which the operator may run; remove auto_map from its"
            " JSON files or, if you trust them, set the operator's trust_remote_code to true"
        )


def _operator_with_absolute_paths(
    run: Run, name: str, given: dict[str, Any], number: int
) -> tuple[str, dict[str, Any]]:
    """Return an operator's name and parameters, with the paths of weights and word lists made absolute.

    `number` is its place in the recipe, from 0. Raises UsageError if weights or word lists do not exist.
    """
    where = f"preprocess.data_juicer.process[{number}].{name}"
    found = dict(given)
    for key, value in given.items():
        if key.startswith("hf_") and isinstance(value, str):
            folder = run.model(value, f"{where}.{key}")
            if not given.get("trust_remote_code"):
                _refuse_python_files(folder, where)
            found[key] = str(folder.absolute())
        if key in WORDS:
            folder = run.data / str(value)
            kind = key.removesuffix("_dir")
            if not any(folder.glob(f"*{kind}*.json")):
                raise UsageError(
                    f"{where}.{key}: {folder} has no {kind}.json; put one there, with a list of words per language, or"
                    " name another folder, relative to data.path"
                )
            found[key] = str(folder.absolute())
    return name, found


def _usable_records(path: Path, stage: Stage) -> Records:
    """Read the records of a file. Returns the usable ones by id, in the order of the file, and skips the others.

    Raises DataError if none is usable.
    """
    known: Records = {}
    skip = Skips(stage.skip)
    for place, line in lines_in(path):
        where = f"{path.name}:{place}"
        try:
            record = object_in(line)
            name = text_of(record, "id")
            _refuse_bad_record(record)
            if name in known:
                raise BadRecordError("duplicate id", f"{name}, as in {known[name][0]}")
        except BadRecordError as error:
            skip(where, error.reason, str(error))
            continue
        known[name] = where, record
    if not known:
        raise DataError(f"{path}: no usable record, which has `id`, `text` and `images`; {skip.why}")
    return known


def _images(record: dict[str, Any]) -> Any:
    """The record's `images` as they are, without a check; an empty list if there are none."""
    return record["images"] if is_given(record.get("images")) else []


def _refuse_bad_record(record: dict[str, Any]) -> None:
    """Raise BadRecordError for a record without text, or whose pictures are no list of paths, lie outside the data
    folder, or are fewer than the text shows."""
    text_of(record, "text")
    images = _images(record)
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise BadRecordError("images is not a list of paths", repr(images)[:100])
    for image in images:
        if PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image).parts:
            raise BadRecordError("picture outside the data folder", image)
    if record["text"].count(IMAGE) > len(images):
        raise BadRecordError("text shows more pictures than there are in images", f"{record['text'].count(IMAGE)}")


# -- the child process -----------------------------------------------------------------------------------------------


def _run_child(
    stage: Stage, settings: DataJuicer, operators: list[tuple[str, dict[str, Any]]], known: Records, work: Path
) -> None:
    """Run all operators in the child process, or resume them from the last saved chunk in `work`.

    Raises the error that the child sends, InterruptedRunError if the stage is asked to stop, and LorryError if the
    child fails without sending an error.
    """
    work.mkdir(parents=True, exist_ok=True)
    before = read_json(work / "job.json")
    if before is not None:  # an earlier start was killed
        shutil.rmtree(before["scratch"], ignore_errors=True)
    # in the system's temporary folder: Ray's sockets need short paths
    scratch = Path(tempfile.mkdtemp(prefix="lorry-"))
    reading, writing = os.pipe()
    job = {
        "operators": operators,
        "executor": settings.executor,
        "workers": settings.workers,
        "cpus": len(os.sched_getaffinity(0)),
        "chunk_size": settings.chunk_size,
        "seed": stage.run.recipe.seed,
        "data": str(stage.run.data.absolute()),
        "work": str(work.absolute()),
        "scratch": str(scratch),
        "channel": writing,
    }
    try:
        if not (work / "read.jsonl").exists():
            write_jsonl(work / "read.jsonl", _operator_rows(known))
        write_json(work / "job.json", job)
        with subprocess.Popen(
            [sys.executable, "-m", WORKER, str(work / "job.json")],
            env=_child_environment(scratch),
            # the child holds the stage's lock while it lives
            pass_fds=[writing, stage.lock] if stage.lock >= 0 else [writing],
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - no other thread runs here
        ) as child:
            os.close(writing)
            stage.stop.pass_on_to(child)
            error = _follow(stage, reading)
            code = child.wait()
            stage.stop.pass_on_to(None)
            with suppress(ProcessLookupError):  # processes of Ray that have not ended yet
                os.killpg(child.pid, signal.SIGKILL)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    stage.stop.check()
    if error is not None:
        raise error
    if code != Exit.DONE:
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else "failed"
        raise LorryError(
            f"preprocess.data_juicer: Data-Juicer {ended}; run the same command again to resume from the last chunk;"
            f" log: {stage.path('log.txt')}"
        )


def _operator_rows(known: Records) -> Iterable[dict[str, Any]]:
    """Yield each record with only the fields that operators read: id, text, images."""
    for name, (_, record) in known.items():
        yield {"id": name, "text": record["text"], "images": _images(record)}


def _follow(stage: Stage, reading: int) -> LorryError | None:
    """Return the error that the child sent; None if it sent none. Prints the child's messages and progress until the
    child closes the channel."""
    kinds = {int(kind.exit_code): kind for kind in (UsageError, DataError, DoesNotFitError, InterruptedRunError)}
    error = None
    with os.fdopen(reading, encoding="utf-8") as channel:
        for line in channel:
            message = json.loads(line)
            if "error" in message:
                error = kinds[message["error"]](message["text"])
            elif "say" in message:
                stage.events.say(message["say"])
            else:
                stage.events.report_progress(message["activity"], message["step"], message["total"], "records")
    return error


def _child_environment(scratch: Path) -> dict[str, str]:
    """Return the child's environment, which keeps Data-Juicer and its libraries off the network and the home folder."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    return {
        **given,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_CACHE": str(scratch / "datasets"),
        "DATA_JUICER_CACHE_HOME": str(scratch / "data_juicer"),
        "TMPDIR": str(scratch),
        # else Data-Juicer installs packages that an operator lacks
        "PIP_NO_INDEX": "1",
        "UV_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(scratch),
        # else Ray writes one into the home folder
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN", secrets.token_hex(32)),
        "TOKENIZERS_PARALLELISM": "false",
        # one thread for each process: there are as many processes as CPUs
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def _kept_record(row: dict[str, Any], known: Records) -> dict[str, Any]:
    """Return an output record: the fields of the input record, with those that operators changed or added. A record
    that an operator added has its own id, and the input record's as `original_id`."""
    origin = row.pop("original_id", row["id"])
    record = known[origin][1]
    if row["id"] != origin:
        return {**record, **row, "original_id": record["id"]}
    return {**record, **row, "id": record["id"]}
