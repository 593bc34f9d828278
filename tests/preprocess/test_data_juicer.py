"""Records through Data-Juicer: which are kept, dropped, changed and skipped; killed and resumed; the same on Ray."""

import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stages.contract.errors import DataError, UsageError
from stages.contract.events import Events
from stages.contract.files import read_json, read_jsonl, write_json
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.contract.stage import Stage
from stages.contract.stop import StopRequest
from stages.preprocess import data_juicer
from stages.preprocess import data_juicer_worker as worker
from stages.preprocess.data_juicer import run_operators
from tests.conftest import REPOSITORY

SENTENCE = "a red bus waits beside the old station while people cross the wide street"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home and temporary folders of these tests, to check what is left there."""
    folder = tmp_path_factory.mktemp("h")
    (folder / "tmp").mkdir()
    before = {name: os.environ.get(name) for name in ("HOME", "XDG_CACHE_HOME")}
    os.environ |= {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    yield folder
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value


def picture(folder: Path, name: str, width: int = 64, height: int = 48) -> str:
    path = folder / "images" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:6], 16)
    Image.new("RGB", (width, height), (seed % 256, seed // 256 % 256, seed // 65536)).save(path)
    return f"images/{name}.png"


def record(name: str, text: str, *images: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "text": f"<__dj__image>\n{text} <|__dj__eoc|>", "images": list(images), **more}


def write(folder: Path, records: list[dict[str, Any] | str]) -> Path:
    path = folder / "records.jsonl"
    lines = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


class Made:
    """A data folder with records that each fail one operator, or none."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "data" / "made"
        (self.folder / "words").mkdir(parents=True)
        (self.folder / "words" / "flagged_words.json").write_text(json.dumps({"en": ["darn"], "zh": ["笨蛋"]}))
        good = picture(self.folder, "good")
        cut = self.folder / "images" / "cut.png"
        cut.write_bytes((self.folder / good).read_bytes()[:90])
        self.records: list[dict[str, Any] | str] = [
            record("first", SENTENCE, good, place=[1, "two"]),
            "{no json",
            record("short", "bus", good),
            record("signs", f"{SENTENCE} {'#$%' * 20}", good),
            record("again", "na" * 30, good),
            record("flagged", f"darn {SENTENCE} today", good),
            record("small", "two dogs run over wet sand towards a boat", picture(self.folder, "small", 20, 20)),
            record("narrow", "a lamp stands on a shelf full of books", picture(self.folder, "narrow", 160, 40)),
            record("cut", "a child looks out of the window of a train", "images/cut.png"),
            record("gone", "a clock on a tower shows noon", "images/gone.png"),
            record("outside", "an umbrella leans on a bench", "../secret.png"),
            record("alone", "three pictures are promised <__dj__image> <__dj__image>", good),
            record("first", "the id comes twice here", good),
            {"id": "empty", "text": " ", "images": []},
            {"id": 7, "text": f"no picture here, only words about a harbour in the evening and {SENTENCE}"},
            record("copy", SENTENCE, good),
            record("heavy", "a horse walks over a field in the snow", self._noise()),
            record("digits", " ".join(str(1000 + 37 * n) for n in range(20)), good),
            record("last", "一艘小船停在安静的港口，岸边的路灯刚刚亮起来，远处的山还看得见", good),
        ]
        self.file = write(self.folder, self.records)

    def _noise(self) -> str:
        """A picture of 9 KB."""
        path = self.folder / "images" / "noise.png"
        Image.frombytes("RGB", (64, 48), random.Random(0).randbytes(64 * 48 * 3)).save(path)
        return "images/noise.png"

    OPERATORS = (
        {"text_length_filter": {"min_len": 40, "max_len": 200}},
        {"alphanumeric_filter": {"min_ratio": 0.6}},
        {"character_repetition_filter": {"rep_len": 3, "max_ratio": 0.5}},
        {"special_characters_filter": {"max_ratio": 0.6}},
        {"flagged_words_filter": {"lang": "en", "max_ratio": 0.0, "flagged_words_dir": "words"}},
        {"image_size_filter": {"min_size": "50", "max_size": "2kb"}},
        {"image_shape_filter": {"min_width": 32, "min_height": 32}},
        {"image_aspect_ratio_filter": {"min_ratio": 0.5, "max_ratio": 2.0}},
        {"document_minhash_deduplicator": {"tokenization": "space", "num_permutations": 64, "jaccard_threshold": 0.85}},
    )


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


