"""The training process: it trains one adapter or the connector with ms-swift. The stage starts and watches it.

The command is `python -m stages.train.worker JOB.json`; the file has the fields of `Job`. torchrun starts several of
these processes to train one adapter together. Each sends messages as JSON Lines to the file descriptor `job.progress`:
the first process its progress, the others only their ids and errors. Each exits with a code of
`stages.contract.errors`. The first process writes:

    <work>/checkpoint-<step>/complete.json   marks the checkpoint as complete
    <adapter>/                               the finished adapter or connector with `training.json`, moved in one step
"""

import json
import os
import shlex
import shutil
import sys
import traceback
from dataclasses import asdict, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

from stages.contract.errors import DataError, DoesNotFitError, Exit, InterruptedRunError, LorryError, UsageError
from stages.contract.files import read_json, read_jsonl, remove, sha256_file, write_json, write_jsonl
from stages.contract.machine_errors import machine_error
from stages.contract.mixes import samples_with_pictures, training_samples, validation_samples
from stages.contract.recipe import Train
from stages.contract.stop import StopRequest, die_with_parent, make_forks_die_with_parents
from stages.engines.cuda import refuse_dead_cards
from stages.hardware.targets import refuse_4bit_twice
from stages.models.connector import link_connector
from stages.models.control_words import count_said
from stages.models.gptq import quantisation_method
from stages.models.remote_code import settle_remote_code
from stages.train.adapter_card import adapter_card, base_name
from stages.train.job import TEMPLATE_FILE, Job, Progress, file_sizes
from stages.train.ladder import Ladder, LostCardError, Shortage, find_shortage, lost_gpu_message
from stages.train.sharding import check_sharding, deepspeed_config, fix_zero3_loading
from stages.train.together import Together, is_peer_lost

T = TypeVar("T")

TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
"""The trainer's measurements of a training's last start."""


