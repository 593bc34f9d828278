"""The recipe: one YAML file that says what to do, the same on every machine.

Reading a recipe resolves its profile and `--set` overrides, and refuses unknown keys by name and line.
Paths in a recipe are relative to the three mounts (`roots.py`), so that a resolved recipe holds no machine's paths.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from stages.contract.errors import UsageError
from stages.contract.files import digest_of
from stages.contract.records import BASE, VOTE

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""A name that is also a folder's name: letters, digits, `.`, `_`, `-`; at most 64 characters."""


def file_name(text: str) -> str:
    """The text itself if it is a FileName other than `base` and `vote`; else a FileName made from it.

    To make one, `-` replaces each run of characters that are not ASCII letters, digits, `_` or `-`. The first 48
    characters stay (`data` if nothing is left), then `-` and the first 8 hex digits of the text's digest (`digest_of`).
    """
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text) and text not in (BASE, VOTE):
        return text
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_")[:48]
    return f"{readable or 'data'}-{digest_of(text)[:8]}"


Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A mapping of a recipe, or of a task's settings. Unknown keys and values of another type are refused.

    A validator's ValueError says `key: what was found; what to do`, with the key relative to this section.
    `problem_text` completes the key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


CHAT_TEMPLATES = ("chatml", "plain")
"""The names of Lorry's own chat templates, for `model.chat_template`."""


class Model(Section):
    """The base that is tuned."""

    path: str = Field(description="Folder of a Hugging Face model, relative to the model mount or absolute")
    swift_type: str | None = Field(
        None,
        description="ms-swift's --model_type of the model; only for training on samples with pictures, and not for the"
        " Qwen2-VL family, LLaVA and MGM, whose pictures Lorry reads itself",
    )
    swift_template: str | None = Field(
        None,
        description="ms-swift's --template of the model, for the same models as swift_type; it has to write the same as"
        " the chat template",
    )
    trust_remote_code: bool = Field(
        False, description="Run the Python files in the model's folder, for a model that transformers has no code for"
    )
    chat_template: str | None = Field(
        None,
        description="Chat template in place of the model's own, for a base model, which has none: chatml; plain, which"
        " writes roles as words; or a .jinja file, relative to the model mount or absolute. null: the model's own",
    )
    enable_thinking: bool | None = Field(
        None,
        description="Value of the chat template's variable of this name: whether hybrid models such as Qwen3 think"
        " before they answer; null: not set",
    )

    @model_validator(mode="after")
    def _check_chat_template(self) -> "Model":
        """Raise ValueError if chat_template is neither a known name nor a .jinja file."""
        found = self.chat_template
        if found is not None and found not in CHAT_TEMPLATES and not found.endswith(".jinja"):
            raise ValueError(
                f"chat_template: found {found!r}; set it to {', '.join(CHAT_TEMPLATES)} or the name of a .jinja file"
            )
        return self


class Data(Section):
    """The task's input, and how it is split."""

    path: str = Field(
        description="Folder with the task's input, relative to the data mount or absolute; for chat also a file"
    )
    test_fraction: Fraction = Field(
        0.25, description="Share of the groups, such as documents, held out for test; data that state a split keep it"
    )
    validation_fraction: Fraction = Field(0.1, description="Share of the other groups held out for validation")
    evaluate_on_training: bool = Field(
        False, description="Score the samples that are trained on, to test a pipeline; every table then says so"
    )


class Pages(Section):
    """How pages are rendered."""

    max_pixels: int = Field(1_229_312, ge=28 * 28, description="Pixel budget of a rendered page")
    jpeg_quality: int = Field(90, ge=1, le=100, description="JPEG quality of a rendered page")


class Retrieval(Section):
    """How pages are embedded and searched."""

    embedder: str = Field(
        description="Folder of the embedder, relative to the model mount: a sentence-transformers model, which reads a"
        " page's text, or GME-Qwen2-VL, which reads its picture"
    )
    top_k: int = Field(2, ge=1, description="Number of pages shown with a question that names no page")
    batch_size: int = Field(
        32, ge=1, description="Texts or pages that are embedded together; a kill loses at most one batch"
    )
    max_pixels: int = Field(
        1280 * 28 * 28, ge=28 * 28, description="Pixel budget of a page when its picture is embedded"
    )
    vectors: Literal["float32", "float16"] = Field("float32", description="Number format in which vectors are stored")