@pytest.fixture(scope="module")
def stage_of(home: Path) -> Iterator[Callable[..., Stage]]:
    """Return a function that makes a preprocess stage; each call is a new start on the run folder of that name."""
    opened: list[Events] = []

    def make(root: Path, name: str, operators: Any, models: Path | None = None, **settings: Any) -> Stage:
        recipe = root / f"{name}.yaml"
        juicer = {"process": list(operators), "workers": 1, **settings}
        values: dict[str, Any] = {
            "task": "better_synth",
            "model": {"path": "none", "swift_type": "none", "swift_template": "none"},
            "data": {"path": "made"},
            "preprocess": {"data_juicer": juicer},
            "train": {"adapters": [{"name": "none"}]},
        }
        recipe.write_text(json.dumps(values))
        run = Run(name, load_recipe(recipe), Roots(root / "data", models or root / "models", root / "runs"))
        console = (root / f"{name}.console").open("w", encoding="utf-8")
        events = Events(run.path("preprocess", "events.jsonl"), "preprocess", console)
        opened.append(events)
        return Stage(run, "preprocess", events, StopRequest(), -1, -1)

    yield make
    for events in opened:
        events.close()


@dataclass(frozen=True)
class Processed:
    """Records, the stage that has run operators over them, and the file of those that it kept."""

    made: Made
    stage: Stage
    kept: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, stage_of: Callable[..., Stage]) -> Processed:
    """All operators over all records, in two processes and two chunks, undisturbed."""
    made = Made(tmp_path_factory.mktemp("whole"))
    stage = stage_of(made.root, "processes", made.OPERATORS, workers=2, chunk_size=9)
    return Processed(made, stage, run_operators(stage, made.file))


def counts(stage: Stage) -> dict[str, tuple[int, int, int, int]]:
    """read, kept, dropped, changed of each operator."""
    done = read_json(stage.path("records", "operators.json"))
    return {one["operator"]: (one["read"], one["kept"], one["dropped"], one["changed"]) for one in done}


# -- which records are kept ----------------------------------------------------------------------------------------


def test_every_operator_drops_its_record_and_ray_does_the_same(
    whole: Processed, stage_of: Callable[..., Stage], home: Path
) -> None:
    made, stage, kept = whole.made, whole.stage, whole.kept

    assert kept == stage.path("records", "kept.jsonl")
    assert [one["id"] for one in read_jsonl(kept)] == ["first", 7, "last"], "in order, and with their own ids"
    assert read_jsonl(kept)[0] == made.records[0], "other fields are carried along"
    assert {one["what"]: one["reason"] for one in stage.skipped} == {
        "records.jsonl:2": "not JSON",
        "records.jsonl:9": "picture cannot be read",
        "records.jsonl:10": "picture cannot be read",
        "records.jsonl:11": "picture outside the data folder",
        "records.jsonl:12": "text shows more pictures than there are in images",
        "records.jsonl:13": "duplicate id",
        "records.jsonl:14": "empty text",
    }
    assert counts(stage) == {
        "text_length_filter": (12, 11, 1, 0),
        "alphanumeric_filter": (11, 10, 1, 0),
        "character_repetition_filter": (10, 9, 1, 0),
        "special_characters_filter": (9, 8, 1, 0),
        "flagged_words_filter": (8, 7, 1, 0),
        "image_size_filter": (7, 6, 1, 0),
        "image_shape_filter": (6, 5, 1, 0),
        "image_aspect_ratio_filter": (5, 4, 1, 0),
        "document_minhash_deduplicator": (4, 3, 1, 0),
    }
    assert stage.counts["records"] == 14
    assert stage.counts["records kept"] == stage.outputs["records/kept.jsonl"] == 3
    assert not stage.path("records", "work").exists()

    on_ray = stage_of(made.root, "ray", made.OPERATORS, executor="ray")
    assert run_operators(on_ray, made.file).read_bytes() == kept.read_bytes()
    assert counts(on_ray) == counts(stage)
    assert on_ray.skipped == stage.skipped
    assert [str(path) for path in home.rglob("*")] == [str(home / "tmp")], "nothing is left in the home folder"