def newest_complete_checkpoint(work: Path) -> Path | None:
    """Return the newest complete checkpoint in the folder `work`; None if it has none. Deletes incomplete checkpoints.

    A checkpoint is complete if its files have the sizes in its complete.json. That file is missing if the process was
    killed while it saved.
    """
    good = []
    for path in work.glob("checkpoint-*"):
        complete = read_json(path / "complete.json")
        if complete is None or file_sizes(path) != complete["sizes"]:
            remove(path)
        else:
            good.append(path)
    return max(good, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def train(job: Job, progress: Progress, stop: StopRequest) -> None:
    """Train the adapter or the connector, and write it to its final folder. Resumes from the newest complete
    checkpoint, if there is one.

    If this or another process is asked to stop, saves a checkpoint and raises InterruptedRunError. Raises UsageError
    for settings that cannot work here and for a training that diverges, DoesNotFitError for GPUs that torch cannot use,
    and DataError for an unusable sample or if no training sample fits max_length.
    """
    check_sharding(job.sharding, job.use_cpu, quantisation_method(job.model))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    _let_memory_segments_grow()
    scratch = job.scratch if job.processes == 1 else job.scratch / os.environ["LOCAL_RANK"]
    remove(scratch)
    scratch.mkdir(parents=True)
    os.environ |= {"HF_DATASETS_CACHE": str(scratch / "datasets"), "MODELSCOPE_CACHE": str(scratch / "modelscope")}

    if not job.use_cpu:
        refuse_dead_cards(job.cards)
    if job.connector is not None:
        job = replace(job, model=link_connector(job.model, *job.connector, scratch / "model"))
    from stages.train.older_torch import add_missing_names
    from stages.train.without_torchvision import patch_missing_torchvision

    add_missing_names()
    patch_missing_torchvision()
    from stages.train.swift_sft import LorrySft  # imports torch and swift: takes seconds

    together = Together(job.processes, job.use_cpu, job.sharding)
    _refuse_different_job(job, together)
    resume = newest_complete_checkpoint(job.work) if together.is_first else None
    name = together.first_value(resume and resume.name)
    resume = job.work / name if name else None
    progress.only_problems = not together.is_first
    if job.sharding != "none":
        batch = job.micro_batch, job.accumulation
        config = deepspeed_config(job.sharding, job.dtype, *batch, job.settings.max_grad_norm)
        write_json(scratch / "deepspeed.json", config)
    if job.sharding == "zero3":
        fix_zero3_loading()
    arguments = _arguments(job, scratch, resume)
    if together.is_first:
        print("swift sft", shlex.join(arguments), flush=True)  # for the log: the command that repeats it by hand
    sft = LorrySft(arguments, job, progress, stop, together)
    counts, left_out, unused = _write_samples(job, sft, scratch)
    _refuse_no_samples(job, counts["train"])
    if not counts["validation"] or not job.evaluate:
        sft.args.val_dataset = []
    random_states = resume is not None and has_random_states(resume, job.processes)
    progress.send(event="loaded", samples=counts, resumed_from=name, random_states=random_states)
    sft.main()
    together.check_stop(stop)
    memory = largest_figures(together.gather(_gpu_memory(job)))
    if together.is_first:
        said = count_said(sft.said)
        facts = {
            "mix": job.mix.mix,
            "samples": counts,
            "micro_batch": job.micro_batch,
            "accumulation": job.accumulation,
            **({"connector": job.connector[1]} if job.connector else {}),
            **unused,
            **({"control_words": said} if said else {}),
            "left_out": left_out,
            "max_length": job.settings.max_length,
            "tokens": sft.tokens,
            **({"skipped_steps": sft.skipped_steps} if sft.skipped_steps else {}),
        }
        rungs = Ladder.read(job.work).decisions
        facts |= ({"memory": memory} if memory else {}) | ({"out_of_memory": rungs} if rungs else {})
        _publish_weights(job, sft.log, facts)
    together.leave()
    remove(scratch)


def _refuse_no_samples(job: Job, samples: int) -> None:
    """Raise DataError if no sample is left to train on. `samples` is the number of training samples left."""
    if samples:
        return
    what, other = (" with a picture", ", or add pictures") if job.settings.trains_connector else ("", "")
    limit = f"{job.settings.full_key('max_length')} {job.settings.max_length}"
    raise DataError(f"{job.train[0]}: no training sample{what} fits in {limit}; raise it{other}")


def _write_samples(job: Job, sft: Any, scratch: Path) -> tuple[dict[str, int], dict[str, list[str]], dict[str, int]]:
    """Write the training and validation samples that fit max_length as files for ms-swift.

    Raises the errors of `LorrySft.fitting_samples`. Returns the number of samples by split, the ids of samples longer
    than max_length by split, and for a connector the number of unused training samples by reason.
    """
    counts, left_out, unused = {}, {}, dict[str, int]()
    for split, sources in (("train", job.train), ("validation", job.validation)):
        samples = [sample for source in sources for sample in read_jsonl(source)]
        samples = (
            training_samples(samples, job.mix, job.seed) if split == "train" else validation_samples(samples, job.mix)
        )
        if job.settings.trains_connector:
            assert job.settings.connector is not None
            samples, others = samples_with_pictures(samples, job.settings.connector.most_samples, job.seed)
            unused = others if split == "train" else unused
        kept, left_out[split] = sft.fitting_samples(samples)
        counts[split] = len(kept)
        write_jsonl(scratch / f"{split}.jsonl", pad_samples(kept, job.processes) if split == "train" else kept)
    return counts, left_out, unused


def _let_memory_segments_grow() -> None:
    """Set torch's allocator to grow its memory segments instead of reserving a new one for each longer micro-batch.

    A segment of fixed size that no later micro-batch fits would stay reserved: neither used nor free. torch before 2.9
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


def pad_samples(samples: list[T], processes: int) -> list[T]:
    """The samples, padded with repetitions of the first samples until every process gets the same number.

    Without this, ms-swift would leave the last samples out of every epoch, and the number of steps would depend on the
    number of GPUs.
    """
    return [*samples, *islice(cycle(samples), -len(samples) % processes)]


def has_random_states(checkpoint: Path, processes: int) -> bool:
    """Whether a checkpoint has a random state for each process. False if another number of processes saved it."""
    saved = {path.name for path in checkpoint.glob("rng_state*.pth")}
    return saved == ({"rng_state.pth"} if processes == 1 else {f"rng_state_{rank}.pth" for rank in range(processes)})


def _refuse_different_job(job: Job, together: Together) -> None:
    """Raise UsageError if this process's job differs from that of the first process: they could not train together."""
    own = {
        "adapter": job.adapter.name,
        "precision": job.dtype,
        "processes": job.processes,
        "micro-batch": job.micro_batch,
        "accumulation": job.accumulation,
        "sharding": job.sharding,
        "gradient checkpointing": job.settings.gradient_checkpointing,
        "max_length": job.settings.max_length,
    }
    first = together.first_value(own)
    if own != first:
        raise UsageError(
            f"this node: has {own}, but node 0 has {first}; use nodes with the same kind and number of GPUs"
        )


def _publish_weights(job: Job, history: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Copy the last checkpoint's adapter or connector to its final folder, which appears only when it is complete.

    Adds the recipe's chat template, if it sets one, training.json, timing.json and made.json. The last has the key and
    the sha256 of each file except timing.json. `facts` go into training.json, for the stage. `history` is the trainer's
    log of all steps; the checkpoint's own log lacks the evaluation at its step.
    """
    last = newest_complete_checkpoint(job.work)
    assert last is not None, "training ended without a checkpoint"
    state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
    partial = job.adapter.with_name(f".{job.adapter.name}")
    remove(partial)
    partial.mkdir(parents=True)
    for name in job.weight_files:
        shutil.copyfile(last / name, partial / name)
    wanted = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "token_acc", "eval_token_acc")
    log = [{key: entry[key] for key in wanted if key in entry} for entry in history]
    log = [entry for entry in log if "loss" in entry or "eval_loss" in entry]
    write_json(partial / "training.json", {"steps": state["global_step"], **facts, "log": log})
    # in a separate file that is no output of the stage: times differ between machines, results must not
    timed = [entry for entry in history if "train_runtime" in entry]
    write_json(partial / "timing.json", {key: timed[-1][key] for key in TIMES if key in timed[-1]} if timed else {})
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


def _arguments(job: Job, scratch: Path, resume: Path | None) -> list[str]:
    """The arguments of the command `swift sft`. They leave ms-swift no choice that depends on the machine.

    `resume` is the checkpoint to resume from; None: train from the start. Raises UsageError if train.load_in_4bit is
    set and the base is quantised already.
    """
    settings = job.settings
    values: dict[str, Any] = {
        "model": job.model,
        "model_type": job.model_settings.swift_type,
        # renders samples with pictures only; `LorrySft` gives ms-swift the tokens of the others
        "template": job.model_settings.swift_template or "dummy",
        "enable_thinking": job.chat.enable_thinking,
        "torch_dtype": job.dtype,
        # set explicitly: with torch_dtype float32, ms-swift chooses mixed precision with float16
        "fp16": job.dtype == "float16",
        "bf16": job.dtype == "bfloat16",
        **_quantisation_options(job),
        "dataset": scratch / "train.jsonl",
        "val_dataset": scratch / "validation.jsonl",
        "split_dataset_ratio": 0,
        "output_dir": job.work,
        "add_version": False,
        "check_model": False,  # else ms-swift asks a hub for a newer model and retries for seconds
        "report_to": "none",
        "use_cpu": job.use_cpu,
        "ddp_backend": ("gloo" if job.use_cpu else "nccl") if job.processes > 1 else None,
        "deepspeed": None if job.sharding == "none" else scratch / "deepspeed.json",
        **(_connector_options() if settings.trains_connector else _lora_options(settings)),
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": job.micro_batch,
        "per_device_eval_batch_size": job.eval_micro_batch,
        "gradient_accumulation_steps": job.accumulation,
        "gradient_checkpointing": settings.gradient_checkpointing,
        # with DeepSpeed, ms-swift's default is the reentrant kind: ZeRO-3 then does not see when a layer's backward
        # pass ends, and keeps the whole base gathered until the last layer's does
        "gradient_checkpointing_kwargs": '{"use_reentrant": false}' if job.sharding == "zero3" else None,
        # for a vision-language model; a frozen tower keeps no activations anyway
        "vit_gradient_checkpointing": settings.gradient_checkpointing
        and not (settings.freeze_vision or settings.trains_connector),
        "max_pixels": settings.max_pixels,
        "max_length": settings.max_length,
        "truncation_strategy": "delete",  # the template raises instead of cutting; `_write_samples` omits long samples
        "lr_scheduler_type": "cosine",
        "warmup_ratio": settings.warmup_ratio,
        "weight_decay": settings.weight_decay,
        "adam_beta1": 0.9,
        "adam_beta2": settings.adam_beta2,
        "max_grad_norm": settings.max_grad_norm,
        "logging_steps": settings.log_every,
        "logging_nan_inf_filter": False,  # it would wait for the GPU after every batch; Losses ends such a training
        "save_strategy": "steps",
        "save_steps": settings.checkpoint_every,
        "save_total_limit": settings.keep_checkpoints,
        "eval_strategy": "steps" if job.evaluate else "no",
        "eval_steps": settings.checkpoint_every,
        "seed": job.seed,
        "data_seed": job.seed,
        "dataset_shuffle": False,  # the trainer's sampler shuffles with the seed
        "lazy_tokenize": True,  # encode a sample and read its pictures when the trainer needs it
        "strict": True,  # else ms-swift silently replaces a sample that it cannot read
        "dataloader_num_workers": 0,
        "resume_from_checkpoint": resume,
    }
    arguments: list[str] = []
    for name, value in values.items():
        if value is not None:
            texts = [str(v) for v in value] if isinstance(value, list) else [str(value)]
            arguments += [f"--{name}", *texts]
    return arguments


def _lora_options(settings: Train) -> dict[str, Any]:
    """The options of `swift sft` that train LoRA with float32 weights."""
    return {
        "tuner_type": "lora",
        "lora_rank": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_regex" if isinstance(settings.target_modules, str) else "target_modules": settings.target_modules,
        "lora_dtype": "float32",
        "lorap_lr_ratio": settings.lora_plus_ratio,
        "freeze_vit": settings.freeze_vision,
    }


def _connector_options() -> dict[str, Any]:
    """The options of `swift sft` that train only the connector (ms-swift's aligner), without LoRA."""
    return {"tuner_type": "full", "freeze_llm": True, "freeze_vit": True, "freeze_aligner": False}


def _quantisation_options(job: Job) -> dict[str, Any]:
    """Options for a base in 4 bits: NF4 with double quantisation, computed in `job.dtype` (QLoRA, arXiv:2305.14314).

    Empty unless train.load_in_4bit is set. Raises UsageError if the base is quantised already.
    """
    if not job.settings.load_in_4bit:
        return {}
    refuse_4bit_twice(job.model, quantisation_method(job.model))
    kind = {"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return {**kind, "bnb_4bit_compute_dtype": job.dtype}


def _explained_error(job: Job, error: BaseException, progress: Progress) -> tuple[LorryError | None, Shortage | None]:
    """Return the LorryError that explains an error to the user, and the shortage if memory ran out.

    Both are None for an error without an explanation, such as a bug in Lorry or the loss of another process.
    """
    if isinstance(error, LorryError):
        return error, None
    shortage = find_shortage(error, progress.during, progress.step)
    if shortage is not None:
        return DoesNotFitError(f"out of memory {shortage}"), shortage
    words = lost_gpu_message(error)
    if words is not None:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        card = job.cards[rank] if rank < len(job.cards) else "the GPU"
        return LostCardError(
            f"{card}: stopped working after step {progress.step} ({words}); run the same command again to resume from"
            " the last checkpoint, without this GPU if it fails again"
        ), None
    return machine_error(error), None


def main() -> None:
    """Run the job in the file that the command line names. Send every error to the stage and exit with its code."""
    job = Job.read(Path(sys.argv[1]))
    progress = Progress(job.progress)
    # before training and in an evaluation there is no step to save; but processes that train together stop together
    stop = StopRequest(waits=lambda: progress.during == "training" or job.processes > 1)
    stop.install()
    make_forks_die_with_parents()  # ms-swift forks processes that read the samples
    if job.processes > 1:
        die_with_parent(os.getppid())  # torchrun, which dies with the stage
        progress.send(event="process", id=os.getpid())
    try:
        settle_remote_code(job.model, job.model_settings.trust_remote_code)
        train(job, progress, stop)
    except BaseException as error:  # noqa: BLE001 - every end must be reported to the stage
        explained, shortage = _explained_error(job, error, progress)
        if explained is None and stop.signal is not None:
            explained = InterruptedRunError(
                f"training {job.adapter.name}: stopped by {stop.signal.name}; run the same command again"
            )
        if explained is None and job.processes > 1 and is_peer_lost(error):
            explained = InterruptedRunError(
                f"training {job.adapter.name}: the other processes are gone ({' '.join(str(error).split())[:100]}); run"
                " the same command again to resume from the last checkpoint"
            )
        if not isinstance(explained, InterruptedRunError):
            traceback.print_exc()
        text = str(explained) if explained else f"{type(error).__name__}: {error}"
        code = explained.exit_code if explained else Exit.CRASHED
        fields: dict[str, Any] = {"shortage": asdict(shortage)} if shortage else {}
        fields |= {"lost": True} if isinstance(explained, LostCardError) else {}
        progress.send(event="error", text=" ".join(text.split())[:1000], code=int(code), **fields)
        sys.exit(code)


if __name__ == "__main__":
    main()