class DataJuicer(Section):
    """Data-Juicer filters and rewrites the records before questions are read from them."""

    process: list[dict[str, Any]] = Field(
        min_length=1,
        description="Data-Juicer operators, applied in order, each a name with its parameters. Weights (hf_clip and"
        " others with hf_) are folders relative to the model mount, word lists (flagged_words_dir) relative to"
        " data.path",
    )
    executor: Literal["default", "ray"] = Field(
        "default",
        description="default: processes on this machine; ray: a Ray cluster, started on this machine unless RAY_ADDRESS"
        " names one",
    )
    workers: int | None = Field(None, ge=1, description="Processes per operator; null: one per CPU")
    chunk_size: int = Field(
        10_000, ge=1, description="Records that an operator processes at a time; a kill loses at most one chunk"
    )

    @model_validator(mode="after")
    def _check_operators(self) -> "DataJuicer":
        """Raise ValueError if an operator is not one name with its parameters."""
        for entry in self.process:
            (name, given), *more = entry.items() or [("", None)]
            if more or not name or not (given is None or isinstance(given, dict)):
                raise ValueError(f"process: found {entry!r}; write an operator as one name with its parameters")
        return self

    def operators(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and parameters of each operator, in order."""
        return [(name, given or {}) for entry in self.process for name, given in entry.items()]

    def weight_folders(self, on_gpu: bool = False) -> dict[str, str]:
        """The weight folders of the operators, relative to the model mount, by the recipe key that names each.

        With `on_gpu`, without those of operators that the recipe keeps on the CPU (`accelerator: cpu`).
        """
        return {
            f"preprocess.data_juicer.process[{number}].{name}.{key}": value
            for number, (name, given) in enumerate(self.operators())
            for key, value in given.items()
            if key.startswith("hf_") and isinstance(value, str)
            if not (on_gpu and given.get("accelerator") == "cpu")
        }


class Preprocess(Section):
    """How the input becomes samples."""

    workers: int | None = Field(None, ge=1, description="Processes that render pages; null: one per CPU")
    page_timeout: float = Field(
        60.0,
        gt=0,
        description="Seconds that a page may take to render, or a document to open; after that its worker process is"
        " killed",
    )
    pages: Pages | None = Field(None, description="How pages are rendered; only for tasks that read documents")
    retrieval: Retrieval | None = Field(
        None, description="How pages are embedded and searched; only for tasks that read documents"
    )
    classifier: Literal["none", "rule", "model"] = Field(
        "none",
        description="What decides that a page's drawing alone answers a question; rule: a rule of the task; model: the"
        " model that is tuned; none: nothing does",
    )
    data_juicer: DataJuicer | None = Field(
        None, description="How Data-Juicer processes the records first; only for tasks that read records"
    )
    samples: dict[str, Any] = Field({}, description="Settings of the task: what a sample shows")


class Source(Section):
    """A part of a data mix: how much of one data set. `name` and `name#100` are short for `{source: name}` and
    `{source: name, count: 100}`."""

    source: str = Field(min_length=1, description="Name of a data set of the task")
    count: int | None = Field(
        None,
        ge=1,
        description="Number of samples; above the data set's size, samples repeat; null: all, or a fraction of them",
    )
    fraction: float | None = Field(
        None, gt=0, description="Number of samples as a share of the data set; above 1, samples repeat"
    )
    seed: int | None = Field(None, ge=0, description="Seed for drawing the samples; null: the recipe's seed")
    draw: Literal["random", "first"] = Field(
        "random", description="random: drawn by the seed; first: the first ones, in the data set's order"
    )

    @model_validator(mode="before")
    @classmethod
    def _parse_text(cls, value: Any) -> Any:
        """The mapping that `name` or `name#100` stands for; a value that is not text is returned as it is.

        Raises ValueError if the text after `#` is not a number.
        """
        if not isinstance(value, str):
            return value
        name, hash_sign, count = value.rpartition("#")
        if not hash_sign:
            return {"source": value}
        if not count.isdecimal():
            raise ValueError(f"source: found {value!r}; write a data set's name, or name#100 for 100 of its samples")
        return {"source": name, "count": int(count)}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler.resolve_ref_schema(handler(core_schema))]}

    @model_validator(mode="after")
    def _check_amount(self) -> "Source":
        """Raise ValueError if count and fraction are both set."""
        if self.count is not None and self.fraction is not None:
            raise ValueError(f"count {self.count}: fraction {self.fraction:g} is set too; remove one of the two")
        return self

    def __str__(self) -> str:
        parts = [self.source]
        if self.count is not None:
            parts.append(f"#{self.count}")
        if self.fraction is not None:
            parts.append(f" x {self.fraction:g}")
        if self.draw == "first":
            parts.append(" (the first)")
        elif self.seed is not None and len(parts) > 1:
            parts.append(f" (seed {self.seed})")
        return "".join(parts)


class Adapter(Section):
    """An adapter to train, and its data mix."""

    name: FileName = Field(description="Name of the adapter in files and tables")
    data: list[Source] = Field([], description="Data mix: parts of data sets; empty: all training samples")

    @model_validator(mode="after")
    def _check_name(self) -> "Adapter":
        """Raise ValueError for a name that tables use for the base or the vote."""
        if self.name == BASE:
            raise ValueError(f"name: {BASE!r} is the untuned model in every table; choose another name")
        if self.name == VOTE:
            raise ValueError(f"name: {VOTE!r} is the common answer in every table; choose another name")
        return self

    @property
    def mix(self) -> str:
        """The data mix as text, such as `train, more#100`; `all` for all training samples."""
        return ", ".join(map(str, self.data)) or "all"

    def covers(self, source: str) -> bool:
        """Whether the data mix names the data set `source`. An empty mix covers every data set."""
        return not self.data or any(part.source == source for part in self.data)


class Connector(Section):
    """The first of two training phases (LLaVA, arXiv:2304.08485). It trains only the connector, the layers between
    vision tower and language model. The second phase then trains the adapters on the base with that connector.

    The other settings are those of `train`, except for those of LoRA and those that change the base.
    """

    data: list[Source] = Field([], description="Data mix: parts of data sets; empty: all training samples")
    most_samples: int = Field(
        200_000,
        ge=1,
        description="Maximum number of samples; from a larger mix, the recipe's seed draws them, and the others are"
        " counted and left out",
    )
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate")
    epochs: float = Field(1.0, gt=0, description="Passes over the samples")
    effective_batch: int = Field(256, ge=1, description="Samples per optimizer step, over all GPUs: exactly so many")
    max_length: int = Field(
        2048, ge=16, description="Maximum tokens of a sample; longer ones are counted and left out, never cut"
    )
    warmup_ratio: Fraction = Field(0.03, description="Share of the steps in which the learning rate rises to its peak")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW")


CONNECTOR = "connector"
"""Name of the first phase in metrics, files and messages, in place of an adapter's name."""


class Train(Section):
    """Which adapters are trained, and how."""

    connector: Connector | None = Field(
        None, description="First phase: train the connector of a vision-language model; null: train adapters only"
    )
    adapters: list[Adapter] = Field([], description="Adapters to train, one for each data mix")
    adapter_for_each_source: bool = Field(
        False, description="Instead of adapters: train one for each data set of the task, named after it"
    )
    keep_going: bool = Field(
        False,
        description="If adapters fail to train, go on to inference with the others; false: stop once all were tried."
        " The next start tries the failed ones again",
    )
    lora_config: str | None = Field(
        None,
        description="JSON file in PEFT's format, relative to the data mount; its r, lora_alpha, lora_dropout and"
        " target_modules replace the recipe's; null: none replaced",
    )
    rank: int = Field(8, ge=1, description="LoRA rank")
    alpha: int = Field(32, ge=1, description="LoRA alpha; an update is scaled by alpha / rank")
    dropout: Fraction = Field(0.05, description="Dropout on the inputs of LoRA")
    target_modules: list[str] | str = Field(
        ["all-linear"],
        min_length=1,
        description="Modules that get LoRA, as in PEFT: names, or one regular expression for whole paths; all-linear:"
        " every linear module of the language model except its head, and of the vision tower unless that is frozen",
    )
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate")
    lora_plus_ratio: float | None = Field(
        None, gt=0, description="LoRA+: learning rate of B divided by that of A; null: the same for both"
    )
    epochs: float = Field(1.0, gt=0, description="Passes over an adapter's samples")
    effective_batch: int = Field(16, ge=1, description="Samples per optimizer step, over all GPUs: exactly so many")
    learn: Literal["all", "last"] = Field(
        "all", description="Answers of a conversation that are learnt: all of the assistant's turns, or only the last"
    )
    max_length: int = Field(
        2048,
        ge=16,
        description="Maximum tokens of a sample; longer conversations are counted, and left out or cut (too_long); a"
        " longer plain text becomes several sequences",
    )
    too_long: Literal["leave out", "cut"] = Field(
        "leave out",
        description="A conversation longer than max_length is left out, or cut between turns: it keeps its system"
        " message and tools and begins at a later user's turn. cut also shortens prompts longer than infer.max_length",
    )
    warmup_ratio: Fraction = Field(0.05, description="Share of the steps in which the learning rate rises to its peak")
    weight_decay: float = Field(0.1, ge=0, description="Weight decay of AdamW")
    adam_beta2: Fraction = Field(0.95, description="Second beta of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="Norm to which gradients are clipped")
    max_pixels: int | None = Field(None, ge=28 * 28, description="Pixel budget of an image; null: the model's own")
    freeze_vision: bool = Field(
        True,
        description="Freeze the vision tower; false: it may get LoRA, which vllm serves only merged (infer.merged)",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute activations again in the backward pass of all layers: less memory, slower; false: of as"
        " many as memory requires",
    )
    precision: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Data type that the frozen base computes in; auto: by compute capability. LoRA weights are float32",
    )
    load_in_4bit: bool = Field(False, description="Keep the frozen base in 4 bits (bitsandbytes' NF4) while training")
    sharding: Literal["auto", "none", "zero3"] = Field(
        "auto",
        description="Share the frozen base out over several GPUs by DeepSpeed's ZeRO-3; auto: if it does not fit whole",
    )
    least_max_length: int | None = Field(
        None, ge=16, description="Lower bound for max_length when out of memory; null: never shortened"
    )
    least_max_pixels: int | None = Field(
        None, ge=28 * 28, description="Lower bound for max_pixels when out of memory; null: never lowered"
    )
    log_every: int = Field(5, ge=1, description="Optimizer steps between two log entries")
    checkpoint_every: int = Field(
        50, ge=1, description="Optimizer steps between two checkpoints; each comes with a validation pass"
    )
    keep_checkpoints: int = Field(2, ge=1, description="Number of checkpoints to keep while training, the newest ones")
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        ["tensorboard"],
        description="Trackers that get losses, learning rate, gradient norm, speed and memory. tensorboard: event files"
        " in the run; wandb, mlflow: if they are installed, without network into files in the run",
    )

    @model_validator(mode="after")
    def _check_adapters(self) -> "Train":
        """Raise ValueError if two adapters have the same name, or if none is listed without adapter_for_each_source."""
        names = [adapter.name for adapter in self.adapters]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"adapters: several are named {' and '.join(twice)}; give each a name of its own")
        if not names and not self.adapter_for_each_source:
            raise ValueError("adapters: lists none; list one, or set train.adapter_for_each_source")
        return self

    @property
    def trains_connector(self) -> bool:
        """Whether these are the settings of the first phase, which `connector_settings` returns."""
        return self.connector is not None and [adapter.name for adapter in self.adapters] == [CONNECTOR]

    def full_key(self, name: str) -> str:
        """The full recipe key of one of these settings: `train.max_length`, or `train.connector.max_length`."""
        section = f"train.{CONNECTOR}" if self.trains_connector and name in Connector.model_fields else "train"
        return f"{section}.{name}"

    @property
    def phases(self) -> "list[Train]":
        """The settings of each phase of training: the connector's, if the recipe trains one, and the adapters'."""
        return [self] if self.connector is None else [self.connector_settings(), self]

    def connector_settings(self) -> "Train":
        """The settings of the first phase: `train` with the values of `train.connector`, without LoRA.

        The base is never in 4 bits, and nothing is sharded, as a connector is small. least_max_length is lowered to the
        connector's max_length. Call it only if `connector` is set.
        """
        assert self.connector is not None
        own = {name: getattr(self.connector, name) for name in Connector.model_fields if name in Train.model_fields}
        least = self.least_max_length and min(self.least_max_length, self.connector.max_length)
        return self.model_copy(
            update={
                **own,
                **{"adapters": [Adapter(name=CONNECTOR, data=self.connector.data)], "adapter_for_each_source": False},
                **{"lora_config": None, "lora_plus_ratio": None, "load_in_4bit": False, "sharding": "none"},
                "least_max_length": least,
            }
        )

    @model_validator(mode="after")
    def _check_sharding(self) -> "Train":
        """Raise ValueError for zero3 with a base in 4 bits."""
        if self.load_in_4bit and self.sharding == "zero3":
            raise ValueError(
                "sharding zero3: cannot shard a base in 4 bits; set it to none, or train.load_in_4bit to false"
            )
        return self

    @model_validator(mode="after")
    def _check_lower_bounds(self) -> "Train":
        """Raise ValueError if a lower bound is above the value that it limits, or limits a max_pixels that is null."""
        if self.least_max_length is not None and self.least_max_length > self.max_length:
            raise ValueError(
                f"least_max_length {self.least_max_length}: above train.max_length, which is {self.max_length}; lower"
                " it"
            )
        if self.least_max_pixels is not None and (self.max_pixels is None or self.least_max_pixels > self.max_pixels):
            found = self.max_pixels or "null"
            raise ValueError(
                f"least_max_pixels {self.least_max_pixels}: train.max_pixels is {found}; set"
                f" train.max_pixels to {self.least_max_pixels} or more, or train.least_max_pixels to null"
            )
        return self


