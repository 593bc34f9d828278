"""What the report shows, and what it must never contain."""

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from PIL import Image

from stages.contract.errors import Exit
from stages.contract.files import read_json, write_json
from stages.contract.records import Prediction, Sample
from stages.contract.run import Run
from stages.eval.report import loss_curve
from stages.eval.stage import work
from stages.host.runner import run_stage
from tests.eval.conftest import LOSSES, answer, make_sample

Predictions = dict[str, list[Prediction]]
Build = Callable[..., Run]

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</style>"


class Page(HTMLParser):
    """Collects elements and attributes, and checks that elements nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def report_of(run: Run) -> str:
    assert run_stage(run, "eval", work) == Exit.DONE
    text = run.path("eval", "report.html").read_text(encoding="utf-8")
    Page(text)
    return text


def test_it_shows_the_run(evaluated: Run) -> None:
    text = report_of(evaluated)
    for shown in ("patent-qa", "tiny", "SmolLM2-135M-Instruct", "US0000001A.pdf", "position", "optimizer step"):
        assert shown in text
    for shown in ("2 min 00 s", "3.00 GiB", "1 × blank page", "precision = <b>float32</b>", "6 documents"):
        assert shown in text
    assert "failed: prompt of 1203 tokens does not fit in 1024" in text
    assert "在第2页的图中，部件9是什么？" in text
    assert "踏板支架" in text


def test_it_is_self_contained(evaluated: Run) -> None:
    text = report_of(evaluated)
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "img" in page.tags
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data"):
            assert value.startswith(("data:image/jpeg;base64,", "#"))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_untrusted_text_is_escaped(build: Build) -> None:
    samples = [make_sample(0, question=ATTACK, kind=ATTACK, group=ATTACK, page_images=[f"{ATTACK}.jpg"], pages=[1])]
    samples[0]["id"] = ATTACK
    run = build(samples, {"base": [answer(samples[0], ATTACK)], "tuned": [answer(samples[0], ATTACK)]}, pictures=False)
    text = report_of(run)
    page = Page(text)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert text.count("&lt;script&gt;alert(1)") >= 6


def test_pictures_are_shrunk(evaluated: Run) -> None:
    page = Page(report_of(evaluated))
    pictures = [value for name, value in page.attributes if name == "src"]
    assert len(pictures) == 2 * 7  # six wrong answers and a failed one, two pages each
    with Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2]))) as picture:
        assert (picture.format, picture.width) == ("JPEG", 500)


def test_pictures_that_are_not_pages_have_no_numbers(build: Build) -> None:
    image = "preprocess/pages/a.png"
    sample: Sample = {**make_sample(0, page_images=[image], evidence=[]), "images": [image]}
    del sample["meta"]["pages"]
    text = report_of(build([sample], {"base": [answer(sample, "x")], "tuned": [answer(sample, "x")]}))
    assert f'alt="Picture of {sample["meta"]["group"]}"' in text and "<figcaption>page" not in text
    assert len([value for name, value in Page(text).attributes if name == "src"]) == 1


def test_missing_and_broken_pictures_are_named(build: Build, samples: list[Sample], predictions: Predictions) -> None:
    text = report_of(build(samples, predictions, pictures=False))
    assert "no picture at preprocess/pages/d1/2.jpg" in text


@pytest.mark.parametrize(
    ("losses", "shown"),
    [
        ([], "not run"),
        ([entry for entry in LOSSES if "loss" in entry], "not measured"),
        ([entry for entry in LOSSES if "eval_loss" in entry], "not measured"),
        (LOSSES[:1], "not measured"),
    ],
)
def test_few_or_no_loss_points(
    build: Build, samples: list[Sample], predictions: Predictions, losses: list[dict[str, float]], shown: str
) -> None:
    assert shown in report_of(build(samples, predictions, losses=losses))


def test_out_of_memory_steps_memory_and_speed_of_training_are_shown(
    build: Build, samples: list[Sample], predictions: Predictions
) -> None:
    run = build(samples, predictions)
    path = run.path("train", "manifest.json")
    manifest = read_json(path)
    rung = {"what": "out of memory", "value": "max_length 64", "why": "adapter tuned, in training after step 3: <b>"}
    manifest["decisions"].append(rung)
    manifest["gpu_memory"] = {"tuned": {"allocated": 3 * 2**30, "reserved": 7 * 2**29, "device_used": 2**33}}
    manifest["tokens_per_second"] = {"tuned": 12345.6}
    manifest["share_of_peak"] = {"tuned": 0.4321}
    assert "Memory ran out" not in report_of(run)
    write_json(path, manifest)
    assert run_stage(run, "eval", work, force=True) == Exit.DONE
    text = run.path("eval", "report.html").read_text(encoding="utf-8")
    Page(text)
    assert "Memory ran out once" in text and "<th>Resumed with</th><th>Reason</th>" in text
    assert '<th scope="row">max_length 64</th><td>adapter tuned, in training after step 3: &lt;b&gt;</td>' in text
    assert '<td class="number">12,346 (43% of peak)</td><td class="number">3.5 GiB</td>' in text


def test_base_alone(build: Build, samples: list[Sample], predictions: Predictions) -> None:
    text = report_of(build(samples, {"base": predictions["base"]}))
    assert "Worst answers of base" in text
    assert '<td class="model">tuned</td><td colspan="6" class="muted">not run</td>' in text


def test_an_answer_that_was_cut_off_says_so(build: Build) -> None:
    sample = make_sample(0)
    cut: Prediction = {**answer(sample, "the lever that"), "finish_reason": "length"}
    assert "cut off at infer.max_new_tokens" in report_of(build([sample], {"base": [cut]}))


def test_nothing_wrong(build: Build, samples: list[Sample]) -> None:
    right = [answer(sample, sample["references"][0]) for sample in samples]
    text = report_of(build(samples, {"base": right, "tuned": right}))
    assert "every answer is perfect" in text


def test_many_adapters(build: Build, samples: list[Sample], predictions: Predictions) -> None:
    text = report_of(build(samples, {"base": predictions["base"]} | {f"a{i}": predictions["tuned"] for i in range(9)}))
    assert "a8" in text
    assert "correction for 9 models." in text and "; 6 documents: intervals are rough.</b>" in text


def test_the_loss_curve_is_reproducible_and_takes_the_page_s_colours() -> None:
    first, second = (loss_curve(LOSSES, {"tuned": 1}) for _ in range(2))
    assert first is not None
    assert first == second
    assert "currentColor" in first
    assert "var(--model-1)" in first
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", first)
    assert loss_curve([{"adapter": "tuned", "step": 1, "epoch": 0.1}], {"tuned": 1}) is None
