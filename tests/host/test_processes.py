"""Stages as local processes."""

import sys
from pathlib import Path

import pytest

from stages.contract.errors import UsageError
from stages.host import needs, processes
from stages.host.cards import CardChoice
from stages.host.runs import result_lines


def test_a_host_without_the_libraries_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "LIBRARIES", {"train": ("click", "no_such_library")})
    with pytest.raises(
        UsageError,
        match="train: needs no_such_library, which is not installed here; run `make setup`, or",
    ):
        processes.local_runner(("train",), {}, CardChoice(), None)


def test_the_cuda_of_torch_is_read_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = tmp_path / "torch" / "version.py"
    version.parent.mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for text, cuda in (("cuda: Optional[str] = '12.8'", "12.8"), ("cuda = None", None), ("git = 'a1'", None)):
        version.write_text(f"debug = False\n{text}\nhip: Optional[str] = None\n")
        assert processes.installed_cuda() == cuda


def test_only_results_that_are_there_are_named(tmp_path: Path) -> None:
    for name in ("train/adapters/tuned", "train/adapters/名字", "train/adapters/.half", "infer/predictions"):
        (tmp_path / name).mkdir(parents=True)
    adapters = [f"adapter {name}: {tmp_path / 'train' / 'adapters' / name}" for name in ("tuned", "名字")]
    predictions = f"predictions: {tmp_path / 'infer' / 'predictions'}"
    assert result_lines(tmp_path, "preprocess") == []
    assert result_lines(tmp_path, "train") == adapters
    assert result_lines(tmp_path, "infer") == [predictions]
    assert result_lines(tmp_path, "eval") == [*adapters, predictions], "there is no report yet"
