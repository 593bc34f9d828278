"""Does the work of `lorry doctor`: checks what would stop a job on this machine, with a cure for each finding."""

import importlib.util
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.contract.errors import Exit, LorryError, UsageError
from stages.contract.roots import Roots, data_path
from stages.hardware.holds import Holds
from stages.hardware.pick import denied_cards, gib_text, shown_gpus
from stages.hardware.probe import Cards, Gpu, Machine, has_card_on_bus, read_cards
from stages.hardware.targets import Target, load_targets, machine_target, named_target, refuse_old_driver
from stages.host.containers import (
    compose_command,
    container_user,
    find_engine,
    image_name,
    image_target,
    refuse_image,
    refuse_without_nvidia,
)
from stages.host.needs import STAGES, missing_libraries

if TYPE_CHECKING:
    from stages.contract.run import Run

GB = 10**9

DISK_WARNING = 50 * GB
"""Bytes of free disk below which a job may run out of it: the original of patent-qa leaves 50 GB of intermediate files,
and a target's images take up to 13 GB."""
DISK_MINIMUM = 5 * GB
"""Bytes of free disk below which not even two checkpoints fit: one of a rank-64 adapter of a 7B model takes 2 GB with
its optimizer (160 million parameters, 12 bytes each)."""
SHARED_MEMORY = 2**30
"""Bytes of /dev/shm that several GPUs need. NCCL takes some 10 MB for each pair of GPUs, and each data loader a batch.
Docker's default of 64 MB is known to fail."""
ENGINE_TIMEOUT = 2.0
"""Seconds to wait for the Docker engine to answer."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    state: str
    """ok, warn, FAIL or not checked."""
    what: str
    """The check, such as driver or disk."""
    text: str
    """Facts that were found, and the cure of a problem."""
    code: Exit = Exit.DONE
    """The exit code of a FAIL."""

    def __str__(self) -> str:
        return f"{self.state:<12}{self.what}: {self.text}"


def _ok_finding(what: str, text: str) -> Finding:
    """A finding without a problem."""
    return Finding("ok", what, text)


def _warning(what: str, text: str) -> Finding:
    """A finding that may stop a job."""
    return Finding("warn", what, text)


def _unchecked_finding(what: str, text: str) -> Finding:
    """A finding that says why a check was left out."""
    return Finding("not checked", what, text)


def _failure(what: str, text: str, code: Exit) -> Finding:
    """A finding that stops a job with this exit code."""
    return Finding("FAIL", what, text, code)


def _error_finding(what: str, error: LorryError) -> Finding:
    """A FAIL with an error's message and exit code. A job would end with the same error."""
    return Finding("FAIL", what, " ".join(str(error).split()), error.exit_code)


def exit_code(findings: Iterable[Finding]) -> Exit:
    """The exit code of `lorry doctor`: 0 without a FAIL, 4 if a FAIL has code 4 (hardware or disk), else 2."""
    codes = {finding.code for finding in findings if finding.state == "FAIL"}
    if not codes:
        return Exit.DONE
    return Exit.DOES_NOT_FIT if Exit.DOES_NOT_FIT in codes else Exit.USAGE


def examine(target: str | None, run: "Run | None") -> Iterator[Finding]:
    """Run all checks and yield their findings.

    `target` is a target's name; None: the targets of this machine's GPUs. `run` has the recipe whose data and models
    are checked; None: all data and models here. Raises UsageError for an unknown target.
    """
    known = load_targets()
    if target:
        named_target(target, known)
    roots, cards = Roots.from_environment(), read_cards()
    targets = _targets_to_check(target, cards, known)
    yield from _check_driver(cards, targets)
    engine, info, found = _find_engine()
    yield found
    if engine is not None:
        yield from _check_engine(engine, info, targets)
    else:
        yield from _check_libraries()
    yield from _check_disk(roots, info)
    yield _check_shared_memory(cards, engine is not None)
    yield from _check_folders(roots, run, engine is not None)
    yield from _check_weights(roots, run)
    yield from _check_gpus(cards)