RESULT_NEUTRAL = {
    *("gradient_checkpointing", "sharding", "least_max_length", "least_max_pixels", "keep_checkpoints", "keep_going"),
    "report_to",
}
"""Settings of `train` that do not change what an adapter learns. They change memory, disk space, speed, what happens
after a failure, and who is told."""


ADDED: dict[str, dict[str, Any]] = {
    "model": {"chat_template": None, "enable_thinking": None, "trust_remote_code": False},
    "train": {"learn": "all", "too_long": "leave out"},
    "infer": {"losses": False},
}
"""Keys that recipes of earlier runs lack, by section, with the value for what those runs did. Digests leave out a key
with that value."""


def without_added(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a section, for a digest: without the keys in ADDED that have the value there."""
    added = ADDED.get(section, {})
    return {key: value for key, value in values.items() if key not in added or value != added[key]}


class Vote(Section):
    """The adapters' common answer: the answer that most of them give."""

    adapters: Literal["all", "greedy"] | list[FileName] = Field(
        "all",
        description="Adapters that vote; greedy: the best N, where N gives the vote its highest score in validation",
    )
    weights: Literal["uniform", "validation"] = Field(
        "uniform", description="Weight of a vote; uniform: 1; validation: the adapter's score on the validation samples"
    )
    second_round: bool = Field(
        False, description="If no answer has more than half of the votes, ask again with the leading answers only"
    )

    @model_validator(mode="after")
    def _check_voters(self) -> "Vote":
        """Raise ValueError if the list of adapters is empty, or has an adapter twice."""
        if not self.adapters:
            raise ValueError("adapters: lists none; list at least one, or write all or greedy")
        names = self.adapters if isinstance(self.adapters, list) else []
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"adapters: lists {name!r} twice; list it once")
        return self


