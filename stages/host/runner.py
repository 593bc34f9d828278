"""Runs a stage's work: locks its folder, skips or resumes it, handles its end, and writes the manifest."""

import importlib.metadata
import os
import platform
import resource
import subprocess
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stages.contract.errors import DataError, Exit, InterruptedRunError, LorryError, UsageError
from stages.contract.events import Events, redirect_output, say, write_refusal
from stages.contract.files import (
    FileHashes,
    open_atomically,
    read_json,
    remove,
    write_json,
)
from stages.contract.machine_errors import machine_error
from stages.contract.part import Node, Part, Shard
from stages.contract.recipe import dump_recipe
from stages.contract.run import CONTRACT_VERSION, REUSABLE, Run, describe_output, lock_stage_folder
from stages.contract.stage import Stage
from stages.contract.stop import StopRequest
from stages.contract.superseded import SUPERSEDED, put_checkpoints_back, set_all_aside, set_checkpoints_aside
from stages.engines import ENGINES
from stages.hardware.probe import probe

DEPENDENCIES = (
    *("torch", "transformers", "peft", "ms-swift"),
    *(name for kind in ENGINES for name in kind.distributions),
    *("sentence-transformers", "pymupdf", "py-data-juicer", "ray"),
)
"""Libraries whose versions the manifest records, if they are installed."""

SAVES_FIRST = {"train": "saves a checkpoint after this step"}
"""What a stage does before a stop, where a line can say more than that it saves what is in progress."""


def run_stage(
    run: Run,
    name: str,
    work: Callable[[Stage], None],
    force: bool = False,
    part: Part = None,
    check: Callable[[], None] | None = None,
) -> Exit:
    """Run one stage of a run, or a part of it, unless it is done. Prints an error in lines; returns the exit code.

    The whole stage, on one node or several, uses the results of finished shards with the same key, unless it was
    started with `force`. `force` discards finished work, except that of an interrupted start with `force`; it is
    refused on several nodes.

    `check` raises a LorryError for mistakes that can be found before the work. It is called before anything is hashed
    if the stage has no manifest or `force` is set, else once the stage turns out not to be up to date.
    """
    stop = StopRequest()
    stop.install()
    folder = run.stage_folder(name, part)
    try:
        if isinstance(part, Node) and force:
            raise UsageError(
                f"--force on {part.count} nodes: the nodes cannot agree when to start again; delete"
                f" {run.stage_folder(name)} and start them without --force"
            )
        run.refuse_other_job()
        with lock_stage_folder(folder) as lock:
            try:
                if check is not None and (force or not (folder / "manifest.json").exists()):
                    check()
                    check = None
                return _run_with_lock(run, name, work, force, stop, lock, part, check)
            except (LorryError, OSError) as error:  # before or after the work, whose own errors are reported inside
                _log_error(folder, error)
                _write_refusal(folder, error)
                raise
    except KeyboardInterrupt:  # before the work or after it
        say(name, str(stop.error()))
        return Exit.INTERRUPTED
    except (LorryError, OSError) as error:
        explained = error if isinstance(error, LorryError) else machine_error(error)
        if explained is None:
            raise
        for line in str(explained).splitlines():
            say(name, line)
        return explained.exit_code


def write_recipe(run: Run) -> None:
    """Write the resolved recipe to `recipe.yaml` in the run folder, unless the file has the same text already."""
    text = dump_recipe(run.recipe)
    path = run.folder / "recipe.yaml"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with open_atomically(path) as file:
            file.write(text)