# -- driver and Docker engine --------------------------------------------------------------------------------------


def _targets_to_check(name: str | None, cards: Cards, known: dict[str, Target]) -> list[Target]:
    """The target called `name`; None: the targets of all GPUs here, or cpu if none has a target."""
    if name:
        return [known[name]]
    found = {}
    for gpu in cards.gpus:
        if not gpu.lost:
            try:
                target = machine_target(Machine(0, 0, (gpu,)), known)
            except UsageError:  # older than every target: _check_gpu reports it
                continue
            found[target.name] = target
    return list(found.values()) or [known["cpu"]]


def _check_driver(cards: Cards, targets: list[Target]) -> Iterator[Finding]:
    """Check whether the NVIDIA driver answers and is new enough for the targets."""
    wanted = [target for target in targets if target.capability is not None]
    if cards.problem:
        yield _failure("driver", cards.problem.removeprefix("NVIDIA driver: "), Exit.DOES_NOT_FIT)
    elif not cards.driver and wanted:
        least = max(target.min_driver or 0 for target in wanted)
        yield _failure(
            "driver",
            f"none, and target {wanted[0].name} needs NVIDIA driver {least} or newer; install it, or set TARGET=cpu",
            Exit.DOES_NOT_FIT,
        )
    elif not cards.driver and has_card_on_bus():
        yield _warning(
            "driver",
            "none, and an NVIDIA GPU is on the PCI bus; install its driver, and until then set TARGET=cpu",
        )
    elif not cards.driver:
        yield _ok_finding("driver", "no NVIDIA GPU here, so the target is cpu")
    for target in wanted if cards.driver else []:
        try:
            refuse_old_driver(target, cards.driver)
        except LorryError as error:
            yield _error_finding("driver", error)
        else:
            yield _ok_finding(
                "driver", f"{cards.driver}; target {target.name} ({target.cuda}) needs {target.min_driver}"
            )
    if cards.driver and not wanted:
        yield _ok_finding("driver", f"{cards.driver}; target cpu needs none")


def _find_engine() -> tuple[Any, dict[str, Any], Finding]:
    """The client of the Docker engine (None if none answers), the answer of its `info()`, and the finding."""
    name = "Docker engine"
    if importlib.util.find_spec("docker") is None:  # as inside an image
        return None, {}, _unchecked_finding(name, "docker-py is not installed here, so stages run as local processes")
    from docker.errors import DockerException

    try:
        engine, address = find_engine(ENGINE_TIMEOUT)
        if engine is None:
            cure = "to run them in containers, start Docker or set DOCKER_HOST"
            return None, {}, _warning(name, f"none answers at {address}, so stages run as local processes; {cure}")
        info = engine.info()
    except LorryError as error:
        return None, {}, _error_finding(name, error)
    except (DockerException, OSError) as error:
        reason = " ".join(str(error).split())
        return None, {}, _failure(name, f"does not answer ({reason}); restart Docker, or set DOCKER_HOST", Exit.USAGE)
    return engine, info, _ok_finding(name, f"version {info.get('ServerVersion')} at {address}")


def _check_engine(engine: Any, info: dict[str, Any], targets: list[Target]) -> Iterator[Finding]:
    """Check whether the Docker engine can run the stages of these targets. `info` is the answer of its `info()`."""
    try:
        yield _ok_finding("compose", " ".join(compose_command()[:2]))
    except LorryError as error:
        yield _error_finding("compose", error)
    for target in targets:
        if target.capability is not None:
            try:
                refuse_without_nvidia(info, target)
                yield _ok_finding("Docker engine", f"can give GPUs to containers of target {target.name}")
            except LorryError as error:
                yield _error_finding("Docker engine", error)
        yield from _check_images(engine, target)


