"""The contract for tasks: what a task's module must have, and what passes between it and the stages.

`Task` holds for every task. `QuestionTask`, `DocumentTask` and `RecordTask` add how its questions are read: from its
own files, about documents, or from Data-Juicer's records. `check_task` checks a module when a recipe is read.
docs/add-a-workload.md leads through a first task.
"""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, TypeGuard, cast, get_type_hints

from stages.contract.errors import UsageError
from stages.contract.recipe import Recipe, Section
from stages.contract.records import Message, Prediction, Sample


class Skip(Protocol):
    """Leaves one record out: counts it and names it in the manifest."""

    def __call__(self, what: str, reason: str, detail: str = "") -> None: ...


Given = Literal["train", "test", "train only", "test only", "asked"]
"""The split that the data themselves give a question. `train`: train or validation; `train only`: never validation, for
a guessed label; `test`: scored; `test only`: scored, of a data set that nothing is trained on; `asked`: no reference
answer, for the submission only. None: Lorry chooses the split."""


class Question(Protocol):
    """What a task reads from its data for each sample to build."""

    @property
    def id(self) -> str:
        """Unique within the run."""

    @property
    def text(self) -> str: ...
    @property
    def source(self) -> str:
        """Its data set, by the name that data mixes use."""

    @property
    def group(self) -> str:
        """Questions of one group fall into the same split, so that nothing trained on is scored."""

    @property
    def answers(self) -> tuple[str, ...]:
        """Reference answers; empty where none is given."""

    @property
    def split(self) -> Given | None: ...


class DocumentQuestion(Question, Protocol):
    """A question about a document."""

    @property
    def document(self) -> str: ...
    @property
    def page(self) -> int | None:
        """1-based page that the question names."""

    @property
    def figure(self) -> str | None:
        """Figure that the question names."""


@dataclass(frozen=True)
class Found:
    """What retrieval found for a question in its document and among the training questions."""

    pages: Mapping[int, Mapping[str, Any]]
    """The document's usable pages by number: `text` and `image` (path relative to the run) of each."""
    ranked: list[int] = field(default_factory=list)
    """Numbers of those pages, most similar to the question first."""
    crop: str | None = None
    """Picture of the figure that the question names, cut out of its page."""
    examples: list[str] = field(default_factory=list)
    """Answers of the most similar training questions, none about the same document."""
    drawing_is_enough: bool | None = None
    """For a question about a page, the classifier's verdict; None where it was not asked."""


@dataclass(frozen=True)
class Wanted:
    """What retrieval must find for a question beside the pages."""

    examples: int
    """How many answers of similar training questions."""
    crops: bool
    """Whether to cut out the figure that a question names."""


@dataclass(frozen=True)
class Ask:
    """One prompt: what a model is asked about a sample in one pass."""

    messages: list[Message]
    images: list[str] = field(default_factory=list)
    """Paths relative to the run, one for each `<image>` in the messages."""
    max_pixels: int | None = None
    """Pixel budget of each picture; None: the model's own."""
    max_new_tokens: int | None = None
    """None: infer.max_new_tokens."""
    temperature: float = 0.0
    """0: greedy."""
    seed: int = 0
    """Random seed for sampling."""


