"""The recipe: one YAML file that says what to do, the same on every machine.

Reading it resolves a profile and `--set` overrides, and refuses unknown keys by name and line.
Paths in it are relative to the three mounts (`roots.py`), so that a resolved recipe holds no machine's paths.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from stages.contract.errors import UsageError
from stages.contract.files import digest_of
from stages.contract.records import BASE, VOTE

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""A name that is also a folder: letters, digits, `.`, `_`, `-`."""


def file_name(text: str) -> str:
    """A FileName for any text: the text itself where it is one, else what of it can be read, and a digest."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text) and text not in (BASE, VOTE):
        return text
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_")[:48]
    return f"{readable or 'data'}-{digest_of(text)[:8]}"


Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


class Model(Section):
    path: str = Field(description="Folder of an ordinary Hugging Face model, relative to the model mount or absolute")
    swift_type: str = Field(description="ms-swift's --model_type, which local folders need")
    swift_template: str = Field(description="ms-swift's --template, which local folders need")


class Data(Section):
    path: str = Field(description="Folder with the task's input, relative to the data mount or absolute")
    test_fraction: Fraction = Field(0.25, description="Share of groups (documents) held out for test")
    validation_fraction: Fraction = Field(0.1, description="Share of groups held out for validation")
    evaluate_on_training: bool = Field(
        False, description="Score on the samples that are trained on; every table then says so. For tests of a pipeline"
    )


class Pages(Section):
    max_pixels: int = Field(1_229_312, ge=28 * 28, description="Pixel budget of a rendered page")
    jpeg_quality: int = Field(90, ge=1, le=100)


class Retrieval(Section):
    embedder: str = Field(
        description="Folder of a sentence-transformers model, which reads a page's text, or of GME-Qwen2-VL, which sees"
        " its picture; relative to the model mount"
    )
    top_k: int = Field(2, ge=1, description="Pages shown with a question that names none")
    batch_size: int = Field(32, ge=1, description="Texts or pages embedded together, and the most that a kill can cost")
    max_pixels: int = Field(1280 * 28 * 28, ge=28 * 28, description="Pixel budget of a page that is embedded")
    vectors: Literal["float32", "float16"] = Field("float32", description="How the vectors are kept")


class DataJuicer(Section):
    """What Data-Juicer does with the records before questions are made of them."""

    process: list[dict[str, Any]] = Field(
        min_length=1,
        description="Data-Juicer's own list of operators, in order: a name, and its parameters. Weights (hf_clip and"
        " the like) are folders relative to the model mount, lists of words (flagged_words_dir) relative to data.path",
    )
    executor: Literal["default", "ray"] = Field(
        "default", description="default: processes of this machine; ray: a Ray of this machine, or that of RAY_ADDRESS"
    )
    workers: int | None = Field(None, ge=1, description="Processes of an operator; null: one per CPU")
    chunk_size: int = Field(
        10_000, ge=1, description="Records that an operator does at a time: the most of its work that a kill can cost"
    )

    @model_validator(mode="after")
    def _one_name_each(self) -> "DataJuicer":
        for entry in self.process:
            (name, given), *more = entry.items() or [("", None)]
            if more or not name or not (given is None or isinstance(given, dict)):
                raise ValueError(f"process: an operator is one name with its parameters, found {entry!r}")
        return self

    def operators(self) -> list[tuple[str, dict[str, Any]]]:
        """The operators in order: name, parameters."""
        return [(name, given or {}) for entry in self.process for name, given in entry.items()]

    def weights(self) -> dict[str, str]:
        """The folders of weights that operators name, by where in the recipe they do."""
        return {
            f"preprocess.data_juicer.process[{number}].{name}.{key}": value
            for number, (name, given) in enumerate(self.operators())
            for key, value in given.items()
            if key.startswith("hf_") and isinstance(value, str)
        }


class Preprocess(Section):
    workers: int | None = Field(None, ge=1, description="Rendering processes; null: one per CPU")
    page_timeout: float = Field(60.0, gt=0, description="Seconds for a page before its worker is ended")
    pages: Pages | None = Field(None, description="How pages are rendered; for tasks that read documents")
    retrieval: Retrieval | None = Field(None, description="How they are searched; for tasks that read documents")
    classifier: Literal["none", "rule", "model"] = Field(
        "none",
        description="Who tells which questions on a page are answered from its drawing alone: a rule of the task, the"
        " model that is tuned, or nobody",
    )
    data_juicer: DataJuicer | None = Field(
        None, description="What Data-Juicer does with the records first; for tasks that read records"
    )
    samples: dict[str, Any] = Field({}, description="The task's own settings of what a sample shows")


class Source(Section):
    """A part of a data mix: how much of one data set. In a recipe `name` and `name#100` say it shortly."""

    source: str = Field(min_length=1, description="Name of a data set of the task")
    count: int | None = Field(None, ge=1, description="Samples; more than there are: some come again")
    fraction: float | None = Field(None, gt=0, description="The same as a share of them, which may exceed 1")
    seed: int | None = Field(None, ge=0, description="Of the draw; null: the recipe's")
    draw: Literal["random", "first"] = "random"

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        name, hash_sign, count = value.rpartition("#")
        if not hash_sign:
            return {"source": value}
        if not count.isdecimal():
            raise ValueError("write a part of a data mix as name, or as name#100 for 100 samples of it")
        return {"source": name, "count": int(count)}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler.resolve_ref_schema(handler(core_schema))]}

    @model_validator(mode="after")
    def _one_amount(self) -> "Source":
        if self.count is not None and self.fraction is not None:
            raise ValueError("give count or fraction, not both")
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
    name: FileName
    data: list[Source] = Field([], description="Its data mix: parts of data sets; empty: all there is to train on")

    @model_validator(mode="after")
    def _not_taken(self) -> "Adapter":
        if self.name == BASE:
            raise ValueError("an adapter cannot be named 'base': that names the untuned model in every table")
        if self.name == VOTE:
            raise ValueError("an adapter cannot be named 'vote': that names the adapters' common answer in every table")
        return self

    @property
    def mix(self) -> str:
        """Its data mix in words."""
        return ", ".join(map(str, self.data)) or "all"

    def covers(self, source: str) -> bool:
        """Whether its mix has samples of a data set."""
        return not self.data or any(part.source == source for part in self.data)


class Connector(Section):
    """The first of two phases (LLaVA, arXiv:2304.08485): what stands between a vision tower and a language model is
    trained whole, and nothing else. The adapters are then trained on the base with it.

    What is not said here is as in `train`, but for LoRA's settings and for what would change the base.
    """

    data: list[Source] = Field([], description="Its data mix: parts of data sets; empty: all there is to train on")
    most_samples: int = Field(
        200_000, ge=1, description="Of the mix, samples beyond it are left out, drawn by the recipe's seed, and counted"
    )
    learning_rate: float = Field(1e-3, gt=0)
    epochs: float = Field(1.0, gt=0)
    effective_batch: int = Field(256, ge=1, description="Samples per optimizer step, over all GPUs")
    micro_batch: int = Field(1, ge=1, description="Samples per forward pass on one GPU")
    max_length: int = Field(2048, ge=16, description="Tokens; a longer sample is counted and left out, never cut")
    warmup_ratio: Fraction = 0.03
    weight_decay: float = Field(0.0, ge=0)


CONNECTOR = "connector"
"""What the first phase is called beside the adapters: in metrics, files and messages."""


class Train(Section):
    connector: Connector | None = Field(None, description="Train the connector of a vision-language model first")
    adapters: list[Adapter] = Field([], description="One for each data mix")
    adapter_for_each_source: bool = Field(
        False, description="Instead: one adapter for each data set of the task, named after it"
    )
    keep_going: bool = Field(
        False,
        description="Where some adapters cannot be trained, go on to inference with the others. They are always tried"
        " one by one, and again by the next run",
    )
    lora_config: str | None = Field(
        None,
        description="JSON file in PEFT's form, relative to the data mount: its r, lora_alpha, lora_dropout and"
        " target_modules take the place of the recipe's",
    )
    rank: int = Field(8, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: Fraction = 0.05
    target_modules: list[str] | str = Field(
        ["all-linear"],
        min_length=1,
        description="As PEFT's: names of modules, or one regular expression for their paths",
    )
    learning_rate: float = Field(1e-4, gt=0)
    lora_plus_ratio: float | None = Field(None, gt=0, description="LoRA+: learning rate of B over that of A")
    epochs: float = Field(1.0, gt=0)
    effective_batch: int = Field(16, ge=1, description="Samples per optimizer step, over all GPUs")
    exact_batch: bool = Field(
        False, description="Refuse GPUs with which effective_batch can only be come near to; the connector's too"
    )
    micro_batch: int = Field(1, ge=1, description="Samples per forward pass on one GPU")
    max_length: int = Field(2048, ge=16, description="Tokens; a longer sample is counted and left out, never cut")
    warmup_ratio: Fraction = 0.05
    weight_decay: float = Field(0.1, ge=0)
    adam_beta2: Fraction = 0.95
    max_grad_norm: float = Field(1.0, gt=0)
    max_pixels: int | None = Field(None, ge=28 * 28, description="Pixel budget of an image; null: the model's own")
    freeze_vision: bool = Field(
        True, description="Leave a vision tower as it is. One that is adapted can be served merged only (infer.merged)"
    )
    gradient_checkpointing: bool = False
    precision: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="What the frozen base computes in; auto: by compute capability. LoRA weights are float32"
    )
    load_in_4bit: bool = Field(False, description="Keep the frozen base in 4 bits (bitsandbytes' NF4) while training")
    sharding: Literal["auto", "none", "zero2", "zero3"] = Field(
        "auto", description="DeepSpeed ZeRO over several GPUs; auto: none where it fits, else what does"
    )
    least_max_length: int | None = Field(
        None, ge=16, description="Where memory runs out whatever else is done, max_length may go down to this"
    )
    least_max_pixels: int | None = Field(None, ge=28 * 28, description="The same for max_pixels")
    log_every: int = Field(5, ge=1, description="Optimizer steps")
    checkpoint_every: int = Field(50, ge=1, description="Optimizer steps")
    keep_checkpoints: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _names_differ(self) -> "Train":
        names = [adapter.name for adapter in self.adapters]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"adapter names must differ; found twice: {', '.join(twice)}")
        if not names and not self.adapter_for_each_source:
            raise ValueError("name at least one in train.adapters, or set train.adapter_for_each_source")
        return self

    @property
    def trains_connector(self) -> bool:
        """Whether these are the settings of the first phase: those of `of_connector`."""
        return self.connector is not None and [adapter.name for adapter in self.adapters] == [CONNECTOR]

    def key_of(self, name: str) -> str:
        """Where the recipe has one of these settings: `train.max_length`, or in the first phase its own."""
        section = f"train.{CONNECTOR}" if self.trains_connector and name in Connector.model_fields else "train"
        return f"{section}.{name}"

    def of_connector(self) -> "Train":
        """The first phase's settings, in the form of all. It trains no LoRA, the base is never in 4 bits, and nothing
        is sharded: what is trained is small."""
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
    def _can_be_sharded(self) -> "Train":
        if self.load_in_4bit and self.sharding == "zero3":
            raise ValueError("sharding zero3 cannot share out a base in 4 bits: take zero2, or leave load_in_4bit out")
        return self

    @model_validator(mode="after")
    def _leasts_are_less(self) -> "Train":
        if self.least_max_length is not None and self.least_max_length > self.max_length:
            raise ValueError("least_max_length is above max_length")
        if self.least_max_pixels is not None and (self.max_pixels is None or self.least_max_pixels > self.max_pixels):
            raise ValueError("least_max_pixels needs a max_pixels that is not below it")
        return self


ONLY_ROOM = {
    *("micro_batch", "gradient_checkpointing", "sharding", "least_max_length", "least_max_pixels", "keep_checkpoints"),
    *("keep_going", "exact_batch"),
}
"""What of `train` changes memory, disk, speed, what is refused or done about failures, and not what is learnt."""

_LEFT_OUT: dict[str, Any] = {"train": {**dict.fromkeys(ONLY_ROOM, True), "connector": {"micro_batch": True}}}
"""The same for pydantic."""


class Vote(Section):
    """The adapters' common answer: the one that most of them give."""

    adapters: Literal["all", "greedy"] | list[FileName] = Field(
        "all",
        description="Who votes; greedy: of those added best first, as many as vote best on the validation samples",
    )
    weights: Literal["uniform", "validation"] = Field(
        "uniform", description="What a vote counts; validation: the adapter's score there"
    )
    second_round: bool = Field(
        False, description="Where no answer has more than half of the votes, ask again with the leading answers only"
    )

    @model_validator(mode="after")
    def _someone_votes(self) -> "Vote":
        if not self.adapters:
            raise ValueError("adapters: name at least one that votes, or write all or greedy")
        if len(set(self.adapters)) < len(self.adapters) and isinstance(self.adapters, list):
            raise ValueError("adapters: one is named twice, and each has one vote")
        return self