def _check_images(engine: Any, target: Target) -> Iterator[Finding]:
    """Check whether the Docker engine has the images of a target, in the version of Lorry that a launch would use."""
    import importlib.metadata

    version = os.environ.get("LORRY_VERSION") or importlib.metadata.version("lorry")
    if os.environ.get("PULL", "never") not in ("", "never"):
        yield _unchecked_finding("images", f"of {target.name}: PULL={os.environ['PULL']}, Compose fetches them")
        return
    there = []
    for stage in STAGES:
        try:
            refuse_image(engine, image_name(stage, version, target), version, image_target(stage, target))
            there.append(stage)
        except LorryError as error:
            yield _error_finding("images", error)
    if there:
        yield _ok_finding("images", f"of {target.name}, version {version}: {', '.join(there)}")


def _check_libraries() -> Iterator[Finding]:
    """Yield a warning on each stage that cannot run as a local process, as a library is not installed here."""
    for stage in STAGES:
        missing = missing_libraries(stage)
        if missing:
            cure = "run `make setup`, or start Docker"
            yield _warning("libraries", f"{stage}: needs {missing[0]}, which is not installed here; {cure}")


# -- disk, memory, permissions -------------------------------------------------------------------------------------


def _check_disk(roots: Roots, info: dict[str, Any]) -> Iterator[Finding]:
    """Check the free disk space for runs and, if `info` of a Docker engine is not empty, for Docker's images."""
    yield _check_free_space("runs", roots.runs, "delete old runs, or name another folder (LORRY_RUNS)")
    if not info:
        return
    folder = Path(str(info.get("DockerRootDir")))
    if folder.is_dir():
        yield _check_free_space("Docker's images", folder, "run `docker image prune` or `docker builder prune`")
    else:
        yield _unchecked_finding("disk", f"Docker's images: {folder} is not on this machine")


def _check_free_space(whose: str, folder: Path, cure: str) -> Finding:
    """A finding on the free disk space of a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    text = f"{free / GB:.0f} GB free for {whose} ({folder})"
    if free < DISK_MINIMUM:
        return _failure("disk", f"{text}, less than {DISK_MINIMUM // GB} GB; {cure}", Exit.DOES_NOT_FIT)
    if free < DISK_WARNING:
        return _warning("disk", f"{text}, less than the {DISK_WARNING // GB} GB that a large job takes; {cure}")
    return _ok_finding("disk", text)


def _check_shared_memory(cards: Cards, in_containers: bool, folder: Path = Path("/dev/shm")) -> Finding:
    """A finding on the size of /dev/shm. It matters only for several GPUs without containers."""
    if in_containers:
        return _ok_finding("/dev/shm", "containers get their own (LORRY_SHM in compose/<target>.env)")
    if len(cards.gpus) < 2:
        return _unchecked_finding("/dev/shm", "only needed for several GPUs")
    size = shutil.disk_usage(folder).total if folder.is_dir() else 0
    text = f"{size / 2**30:.1f} GiB for the processes of several GPUs"
    if size < SHARED_MEMORY:
        return _failure(
            "/dev/shm", f"{text}, but 1 GiB is needed; sudo mount -o remount,size=16g {folder}", Exit.DOES_NOT_FIT
        )
    return _ok_finding("/dev/shm", text)


@dataclass(frozen=True)
class _User:
    """The user that the stages run as."""

    uid: int
    groups: frozenset[int]

    def has_access(self, path: Path, wanted: int) -> bool:
        """Whether a path's mode gives this user the `wanted` access, a sum of r=4, w=2 and x=1. Root has all access."""
        # os.access would answer for this process's user, who may be root
        found = path.stat()
        if self.uid == 0:
            return True
        shift = 6 if found.st_uid == self.uid else 3 if found.st_gid in self.groups else 0
        return (stat.S_IMODE(found.st_mode) >> shift) & wanted == wanted


