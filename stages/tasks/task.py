"""The contract for tasks: what a task's module must have, and what passes between it and the stages.

Every task has the members of `Task`. `QuestionTask`, `DocumentTask`, `RecordTask` and `ConversationTask` add how a task
reads its questions: from its own files, about documents, from Data-Juicer's records, or from conversations in any
form. `check_task` checks a module when a
recipe is read. docs/add-a-workload.md walks through a first task.
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
    """Leaves one record out, counts it by reason and names it in the manifest.

    `what` is the record's file and line or its id, `reason` the kind of fault, `detail` the value found.
    """

    def __call__(self, what: str, reason: str, detail: str = "") -> None: ...


class Say(Protocol):
    """Shows a sentence about the data on the console, and adds it to the manifest."""

    def __call__(self, sentence: str) -> None: ...


Given = Literal["train", "test", "train only", "test only", "asked"]
"""The split that the data state for a question; None: Lorry chooses it. `train`: train or validation. `train only`:
never validation, as for guessed labels. `test`: scored. `test only`: scored, and its data set is never trained on.
`asked`: answered for the submission and not scored, because it has no reference."""


class Question(Protocol):
    """A question as a task reads it from its data. Samples are built from it."""

    @property
    def id(self) -> str:
        """Unique within the run."""

    @property
    def text(self) -> str:
        """The words of the question."""

    @property
    def source(self) -> str:
        """Name of its data set, as data mixes use it."""

    @property
    def group(self) -> str:
        """Name of its group, of which no question is trained on if another is scored, unless
        `data.evaluate_on_training`."""

    @property
    def answers(self) -> tuple[str, ...]:
        """Reference answers; empty if the data have none."""

    @property
    def split(self) -> Given | None:
        """The split that the data state; None: Lorry chooses it."""


class DocumentQuestion(Question, Protocol):
    """A question about a document."""

    @property
    def document(self) -> str:
        """Id of its document."""

    @property
    def page(self) -> int | None:
        """1-based page that the question names; None if it names none."""

    @property
    def figure(self) -> str | None:
        """Figure that the question names; None if it names none."""


@dataclass(frozen=True)
class Found:
    """What retrieval found for a question in its document and among the training questions."""

    pages: Mapping[int, Mapping[str, Any]]
    """The document's usable pages by number: `text` and `image` (path relative to the run) of each."""
    ranked: list[int] = field(default_factory=list)
    """Numbers of those pages, most similar to the question first."""
    crop: str | None = None
    """Path, relative to the run, of the figure that the question names, cut out of its page; None without one."""
    examples: list[str] = field(default_factory=list)
    """Answers of the most similar training questions, none about the same document."""
    drawing_is_enough: bool | None = None
    """The classifier's verdict on whether the page's drawing answers the question; None if it was not asked."""


@dataclass(frozen=True)
class RetrievalNeeds:
    """What retrieval must find for a question in addition to pages."""

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
    tools: list[dict[str, Any]] = field(default_factory=list)
    """The tools that the model may call, in OpenAI's form."""