def test_records_stay_together_with_their_ids_in_any_chunk() -> None:
    rows = [{"id": name, "text": name, "images": []} for name in "abcd"]

    def backwards_and_twice(some: list[worker.Row], problems: list[worker.Row]) -> list[worker.Row]:
        problems.append(worker._problem(some[3], "failed", ""))
        made = [{**some[2], "text": "new"}, dict(some[2]), dict(some[0])]
        return [*made, {**some[0], "text": "second"}, {**some[0], "text": "third"}]

    head, *out = worker._process_chunk(5, rows, backwards_and_twice)
    assert [(one["id"], one["text"], one.get("original_id")) for one in out] == [
        ("a", "a", None),
        ("a+5.1", "second", "a"),
        ("a+5.2", "third", "a"),
        ("c", "new", None),
        ("c+5.1", "c", "c"),
    ]
    found = {key: head[key] for key in ("read", "kept", "dropped", "changed", "added", "failed")}
    assert found == {"read": 4, "kept": 5, "dropped": 1, "changed": 1, "added": 3, "failed": 1}


def test_an_added_record_may_have_others_added() -> None:
    first = [{"id": "a", "text": "x", "images": []}, {"id": "a+2.1", "text": "y", "images": [], "original_id": "a"}]
    _, *out = worker._process_chunk(3, first, lambda rows, _: [dict(row) for row in rows for _ in range(2)])
    assert [(one["id"], one.get("original_id")) for one in out] == [
        ("a", None),
        ("a+3.1", "a"),
        ("a+2.1", "a"),
        ("a+2.1+3.1", "a"),
    ]


def test_a_record_on_which_an_operator_fails_costs_no_other() -> None:
    asked: list[int] = []

    def fails_on_b(rows: list[worker.Row]) -> list[worker.Row]:
        asked.append(len(rows))
        if any(row["id"] == "5" for row in rows):
            raise ValueError("no such\n luck")
        return rows

    problems: list[worker.Row] = []
    rows = [{"id": str(number), "text": "", "images": []} for number in range(8)]
    done = worker._Bisection(fails_on_b, "some_mapper")(rows, problems)
    assert [row["id"] for row in done] == ["0", "1", "2", "3", "4", "6", "7"]
    assert problems == [{"id": "5", "reason": "some_mapper failed", "detail": "ValueError: no such luck"}]
    assert asked == [8, 4, 4, 2, 1, 1, 2]


def test_an_operator_that_fails_on_all_is_given_up() -> None:
    tried: list[int] = []

    def fails(rows: list[worker.Row]) -> list[worker.Row]:
        tried.append(len(rows))
        raise RuntimeError("no kernel")

    rows = [{"id": str(number), "text": "", "images": []} for number in range(1000)]
    with pytest.raises(
        DataError, match=r"some_mapper: fails on each of the first 10 records \(RuntimeError: no kernel"
    ):
        worker._Bisection(fails, "some_mapper")(rows, [])
    assert tried.count(1) == worker.FAILURES_BEFORE_GIVING_UP


def test_a_record_whose_pictures_are_null_has_none(made: Made, stage_of: Callable[..., Stage]) -> None:
    write(made.folder, ['{"id": "a", "text": "words", "images": null}', '{"id": "b", "text": "words", "images": ""}'])
    stage = stage_of(made.root, "null", made.OPERATORS)
    rows = list(data_juicer._operator_rows(data_juicer._usable_records(made.file, stage)))
    assert [(row["id"], row["images"]) for row in rows] == [("a", []), ("b", [])]
    assert stage.skipped == []


