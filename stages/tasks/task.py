"""The contract for tasks: what a task's module must have, and what passes between it and the stages.

`Task` is for every task, `DocumentTask` and `RecordTask` add what tasks need that read documents or records. A recipe's
task is checked against it when the recipe is read (`stages.tasks.load_task`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from stages.contract.recipe import Recipe, Section
from stages.contract.records import Message, Prediction, Sample


class Skip(Protocol):
    def __call__(self, what: str, reason: str, detail: str = "") -> None: ...


Given = Literal["train", "test", "train only", "test only", "asked"]
"""What the data themselves say of a question's split. `train`: to train or validate on; `train only`: never to validate
on, such as a guessed label; `test`: to score; `test only`: likewise, of a data set that nothing is trained on;
`asked`: without an answer, for the submission. None: as it falls."""


class Question(Protocol):
    """What a task reads from its data for each sample to build."""

    @property
    def id(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def source(self) -> str:
        """The data set that it is of, as data mixes name it."""

    @property
    def group(self) -> str:
        """What must not straddle train and test: all questions of a group fall into the same split."""

    @property
    def answers(self) -> tuple[str, ...]: ...
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
    """What was found for a question in its document and among the training questions."""

    pages: Mapping[int, Mapping[str, Any]]
    """The document's usable pages by number: `text` and `image` (path relative to the run) of each."""
    ranked: list[int] = field(default_factory=list)
    """Those pages, the most like the question first."""
    crop: str | None = None
    """Picture of the figure that the question names, cut out of its page."""
    examples: list[str] = field(default_factory=list)
    """Answers of the training questions that are most like it, none of its own document."""
    drawing_is_enough: bool | None = None
    """Of a question on a page, what the classifier said; None where it was not asked."""


@dataclass(frozen=True)
class Wanted:
    """What has to be found for a question beside the pages."""

    examples: int
    """Answers of similar training questions."""
    crops: bool
    """The figure that a question names, cut out of its page."""


@dataclass(frozen=True)
class Ask:
    """What a model is asked about a sample in one pass."""

    messages: list[Message]
    images: list[str] = field(default_factory=list)
    """Paths relative to the run, one for each `<image>` in the messages."""
    max_pixels: int | None = None
    """Budget of each picture; None: the model's own."""
    max_new_tokens: int | None = None
    """None: infer.max_new_tokens."""
    temperature: float = 0.0
    """0: greedy."""
    seed: int = 0
    """Of the random numbers where it is not."""