class Task(Protocol):
    """What every task's module has. `stages.tasks.common.default_*` has what most tasks leave as it is."""

    # A task's own question type takes the place of Any: a parameter of type Question would refuse it.

    @property
    def READS_DOCUMENTS(self) -> bool:  # noqa: N802 - a constant of the module
        """Whether it is a DocumentTask."""

    @property
    def READS_RECORDS(self) -> bool:  # noqa: N802
        """Whether it is a RecordTask."""

    @property
    def Samples(self) -> type[Section]:  # noqa: N802 - a class of the module
        """Settings of `preprocess.samples`."""

    @property
    def Passes(self) -> type[Section]:  # noqa: N802
        """Settings of `infer.passes`."""

    @property
    def Scoring(self) -> type[Section]:  # noqa: N802
        """Settings of `eval.scoring`."""

    @property
    def COMPONENTS(self) -> tuple[str, ...]:  # noqa: N802
        """Names that `infer.ablate` may list."""

    @property
    def SHARED(self) -> tuple[str, ...]:  # noqa: N802
        """Passes that the base model answers once for all adapters."""

    def sources(self, folder: Path) -> list[str]:
        """Names of the data sets in the data folder that an adapter can be trained on, sorted. Raises DataError where
        there is none."""

    def asked_rows(self, folder: Path, tested: list[Any]) -> list[dict[str, Any]]:
        """The rows of the submission, in order; `tested` are the test questions.

        Each row has `ids`, the samples whose answers it takes; each test sample is in exactly one row. A row with
        `line` False is scored but not submitted.
        """

    def build_samples(self, recipe: Recipe, question: Any, found: Found | None, split: str) -> list[Sample]:
        """The samples of one question, at least one; in the test split exactly one. `found` is None where the task
        reads no documents.

        The messages end before the answer. In training the first reference is the completion to learn, or
        `meta["target"]` where that differs.
        """

    def passes(self, recipe: Recipe) -> tuple[str, ...]:
        """Names of the passes in order; the last one that a sample needs gives its answer."""

    def ask(
        self, recipe: Recipe, sample: Sample, name: str, before: Mapping[str, str], without: Collection[str]
    ) -> Ask | None:
        """The prompt of a pass, given the completions of the passes before it; None where the sample skips the pass.

        `without` are the components that an ablation leaves out.
        """

    def rehearsal(self, recipe: Recipe, sample: Sample, without: Collection[str]) -> list[tuple[Ask, int]]:
        """All prompts that a sample may lead to, each with the most tokens of earlier completions that it will hold."""

    def read_answer(self, text: str, sample: Sample) -> str | None:
        """The answer in a completion; None where it holds none."""

    def narrowed_sample(self, sample: Sample, answers: Sequence[str]) -> Sample | None:
        """The sample with only these answers to choose from, for a second round of the vote; None where that is
        impossible or changes nothing."""

    def submission(self, row: Mapping[str, Any], predictions: Mapping[str, Prediction]) -> dict[str, Any]:
        """A line of the submission for a row of `asked_rows`; `predictions` by sample id, where there are any."""

    def score(self, recipe: Recipe, answer: str, sample: Sample) -> dict[str, float]:
        """Metrics of one answer, each in 0..1. The first one ranks and weighs adapters."""

    def facts(self, sample: Sample) -> dict[str, float]:
        """Metrics of a sample that no answer changes, such as retrieval recall, each in 0..1."""

    def together(self, sample: Sample) -> str:
        """A key that samples which count once share, such as the rotations of one question: their lowest score counts.
        The sample's id where it counts by itself."""

    def uploads(self, folder: Path, samples: Sequence[Sample], predictions: Mapping[str, Prediction]) -> list[str]:
        """Write one model's answers to the test samples below `folder`, as a benchmark's server takes them. Returns the
        files' names. A sample may lack a prediction."""

    def measures(self, recipe: Recipe, answer: str | None, sample: Sample) -> dict[str, list[float]]:
        """Values of an answer that have a unit, by a name that says it (`axis angle, degrees`): any number of values a
        name. `answer` is None where there is none. They rank nothing."""

    def picture(self, recipe: Recipe, sample: Sample, prediction: Prediction | None) -> str | None:
        """Reference and answer drawn as one SVG for the report, all outside text escaped; None: nothing to draw."""


class QuestionTask(Task, Protocol):
    """A task that reads its questions from its own files."""

    def read_questions(self, recipe: Recipe, folder: Path, documents: set[str], skip: Skip) -> list[Any]:
        """All usable questions of the data folder; the others go to `skip`. Raises DataError where none is left.

        `documents` are the ids of the documents; empty where the task reads none.
        """


class DocumentTask(QuestionTask, Protocol):
    """A task whose questions are about documents, which preprocess renders, embeds and searches."""

    def find_documents(self, folder: Path) -> list[Path]:
        """The documents to render, sorted. Raises DataError where there is none."""

    def retrieval_needs(self, recipe: Recipe) -> Wanted:
        """What retrieval must find for the questions."""

    def classification(self, recipe: Recipe, question: Any) -> Ask | bool | None:
        """Whether the drawing on its page is enough for a question: a prompt for the model, a rule's verdict, or None
        where nobody decides."""

    def read_classification(self, text: str) -> bool:
        """The verdict in a model's completion."""