class Task(Protocol):
    """The members that every task's module must have. `stages.tasks.common.default_*` has those that most tasks
    share."""

    # Questions are Any, because a function that takes only a task's own question type does not accept every Question.

    @property
    def READS_DOCUMENTS(self) -> bool:  # noqa: N802 - a constant of the module
        """Whether the task is a DocumentTask."""

    @property
    def READS_RECORDS(self) -> bool:  # noqa: N802
        """Whether the task is a RecordTask."""

    @property
    def READS_CONVERSATIONS(self) -> bool:  # noqa: N802
        """Whether the task is a ConversationTask."""

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
        """Names of the data sets in the data folder that an adapter can be trained on, sorted. Raises DataError if
        there is none."""

    def asked_rows(self, folder: Path, tested: list[Any]) -> list[dict[str, Any]]:
        """The rows of the submission, in the order of its lines. `tested` has the test questions that are asked.

        Each row has `ids`: the ids of the samples whose answers it uses. Each asked sample is in exactly one row. A row
        with `line` False is scored but not submitted.
        """

    def build_samples(self, recipe: Recipe, question: Any, found: Found | None, split: str) -> list[Sample]:
        """The samples of one question, at least one; in the test split exactly one. `found` is None if the task
        reads no documents.

        The messages end before the answer. Training learns `meta["target"]` as the completion, or the first reference
        if there is no target. A sample for training may also be whole: end with the answer, or be plain text.
        """

    def passes(self, recipe: Recipe) -> tuple[str, ...]:
        """Names of the passes, in order. The answer to a sample comes from the last pass that it does not skip."""

    def ask(
        self, recipe: Recipe, sample: Sample, name: str, before: Mapping[str, str], without: Collection[str]
    ) -> Ask | None:
        """The prompt of the pass `name` for a sample; None if the sample skips that pass.

        `before` has the completions of earlier passes by name, `without` the components that an ablation leaves out.
        """

    def possible_prompts(self, recipe: Recipe, sample: Sample, without: Collection[str]) -> list[tuple[Ask, int]]:
        """All prompts that the passes may use for a sample, each with the largest number of tokens that earlier
        completions can add to it. infer sets the engine's limits by them before it answers any pass.

        `without` has the components that an ablation leaves out.
        """

    def read_answer(self, text: str, sample: Sample) -> str | None:
        """The answer in a completion; None if there is none."""

    def narrowed_sample(self, sample: Sample, answers: Sequence[str]) -> Sample | None:
        """The sample with only these answers as options, for the second round of the vote. None if it has no options,
        if fewer than two would remain, or if none would be removed."""

    def submission(self, row: Mapping[str, Any], predictions: Mapping[str, Prediction]) -> dict[str, Any]:
        """The line of the submission for a row of `asked_rows`. `predictions` are by sample id; some may be missing."""

    def score(self, recipe: Recipe, answer: str, sample: Sample) -> dict[str, float]:
        """Metrics of one answer by name, each in 0..1. The first one ranks adapters and may weight their votes."""

    def facts(self, sample: Sample) -> dict[str, float]:
        """Metrics of a sample that do not depend on its answer, such as retrieval recall, by name, each in 0..1."""

    def score_notes(self, recipe: Recipe, samples: Sequence[Sample]) -> list[str]:
        """Sentences for console and report on how the samples are scored: by whose rules each metric is computed, and
        how it differs from published figures."""

    def together(self, sample: Sample) -> str:
        """The key of the samples that are scored together, such as all rotations of one question. Samples with the same
        key count once, with their lowest score. A sample that counts alone has its id as key."""

    def uploads(self, folder: Path, samples: Sequence[Sample], predictions: Mapping[str, Prediction]) -> list[str]:
        """Write one model's answers below `folder`, in the format that a benchmark's server accepts. Returns the paths
        of the files relative to `folder`. `predictions` are by sample id; some may be missing."""

    def measures(self, recipe: Recipe, answer: str | None, sample: Sample) -> dict[str, list[float]]:
        """Values of an answer that have a unit, by name. The name includes the unit, such as `axis angle, degrees`, and
        may have any number of values. `answer` is None for a failed sample. Measures do not rank adapters."""

    def picture(self, recipe: Recipe, sample: Sample, prediction: Prediction | None) -> str | None:
        """An SVG of reference and answer for the report; None if there is nothing to draw. The task must escape text
        that comes from data or models."""


class QuestionTask(Task, Protocol):
    """A task that reads its questions from its own files."""

    def read_questions(self, recipe: Recipe, folder: Path, documents: set[str], skip: Skip) -> list[Any]:
        """All usable questions of the data folder. Unusable ones go to `skip`. Raises DataError if none is usable.

        `documents` has the ids of the documents; it is empty if the task reads none.
        """


class DocumentTask(QuestionTask, Protocol):
    """A task whose questions are about documents, which preprocess renders, embeds and searches."""

    def find_documents(self, folder: Path) -> list[Path]:
        """Paths of the documents to render, sorted. Raises DataError if there is none."""

    def retrieval_needs(self, recipe: Recipe) -> RetrievalNeeds:
        """What retrieval must find for the questions."""

    def classification(self, recipe: Recipe, question: Any) -> Ask | bool | None:
        """How to decide whether the drawing on a page is enough for a question: a prompt for the model, a rule's
        verdict, or None if it need not be decided."""

    def read_classification(self, text: str) -> bool:
        """Whether a completion says that the drawing is enough."""


class RecordTask(Task, Protocol):
    """A task that reads some of its questions from records in Data-Juicer's format (`id`, `text`, `images`).
    Data-Juicer may filter and rewrite the records first. Such a task reads no documents."""

    def records(self, folder: Path) -> Path:
        """Path of the file of records (JSON Lines). Raises DataError if it, or another file that its questions need, is
        missing."""

    def read_others(self, recipe: Recipe, folder: Path, pictures: Path, skip: Skip) -> list[Any]:
        """All usable questions that do not come from records. Unusable ones go to `skip`. Raises DataError if there is
        nothing to train on or nothing to test on.

        Preprocess reads them before Data-Juicer starts, so that faults in them are found before hours of work. Their
        pictures are written to `pictures`, <run>/preprocess/pictures.
        """

    def read_records(
        self, recipe: Recipe, folder: Path, records: Path, pictures: Path, others: list[Any], skip: Skip
    ) -> list[Any]:
        """The usable questions from records. None of them shows a picture of a test question in `others`.

        `records` is the file that Data-Juicer wrote, or the original file if the recipe has no
        `preprocess.data_juicer`.
        """


