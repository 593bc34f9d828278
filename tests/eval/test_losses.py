"""eval with held-out losses: figures, console, comparison and ledger, and the report's answers side by side."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import Exit
from stages.contract.files import read_json, read_jsonl, write_jsonl
from stages.contract.records import Sample
from stages.contract.run import Run
from stages.eval.stage import work
from stages.host.runner import run_stage
from tests.eval.conftest import answer, make_run
from tests.eval.test_report import ATTACK, Page
from tests.eval.test_report_in_a_browser import BROWSER, measure

Build = Callable[..., Run]

LONG_ANSWER = "踏板支架位于第二页左上角，靠近弹簧。" * 6


NO_PAGES: dict[str, list[Any]] = {"pages": [], "page_images": [], "evidence": []}
"""What scoring by the run's task looks for in `meta`."""


def conversation(number: int, **changes: Any) -> Sample:
    """A test sample of the task chat; every third is in Chinese."""
    chinese = number % 3 == 0
    turns = (
        ["你好", "您好，请问？", f"部件{number}在哪里？\n请详细说明。"]
        if chinese
        else ["Hi", "Hello?", f"What is part {number}?"]
    )
    roles = ("user", "assistant", "user")
    text = LONG_ANSWER if chinese else f"Part {number} is the locking lever of the valve."
    sample: Any = {
        "id": f"c{number}",
        "messages": [{"role": role, "content": content} for role, content in zip(roles, turns, strict=True)],
        "images": [],
        "references": [text],
        "meta": {"group": f"c{number}", **NO_PAGES, "answer": {"role": "assistant", "content": text}},
    }
    return {**sample, **changes}  # type: ignore[return-value]


def plain_text(number: int) -> Sample:
    text = f"Text {number}: 阀门。"
    changed: Any = {"messages": [], "references": [], "text": text, "meta": {"group": f"t{number}", **NO_PAGES}}
    return conversation(number, id=f"t{number}", **changed)


def loss_rows(samples: list[Sample], gain: Callable[[int], float]) -> list[dict[str, Any]]:
    """Losses of 3 nats a token, less `gain` of the sample's number."""
    tokens = [10 + 5 * number for number in range(len(samples))]
    return [
        {"id": sample["id"], "loss": (3.0 - gain(number)) * tokens[number], "tokens": tokens[number]}
        for number, sample in enumerate(samples)
    ]


def gains(number: int) -> float:
    """One sample loses, one stays, the others gain."""
    return {0: -0.5, 1: 0.0}.get(number, 0.1 * number)


def with_losses(run: Run, losses: dict[str, list[dict[str, Any]]]) -> Run:
    """Add infer's losses to a run."""
    from tests.eval.conftest import _manifest

    for name, rows in losses.items():
        write_jsonl(run.path("infer", "losses", f"{name}.jsonl"), rows)
    predictions = [f"predictions/{path.name}" for path in run.path("infer", "predictions").iterdir()]
    _manifest(run, "infer", dict.fromkeys([*predictions, *(f"losses/{name}.jsonl" for name in losses)]))
    return run