class Infer(Section):
    engine: str = Field("vllm", description="Inference engine, by its name in stages/engines/__init__.py")
    max_length: int = Field(
        8192, ge=16, description="Tokens of prompt and answer; a longer prompt is counted as failed"
    )
    max_new_tokens: int = Field(64, ge=1, description="Of the longest of the task's passes")
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        16,
        description="Sequences decoded together; auto: found out by trying with transformers, with vllm its own choice",
    )
    chunk_size: int = Field(
        256, ge=1, description="Records submitted at once; with transformers the most that a kill can lose, too"
    )
    passes: dict[str, Any] = Field({}, description="The task's own settings of what the model is asked, and in turn")
    ablate: list[FileName] = Field(
        [], description="Components of the task: the test samples are answered again without each of them in turn"
    )
    answers: Literal["all", "own sources"] = Field(
        "all", description="Which test samples an adapter answers; own sources: those of the data sets in its mix"
    )
    vote: Vote | None = Field(None, description="Whether the adapters vote, and how")
    merged: bool = Field(False, description="Answer with adapters merged into copies of the weights, one by one")
    tensor_parallel: int | None = Field(
        None,
        ge=1,
        description="GPUs that share the weights (vllm); null: as many as the machine shows and the model allows",
    )

    @model_validator(mode="after")
    def _leaves_room(self) -> "Infer":
        if self.max_new_tokens >= self.max_length:
            raise ValueError("max_new_tokens leaves no room for a prompt in max_length")
        return self

    @model_validator(mode="after")
    def _all_can_vote(self) -> "Infer":
        if self.vote is not None and self.answers != "all":
            raise ValueError("vote needs answers: all; adapters that answer other samples cannot vote together")
        return self


