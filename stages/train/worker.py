"""The training process: it trains adapters, one after the other, or the connector. The stage starts and watches it.

The command is `python -m stages.train.worker JOBS`. JOBS is a file with the fields of `Job`, or a folder in which the
stage writes such files: 1.json, and each time a job is done the next number, until it removes the folder. The next job
has the same base, which stays loaded; everything else begins again. torchrun starts several of these processes to train
one adapter together. Each sends messages as JSON Lines to the file descriptor `job.progress` of its first job:
the first process its progress, the others only their ids and errors. Each exits with a code of
`stages.contract.errors`. The first process writes:

    <work>/checkpoint-<step>/complete.json   marks the checkpoint as complete
    <adapter>/                               the finished adapter or connector with `training.json`, moved in one step
"""

import gc
import json
import os
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.contract.errors import DataError, DoesNotFitError, Exit, InterruptedRunError, LorryError, UsageError
from stages.contract.files import remove, sha256_file, write_json
from stages.contract.machine_errors import machine_error
from stages.contract.stop import StopRequest, die_with_parent, make_forks_die_with_parents
from stages.engines.cuda import refuse_dead_cards
from stages.models.connector import link_connector
from stages.models.control_words import count_said
from stages.models.gptq import quantisation_method
from stages.models.remote_code import settle_remote_code
from stages.models.rendering import Renderer
from stages.train.checkpoints import newest_complete_checkpoint
from stages.train.encoding import encode_samples, read_encoded
from stages.train.job import TEMPLATE_FILE, Job, Progress
from stages.train.ladder import Ladder, LostCardError, Shortage, find_shortage, lost_gpu_message
from stages.train.model_card import adapter_card, base_name
from stages.train.samples import Samples
from stages.train.sharding import check_sharding
from stages.train.together import Together, is_peer_lost

if TYPE_CHECKING:
    from stages.train.base import Base
    from stages.train.trainee import Trainee


def main() -> None:
    """Do the jobs that the command line names. Send every error to the stage and exit with its code."""
    place = Path(sys.argv[1])
    job = Job.read(place if place.is_file() else place / "1.json")
    progress = Progress(job.progress)
    # before training and in an evaluation there is no step to save; but processes that train together stop together
    stop = StopRequest(waits=lambda: progress.during == "training" or job.processes > 1)
    stop.install()
    make_forks_die_with_parents()  # processes that encode samples
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    _let_memory_segments_grow()
    if job.processes > 1:
        die_with_parent(os.getppid())  # torchrun, which dies with the stage
        progress.send(event="process", id=os.getpid())
    worker = Worker(progress, stop)
    try:
        settle_remote_code(job.model, job.model_settings.trust_remote_code)
        for job in _jobs(place, stop):
            worker.train(job)
            progress.during = "loading"  # nothing is left to save: a stop ends a single process at once
            if place.is_dir():
                progress.send(event="done")
                worker.begin_again()
        worker.leave()
    except BaseException as error:  # noqa: BLE001 - every end must be reported to the stage
        sys.exit(_report_error(job, error, progress, stop))


def _jobs(place: Path, stop: StopRequest) -> Iterator[Job]:
    """Yield the job in a file, or those that the stage writes to a folder, until it removes the folder.

    Raises InterruptedRunError if this process is asked to stop while it waits for a job.
    """
    if place.is_file():
        yield Job.read(place)
        return
    for number in count(1):
        path = place / f"{number}.json"
        while not path.is_file():
            stop.check()
            if not place.is_dir():
                return
            time.sleep(0.01)
        stop.check()
        yield Job.read(path)