def _check_folders(roots: Roots, run: "Run | None", in_containers: bool) -> Iterator[Finding]:
    """Check whether the user that the stages run as can read data and models, and write to the runs folder.

    With `run`, the data are those of its recipe, and the folders of the run are checked too.
    """
    uid, gid = container_user() if in_containers else (os.getuid(), os.getgid())
    user = _User(uid, frozenset([gid] if in_containers else [gid, *os.getgroups()]))
    data = data_path(run.roots.data, run.recipe.data.path) if run is not None else roots.data
    for folder, name in ((data, "LORRY_DATA"), (roots.models, "LORRY_MODELS")):
        if not folder.is_dir() and not (run is not None and folder == data and data.is_file()):
            yield _failure("folders", f"{folder}: no such folder; create it, or name another ({name})", Exit.USAGE)
            continue
        closed = _first_unreadable_path(folder, user)
        if closed is not None:
            kind = "o+rX" if closed.is_dir() else "o+r"
            cure = f"sudo chmod {kind} {closed} (and what is below)"
            yield _failure("folders", f"{closed}: uid {uid} cannot read it; {cure}", Exit.USAGE)
        else:
            yield _ok_finding("folders", f"{folder}: readable for uid {uid}")
    yield _check_runs_folder(roots, user, gid, in_containers)
    for folder in _run_folders(run):
        if not user.has_access(folder, 7):
            cure = f"sudo chown -R {uid}:{gid} {folder}, or name another --run"
            yield _failure("folders", f"{folder}: uid {uid} cannot write there; {cure}", Exit.USAGE)


def _first_unreadable_path(folder: Path, user: _User) -> Path | None:
    """The first path that the user cannot read: the folder, or a path up to two levels below it; None if there is none.

    It looks at 2000 paths at most, to stay quick.
    """
    for path in islice(_paths_two_levels_deep(folder), 2000):
        if not user.has_access(path, 5 if path.is_dir() else 4):
            return path
    return None


def _paths_two_levels_deep(folder: Path) -> Iterator[Path]:
    """Yield a folder and the paths up to two levels below it."""
    yield folder
    for pattern in ("*", "*/*"):
        for path in folder.glob(pattern):
            if path.exists():
                yield path


def _check_runs_folder(roots: Roots, user: _User, gid: int, in_containers: bool) -> Finding:
    """A finding on whether the stages can write to the runs folder, which need not exist yet."""
    try:
        roots.refuse_missing_runs()
    except UsageError as error:
        return _error_finding("folders", error)
    runs = roots.runs
    there = next(path for path in (runs, *runs.parents) if path.is_dir())
    cure = f"sudo chown {user.uid}:{gid} {there}, or name another folder (LORRY_RUNS)"
    if os.statvfs(there).f_flag & os.ST_RDONLY:
        return _failure("folders", f"{runs}: on a read-only file system; name another folder (LORRY_RUNS)", Exit.USAGE)
    if in_containers and os.getuid() == 0 and (there != runs or there.stat().st_uid == 0):
        return _ok_finding("folders", f"{runs}: owned by root; the next launch gives it to uid {user.uid}")
    if there != runs:  # the user who launches creates it
        user = _User(os.getuid(), frozenset(os.getgroups()))
    if not user.has_access(there, 7 if there == runs else 3):
        return _failure("folders", f"{there}: uid {user.uid} cannot write there; {cure}", Exit.USAGE)
    note = "" if there == runs else " (created by the first launch)"
    return _ok_finding("folders", f"{runs}: writable for uid {user.uid}{note}")


def _run_folders(run: "Run | None") -> list[Path]:
    """A run's folder and the folders directly in it, which may belong to another user; empty if there is no run."""
    if run is None or not run.folder.is_dir():
        return []
    return [run.folder, *(path for path in sorted(run.folder.iterdir()) if path.is_dir())]


# -- weights -------------------------------------------------------------------------------------------------------