def make_chat_run(folder: Path, samples: list[Sample], gain: Callable[[int], float] = gains) -> Run:
    asked = [sample for sample in samples if sample["messages"]]
    given = {
        name: [
            answer(sample, f"{name}: {''.join(sample['references']) if name == 'tuned' else '不知道。'}")
            for sample in asked
        ]
        for name in ("base", "tuned")
    }
    run = make_run(folder, samples, given, pictures=False)
    return with_losses(run, {"base": loss_rows(samples, lambda _: 0.0), "tuned": loss_rows(samples, gain)})


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of eight conversations after eval, for tests that change nothing in it."""
    run = make_chat_run(tmp_path_factory.mktemp("chat"), [conversation(number) for number in range(8)])
    assert run_stage(run, "eval", work) == Exit.DONE
    return run


def test_figures_are_per_token_and_paired(chat_run: Run) -> None:
    figures = read_json(chat_run.path("eval", "losses.json"))
    assert list(figures) == ["base", "tuned"]
    tokens = [10 + 5 * number for number in range(8)]
    expected = 3 - sum(gains(number) * tokens[number] for number in range(8)) / sum(tokens)
    assert figures["base"]["perplexity"]["value"] == pytest.approx(math.exp(3), rel=1e-6)
    assert figures["tuned"]["loss"]["value"] == pytest.approx(expected, abs=1e-6)
    over = figures["tuned"]["over_base"]
    assert over["loss"]["value"] == pytest.approx(expected - 3, abs=1e-6)
    assert (over["wins"], over["ties"], over["losses"]) == (6, 1, 1)
    assert over["win_rate"]["value"] == 81.25 and over["win_rate"]["high"] <= 100
    assert (over["n"], over["tokens"], over["groups"]) == (8, sum(tokens), 8)
    lines = read_jsonl(chat_run.path("eval", "losses.jsonl"))
    assert [line["id"] for line in lines] == [f"c{number}" for number in range(8)]
    assert lines[0]["models"]["base"] == {"loss": 30.0, "tokens": 10}
    manifest = chat_run.manifest("eval")
    assert manifest is not None and {"losses.json", "losses.jsonl"} <= set(manifest["outputs"])
    assert manifest["counts"]["with a loss"] == 8


def test_the_console_shows_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_chat_run(tmp_path, [conversation(number) for number in range(8)])
    assert run_stage(run, "eval", work) == Exit.DONE
    lines = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    assert any(re.match(r"tuned 1\d\.\d\d \[\d+\.\d\d, \d+\.\d\d\] 2\.\d{3} -0\.\d{3} \[", line) for line in lines)
    assert any(" 6 1 1 81.2 [" in line for line in lines)
    assert any(line.startswith("loss: mean cross entropy per token") for line in lines)


def test_a_test_set_without_references_is_scored_by_loss(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_chat_run(tmp_path, [plain_text(number) for number in range(6)])
    assert run_stage(run, "eval", work) == Exit.DONE
    captured = capfd.readouterr()
    assert "held-out loss" in captured.out and "percent [95%]" not in captured.out
    assert read_json(run.path("eval", "scores.json")) == {"base": {}, "tuned": {}}
    assert read_json(run.path("eval", "losses.json"))["tuned"]["over_base"]["n"] == 6
    report = run.path("eval", "report.html").read_text(encoding="utf-8")
    Page(report)
    assert "Held-out loss" in report and "<h2>Base and adapters" not in report and "Worst answers" not in report
    assert "Text 5: 阀门。" in report and "not asked" in report


def test_text_and_conversations_in_one_test_set(tmp_path: Path) -> None:
    samples = [*(conversation(number) for number in range(5)), *(plain_text(number) for number in range(5))]
    run = make_chat_run(tmp_path, samples)
    assert run_stage(run, "eval", work) == Exit.DONE
    counts = run.manifest("eval")["counts"]  # type: ignore[index]
    assert (counts["samples"], counts["scored"], counts["with a loss"]) == (10, 5, 10)
    figure = next(iter(read_json(run.path("eval", "scores.json"))["tuned"].values()))
    assert (figure["n"], figure["failed"]) == (5, 0), "text that nobody was asked is no failed answer"


def test_samples_without_a_loss_are_counted_with_a_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    samples = [conversation(number) for number in range(6)]
    run = make_chat_run(tmp_path, samples)
    lost = {"id": "c2", "error": "infer.max_length: 64 is too short for a conversation of 70 tokens; raise it"}
    rows = {name: read_jsonl(run.path("infer", "losses", f"{name}.jsonl")) for name in ("base", "tuned")}
    with_losses(run, {name: [lost if row["id"] == "c2" else row for row in own] for name, own in rows.items()})
    assert run_stage(run, "eval", work) == Exit.DONE
    note = "1 of 6 test samples have no loss, such as c2: infer.max_length: 64 is too short"
    assert note in " ".join(capfd.readouterr().out.split())
    assert note in run.path("eval", "report.html").read_text(encoding="utf-8")
    assert read_json(run.path("eval", "losses.json"))["base"]["n"] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "stranger", "loss": 1.0, "tokens": 3}, "'stranger' is not a test sample; run infer again"),
        ({"id": "c1", "loss": 1.0, "tokens": 3}, "'c1' has 3 tokens, but 15 for base; run infer again"),
    ],
)
def test_losses_that_do_not_fit_are_named(
    tmp_path: Path, change: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    samples = [conversation(number) for number in range(3)]
    run = make_chat_run(tmp_path, samples)
    base, tuned = (read_jsonl(run.path("infer", "losses", f"{name}.jsonl")) for name in ("base", "tuned"))
    with_losses(run, {"base": base, "tuned": [tuned[0], change, tuned[2]]})
    assert run_stage(run, "eval", work) == Exit.DATA
    assert message in capfd.readouterr().err


# -- the report ----------------------------------------------------------------------------------------------------


def articles(report: str) -> list[str]:
    """The ids of the samples side by side, in order."""
    return re.findall(r'<article class="beside">.*?<code>(.*?)</code>', report, re.DOTALL)


def test_answers_stand_side_by_side_the_largest_changes_first(chat_run: Run) -> None:
    report = chat_run.path("eval", "report.html").read_text(encoding="utf-8")
    Page(report)
    assert articles(report) == ["c7", "c6", "c5", "c4", "c3", "c2", "c0"]
    assert report.index("Where tuned gained most") < report.index("Where tuned lost most")
    seventh = re.findall(r'<article class="beside">.*?</article>', report, re.DOTALL)[0]
    texts = [" ".join(text.split()) for text in re.findall(r">([^<>]+)<", seventh) if text.strip()]
    question, reference = "What is part 7?", "Part 7 is the locking lever of the valve."
    assert [text for text in texts if text not in ("·", "Expected")] == [
        *("1 · c7 · 45 tokens", "c7", question, reference),
        *("base", "loss 3.000", "base: 不知道。", "tuned", "loss 2.300", f"tuned: {reference}"),
    ]
    third = re.findall(r'<article class="beside">.*?</article>', report, re.DOTALL)[-1]
    assert "部件0在哪里？\n请详细说明。" in third and LONG_ANSWER in third
    assert "<script" not in report


def test_text_of_models_and_data_is_escaped(tmp_path: Path) -> None:
    samples = [conversation(number) for number in range(5)]
    samples[3]["messages"][-1]["content"] = ATTACK
    samples[3]["references"] = [ATTACK]
    run = make_chat_run(tmp_path, samples)
    rows = read_jsonl(run.path("infer", "predictions", "tuned.jsonl"))
    write_jsonl(
        run.path("infer", "predictions", "tuned.jsonl"), [{**row, "text": ATTACK, "answer": ATTACK} for row in rows]
    )
    with_losses(run, {})
    with_losses(run, {name: read_jsonl(run.path("infer", "losses", f"{name}.jsonl")) for name in ("base", "tuned")})
    assert run_stage(run, "eval", work) == Exit.DONE
    page = Page(run.path("eval", "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and not [name for name, _ in page.attributes if name.startswith("on")]


def test_tool_calls_are_shown_as_the_reference(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {"部件": 3}}}
    samples = [conversation(number) for number in range(5)]
    samples[4]["references"] = []
    samples[4]["meta"]["answer"] = {"role": "assistant", "content": "", "tool_calls": [call]}  # type: ignore[typeddict-unknown-key]
    run = make_chat_run(tmp_path, samples)
    assert run_stage(run, "eval", work) == Exit.DONE
    report = run.path("eval", "report.html").read_text(encoding="utf-8")
    shown = json.dumps(call["function"], ensure_ascii=False).replace('"', "&#34;")
    assert shown in report


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_side_by_side_fits_a_desk_and_a_phone(tmp_path: Path) -> None:
    samples = [conversation(number) for number in range(8)]
    samples[7]["references"] = ["z" * 300]
    samples[6]["messages"][-1]["content"] = "很长的问题" * 200 + "w" * 300
    run = make_chat_run(tmp_path, samples)
    assert run_stage(run, "eval", work) == Exit.DONE
    report = run.path("eval", "report.html").read_text(encoding="utf-8")
    for found in measure(report, tmp_path, 1280, 768, 390):
        assert found["page"] <= found["width"], "the page scrolls sideways"
        assert found["broken"] == [] and found["outside"] == 0