class Eval(Section):
    bootstrap: int = Field(2000, ge=100, description="Resamples behind each 95% interval")
    worst: int = Field(10, ge=0, description="Worst answers shown in the report")
    scoring: dict[str, Any] = Field({}, description="The task's own settings of how answers are scored")


class Recipe(Section):
    """A resolved recipe: no profile is left to apply."""

    description: str = ""
    task: FileName
    seed: int = Field(42, ge=0)
    profile: str | None = Field(None, description="The profile that was applied; set by Lorry")
    model: Model
    data: Data
    preprocess: Preprocess
    train: Train
    infer: Infer = Infer()
    eval: Eval = Eval()

    @model_validator(mode="after")
    def _first_phase_has_its_name(self) -> "Recipe":
        if self.train.connector is not None and any(adapter.name == CONNECTOR for adapter in self.train.adapters):
            raise ValueError(f"train.adapters: {CONNECTOR!r} names the first phase, train.connector: take another name")
        return self

    @model_validator(mode="after")
    def _voters_are_trained(self) -> "Recipe":
        vote = self.infer.vote
        if vote is not None and isinstance(vote.adapters, list) and self.train.adapters:
            unknown = sorted(set(vote.adapters) - {adapter.name for adapter in self.train.adapters})
            if unknown:
                raise ValueError(f"infer.vote.adapters: train.adapters has no {', '.join(unknown)}")
        return self

    def digest(self, *sections: str) -> str:
        """sha256 of the named sections' values (or of `section.key`), or of all that can change a result.

        How training finds room is not among them: it may be changed, as after an out-of-memory, and gone on with.
        """
        values = self.model_dump(mode="json", exclude={"description": True, "profile": True, **_LEFT_OUT})
        if not sections:
            return digest_of(values)
        found = {}
        for name in sections:
            section, _, key = name.partition(".")
            found[name] = values[section][key] if key else values[section]
        return digest_of(found)


