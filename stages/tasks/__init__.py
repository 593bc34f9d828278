"""The workloads: how to read questions, build samples, prompt, parse and score. One module or package each.

A recipe's `task` names one. The stages know no task by name: they call what `stages.tasks.task` lists.
"""

import difflib
import importlib
import pkgutil
from pathlib import Path

from pydantic import ValidationError

from stages.contract.errors import DataError, UsageError
from stages.contract.lora_config import apply_lora_config
from stages.contract.recipe import Adapter, Recipe, Section, Source, Train, file_name, problem_text
from stages.contract.roots import data_path
from stages.tasks.task import Task, check_task, reads_conversations

NO_TASKS = ("common", "task")
"""Modules of this package that are not tasks."""


def load_task(name: str) -> Task:
    """The module of a recipe's task.

    Raises UsageError for a name that no module has, for a module whose import fails with ImportError or SyntaxError,
    and for a module that breaks the contract of `stages.tasks.task`.
    """
    names = task_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"task: no task {name!r}; {hint}known tasks: {', '.join(names)}")
    try:
        module = importlib.import_module(f"stages.tasks.{name}")
    except (ImportError, SyntaxError) as error:
        raise UsageError(f"task: cannot import stages/tasks/{name} ({error}); mend that module") from error
    return check_task(module)


def task_names() -> list[str]:
    """Names that a recipe's `task` may have, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in NO_TASKS)


def refuse_file(task: Task, recipe: Recipe, data: Path) -> None:
    """Raise UsageError if the data path is a file, and the task reads a folder."""
    if data.is_file() and not reads_conversations(task):
        raise UsageError(f"data.path: {data} is a file, but {recipe.task} reads a folder; name the folder")


def settle_recipe(recipe: Recipe, where: str, data: Path) -> Recipe:
    """The complete recipe: with all settings of its task, its list of adapters, and the settings of its LoRA file.

    `where` names the recipe's file in messages, `data` is the data mount. Raises UsageError for an unknown task, a task
    that breaks its contract, a wrong or missing setting, an unusable LoRA file, and if the recipe wants an adapter for
    each data set but the data folder has none.
    """
    try:
        task = load_task(recipe.task)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    samples = _settings(task.Samples, recipe.preprocess.samples, f"{where}: preprocess.samples")
    passes = _settings(task.Passes, recipe.infer.passes, f"{where}: infer.passes")
    scoring = _settings(task.Scoring, recipe.eval.scoring, f"{where}: eval.scoring")
    for name in recipe.infer.ablate:
        if name not in task.COMPONENTS:
            known = ", ".join(task.COMPONENTS) or "none"
            raise UsageError(f"{where}: infer.ablate: {recipe.task} has no component {name!r}; its components: {known}")
    for name in ("pages", "retrieval"):
        if task.READS_DOCUMENTS and getattr(recipe.preprocess, name) is None:
            raise UsageError(f"{where}: preprocess.{name} is missing; set it, as {recipe.task} reads documents")
    if recipe.preprocess.data_juicer is not None and not task.READS_RECORDS:
        raise UsageError(f"{where}: preprocess.data_juicer: {recipe.task} reads no records for it; remove the key")
    complete = recipe.model_copy(
        update={
            "preprocess": recipe.preprocess.model_copy(update={"samples": samples.model_dump(mode="json")}),
            "train": _settle_training(recipe, task, where, data),
            "infer": recipe.infer.model_copy(update={"passes": passes.model_dump(mode="json")}),
            "eval": recipe.eval.model_copy(update={"scoring": scoring.model_dump(mode="json")}),
        }
    )
    try:
        return Recipe.model_validate(complete.model_dump())  # to check the voters, as the adapters are known now
    except ValidationError as error:
        raise UsageError(f"{where}: {problem_text(error.errors()[0], '')}") from error


def _settle_training(recipe: Recipe, task: Task, where: str, data: Path) -> Train:
    """The settings of `train`, with values from the LoRA file if `lora_config` names one, and with an adapter for each
    data set if `adapter_for_each_source` is set. Raises UsageError for an unusable LoRA file, and if an adapter for
    each data set is wanted but the data sets cannot be listed."""
    settings = recipe.train
    if settings.lora_config is not None:
        settings = apply_lora_config(settings, data / settings.lora_config)
    if not settings.adapter_for_each_source:
        return settings
    try:
        names = task.sources(data_path(data, recipe.data.path))
    except DataError as error:
        raise UsageError(f"{where}: train.adapter_for_each_source: {error}") from error
    adapters = [Adapter(name=file_name(name), data=[Source(source=name)]) for name in names]
    return settings.model_copy(update={"adapters": adapters})


def _settings(kind: type[Section], values: dict[str, object], where: str) -> Section:
    """The settings of a section, with its defaults filled in. `where` begins the message. Raises UsageError for an
    unknown key or a wrong value."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(map(str, detail["loc"]))
        if detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, kind.model_fields, 1)
            known = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(kind.model_fields) or 'none'}"
            raise UsageError(f"{where}: unknown key {key!r}; {known}") from error
        raise UsageError(problem_text(detail, f"{where}.{key}")) from error