def _check_weights(roots: Roots, run: "Run | None") -> Iterator[Finding]:
    """Check whether models' safetensors files exist and are as long as their headers say. It reads no weights.

    The models are base and embedder of the run's recipe; without a run, all in the model folder.
    """
    if run is not None:
        named = {"model.path": run.recipe.model.path}
        if run.recipe.preprocess.retrieval is not None:
            named["preprocess.retrieval.embedder"] = run.recipe.preprocess.retrieval.embedder
        for key, path in named.items():
            try:
                yield _check_model(run.model(path, key))
            except UsageError as error:
                yield _error_finding("weights", error)
        return
    folders = sorted(path.parent for path in roots.models.glob("*/config.json"))
    if not folders:
        yield _warning("weights", f"no model in {roots.models}; put Hugging Face model folders there (LORRY_MODELS)")
    for folder in folders:
        yield _check_model(folder)


def _check_model(folder: Path) -> Finding:
    """A finding on the weights of one model."""
    from stages.models.shape import UnknownShapeError, read_shape

    try:
        shape = read_shape(folder)
    except UnknownShapeError:  # not a model that Lorry trains
        return _unchecked_finding("weights", f"{folder}: its config.json is not that of a known decoder or encoder")
    except UsageError as error:
        return _error_finding("weights", error)
    return _ok_finding("weights", f"{folder}: {len(shape.weights)} tensors, {shape.disk_bytes / GB:.1f} GB, whole")


# -- GPUs ----------------------------------------------------------------------------------------------------------


def _check_gpus(cards: Cards) -> Iterator[Finding]:
    """Yield a finding on each GPU: whether Lorry can use it, its free memory, and the processes that use the rest."""
    if not cards.problem:
        try:
            shown_gpus(cards.gpus)
        except LorryError as error:
            yield _error_finding("GPUs", error)
    if not cards.gpus:
        yield _unchecked_finding("GPUs", "NVML shows none")
        return
    denied: frozenset[int] = frozenset()
    try:
        denied = denied_cards(os.environ.get("LORRY_GPU_DENY"), cards.gpus)
    except UsageError as error:
        yield _error_finding("GPUs", error)
    holds = Holds()
    for gpu in cards.gpus:
        notes = [str(lock) + (" (auto)" if lock.exclusive else "") for lock in holds.holders(gpu.uuid or "-")]
        yield _check_gpu(gpu, gpu.index in denied, notes)


def _check_gpu(gpu: Gpu, denied: bool, holders: list[str]) -> Finding:
    """A finding on one GPU. `holders` are the Lorry processes that hold it, as text."""
    if gpu.lost:
        cure = f"see `dmesg | grep Xid`; nvidia-smi --gpu-reset -i {gpu.index}, or reboot; until then name other GPUs"
        return _failure("GPUs", f"{gpu} no longer answers (NVML: {gpu.lost}); {cure}", Exit.DOES_NOT_FIT)
    facts = [f"{gpu}: {gib_text(gpu.memory_free)} GiB free of {gib_text(gpu.memory_total)}"]
    facts += [f"{holder} {gib_text(holder.memory)} GiB" if holder.memory else str(holder) for holder in gpu.processes]
    facts += [f"held by {holder}" for holder in holders]
    facts += ["denied by LORRY_GPU_DENY"] if denied else []
    text = f"{'; '.join(facts)}; {gpu.uuid}"
    if gpu.mig:
        cure = f"sudo nvidia-smi -i {gpu.index} -mig 0, or name other GPUs"
        return _warning("GPUs", f"{text}; in MIG mode, but Lorry binds whole GPUs; {cure}")
    oldest = min(target.capability for target in load_targets().values() if target.capability)
    if gpu.capability < oldest:
        return _warning("GPUs", f"{text}; older than every target; name other GPUs, or set TARGET=cpu")
    return _ok_finding("GPUs", text)