def _run_with_lock(
    run: Run,
    name: str,
    work: Callable[[Stage], None],
    force: bool,
    stop: StopRequest,
    lock: int,
    part: Part,
    check: Callable[[], None] | None,
) -> Exit:
    """Run a stage, or a part of it, in its locked folder. Returns the exit code.

    Errors of the work are printed. Raises the errors of `Run.inputs`, `Run.is_done` and `check` (None: no check),
    before the work starts.
    """
    folder = run.stage_folder(name, part)
    label = f"{name} {part.label}" if part else name
    helps = isinstance(part, Node) and part.rank > 0  # node 0 prepares the folder and writes results and manifest
    hashes = FileHashes(folder / ".hashes.json")
    inputs = run.inputs(name, hashes)
    key = run.key(name, inputs)
    if not force and run.is_done(name, hashes, part if isinstance(part, Shard) else None):
        (folder / "state.json").unlink(missing_ok=True)  # left by a kill just after the manifest was written
        hashes.save()
        say(label, "up to date")
        return Exit.DONE
    hashes.save()
    if check is not None:
        check()
    state: dict[str, Any] = {"starts": [_present_time()], "forced": False}
    if not helps:
        write_recipe(run)
        state = _prepare_folder(folder, key, force, REUSABLE.get(name, ()))

    with (
        redirect_output(folder / "log.txt") as (console, output),
        closing(Events(folder / "events.jsonl", label, console)) as events,
    ):
        stage = Stage(run, name, events, stop, lock, output.fileno(), part, key, state["starts"], state["forced"])
        stop.notify(console.fileno(), f"{label}: {SAVES_FIRST.get(name, 'saves what is in progress')}, then stops")
        events.emit("start", key=key, starts=len(state["starts"]))
        try:
            if not (helps or stage.shard or state["forced"]):
                _take_over_shards(stage)
            with stop.waiting(True):
                work(stage)
            if helps:
                events.say("done")
                return Exit.DONE
            stage.remove_unused_cache()
        except BaseException as error:  # noqa: BLE001 - every end of a stage is reported in its own way
            return _report_end(stage, error)
        finally:
            events.emit("end")
        hashes = FileHashes(folder / ".hashes.json")
        manifest = _manifest(stage, key, inputs, state["starts"], hashes)
        write_json(folder / "manifest.json", manifest)
        if not manifest.get("untrained"):  # else the next start resumes, with the adapters that failed
            if state["forced"]:
                remove(folder / SUPERSEDED)
            (folder / "state.json").unlink(missing_ok=True)
        hashes.save()
        skipped = f", {len(stage.skipped)} skipped" if stage.skipped else ""
        failed = f", {stage.counts['failed']} failed" if stage.counts["failed"] else ""
        empty = f", {stage.counts['empty']} empty answers" if stage.counts["empty"] else ""
        events.say(f"done in {manifest['seconds']:.0f} s{skipped}{failed}{empty}")
    return Exit.DONE


def _take_over_shards(stage: Stage) -> None:
    """Find the finished shards whose results this start uses, and add their folders, GPUs and decisions to the stage.

    Raises UsageError if another version of Lorry wrote one of them.
    """
    every = stage.run.shards(stage.name)
    if not every:
        return
    finished = stage.run.finished_shards(stage.name, stage.key, FileHashes(stage.path(".hashes.json")))
    stage.finished_shards = [stage.run.stage_folder(stage.name, shard) for shard in finished]
    ignored = ", ".join(str(shard) for shard in every if shard not in finished)
    if ignored:
        stage.events.say(f"ignores shards {ignored}, which are unfinished or have other inputs or another recipe")
    if finished:
        stage.decide("shards taken over", ", ".join(map(str, finished)), "finished, with these inputs and this recipe")
    for shard in finished:
        manifest = stage.run.manifest(stage.name, shard) or {}
        stage.gpus += manifest["gpus"]
        stage.decisions += [{**made, "why": f"{made['why']}; shard {shard}"} for made in manifest["decisions"]]


def _prepare_folder(folder: Path, key: str, force: bool, reusable: tuple[str, ...]) -> dict[str, Any]:
    """Prepare a stage's folder for a start: keep half-done work of the same key, or else delete all but `reusable`.

    With `force`, half-done work stays only if it was started with `force` too; or else `reusable` is deleted as well.
    Adapters and connectors are never deleted here: with `force` they are set aside, until the stage is done. So are the
    checkpoints of a training with other settings, without `force`; those with this key are put back. Also deletes the
    manifest and temporary files, and writes state.json. Returns the state: `key`, `forced`, and `starts`, the times of
    this start and of earlier starts of the same work.
    """
    state = read_json(folder / "state.json") or {}
    resumes = state.get("key") == key and (state["forced"] or not force)
    if not resumes and force:
        set_all_aside(folder)
    elif not resumes and "key" in state:
        set_checkpoints_aside(folder, state["key"])
    if not resumes:
        _clear_folder(folder, keep=(SUPERSEDED,) if force else reusable)
    forced = force or (resumes and state["forced"])
    if not forced:
        put_checkpoints_back(folder, key)
    starts = [*(state["starts"] if resumes else []), _present_time()]
    state = {"key": key, "forced": forced, "starts": starts}
    write_json(folder / "state.json", state)
    (folder / "manifest.json").unlink(missing_ok=True)
    for partial in folder.rglob(".*.partial"):  # left by writes that a kill interrupted
        partial.unlink()
    return state