class Infer(Section):
    """How base and adapters answer the test samples."""

    engine: str = Field("vllm", description="Engine that answers the prompts, by its name in stages/engines")
    max_length: int = Field(
        8192, ge=16, description="Maximum tokens of prompt and completion; a sample with a longer prompt fails"
    )
    max_new_tokens: int = Field(64, ge=1, description="Maximum tokens of a completion; a task may set less for a pass")
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        16,
        description="Sequences decoded together; auto: transformers tries which number fits, vllm uses its own default",
    )
    chunk_size: int = Field(
        256, ge=1, description="Records submitted at once; with transformers, a kill loses at most one chunk"
    )
    passes: dict[str, Any] = Field({}, description="Settings of the task: what the model is asked, pass by pass")
    ablate: list[FileName] = Field(
        [], description="Components of the task; the test samples are answered again without each of them in turn"
    )
    answers: Literal["all", "own sources"] = Field(
        "all", description="Test samples that an adapter answers; own sources: those of the data sets in its data mix"
    )
    losses: bool = Field(
        False,
        description="Also compute the loss of the test samples' own answers, for base and adapters on the same tokens",
    )
    vote: Vote | None = Field(None, description="How the adapters vote; null: no vote")
    merged: bool = Field(
        False, description="Merge each adapter into a copy of the weights before it answers, one adapter at a time"
    )
    tensor_parallel: int | None = Field(
        None,
        ge=1,
        description="GPUs that share the weights (vllm); null: as many visible GPUs as the model can be split over",
    )

    @model_validator(mode="after")
    def _check_room_for_prompt(self) -> "Infer":
        """Raise ValueError if a completion alone may be as long as max_length."""
        if self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens}: leaves no room for a prompt, as infer.max_length is"
                f" {self.max_length}; lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _check_answers_for_vote(self) -> "Infer":
        """Raise ValueError for a vote of adapters that do not all answer the same samples."""
        if self.vote is not None and self.answers != "all":
            raise ValueError(
                f"answers {self.answers}: adapters that answer different samples cannot vote together; set it to all,"
                " or infer.vote to null"
            )
        return self