def test_no_record_left_is_an_error(made: Made, stage_of: Callable[..., Stage]) -> None:
    stage = stage_of(made.root, "none", [{"text_length_filter": {"min_len": 5000}}])
    with pytest.raises(DataError, match=r"kept none of 14 records; relax the operator .* \(.*/operators.json"):
        run_operators(stage, made.file)
    write(made.folder, ["[]", ""])
    with pytest.raises(DataError, match="no usable record, which has `id`, `text` and `images`; there is no record"):
        run_operators(stage_of(made.root, "empty", made.OPERATORS), made.file)


# -- refused before any work ---------------------------------------------------------------------------------------


REFUSED = {
    "image_captioning_mapper": ({}, "no hf_img2seq; set it to the folder of the weights, relative to the model mount"),
    "text_length_filter": ({"min_length": 3}, "Unknown parameter 'min_length' (did you mean: min_len?)"),
    "alphanumeric_filter": ({"min_ratio": "high"}, "Parameter 'min_ratio' expects type 'float', got 'str'"),
    "stopwords_filter": ({}, "no stopwords_dir; set it to a folder, relative to data.path, with stopwords.json"),
    "extract_keyword_mapper": ({}, "asks a model over the network, but no stage uses the network; remove it"),
    "nlpaug_en_mapper": (
        {"swap_random_word": True},
        "needs the package nlpaug, which is not installed; install it first, as Lorry installs nothing at run time",
    ),
    "image_tagging_mapper": ({}, "needs the package ram @ git+https://github.com/cmgzn/recognize-anything"),
    "ray_bts_minhash_deduplicator": (
        {},
        "does not run with executor default; set preprocess.data_juicer.executor to ray, or remove",
    ),
    "key_value_grouper": (
        {},
        "does not turn records into records; use a mapper, filter, deduplicator or selector",
    ),
}