class ConversationTask(Task, Protocol):
    """A task that reads conversations, whose data path may be a file. Such a task reads neither documents nor
    records."""

    def read_conversations(self, recipe: Recipe, path: Path, pictures: Path, skip: Skip, say: Say) -> list[Any]:
        """All usable conversations of the data path. Unusable records go to `skip`, and what was found out about the
        data to `say`. Raises DataError if none is usable.

        Pictures are written to `pictures`, <run>/preprocess/pictures.
        """


def reads_documents(task: Task) -> TypeGuard[DocumentTask]:
    """Whether a task reads documents."""
    return task.READS_DOCUMENTS


def reads_records(task: Task) -> TypeGuard[RecordTask]:
    """Whether a task reads Data-Juicer's records."""
    return task.READS_RECORDS


def reads_conversations(task: Task) -> TypeGuard[ConversationTask]:
    """Whether a task reads conversations."""
    return task.READS_CONVERSATIONS


HAVE_DEFAULTS = {
    **dict.fromkeys(("COMPONENTS", "READS_CONVERSATIONS", "READS_DOCUMENTS", "READS_RECORDS"), "settings"),
    **dict.fromkeys(("Passes", "Samples", "Scoring"), "settings"),
    **dict.fromkeys(("SHARED", "ask", "narrowed_sample", "passes", "possible_prompts"), "prompts"),
    **dict.fromkeys(("asked_rows", "facts", "measures", "picture", "score_notes", "submission"), "results"),
    **dict.fromkeys(("together", "uploads"), "results"),
}
"""Members of the contract that have a default, each with the ending of its module `stages.tasks.common.default_*`."""


def check_task(module: ModuleType) -> Task:
    """The module as a Task, if it has all members of the contract.

    Raises UsageError with the module's file and every member that is missing or differs from the contract, or if more
    than one of READS_DOCUMENTS, READS_RECORDS and READS_CONVERSATIONS is set.
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
    """The contract that a module must meet, by its constants READS_DOCUMENTS, READS_RECORDS and READS_CONVERSATIONS.
    Raises UsageError if more than one is set."""
    kinds = {"READS_DOCUMENTS": DocumentTask, "READS_RECORDS": RecordTask, "READS_CONVERSATIONS": ConversationTask}
    found = [name for name in kinds if getattr(module, name, False)]
    if len(found) > 1:
        raise UsageError(f"task: {module.__file__}: {' and '.join(found)} are both set; set at most one")
    return kinds[found[0]] if found else QuestionTask


def _members(contract: type) -> list[tuple[str, Any]]:
    """The contract's members by name, those of `Task` first."""
    classes = [one for one in reversed(contract.__mro__) if one.__module__ == __name__]
    return [pair for one in classes for pair in vars(one).items() if not pair[0].startswith("_")]


def _fault(module: ModuleType, name: str, member: Any) -> str | None:
    """How one member of a module breaks the contract, in words; None if it does not."""
    if not hasattr(module, name):
        cure = "define it"
        if name in HAVE_DEFAULTS:
            cure += f", or import it from stages.tasks.common.default_{HAVE_DEFAULTS[name]}"
        return f"{name} is missing ({cure})"
    value = getattr(module, name)
    if isinstance(member, property):
        wanted = get_type_hints(member.fget)["return"]
        return None if _has_type(value, wanted) else f"{name} must be {_type_in_words(wanted)}, found {value!r}"
    if not callable(value):
        return f"{name} must be a function, found {value!r}"
    expected = list(inspect.signature(member).parameters)[1:]
    return _fault_of_parameters(name, value, expected)


def _has_type(value: Any, wanted: Any) -> bool:
    """Whether a member's value has the type that the contract states."""
    if wanted is bool:
        return isinstance(value, bool)
    if wanted == tuple[str, ...]:
        return isinstance(value, tuple) and all(isinstance(one, str) for one in value)
    return isinstance(value, type) and issubclass(value, Section)


def _type_in_words(wanted: Any) -> str:
    """A type of the contract in words, for a message."""
    if wanted is bool:
        return "True or False"
    return "a tuple of texts" if wanted == tuple[str, ...] else "a subclass of stages.contract.recipe.Section"


def _fault_of_parameters(name: str, function: Any, expected: list[str]) -> str | None:
    """How the parameters of a function break the contract, in words; None if they do not.

    The stages pass arguments by position, so the names must be in the contract's order. Further parameters must have
    defaults.
    """
    found = list(inspect.signature(function).parameters.values())
    names = [one.name for one in found]
    optional = all(one.default is not one.empty for one in found[len(expected) :])
    if names[: len(expected)] == expected and optional:
        return None
    return f"{name} must take ({', '.join(expected)}), found ({', '.join(names)})"