class Eval(Section):
    """How answers are scored and reported."""

    worst: int = Field(
        10,
        ge=0,
        description="Number of worst answers in the report; with infer.losses, also of the samples whose loss tuning"
        " lowered most, and of those whose loss it raised most",
    )
    scoring: dict[str, Any] = Field({}, description="Settings of the task: how answers are scored")


class Recipe(Section):
    """A resolved recipe: its profile is applied."""

    description: str = Field("", description="What the recipe does, in one line")
    task: FileName = Field(description="Task: a module of stages/tasks/")
    seed: int = Field(42, ge=0, description="Seed of every random choice")
    profile: str | None = Field(None, description="Profile that was applied; set by Lorry")
    model: Model = Field(description="Base that is tuned")
    data: Data = Field(description="Input of the task, and how it is split")
    preprocess: Preprocess = Field(description="How the input becomes samples")
    train: Train = Field(description="Which adapters are trained, and how")
    infer: Infer = Field(Infer(), description="How base and adapters answer the test samples")
    eval: Eval = Field(Eval(), description="How answers are scored and reported")

    @model_validator(mode="after")
    def _check_connector_name(self) -> "Recipe":
        """Raise ValueError if an adapter has the name of the first phase."""
        if self.train.connector is not None and any(adapter.name == CONNECTOR for adapter in self.train.adapters):
            raise ValueError(
                f"train.adapters: {CONNECTOR!r} is the name of the first phase (train.connector); rename that adapter"
            )
        return self

    @model_validator(mode="after")
    def _check_voters_are_trained(self) -> "Recipe":
        """Raise ValueError if `infer.vote` lists an adapter that is not trained.

        Nothing is checked while train.adapters is empty: with adapter_for_each_source, `settle_recipe` fills it.
        """
        vote = self.infer.vote
        if vote is not None and isinstance(vote.adapters, list) and self.train.adapters:
            unknown = sorted(set(vote.adapters) - {adapter.name for adapter in self.train.adapters})
            if unknown:
                raise ValueError(
                    f"infer.vote.adapters: found {', '.join(unknown)}, which train.adapters lacks; list"
                    " adapters that are trained"
                )
        return self

    def digest(self, *sections: str, replaced: Mapping[str, Mapping[str, Any]] | None = None) -> str:
        """sha256 (hex) of the values of the named sections or keys (`section.key`); without names, of the whole recipe.

        `RESULT_NEUTRAL`, description and profile are left out: a run resumes even if they change. So are the keys in
        ADDED with the value there. `replaced` adds the values of `replaced_values` to the named sections, for the
        digest that an earlier version of Lorry computed.
        """
        values = self.model_dump(mode="json", exclude={"description": True, "profile": True, "train": RESULT_NEUTRAL})
        for section in ADDED:
            values[section] = without_added(section, values[section])
        if not sections:
            return digest_of(values)
        found = {}
        for name in sections:
            section, _, key = name.partition(".")
            if key in ADDED.get(section, {}) and key not in values[section]:
                continue
            found[name] = values[section][key] if key else values[section]
            if not key and replaced and section in replaced:
                found[name] = {**values[section], **replaced[section]}
        return digest_of(found)