class RecordTask(Task, Protocol):
    """A task some of whose questions come from records in Data-Juicer's format (`id`, `text`, `images`), which
    Data-Juicer may filter and rewrite first. Such a task reads no documents."""

    def records(self, folder: Path) -> Path:
        """The file of records, JSON Lines. Raises DataError where it, or what its questions need, is missing."""

    def read_others(self, recipe: Recipe, folder: Path, pictures: Path, skip: Skip) -> list[Any]:
        """All usable questions that come from no record.

        They are read before Data-Juicer starts, so that their faults are found before hours of work. Pictures that they
        show are written to `pictures`, <run>/preprocess/pictures.
        """

    def read_records(
        self, recipe: Recipe, folder: Path, records: Path, pictures: Path, others: list[Any], skip: Skip
    ) -> list[Any]:
        """The usable questions from records. None shows a picture of a test question among `others`.

        `records` is the file that Data-Juicer kept, or the original file where the recipe has no
        `preprocess.data_juicer`.
        """


def reads_documents(task: Task) -> TypeGuard[DocumentTask]:
    """Whether a task reads documents."""
    return task.READS_DOCUMENTS


def reads_records(task: Task) -> TypeGuard[RecordTask]:
    """Whether a task reads Data-Juicer's records."""
    return task.READS_RECORDS


HAVE_DEFAULTS = {
    **dict.fromkeys(("COMPONENTS", "READS_DOCUMENTS", "READS_RECORDS", "Passes", "Samples", "Scoring"), "settings"),
    **dict.fromkeys(("SHARED", "ask", "narrowed_sample", "passes", "rehearsal"), "prompts"),
    **dict.fromkeys(("asked_rows", "facts", "measures", "picture", "submission", "together", "uploads"), "results"),
}
"""Members of the contract that have a default, in `stages.tasks.common.default_<this>`."""


def check_task(module: ModuleType) -> Task:
    """The module as a Task.

    Raises UsageError that names the module's file and every part of the contract that is missing or of another form.
    """
    contract = _contract_of(module)
    faults = [fault for name, member in _members(contract) if (fault := _fault(module, name, member))]
    if faults:
        raise UsageError(
            f"task: {module.__file__} breaks the contract of {contract.__name__} (stages/tasks/task.py):"
            f" {'; '.join(faults)}"
        )
    return cast(Task, module)


def _contract_of(module: ModuleType) -> type:
    documents, records = getattr(module, "READS_DOCUMENTS", False), getattr(module, "READS_RECORDS", False)
    if documents and records:
        raise UsageError(f"task: {module.__file__}: READS_DOCUMENTS and READS_RECORDS are both set; set one at most")
    return DocumentTask if documents else RecordTask if records else QuestionTask


def _members(contract: type) -> list[tuple[str, Any]]:
    """The contract's members by name, those of `Task` first."""
    classes = [one for one in reversed(contract.__mro__) if one.__module__ == __name__]
    return [pair for one in classes for pair in vars(one).items() if not pair[0].startswith("_")]


def _fault(module: ModuleType, name: str, member: Any) -> str | None:
    """What is wrong with one member of a module; None where nothing is."""
    if not hasattr(module, name):
        cure = "define it"
        if name in HAVE_DEFAULTS:
            cure += f", or import it from stages.tasks.common.default_{HAVE_DEFAULTS[name]}"
        return f"{name} is missing ({cure})"
    value = getattr(module, name)
    if isinstance(member, property):
        wanted = get_type_hints(member.fget)["return"]
        return None if _is_of(value, wanted) else f"{name} must be {_in_words(wanted)}, found {value!r}"
    if not callable(value):
        return f"{name} must be a function, found {value!r}"
    expected = list(inspect.signature(member).parameters)[1:]
    return _fault_of_parameters(name, value, expected)


def _is_of(value: Any, wanted: Any) -> bool:
    if wanted is bool:
        return isinstance(value, bool)
    if wanted == tuple[str, ...]:
        return isinstance(value, tuple) and all(isinstance(one, str) for one in value)
    return isinstance(value, type) and issubclass(value, Section)


def _in_words(wanted: Any) -> str:
    if wanted is bool:
        return "True or False"
    return "a tuple of texts" if wanted == tuple[str, ...] else "a subclass of stages.contract.recipe.Section"


def _fault_of_parameters(name: str, function: Any, expected: list[str]) -> str | None:
    """The stages pass arguments by place, so that the names must come in the contract's order."""
    found = list(inspect.signature(function).parameters.values())
    names = [one.name for one in found]
    optional = all(one.default is not one.empty for one in found[len(expected) :])
    if names[: len(expected)] == expected and optional:
        return None
    return f"{name} must take ({', '.join(expected)}), found ({', '.join(names)})"
