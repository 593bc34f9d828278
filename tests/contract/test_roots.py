"""Where data, models and runs are."""

from pathlib import Path

import pytest

from stages.contract import roots
from stages.contract.roots import Roots
from tests.conftest import REPOSITORY


def test_the_defaults_are_the_checkouts_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    default = Roots(REPOSITORY / "recipes" / "data", REPOSITORY / "models", REPOSITORY / "runs")
    for name in ("LORRY_DATA", "LORRY_MODELS", "LORRY_RUNS"):
        monkeypatch.delenv(name, raising=False)
    assert Roots.from_environment() == default
    for name in ("LORRY_DATA", "LORRY_MODELS", "LORRY_RUNS"):
        monkeypatch.setenv(name, "")
    assert Roots.from_environment() == default, "an empty variable is none, as for the other settings"


def test_a_folder_of_ones_own_is_relative_to_the_present_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("LORRY_DATA", "LORRY_MODELS", "LORRY_RUNS"):
        monkeypatch.setenv(name, f"my/{name}")
    assert Roots.from_environment() == Roots(*(tmp_path / f"my/LORRY_{name}" for name in ("DATA", "MODELS", "RUNS")))


def test_without_a_checkout_the_defaults_are_in_the_present_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(roots, "CHECKOUT", tmp_path / "site-packages")
    for name in ("LORRY_DATA", "LORRY_MODELS", "LORRY_RUNS"):
        monkeypatch.delenv(name, raising=False)
    assert Roots.from_environment() == Roots(tmp_path / "recipes" / "data", tmp_path / "models", tmp_path / "runs")