REPLACED = {
    ("eval", "bootstrap"): "intervals are computed without resamples (docs/runs.md#intervals)",
    ("train", "micro_batch"): "a pass holds as many tokens as memory allows (docs/memory.md)",
    ("train", "connector", "micro_batch"): "a pass holds as many tokens as memory allows (docs/memory.md)",
    ("train", "exact_batch"): "a step has exactly train.effective_batch samples on any number of GPUs",
}
"""Keys that recipes of earlier runs have, and what replaced them. They are read and ignored."""

REPLACED_VALUES = {("train", "sharding"): ("zero2", "auto", "Lorry shards the base (zero3) or nothing")}
"""Values that recipes of earlier runs have, each with the value that it is read as, and why."""

IN_EARLIER_DIGESTS = (("eval", "bootstrap"),)
"""Those of REPLACED that were in the digest of a recipe. The others never changed a result."""


def replaced_values(path: Path) -> dict[str, dict[str, Any]]:
    """The values of the keys IN_EARLIER_DIGESTS that a recipe file sets outside its profiles, by section and name.

    Raises UsageError if the file cannot be read, or is not a YAML mapping.
    """
    values, _, _ = _read_recipe_file(path)
    return {
        section: {name: values[section][name]}
        for section, name in IN_EARLIER_DIGESTS
        if isinstance(values.get(section), dict) and name in values[section]
    }


def job_of_recipe(path: Path) -> dict[str, str]:
    """What a run's recipe file says of its job: those of `task`, `data.path` and `model.path` that it has, by key. It
    may be of another version of Lorry.

    Raises UsageError if the file cannot be read, or is not a YAML mapping.
    """
    values, _, _ = _read_recipe_file(path)
    places = {"task": values, "data.path": values.get("data"), "model.path": values.get("model")}
    found = {key: place.get(key.rpartition(".")[2]) for key, place in places.items() if isinstance(place, dict)}
    return {key: str(value) for key, value in found.items() if value is not None}