def _report_end(stage: Stage, error: BaseException) -> Exit:
    """Print the error that ended a stage, write it to events.jsonl and its traceback to the log. Returns the exit code.

    Before an error of data or recipe, also prints the first skipped records.
    """
    if isinstance(error, KeyboardInterrupt):
        error = stage.stop.error()
    _log_error(stage.folder, error)
    explained = error if isinstance(error, LorryError) else machine_error(error)
    if explained is not None:
        _emit_stop_event(stage, explained)
        if isinstance(explained, DataError | UsageError):
            stage.show_first_skips()
        for line in str(explained).splitlines():
            stage.events.say(line)
        return explained.exit_code
    stage.events.emit("crashed", error=repr(error))
    stage.events.say(
        f"failed: {type(error).__name__}: {error}; report this bug, with the traceback in {stage.path('log.txt')}"
    )
    return Exit.CRASHED


def _log_error(folder: Path, error: BaseException) -> None:
    """Append an error with its traceback to the log of a stage's folder; ignore an OSError.

    A stop is no error: of an InterruptedRunError, only the message is appended.
    """
    text = f"{error}\n" if isinstance(error, InterruptedRunError) else "".join(traceback.format_exception(error))
    # not through standard error, which would keep the text after a failed write and fail again when it is flushed
    with suppress(OSError), (folder / "log.txt").open("a", encoding="utf-8", errors="backslashreplace") as log:
        log.write(text)


def _write_refusal(folder: Path, error: LorryError | OSError) -> None:
    """Write an error from before the work to events.jsonl, for `lorry status`, if that can be done."""
    explained = error if isinstance(error, LorryError) else machine_error(error)
    if explained is not None:
        with suppress(OSError, UnicodeError):  # the disk may be full, and the error may name a file that is not UTF-8
            write_refusal(folder / "events.jsonl", str(explained), int(explained.exit_code))


def _emit_stop_event(stage: Stage, error: LorryError) -> None:
    """Write the event that the stage stopped with this error; ignore an OSError."""
    try:
        stage.events.emit("stopped", error=str(error), exit_code=int(error.exit_code))
    except OSError:  # the disk may be full
        return


def _clear_folder(folder: Path, keep: tuple[str, ...] = ()) -> None:
    """Delete everything in a stage's folder, except for hidden files (lock, digests) and the names in `keep`.

    State and manifest go last, so that after a kill in between the next start still knows to delete the rest.
    """
    for path in sorted(folder.iterdir(), key=lambda path: path.name in ("state.json", "manifest.json")):
        if not path.name.startswith(".") and path.name not in keep:
            remove(path)


def _manifest(stage: Stage, key: str, inputs: dict[str, str], starts: list[str], hashes: FileHashes) -> dict[str, Any]:
    """The manifest of a finished stage or shard. `seconds` counts from the last of the `starts`."""
    run, machine = stage.run, probe()
    end = datetime.now(UTC)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "contract": CONTRACT_VERSION,
        "stage": stage.name,
        "status": "done",
        "key": key,
        "recipe": run.recipe.digest(),
        "inputs": inputs,
        "outputs": {
            name: describe_output(stage.folder, name, records, hashes) for name, records in stage.outputs.items()
        },
        "counts": dict(stage.counts),
        "skipped": stage.named_skips(),
        "skipped_counts": stage.skipped_counts(),
        "decisions": stage.decisions,
        **stage.facts,
        "seed": run.recipe.seed,
        "version": importlib.metadata.version("lorry"),
        "revision": _git_revision(),
        "image": os.environ.get("LORRY_IMAGE"),
        "target": os.environ.get("LORRY_TARGET"),
        "gpus": list({gpu["uuid"]: gpu for gpu in [*(gpu.identity() for gpu in machine.gpus), *stage.gpus]}.values()),
        "machine": {"cpus": machine.cpus, "memory_bytes": machine.memory_bytes, "python": platform.python_version()},
        "dependencies": _dependency_versions(),
        "starts": starts,
        "end": end.isoformat(timespec="seconds"),
        "seconds": round((end - datetime.fromisoformat(starts[-1])).total_seconds(), 2),
        "peak_memory_bytes": peak * 1024,
    }


def _present_time() -> str:
    """The current time in UTC, as ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _dependency_versions() -> dict[str, str]:
    """Versions of the installed DEPENDENCIES, by name."""
    found = {}
    for name in DEPENDENCIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
    """The git revision of this code: LORRY_REVISION, which images set, else the checkout's; None without either."""
    if "LORRY_REVISION" in os.environ:
        return os.environ["LORRY_REVISION"]
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # installed from a wheel, maybe inside the checkout of something else
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
