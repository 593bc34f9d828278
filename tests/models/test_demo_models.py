"""How recipes/demo_models.py makes its models. What it makes, other tests use."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recipes import demo_models


def test_a_model_is_made_once_by_processes_that_want_it_at_once(tmp_path: Path) -> None:
    made = []

    def make(_scratch: Path, folder: Path) -> None:
        made.append(folder)
        time.sleep(0.2)
        (folder / "config.json").touch()

    with ThreadPoolExecutor(3) as pool:  # flock keeps threads apart as it does processes
        list(pool.map(lambda _: demo_models.make_whole(tmp_path / "models", "m", make), range(3)))
    assert len(made) == 1
    assert [path.name for path in (tmp_path / "models").glob("[!.]*")] == ["m"]


def test_what_making_prints_goes_into_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def make(source: Path, _folder: Path) -> None:
        os.write(1, b"a line\n")
        os.write(2, b"of a C library\n")
        if source.name == "bad":
            raise ValueError("broken")

    log = tmp_path / "m.log"
    demo_models.with_log(log, make, tmp_path, tmp_path)
    print("after")
    assert capfd.readouterr().out == f"its output goes to {log}\nafter\n"
    assert sorted(log.read_text().splitlines()) == ["a line", "of a C library"]
    with pytest.raises(ValueError, match="broken"):
        demo_models.with_log(log, make, tmp_path / "bad", tmp_path)
    print("after")
    assert capfd.readouterr().out.endswith("after\n"), "also after an error"


def test_the_quantised_model_is_made_only_if_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(demo_models, "make_whole", lambda _folder, name, _make: names.append(name))
    monkeypatch.setattr(sys, "argv", ["demo_models.py", str(tmp_path)])
    demo_models.main()
    assert len(names) == 5 and demo_models.QUANTISED not in names
    monkeypatch.setattr(sys, "argv", [*sys.argv, demo_models.QUANTISED])
    demo_models.main()
    assert names[-1] == demo_models.QUANTISED