def test_an_operator_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    script = """
import json, sys
from stages.preprocess import data_juicer_worker as worker
worker._forbid_installs_and_downloads()
for name, given in json.loads(sys.argv[1]):
    try:
        worker._load_operators(worker.Job([(name, given)], "default", 1, 1, 1, 0, "", "", "", 0))
        print("loaded")
    except worker.UsageError as error:
        print(error)
"""
    entries = json.dumps([(name, given) for name, (given, _) in REFUSED.items()])
    out = subprocess.run(
        [sys.executable, "-c", script, entries],
        env={**os.environ, "DATA_JUICER_CACHE_HOME": str(tmp_path)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for (name, (_, message)), line in zip(REFUSED.items(), out, strict=True):
        assert line.startswith(f"preprocess.data_juicer.process[0].{name}: ")
        assert message in line


def test_an_unknown_operator_is_refused_before_any_work(made: Made, stage_of: Callable[..., Stage]) -> None:
    stage = stage_of(made.root, "wrong", [made.OPERATORS[0], {"text_lenght_filter": {}}])
    message = r"process\[1\]: Data-Juicer has no operator 'text_lenght_filter'; did you mean text_length_filter"
    with pytest.raises(UsageError, match=message):
        run_operators(stage, made.file)
    assert not list(stage.path("records", "work").glob("0*"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_text_similarity_filter": {"hf_clip": "nowhere"}}, "nowhere: no such model folder"),
        (
            {"flagged_words_filter": {"flagged_words_dir": "images"}},
            "images has no flagged_words.json; put one there, with a list of words per language",
        ),
    ],
)
def test_missing_folders_are_refused(
    entry: dict[str, Any], message: str, made: Made, stage_of: Callable[..., Stage]
) -> None:
    with pytest.raises(UsageError, match=message):
        run_operators(stage_of(made.root, "missing", [entry]), made.file)


def test_weights_that_name_python_files_are_refused(tmp_path: Path, made: Made, stage_of: Callable[..., Stage]) -> None:
    """Several of Data-Juicer's operators trust them without being asked to."""
    write_json(tmp_path / "own" / "config.json", {"auto_map": {"AutoModel": "own.Model"}})
    (tmp_path / "own" / "model.safetensors").touch()
    stage = stage_of(made.root, "own", [{"image_text_similarity_filter": {"hf_clip": "own"}}], tmp_path)
    with pytest.raises(UsageError, match=r"own names Python files \(auto_map\), which the operator may run"):
        run_operators(stage, made.file)


def test_without_data_juicer_the_message_says_how_to_install_it(
    made: Made, stage_of: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(made.root, "none", made.OPERATORS, executor="ray")
    find = importlib.util.find_spec
    gone = "ray"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == gone else find(name))
    with pytest.raises(UsageError, match="Ray, for `executor: ray`, is not installed here; run `make setup`"):
        run_operators(stage, made.file)
    gone = "data_juicer"
    with pytest.raises(UsageError, match="Data-Juicer is not installed here; run `make setup`"):
        run_operators(stage, made.file)


@pytest.mark.parametrize("entry", [{}, {"a": {}, "b": {}}, {"text_length_filter": 3}])
def test_a_malformed_list_of_operators_is_refused(
    entry: dict[str, Any], made: Made, stage_of: Callable[..., Stage]
) -> None:
    with pytest.raises(
        UsageError,
        match=r"preprocess\.data_juicer\.process: found .*; write an operator as one name with its parameters",
    ):
        stage_of(made.root, "malformed", [entry])


# -- operators with weights ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models mount with a random CLIP, a random BLIP-2 on T5 and one on OPT, all tiny."""
    import torch
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        CLIPConfig,
        CLIPModel,
        CLIPProcessor,
        OPTConfig,
        T5Config,
    )
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    least = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    vision = {**least, "image_size": 32, "patch_size": 16}

    text = {**least, **ends, "vocab_size": 300, "max_position_embeddings": 32}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder / "clip")
    sides = {"height": 32, "width": 32}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=sides)
    CLIPProcessor(pictures, tokenizer(290)).save_pretrained(folder / "clip")

    t5 = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **ends)
    t5.decoder_start_token_id = 0
    opt = OPTConfig(
        vocab_size=50272, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=256, **ends,
    )  # fmt: skip
    former = {**least, "vocab_size": 64, "encoder_hidden_size": 16, "cross_attention_frequency": 1}
    for name, language, token in (("blip2-t5", t5, 299), ("blip2-opt", opt, 50265)):
        config = Blip2Config(
            vision_config=vision,
            qformer_config=former,
            text_config=language.to_dict(),
            num_query_tokens=4,
            image_token_index=token,
        )
        Blip2ForConditionalGeneration(config).save_pretrained(folder / name)
        words = tokenizer(language.vocab_size - 10)
        Blip2Processor(BlipImageProcessorPil(size=sides), words, num_query_tokens=4).save_pretrained(folder / name)
    return folder


def tokenizer(words: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{number}": number for number in range(3, words)}}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="</s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=32,
    )  # fmt: skip


@dataclass(frozen=True)
class Captioned:
    """Records, the operators, and the stage that has run them in one process."""

    root: Path
    records: list[dict[str, Any]]
    file: Path
    operators: list[dict[str, Any]]
    scores: list[float]
    """The records' similarities of text and picture, by CLIP itself."""
    stage: Stage
    kept: Path


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory, weights: Path, stage_of: Callable[..., Stage]) -> Captioned:
    """Six records, of which a threshold on CLIP's similarity drops half; the others get captions by both BLIP-2."""
    import torch
    from transformers import CLIPModel, CLIPProcessor

    root = tmp_path_factory.mktemp("captioned")
    folder = root / "data" / "made"
    folder.mkdir(parents=True)
    records = [record(f"r{n}", f"w{20 + 3 * n} w{50 + n}", picture(folder, f"p{n}")) for n in range(6)]
    file = write(folder, list(records))
    model, reads = CLIPModel.from_pretrained(weights / "clip"), CLIPProcessor.from_pretrained(weights / "clip")
    scores = []
    for number, one in enumerate(records):
        with Image.open(folder / one["images"][0]) as image, torch.no_grad():
            text = f"w{20 + 3 * number} w{50 + number}"
            inputs = reads(text=text, images=image.convert("RGB"), return_tensors="pt")
            scores.append(float(model(**inputs).logits_per_text) / 100)
    middle = sum(sorted(scores)[2:4]) / 2
    operators: list[dict[str, Any]] = [
        {"image_text_similarity_filter": {"hf_clip": "clip", "min_score": middle}},
        {"image_captioning_mapper": {"hf_img2seq": "blip2-opt", "keep_original_sample": True}},
        {"image_captioning_mapper": {"hf_img2seq": "blip2-t5", "keep_original_sample": False}},
    ]
    stage = stage_of(root, "together", operators, weights)
    return Captioned(root, records, file, operators, scores, stage, run_operators(stage, file))