class Task(Protocol):
    READS_DOCUMENTS: bool
    """Whether it is a DocumentTask."""
    READS_RECORDS: bool
    """Whether it is a RecordTask."""
    Samples: type[Section]
    """Settings of `preprocess.samples`."""
    Passes: type[Section]
    """Settings of `infer.passes`."""
    Scoring: type[Section]
    """Settings of `eval.scoring`."""
    COMPONENTS: tuple[str, ...]
    """What `infer.ablate` may name."""
    SHARED: tuple[str, ...]
    """Passes that the base model does once for all."""

    def sources(self, folder: Path) -> list[str]:
        """The data sets in the data folder that an adapter can be trained on, sorted. Raises DataError for none."""

    def read_questions(self, recipe: Recipe, folder: Path, documents: set[str], skip: Skip) -> list[Any]:
        """All usable questions; the others go to `skip`. Raises DataError when none is left."""

    def asked_rows(self, folder: Path, tested: list[Any]) -> list[dict[str, Any]]:
        """What a submission has a line for, in order; `tested` are the questions of the test set.

        Each row has `ids`, the samples whose answers it takes; each of the test set is in exactly one. What is scored
        and not handed in is in a row with `line` False.
        """

    def build_samples(self, recipe: Recipe, question: Any, found: Found | None, split: str) -> list[Sample]:
        """The samples of one question, at least one; in the test set exactly one. Without the answer at the end, which
        is the first reference, or `meta["target"]` where a model is to write it otherwise.

        `found` is None where the task reads no documents.
        """

    def passes(self, recipe: Recipe) -> tuple[str, ...]:
        """What the model is asked in turn; the last that is asked of a sample is the answer."""

    def ask(
        self, recipe: Recipe, sample: Sample, name: str, before: Mapping[str, str], without: Collection[str]
    ) -> Ask | None:
        """What to ask in a pass, with what came of those before it; None where the sample needs no such pass.

        `without` are the components that are left out.
        """

    def rehearsal(self, recipe: Recipe, sample: Sample, without: Collection[str]) -> list[tuple[Ask, int]]:
        """All that may be asked of a sample, each with the most tokens of earlier answers that it will hold."""

    def read_answer(self, text: str, sample: Sample) -> str | None:
        """The answer in a completion; None where there is none in it."""

    def narrowed(self, sample: Sample, answers: Sequence[str]) -> Sample | None:
        """The sample with only these answers to choose from, for a second vote; None where a task cannot ask so, or it
        would be the same question."""

    def submission(self, row: Mapping[str, Any], predictions: Mapping[str, Prediction]) -> dict[str, Any]:
        """A submission's line, of a row of `asked_rows` and the predictions that there are, by sample id."""

    def score(self, recipe: Recipe, answer: str, sample: Sample) -> dict[str, float]:
        """Metrics of one answer, each in 0..1. The first one is what adapters are chosen and weighed by."""

    def facts(self, sample: Sample) -> dict[str, float]:
        """Metrics of a sample that no answer changes, such as retrieval recall, each in 0..1."""

    def together(self, sample: Sample) -> str:
        """What samples that count once have in common, such as the rotations of one question: the least of their scores
        is what counts. The sample's id where each counts by itself."""

    def uploads(self, folder: Path, samples: Sequence[Sample], predictions: Mapping[str, Prediction]) -> list[str]:
        """Write one model's answers to the test samples as the files that a benchmark's server takes, below `folder`.
        Returns their names; none where the submission is all that is handed in. A sample may lack a prediction."""

    def measures(self, recipe: Recipe, answer: str | None, sample: Sample) -> dict[str, list[float]]:
        """What of an answer has a unit, by a name that says it (`axis angle, degrees`): several values of one name, or
        none. `answer` is None where there is none. It chooses and ranks nothing. Empty where nothing has a unit.
        """

    def picture(self, recipe: Recipe, sample: Sample, prediction: Prediction | None) -> str | None:
        """What is expected and what was answered as one SVG for the report, with nothing from outside in it that is not
        escaped; None where there is nothing to draw."""


class DocumentTask(Task, Protocol):
    """A task whose questions are about documents: they are rendered, embedded and searched for it."""

    def find_documents(self, folder: Path) -> list[Path]:
        """The documents to render, sorted. Raises DataError when there is none."""

    def wanted(self, recipe: Recipe) -> Wanted:
        """What has to be found for the questions."""

    def classification(self, recipe: Recipe, question: Any) -> Ask | bool | None:
        """How to find out whether a question's drawing is enough: what to ask a model, or what a rule says of it."""

    def read_classification(self, text: str) -> bool:
        """What a model's answer to that means."""


class RecordTask(Task, Protocol):
    """A task some of whose questions are made of records in Data-Juicer's format (`id`, `text`, `images`), which
    Data-Juicer may filter and rewrite first. Such a task reads no documents."""

    def records(self, folder: Path) -> Path:
        """The file of records, JSON Lines. Raises DataError when there is none, or when what its questions are made
        with is not there."""

    def read_others(self, recipe: Recipe, folder: Path, pictures: Path, skip: Skip) -> list[Any]:
        """All usable questions that are not made of records, in place of `read_questions`.

        They are read before Data-Juicer is let at the records: what is wrong with them is found before hours of work.
        The pictures that questions show are put into `pictures`, <run>/preprocess/pictures.
        """

    def read_records(
        self, recipe: Recipe, folder: Path, records: Path, pictures: Path, others: list[Any], skip: Skip
    ) -> list[Any]:
        """The usable questions that are made of records. None shows what a test question among `others` does.

        `records` are those that Data-Juicer kept, or the file as it is where the recipe has no
        `preprocess.data_juicer`.
        """
