"""The workloads: how to read questions, build samples, prompt, parse and score. One module each.

A recipe's `task` names a module here. The four stages know no task by name; they call what `Task` lists.
"""

import importlib
import pkgutil
from pathlib import Path
from typing import Any, Protocol

from stages.contract.errors import UsageError
from stages.contract.records import Sample


class Skip(Protocol):
    def __call__(self, what: str, reason: str, detail: str = "") -> None: ...


class Question(Protocol):
    """What a task reads from its data for each sample to build."""

    @property
    def id(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def document(self) -> str: ...
    @property
    def page(self) -> int | None:
        """1-based page that the question names."""


class Task(Protocol):
    def find_documents(self, folder: Path) -> list[Path]:
        """The documents to render, sorted. Raises DataError when there is none."""

    def read_questions(self, folder: Path, documents: set[str], skip: Skip) -> list[Any]:
        """All usable questions; the others go to `skip`. Raises DataError when none is left."""

    def build_sample(self, question: Any, pages: list[dict[str, Any]]) -> Sample:
        """One sample from a question and the pages shown with it, best first."""

    def read_answer(self, text: str) -> str:
        """The answer in a completion."""

    def score(self, answer: str, sample: Sample) -> dict[str, float]:
        """Metrics of one answer, each in 0..1."""

    def facts(self, sample: Sample) -> dict[str, float]:
        """Metrics of a sample that no answer changes, such as retrieval recall, each in 0..1."""


def load_task(name: str) -> Any:
    """The module of a recipe's task. Raises UsageError for a name that is none."""
    names = task_names()
    if name not in names:
        raise UsageError(f"task: no task {name!r}; there are: {', '.join(names)}")
    return importlib.import_module(f"stages.tasks.{name}")


def task_names() -> list[str]:
    """Names that a recipe's `task` may have."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
