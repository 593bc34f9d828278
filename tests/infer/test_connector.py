"""Adapters answer on the base with their connector, and `base` without it."""

from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import Exit
from stages.contract.files import read_jsonl, sha256_file
from stages.engines.engine import EngineSettings
from stages.host.runner import run_stage
from stages.infer import stage as infer
from stages.models.connector import link_connector
from stages.models.rendering import Renderer
from tests.train.two_phases import TwoPhases, two_phases

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TwoPhases:
    """Trained hard enough that connector and adapter each change the answers."""
    rates = ("train.learning_rate=0.05", "train.connector.learning_rate=0.05")
    training = two_phases(tmp_path_factory.mktemp("two"), *rates).prepared()
    training.done()
    return training


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_TARGET", "cpu")


def texts(run: Any, name: str) -> list[str]:
    return [row["text"] for row in read_jsonl(run.path("infer", "predictions", f"{name}.jsonl"))]


def said(trained: TwoPhases, folder: Path, connector: bool, adapter: bool) -> list[str]:
    """What transformers' engine answers with these put together by hand."""
    from stages.engines.transformers_engine import TransformersEngine

    model = trained.lorry.models / "tiny-llava"
    if connector:
        model = link_connector(model, trained.connector, sha256_file(trained.connector), folder / "both")
    adapters = {"tuned": trained.adapter.parent} if adapter else {}
    engine = TransformersEngine(EngineSettings(model, adapters, "float32", 6, 4, 256, 42))
    renderer, run = Renderer(model), trained.run
    samples = read_jsonl(run.path("preprocess", "samples", "test.jsonl"))
    prompts = [
        renderer.render(s["id"], s["messages"], [run.folder / name for name in s["images"]], max_new_tokens=6)
        for s in samples
    ]
    found = [completion.text for completion in engine.generate(prompts, "tuned" if adapter else None)]
    engine.close()
    return found


def test_base_is_the_untouched_model_and_adapters_have_the_connector(
    trained: TwoPhases, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trained.run
    assert run_stage(run, "infer", infer.work) == Exit.DONE, capfd.readouterr()
    assert texts(run, "base") == said(trained, tmp_path, connector=False, adapter=False)
    assert texts(run, "tuned") == said(trained, tmp_path, connector=True, adapter=True)
    alone = said(trained, tmp_path, connector=False, adapter=True)
    assert texts(run, "tuned") != alone, "the connector has an effect"
    assert not run.path("infer", "merged").exists()

    # merged, the same is said
    merged = TwoPhases(trained.lorry, *trained.overrides[-2:], "infer.merged=true").run
    assert run_stage(merged, "infer", infer.work) == Exit.DONE, capfd.readouterr()
    assert texts(merged, "tuned") == said(trained, tmp_path, connector=True, adapter=True)


def test_a_changed_connector_is_refused(trained: TwoPhases, capfd: pytest.CaptureFixture[str]) -> None:
    content = trained.connector.read_bytes()
    try:
        trained.connector.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert run_stage(trained.run, "infer", infer.work, force=True) == Exit.USAGE
    finally:
        trained.connector.write_bytes(content)
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "connector.safetensors: changed since train wrote it; run train again" in line