class Worker:
    """Trains one adapter after the other, and keeps what they share: group, tokenizer and base."""

    def __init__(self, progress: Progress, stop: StopRequest) -> None:
        self._progress, self._stop = progress, stop
        self._together: Together | None = None
        self._renderer: Renderer | None = None
        self._base: Base | None = None

    def train(self, job: Job) -> None:
        """Train the adapter or the connector, and write it to its final folder. Resumes from the newest complete
        checkpoint, if there is one.

        If this or another process is asked to stop, saves a checkpoint and raises InterruptedRunError. Raises
        UsageError for settings that cannot work here and for a training that diverges, DoesNotFitError for GPUs that
        torch cannot use, and DataError for an unusable sample or if no training sample fits max_length.
        """
        progress, stop = self._progress, self._stop
        progress.during, progress.step, progress.one_by_one = "loading", 0, False
        check_sharding(job.sharding, job.use_cpu, quantisation_method(job.model))
        scratch = job.scratch if job.processes == 1 else job.scratch / os.environ["LOCAL_RANK"]
        remove(scratch)
        scratch.mkdir(parents=True)
        if not job.use_cpu and self._together is None:
            refuse_dead_cards(job.cards)
        if os.environ.get("RANK", "0") == "0":  # the others wait for this process below
            self._renderer = self._renderer or Renderer(job.model, job.chat)
            encode_samples(job, self._renderer)
        if job.connector is not None:
            job = replace(job, model=link_connector(job.model, *job.connector, scratch / "model"))
        from stages.train.loop import Loop  # imports torch: takes seconds

        together = self._together = self._together or Together(job.processes, job.use_cpu)
        _refuse_different_job(job, together)
        resume = newest_complete_checkpoint(job.work) if together.is_first else None
        name = together.first_value(resume and resume.name)
        progress.only_problems = not together.is_first
        samples, validation, unused = read_encoded(job)
        _refuse_no_samples(job, len(samples))
        together.check_stop(stop)
        loads_base = self._base is None
        trainee = self._load_trainee(job, samples, validation)
        if together.is_first:
            print(*samples.facts.notes, f"attention: {trainee.attention_facts}", sep="\n", flush=True)  # for the log
        loop = Loop(job, trainee, samples, validation, together, progress, stop)
        if name:
            loop.resume(job.work / name)
        counts = {"train": len(samples), "validation": len(validation)}
        one_by_one, progress.one_by_one = trainee.why_one_by_one, not trainee.packs
        progress.send(
            event="loaded", samples=counts, resumed_from=name, loads_base=loads_base, one_sample_a_pass=one_by_one
        )
        loop.run()
        memory = largest_figures(together.gather(_gpu_memory(job)))
        if together.is_first:
            said = count_said(Counter(words) for words in samples.facts.control_words + validation.facts.control_words)
            facts = {
                "mix": job.mix.mix,
                "samples": counts,
                "pass_tokens": job.pass_tokens,
                **({"connector": job.connector[1]} if job.connector else {}),
                **unused,
                **({"control_words": said} if said else {}),
                "left_out": {"train": samples.facts.left_out, "validation": validation.facts.left_out},
                **_cut_facts(samples, validation),
                "max_length": job.settings.max_length,
                "attention": trainee.attention_facts,
                "tokens": loop.state.tokens,
                **({"skipped_steps": loop.state.skipped_steps} if loop.state.skipped_steps else {}),
            }
            rungs = Ladder.read(job.work).decisions
            facts |= ({"memory": memory} if memory else {}) | ({"out_of_memory": rungs} if rungs else {})
            _publish_weights(job, loop.state.step, loop.state.log, loop.mean_loss, facts)
        together.gather(None)  # each process has all that it needs of the others
        remove(scratch)

    def _load_trainee(self, job: Job, samples: Samples, validation: Samples) -> "Trainee":
        """What a job trains, on the base that is loaded if there is one. Raises the errors of `load_trainee`."""
        from stages.train.base import Base, load_trainee

        device, by_swift = torch_device(job), samples.has_rows or validation.has_rows
        if by_swift:
            self._base = None
        elif self._base is None and job.base is not None:
            self._base = Base.load(job, device)
        return load_trainee(job, device, samples.probes(), by_swift, self._base)

    def begin_again(self) -> None:
        """Forget all of the last training but what the next one shares with it."""
        import torch

        if self._base is not None:
            self._base.take_off()
        gc.collect()  # a module and those that share its input name one another
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def leave(self) -> None:
        """Wait for the other processes, then leave their group."""
        if self._together is not None:
            self._together.leave()


def torch_device(job: Job) -> Any:
    """The torch device of this process: the CPU, or the GPU of its local rank."""
    import torch

    if job.use_cpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _refuse_no_samples(job: Job, samples: int) -> None:
    """Raise DataError if no sample is left to train on. `samples` is the number of training samples left."""
    if samples:
        return
    what, other = (" with a picture", ", or add pictures") if job.settings.trains_connector else ("", "")
    limit = f"{job.settings.full_key('max_length')} {job.settings.max_length}"
    raise DataError(f"{job.train[0]}: no training sample{what} fits in {limit}; raise it{other}")


def _cut_facts(samples: Samples, validation: Samples) -> dict[str, Any]:
    """How many samples of each split are cut to fit max_length: conversations as `cut`, texts as `in_pieces` with the
    number of their `pieces`. Empty if none is."""
    found = {"train": samples.facts, "validation": validation.facts}
    cut = {split: len(facts.cut) for split, facts in found.items()}
    texts = {split: len(facts.pieces) for split, facts in found.items()}
    pieces = sum(sum(facts.pieces.values()) for facts in found.values())
    return ({"cut": cut} if any(cut.values()) else {}) | (
        {"in_pieces": {**texts, "pieces": pieces}} if any(texts.values()) else {}
    )


def _refuse_different_job(job: Job, together: Together) -> None:
    """Raise UsageError if this process's job differs from that of the first process: they could not train together."""
    own = {
        "adapter": job.adapter.name,
        "precision": job.dtype,
        "processes": job.processes,
        "tokens a pass": job.pass_tokens,
        "sharding": job.sharding,
        "checkpointed layers": job.checkpointed_layers,
        "gradient checkpointing": job.settings.gradient_checkpointing,
        "max_length": job.settings.max_length,
    }
    first = together.first_value(own)
    if own != first:
        raise UsageError(
            f"this node: has {own}, but node 0 has {first}; use nodes with the same kind and number of GPUs"
        )