def load_recipe(
    path: Path,
    profile: str | None = None,
    overrides: tuple[str, ...] = (),
    data: Path | None = None,
    say: Callable[[str, str], None] | None = None,
) -> Recipe:
    """The resolved recipe of a file, after a profile, a data folder and `section.key=value` overrides, in this order.

    `say` gets, for each key that is ignored because something replaced it, and for each value that is read as another,
    its section and a line. Raises UsageError
    for a file that cannot be read, an unknown profile, an override of another form, an unknown or missing key, and a
    wrong value. The message has the line of a key or value that the file sets.
    """
    values, profiles, text = _read_recipe_file(path)
    prefix: tuple[str, ...] = ()
    if profile is not None:
        if profile not in profiles:
            raise UsageError(f"{path}: no profile {profile!r}; known profiles: {', '.join(profiles) or 'none'}")
        values = _merge(values, profiles[profile] or {}, f"{path}: profiles.{profile}")
        values["profile"] = profile
        prefix = ("profiles", profile)
    if data is not None:
        values = _merge(values, {"data": {"path": str(data.absolute())}}, "--data")
    for override in overrides:
        values = _merge(values, parse_override(override), f"--set {override}")
    for location, instead in REPLACED.items():
        key = ".".join(location)
        if _remove_key(values, location) and say is not None:
            where = _where_set(path, location, profile, overrides)
            say(location[0], f"{where}: {key!r} is ignored: {instead}; remove it")
    for (section, name), (value, other, why) in REPLACED_VALUES.items():
        if isinstance(values.get(section), dict) and values[section].get(name) == value:
            values[section] = {**values[section], name: other}
            if say is not None:
                where = _where_set(path, (section, name), profile, overrides)
                say(section, f"{where}: {f'{section}.{name}'!r} {value} is read as {other}: {why}; set it to {other}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(_describe_problems(error, path, text, prefix, values, overrides)) from error


def _read_recipe_file(path: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A recipe file's values without profiles, its profiles by name, and its text.

    Raises UsageError if the file cannot be read, or if it or its `profiles` is not a YAML mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read the recipe ({error}); name a readable text file") from error
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML ({' '.join(str(error).split())}); correct that line") from error
    if not isinstance(values, dict):
        known = ", ".join(Recipe.model_fields)
        raise UsageError(f"{path}: found a {type(values).__name__}; write a mapping with the keys {known}")
    profiles = values.pop("profiles", None) or {}
    if not isinstance(profiles, dict):
        raise UsageError(f"{path}: profiles: found {profiles!r}; write a mapping of names to sections")
    return values, profiles, text


def _where_set(path: Path, location: tuple[str, ...], profile: str | None, overrides: tuple[str, ...]) -> str:
    """The place where a recipe sets a key: the last override that does, or else file and line."""
    options = [f"--set {override}" for override in overrides if _sets_key(override, location)]
    return options[-1] if options else locate_key(path, location, profile)


def locate_key(path: Path, location: tuple[str, ...], profile: str | None) -> str:
    """The place where a recipe file sets a key, as `file:line`; only the file if it does not set the key.

    A line in the profile takes precedence; `profile` None: no profile. Raises OSError if the file cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    line = _key_line(text, ("profiles", profile, *location)) if profile else None
    line = line or _key_line(text, location)
    return f"{path}:{line}" if line else str(path)


def profile_names(path: Path) -> list[str]:
    """Names of a recipe file's profiles. Raises UsageError if the file cannot be read, or is not a YAML mapping."""
    return list(_read_recipe_file(path)[1])


def recipe_file_schema(engines: Sequence[str]) -> dict[str, Any]:
    """JSON schema of a recipe file, with its profiles; `engines` are the names that `infer.engine` may have."""
    schema = Recipe.model_json_schema()
    schema["$defs"]["Infer"]["properties"]["engine"]["enum"] = list(engines)
    schema["properties"].pop("profile")
    schema["properties"]["profiles"] = {
        "type": "object",
        "additionalProperties": {"type": "object"},
        "description": "Named sets of overrides; --profile applies one of them",
    }
    return schema


def dump_recipe(recipe: Recipe) -> str:
    """A resolved recipe as YAML text."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Loads YAML and refuses a key that comes twice, where PyYAML's own loader silently takes the later one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node. Raises MarkedYAMLError for a key that is not a plain name, or comes twice."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a plain name", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"found key {key.value!r} twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 2e-4 (no dot) as text, but the user means a number
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _merge(base: Any, over: Any, where: str) -> dict[str, Any]:
    """`base` with the values of `over`. Mappings are merged key by key; other values, including lists, are replaced.

    Raises UsageError if `over` is not a mapping; `where` begins the message.
    """
    if not isinstance(over, dict):
        raise UsageError(f"{where}: found {over!r}; write a mapping of keys to values")
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merge(result[key], value, where) if both else value
    return result


def _sets_key(override: str, location: tuple[str, ...]) -> bool:
    """Whether an override of the form `section.key=value` sets a key, also as part of a mapping."""
    values: Any = parse_override(override)
    for name in location:
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


def _remove_key(values: dict[str, Any], location: tuple[str, ...]) -> bool:
    """Remove a key from nested mappings, in copies of those above it. Returns whether it was there."""
    name, *inner = location
    if name not in values:
        return False
    if not inner:
        del values[name]
        return True
    if not isinstance(values[name], dict):
        return False
    values[name] = dict(values[name])
    return _remove_key(values[name], tuple(inner))


def parse_override(text: str) -> dict[str, Any]:
    """The nested mapping that `section.key=value` stands for.

    Raises UsageError if the text has another form, or if the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"--set {text}: not section.key=value; write it as in train.learning_rate=2e-4")
    try:
        parsed: Any = yaml.load(value, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text}: {value!r} is not a YAML value; put it in quotes") from error
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def _describe_problems(
    error: ValidationError,
    path: Path,
    text: str,
    prefix: tuple[str, ...],
    values: dict[str, Any],
    overrides: tuple[str, ...],
) -> str:
    """The first three problems in one line, each with its place and cure, and the number of further problems.

    The place is the override that sets the key, else file and line, or only the file `path` if its text does not set
    the key. `prefix` is the location of the applied profile, where a key is looked for first. `values` are the wrong
    ones.
    """
    problems: dict[str, str] = {}
    for detail in error.errors():
        location = _location(detail)
        line = _key_line(text, prefix + location) or _key_line(text, location)
        key = ".".join(map(str, location))
        options = [f"--set {one}" for one in overrides if _sets(one.partition("=")[0], key, detail)]
        where = options[-1] if options else f"{path}:{line}" if line else str(path)
        if detail["type"] == "extra_forbidden":
            problems[key] = f"{where}: unknown key {key!r}; {_hint(location, values)}"
        elif detail["type"] == "missing":
            problems[key] = f"{where}: {key!r} is missing; set it"
        elif key in problems:  # if a key may have values of several types, pydantic lists a problem for each of them
            problems[key] += f", or {_requirement(detail)}"
        else:
            problems[key] = f"{where}: {problem_text(detail, key)}"
    more = len(problems) - 3
    return "; ".join([*problems.values()][:3]) + (f"; and {more} more" if more > 0 else "")


def _sets(override: str, key: str, detail: "ErrorDetails") -> bool:
    """Whether an override of the full key `override` sets the wrong value at `key`: that key, its section, or a part of
    a value that has no parts. A section may also be wrong because of its other keys."""
    deeper = detail["type"] != "value_error" and f"{override}.".startswith(f"{key}.")
    return f"{key}.".startswith(f"{override}.") or deeper


def problem_text(detail: "ErrorDetails", key: str) -> str:
    """One of pydantic's problems as `key: what was found; what to do`. `key` names the wrong value or section."""
    if detail["type"] == "value_error":
        section = f"{key}." if key else ""
        return f"{section}{detail['ctx']['error']}"
    found = detail["input"]
    kind = "a mapping" if isinstance(found, dict) else "a list" if isinstance(found, list) else ""
    return f"{key or 'recipe'}: found {kind if found and kind else repr(found)}; it must {_requirement(detail)}"


def _requirement(detail: "ErrorDetails") -> str:
    """What a wrong value must be or have, as a verb phrase such as `be greater than 0`."""
    if detail["type"] in ("model_type", "dict_type"):
        return "be a mapping of keys to values"
    text = re.sub(r" after validation, not \d+$", "", detail["msg"])
    return re.sub(r"^\w+ should ", "", text)


def _location(detail: "ErrorDetails") -> tuple[int | str, ...]:
    """The path of keys and list indexes to a wrong value or section, without the names of types that pydantic adds."""
    if detail["type"] == "extra_forbidden":
        return detail["loc"]
    return tuple(
        part for part in detail["loc"] if isinstance(part, int) or (part.isidentifier() and part not in ("str", "int"))
    )


def _hint(location: tuple[int | str, ...], values: dict[str, Any]) -> str:
    """What the unknown key at this location may be meant to be: at most three full keys, or the known keys there.

    In this order: a similar key of the same section, keys of other sections with the same last part, similar keys of
    other sections. `values` are the recipe's, which may set keys that only its task knows.
    """
    *around, name = [str(part) for part in location if not isinstance(part, int)]
    full_keys = {key: key.rpartition(".")[2] for key in _full_keys(Recipe, values)}
    section = ".".join(around)
    beside = {last: key for key, last in full_keys.items() if key.rpartition(".")[0] == section}
    similar = difflib.get_close_matches(name, full_keys.values(), n=1, cutoff=0.7)
    found = (
        [beside[last] for last in difflib.get_close_matches(name, beside, n=1, cutoff=0.7)]
        or [key for key, last in full_keys.items() if last == name]
        or [key for key, last in full_keys.items() if last in similar]
        or difflib.get_close_matches(".".join([*around, name]), full_keys, n=1, cutoff=0.8)
        or [beside[last] for last in difflib.get_close_matches(name, beside, n=1, cutoff=0.5)]
    )
    if not found:
        return f"known keys: {', '.join(beside)}"
    return f"did you mean {' or '.join(map(repr, sorted(found, key=lambda key: key.count('.'))[:3]))}?"


def _full_keys(section: type[BaseModel], values: Any, prefix: str = "") -> list[str]:
    """All keys of a recipe section and of the sections in it, with `prefix` before each: `train.adapters.name`.

    Of the settings of a task, those that `values` sets.
    """
    found = []
    for name, field in section.model_fields.items():
        given = values.get(name) if isinstance(values, dict) else None
        inner = _sections_in(field.annotation)
        found.append(f"{prefix}{name}")
        for one in inner:
            found += _full_keys(one, given, f"{prefix}{name}.")
        if not inner and isinstance(given, dict):
            found += [f"{prefix}{name}.{key}" for key in given]
    return found


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field with this annotation may hold, by itself or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_in(argument)]


def _key_line(text: str, location: tuple[int | str, ...]) -> int | None:
    """The line (1-based) of a key or list item in YAML text; None if the text does not have it."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == part]
            if not found:
                return None
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return None
    return line