def load_recipe(
    path: Path, profile: str | None = None, overrides: tuple[str, ...] = (), data: Path | None = None
) -> Recipe:
    """Read a recipe file, apply a profile, a data folder and `section.key=value` overrides, and validate the result.

    Raises UsageError with the file, the line, what was found and the nearest known name.
    """
    values, profiles, text = _read(path)
    prefix: tuple[str, ...] = ()
    if profile is not None:
        if profile not in profiles:
            raise UsageError(f"{path}: no profile {profile!r}; it has: {', '.join(profiles) or 'none'}")
        values = _merged(values, profiles[profile] or {}, f"{path}: profiles.{profile}")
        values["profile"] = profile
        prefix = ("profiles", profile)
    if data is not None:
        values = _merged(values, {"data": {"path": str(data.absolute())}}, "--data")
    for override in overrides:
        values = _merged(values, _parsed_override(override), f"--set {override}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(_explained(error, path, text, prefix)) from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A recipe file's values, its profiles, and its text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read the recipe ({error})") from error
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    profiles = values.pop("profiles", None) or {}
    if not isinstance(profiles, dict):
        raise UsageError(f"{path}: `profiles` must map a profile's name to the values that it overrides")
    return values, profiles, text


def place_of_key(path: Path, location: tuple[str, ...], profile: str | None) -> str:
    """`file:line` of a key in a recipe file, or the file alone where the key is not in it."""
    text = path.read_text(encoding="utf-8")
    line = _line_of(text, ("profiles", profile, *location)) if profile else None
    line = line or _line_of(text, location)
    return f"{path}:{line}" if line else str(path)


