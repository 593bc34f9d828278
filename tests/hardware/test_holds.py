"""Cards are held by locks that die with their process, in a folder that every user may write."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.contract.errors import InterruptedRunError, UsageError
from stages.hardware import holds as module
from stages.hardware.holds import Holds
from tests.conftest import REPOSITORY
from tests.other_user import UID, folder_for_all

CARDS = ["GPU-a", "GPU-b", "GPU-c"]

TAKE = """
import sys, time
from pathlib import Path
from stages.hardware.holds import Holds
folder, kind, wanted, *cards = sys.argv[1:]
holds = Holds(Path(folder))
with holds.choice_lock():
    taken = []
    for card in cards:
        if len(taken) < int(wanted) and holds.take(card, kind == "exclusive"):
            taken.append(card)
            time.sleep(0.05)  # so that two that choose at once do meet
print(*taken, flush=True)
sys.stdin.read()
"""

Take = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def take(tmp_path: Path) -> Iterator[Take]:
    """Starts a process that takes cards and holds them until its standard input ends."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, prefix: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
        started.append(
            subprocess.Popen(
                [*prefix, sys.executable, "-B", "-c", TAKE, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=REPOSITORY,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def taken(process: "subprocess.Popen[str]") -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def test_processes_that_choose_at_once_never_get_the_same_card(take: Take, tmp_path: Path) -> None:
    racing = [take(str(tmp_path / "holds"), "exclusive", "1", *CARDS) for _ in range(4)]
    got = [taken(process) for process in racing]
    assert sorted(got) == [[], *[[card] for card in CARDS]], "three cards for four"


def test_two_that_each_want_two_of_three_do_not_both_fail(take: Take, tmp_path: Path) -> None:
    racing = [take(str(tmp_path / "holds"), "exclusive", "2", *CARDS) for _ in range(2)]
    assert sorted(len(taken(process)) for process in racing) == [1, 2]


def test_a_holder_that_is_killed_holds_no_longer(take: Take, tmp_path: Path) -> None:
    holder = take(str(tmp_path), "exclusive", "1", "GPU-a")
    assert taken(holder) == ["GPU-a"]
    mine = Holds(tmp_path)
    assert not mine.take("GPU-a", exclusive=True)
    assert not mine.take("GPU-a", exclusive=False)
    (lock,) = mine.holders("GPU-a")
    assert (lock.pid, lock.exclusive, lock.user != "?") == (holder.pid, True, True)
    assert str(lock) == f"lorry, pid {holder.pid} of {lock.user}"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert mine.holders("GPU-a") == []
    assert mine.take("GPU-a", exclusive=True)


def test_shared_holds_are_several_and_keep_an_exclusive_one_out(take: Take, tmp_path: Path) -> None:
    holders = [take(str(tmp_path), "shared", "1", "GPU-a") for _ in range(2)]
    assert [taken(holder) for holder in holders] == [["GPU-a"]] * 2
    mine = Holds(tmp_path)
    assert sorted(lock.pid for lock in mine.holders("GPU-a")) == sorted(holder.pid for holder in holders)
    assert not mine.take("GPU-a", exclusive=True)
    assert mine.take("GPU-a", exclusive=False)


def test_release_and_close_let_go(tmp_path: Path) -> None:
    one, two = Holds(tmp_path), Holds(tmp_path)
    assert one.take("GPU-a", exclusive=True) and one.take("GPU-b", exclusive=True)
    one.release("GPU-a")
    assert two.take("GPU-a", exclusive=True) and not two.take("GPU-b", exclusive=True)
    one.close()
    assert two.take("GPU-b", exclusive=True)
    assert one.take("GPU-c", exclusive=True), "and it can be used again"


def test_the_folder_and_its_files_are_for_everybody(tmp_path: Path) -> None:
    folder, before = tmp_path / "holds", os.umask(0o077)
    try:
        assert Holds(folder).take("GPU-a", exclusive=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777
    assert stat.S_IMODE((folder / "GPU-a").stat().st_mode) == 0o644


def test_the_default_folder_is_one_for_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORRY_GPU_HOLDS", "")
    assert Holds().folder == Path("/tmp/lorry-gpus")
    monkeypatch.setenv("LORRY_GPU_HOLDS", str(tmp_path))
    assert Holds().folder == tmp_path


def test_another_users_file_can_be_held(take: Take) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can start a process as another user")
    prefix = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups")
    if subprocess.run([*prefix, "test", "-r", f"{REPOSITORY}/pyproject.toml"], check=False).returncode != 0:
        pytest.skip(f"{REPOSITORY} cannot be read by uid {UID}")
    with folder_for_all() as place:
        mine = Holds(place / "holds")
        assert mine.take("GPU-a", exclusive=True)
        other = take(str(mine.folder), "exclusive", "2", "GPU-a", "GPU-b", prefix=prefix)
        assert taken(other) == ["GPU-b"]
        assert (mine.folder / "GPU-b").stat().st_uid == UID
        assert not mine.take("GPU-b", exclusive=True)
        (lock,) = mine.holders("GPU-b")
        assert lock.pid == other.pid
        mine.close()
        again = take(str(mine.folder), "exclusive", "1", "GPU-a", prefix=prefix)
        assert taken(again) == ["GPU-a"], "root made the file"


def test_a_folder_that_a_user_may_not_write_to_is_reported(take: Take) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can start a process as another user")
    prefix = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups")
    if subprocess.run([*prefix, "test", "-r", f"{REPOSITORY}/pyproject.toml"], check=False).returncode != 0:
        pytest.skip(f"{REPOSITORY} cannot be read by uid {UID}")
    with folder_for_all() as place:
        output, _ = take(str(place), "exclusive", "1", "GPU-a", prefix=prefix).communicate("")
        assert "UsageError" in output
        assert (
            f"{place}/choosing: cannot hold a GPU with this file (Permission denied); delete the folder while" in output
        )


def unusable(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        Holds(folder).take("GPU-a", exclusive=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "holds"
    folder.mkdir()
    (folder / "GPU-a").symlink_to(victim)
    assert "GPU-a: cannot hold a GPU with this file" in unusable(folder)
    assert not victim.exists()
    victim.write_text("mine")
    assert "cannot hold a GPU with this file" in unusable(folder)
    (tmp_path / "linked").symlink_to(tmp_path, target_is_directory=True)
    assert "cannot hold a GPU with this file" in unusable(tmp_path / "linked")
    assert not (tmp_path / "GPU-a").exists()


def test_what_is_no_plain_file_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "GPU-a")
    assert "not a regular file" in unusable(tmp_path)
    (tmp_path / "file").write_text("")
    assert "Not a directory" in unusable(tmp_path / "file")


def test_a_lock_file_that_was_deleted_meanwhile_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, opened = Holds._open_lock_file, []

    def open_then_delete(self: Holds, name: str) -> int:
        descriptor = real(self, name)
        if not opened:
            (tmp_path / name).unlink()
        opened.append(name)
        return descriptor

    monkeypatch.setattr(Holds, "_open_lock_file", open_then_delete)
    first = Holds(tmp_path)
    assert first.take("GPU-a", exclusive=True)
    assert opened == ["GPU-a", "GPU-a"]
    assert not Holds(tmp_path).take("GPU-a", exclusive=True)


def test_one_that_chooses_for_ever_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    with Holds(tmp_path).choice_lock():
        pass
    other = Holds(tmp_path)
    message = rf"{tmp_path}/choosing: lorry, pid {os.getpid()} of \w+ has been choosing GPUs"
    with other.choice_lock(), pytest.raises(InterruptedRunError, match=message), Holds(tmp_path).choice_lock():
        pass