def test_similarity_is_clips_and_a_threshold_drops_by_it(captioned: Captioned) -> None:
    kept = [one["id"] for one in read_jsonl(captioned.kept) if "original_id" not in one]
    middle = captioned.operators[0]["image_text_similarity_filter"]["min_score"]
    assert kept == [f"r{number}" for number, score in enumerate(captioned.scores) if score >= middle]
    assert len(kept) == 3


def test_captions_are_the_same_whoever_writes_them(
    captioned: Captioned, weights: Path, stage_of: Callable[..., Stage]
) -> None:
    out = read_jsonl(captioned.kept)
    names = [one["id"] for one in out[::2]]
    assert [one["id"] for one in out] == [name for first in names for name in (first, f"{first}+2.1")]
    assert [one.get("original_id") for one in out] == [name for first in names for name in (None, first)]
    assert counts(captioned.stage) == {
        "image_text_similarity_filter": (6, 3, 3, 0),
        "image_captioning_mapper": (6, 6, 0, 6),
    }
    written = [one["text"] for one in out]
    assert all(text.startswith("<__dj__image>") and text.endswith("<|__dj__eoc|>") for text in written)
    assert len(set(written)) == 6, "sampled for each"

    apart = stage_of(captioned.root, "apart", captioned.operators, weights, workers=2, chunk_size=3)
    assert run_operators(apart, captioned.file).read_bytes() == captioned.kept.read_bytes()


# -- stopped, killed, resumed --------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.host.runner import run_stage
from stages.preprocess.data_juicer import run_operators
root, name = Path(sys.argv[1]), sys.argv[2]
run = Run(name, load_recipe(root / f"{name}.yaml"), Roots(root / "data", root / "models", root / "runs"))
sys.exit(run_stage(run, "preprocess", lambda stage: run_operators(stage, run.data / "records.jsonl") and None))
"""


def started(root: Path, name: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(root), name], cwd=REPOSITORY)


def worker_of(work: Path) -> set[int]:
    """Ids of the processes whose command line names the job in this folder."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(work / "job.json").encode() in command:
                found.add(int(entry.name))
    return found


def wait_for(what: Callable[[], Any], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.kill
def test_a_kill_costs_a_chunk_and_changes_nothing(made: Made, whole: Processed, stage_of: Callable[..., Stage]) -> None:
    stage = stage_of(made.root, "killed", made.OPERATORS, chunk_size=3)
    work = stage.path("records", "work")

    child = started(made.root, "killed")
    wait_for((work / "02.json").exists)
    child.send_signal(signal.SIGKILL)
    child.wait()
    wait_for(lambda: not worker_of(work), 10)
    done = {path.name: path.stat().st_mtime_ns for path in work.glob("0[012].json")}
    assert len(done) == 3

    child = started(made.root, "killed")
    wait_for((work / "04.json").exists)
    assert {name: (work / name).stat().st_mtime_ns for name in done} == done, "finished operators do not run again"
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 75
    wait_for(lambda: not worker_of(work), 10)

    child = started(made.root, "killed")
    assert child.wait() == 0
    assert stage.path("records", "kept.jsonl").read_bytes() == whole.kept.read_bytes()
    manifest = read_json(stage.path("manifest.json"))
    assert len(manifest["starts"]) == 3
    assert len(manifest["skipped"]) == 7
    assert manifest["outputs"]["records/kept.jsonl"]["records"] == 3
    child = started(made.root, "killed")
    assert child.wait() == 0, "done and unchanged"