def profile_names(path: Path) -> list[str]:
    """Names of a recipe file's profiles."""
    return list(_read(path)[1])


def recipe_file_schema(engines: Sequence[str]) -> dict[str, Any]:
    """JSON schema of a recipe file: a recipe and its profiles, each of which may override any part of it.

    `engines` are the values that `infer.engine` may have.
    """
    schema = Recipe.model_json_schema()
    schema["$defs"]["Infer"]["properties"]["engine"]["enum"] = list(engines)
    schema["properties"].pop("profile")
    schema["properties"]["profiles"] = {"type": "object", "additionalProperties": {"type": "object"}}
    return schema


def dump_recipe(recipe: Recipe) -> str:
    """A resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a later key silently replace an earlier one; a recipe must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a plain name", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 2e-4 (no dot) as text; people mean a number
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _merged(base: Any, over: Any, where: str) -> dict[str, Any]:
    """Mappings merge key by key; anything else, lists included, is replaced whole."""
    if not isinstance(over, dict):
        raise UsageError(f"{where}: expected a mapping of keys to values, found {over!r}")
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value, where) if both else value
    return result


def _parsed_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"--set {text}: write it as section.key=value, as in train.learning_rate=2e-4")
    try:
        parsed: Any = yaml.load(value, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text}: {value!r} is not a YAML value") from error
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def _explained(error: ValidationError, path: Path, text: str, prefix: tuple[str, ...]) -> str:
    """The first few problems, one clause each, with line and nearest known name."""
    problems = []
    for detail in error.errors()[:3]:
        location = detail["loc"]
        line = _line_of(text, prefix + location) or _line_of(text, location)
        where = f"{path}:{line}" if line else str(path)
        key = ".".join(str(part) for part in location) or "recipe"
        if detail["type"] == "extra_forbidden":
            known = _known_keys(location[:-1])
            near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            problems.append(f"{where}: unknown key {key!r}; {hint}")
        elif detail["type"] == "missing":
            problems.append(f"{where}: {key!r} is missing")
        else:
            problems.append(f"{where}: {key}: {detail['msg']} (found {detail['input']!r})")
    more = error.error_count() - len(problems)
    return "; ".join(problems) + (f"; and {more} more" if more > 0 else "")


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        arguments = [*getattr(annotation, "__args__", ()), annotation]
        section = next(a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel))
    return list(section.model_fields)


def _line_of(text: str, location: tuple[int | str, ...]) -> int | None:
    """1-based line of a key in YAML text, or None when it does not stand there."""
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
