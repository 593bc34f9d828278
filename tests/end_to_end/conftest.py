"""One whole job through the real commands, which the tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MODELS, Lorry, need_model
from tests.small_inputs import demo_subset, small_models

__all__ = ["demo_subset", "small_models"]

OPTIONS = (
    *("patent-qa", "--profile", "tiny", "--run", "job"),
    *("--set", "train.epochs=1", "--set", "train.effective_batch=4", "--set", "infer.max_new_tokens=12"),
    *("--set", "train.checkpoint_every=2"),
)


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory, demo_subset: Path) -> Iterator[tuple[Lorry, tuple[str, ...]]]:
    """`lorry run` of the demo's recipe on four of its documents, with SmolLM2-135M and all-MiniLM-L6-v2."""
    need_model("SmolLM2-135M-Instruct")
    need_model("all-MiniLM-L6-v2")
    lorry = Lorry(demo_subset.parent, MODELS, tmp_path_factory.mktemp("runs"))
    options = (*OPTIONS, "--set", f"data.path={demo_subset.name}")
    finished = lorry("entrypoints.lorry", "run", *options)
    assert finished.code == 0, finished.output
    yield lorry, options