def _let_memory_segments_grow() -> None:
    """Set torch's allocator to grow its memory segments instead of reserving a new one for each longer pass.

    A segment of fixed size that no later pass fits would stay reserved: neither used nor free. torch before 2.9
    reads only the second of the two variables. Changes nothing if the user has set one of them.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if not any(name in os.environ for name in names):
        os.environ |= dict.fromkeys(names, "expandable_segments:True")


def _gpu_memory(job: Job) -> dict[str, int]:
    """Bytes on this process's GPU: `allocated` is the peak that tensors used, `reserved` the peak that torch reserved
    for them. `device_used` is what all processes hold now, CUDA's own part included. Empty on a CPU."""
    if job.use_cpu:
        return {}
    import torch

    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "device_used": total - free,
    }


def largest_figures(measured: list[dict[str, int]]) -> dict[str, int]:
    """The largest figure of each name over all processes. `measured` has one dict for each, with the same names."""
    return {name: max(one[name] for one in measured) for name in measured[0]}


def _publish_weights(
    job: Job, steps: int, log: list[dict[str, Any]], mean_loss: float | None, facts: dict[str, Any]
) -> None:
    """Copy the last checkpoint's adapter or connector to its final folder, which appears only when it is complete.

    Adds the recipe's chat template, if it sets one, training.json, timing.json and made.json. The last has the key and
    the sha256 of each file except timing.json. `steps` is the number of optimizer steps, `log` has their entries,
    `mean_loss` is that of this start's steps.
    `facts` go into training.json, for the stage.
    """
    last = job.work / f"checkpoint-{steps}"
    partial = job.adapter.with_name(f".{job.adapter.name}")
    remove(partial)
    partial.mkdir(parents=True)
    for name in job.weight_files:
        shutil.copyfile(last / name, partial / name)
    write_json(partial / "training.json", {"steps": steps, **facts, "log": log})
    # in a separate file that is no output of the stage: times differ between machines, results must not
    write_json(partial / "timing.json", {} if mean_loss is None else {"train_loss": mean_loss})
    if not job.settings.trains_connector:
        _write_adapter_config(job, partial)
        if job.chat.template is not None:
            (partial / TEMPLATE_FILE).write_text(job.chat.template, encoding="utf-8")
    made = {
        name: sha256_file(partial / name)
        for name in sorted(path.name for path in partial.iterdir())
        if name != "timing.json"
    }
    write_json(partial / "made.json", {"key": job.key, "files": made})
    partial.rename(job.adapter)


def _write_adapter_config(job: Job, folder: Path) -> None:
    """Rewrite PEFT's adapter_config.json so that it is the same on every machine, and write a README.md that says how
    to load the adapter."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # the base's name on its hub or below the model mount, not its path on this machine
    name, config["revision"] = base_name(job.model, job.model_settings.path)
    config["base_model_name_or_path"] = name
    card = adapter_card(name, config, job.model, has_connector=job.connector is not None)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if isinstance(config["target_modules"], list):  # PEFT keeps a set, whose order changes from process to process
        config["target_modules"].sort()
    write_json(path, config)


def _report_error(job: Job, error: BaseException, progress: Progress, stop: StopRequest) -> Exit:
    """Send the error that ended a job to the stage, and print its traceback unless it is a stop. Returns the exit
    code."""
    explained, shortage = _explained_error(job, error, progress, stop)
    if not isinstance(explained, InterruptedRunError):
        traceback.print_exception(error)
    text = str(explained) if explained else f"{type(error).__name__}: {error}"
    code = explained.exit_code if explained else Exit.CRASHED
    fields: dict[str, Any] = {"shortage": asdict(shortage)} if shortage else {}
    fields |= {"lost": True} if isinstance(explained, LostCardError) else {}
    progress.send(event="error", text=" ".join(text.split())[:1000], code=int(code), **fields)
    return code


def _explained_error(
    job: Job, error: BaseException, progress: Progress, stop: StopRequest
) -> tuple[LorryError | None, Shortage | None]:
    """Return the LorryError that explains an error to the user, and the shortage if memory ran out.

    Both are None for an error without an explanation, such as a bug in Lorry.
    """
    if isinstance(error, LorryError):
        return error, None
    shortage = find_shortage(error, progress.during, progress.step)
    if shortage is not None:
        shortage = replace(shortage, one_by_one=progress.one_by_one)
        return DoesNotFitError(f"out of memory {shortage}"), shortage
    words = lost_gpu_message(error)
    if words is not None:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        card = job.cards[rank] if rank < len(job.cards) else "the GPU"
        return LostCardError(
            f"{card}: stopped working after step {progress.step} ({words}); run the same command again to resume from"
            " the last checkpoint, without this GPU if it fails again"
        ), None
    explained = machine_error(error)
    if explained is None and stop.signal is not None:
        explained = InterruptedRunError(
            f"training {job.adapter.name}: stopped by {stop.signal.name}; run the same command again"
        )
    if explained is None and job.processes > 1 and is_peer_lost(error):
        explained = InterruptedRunError(
            f"training {job.adapter.name}: the other processes are gone ({' '.join(str(error).split())[:100]}); run"
            " the same command again to resume from the last checkpoint"
        )
    return explained, None


if __name__ == "__main__":
    main()
