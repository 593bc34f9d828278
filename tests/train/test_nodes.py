"""Two machines train together; here they are two processes that meet on this one."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from stages.contract.files import read_json, read_jsonl
from stages.contract.part import Node
from stages.train import torchrun
from stages.train.attempts import record_seconds
from stages.train.checkpoints import newest_complete_checkpoint
from tests.train.conftest import Training


@pytest.fixture
def nodes(training: Training) -> "TwoNodes":
    # one sample more than two can share out evenly: still seven steps an epoch, as one process would take
    return TwoNodes(Training(training.lorry, (*training.overrides, "train.epochs=12")).with_samples(25))


class TwoNodes:
    """Starts the same command on both."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def start(self, **environment: str) -> "list[subprocess.Popen[str]]":
        meeting = {
            "LORRY_NODES": "2",
            "LORRY_RENDEZVOUS": f"127.0.0.1:{free_port()}",
            "OMP_NUM_THREADS": "1",
        } | environment
        return [self.training.start(**meeting, LORRY_NODE_RANK=str(rank)) for rank in range(2)]

    def log(self) -> str:
        folders = self.training.run.stage_folder("train"), self.training.run.folder / "nodes" / "train" / "1"
        return "\n".join((folder / "log.txt").read_text()[-3000:] for folder in folders if folder.is_dir())

    def wait_for_steps(self, process: "subprocess.Popen[str]", steps: int = 3) -> None:
        """Until this start has trained a little."""
        events = self.training.run.path("train", "events.jsonl")
        before = events.read_text().count('"loss"') if events.is_file() else 0
        deadline = time.monotonic() + 120
        while not events.is_file() or events.read_text().count('"loss"') < before + steps:
            assert process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def processes_naming(folder: Path) -> dict[int, str]:
    """Living processes whose command line names something below a folder."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in command:
                found[int(path.parent.name)] = command
    return found


def ended(processes: "list[subprocess.Popen[str]]") -> tuple[list[int], str]:
    """Exit codes, and what was printed. Whoever has not ended after five minutes never will."""
    deadline = time.monotonic() + 300
    try:
        outputs = [process.communicate(timeout=max(deadline - time.monotonic(), 1))[0] for process in processes]
    except subprocess.TimeoutExpired:
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()
        outputs = [process.communicate()[0] for process in processes]
        raise AssertionError(f"still running (None): {codes}\n" + "\n".join(outputs)) from None
    return [process.returncode for process in processes], "\n".join(outputs)


@pytest.mark.kill
def test_two_nodes_train_together_and_survive_a_kill_and_a_stop(nodes: TwoNodes) -> None:
    """One long test: every start of two nodes takes its time."""
    first, second = nodes.start()
    nodes.wait_for_steps(first)
    started = processes_naming(nodes.training.run.folder / "nodes")
    (worker,) = [process for process, command in started.items() if "torch.distributed.run" not in command]
    os.kill(worker, signal.SIGKILL)
    codes, output = ended([first, second])
    assert codes == [75, 1], output + nodes.log()  # the other node is asked to try again; a crash counts as one
    assert ": the other processes are gone (" in output
    assert "was ended from outside" in output
    assert not processes_naming(nodes.training.run.folder), "nothing may be left behind"
    assert not nodes.training.run.path("train", "adapters").exists()

    first, second = nodes.start()
    nodes.wait_for_steps(first)
    second.send_signal(signal.SIGTERM)
    codes, output = ended([first, second])
    assert codes == [75, 75], output + nodes.log()
    work = nodes.training.run.path("train", "checkpoints", "tuned")
    saved = newest_complete_checkpoint(work)
    assert saved is not None
    sizes = read_json(saved / "complete.json")["sizes"]
    assert {"adapter_model.safetensors", "optimizer.safetensors", "state.json"} <= sizes.keys()

    codes, output = ended(nodes.start())
    assert codes == [0, 0], output + nodes.log()
    assert f"resuming from {saved.name}" in output
    manifest = nodes.training.manifest()
    assert manifest["counts"] == {"tuned samples": 25, "tuned steps": 84}
    decisions = {made["what"]: made["value"] for made in manifest["decisions"]}
    assert decisions["training processes"] == 2
    assert decisions["effective batch"].startswith("4 samples a step in passes of at most ")
    assert decisions["effective batch"].endswith(" by 2 processes")
    steps = [row["step"] for row in read_jsonl(nodes.training.run.path("train", "metrics.jsonl")) if "loss" in row]
    assert steps == list(range(1, 85)), "one process speaks for all, and no step is lost or done twice"
    assert read_json(nodes.training.run.path("train", "adapters", "tuned", "timing.json"))["seconds"] > 0

    late = nodes.training(LORRY_NODES="2", LORRY_RENDEZVOUS="127.0.0.1:1", JOB_COMPLETION_INDEX="1")
    assert late == (0, "train node 1: up to date\n")


@pytest.mark.long
def test_two_nodes_train_one_adapter_after_the_other(training: Training) -> None:
    overrides = (*training.overrides, "train.epochs=1", "train.adapters=[{name: one}, {name: two}]")
    nodes = TwoNodes(Training(training.lorry, overrides).with_samples(25))
    codes, output = ended(nodes.start())
    assert codes == [0, 0], output + nodes.log()
    assert "train two: loads the base again, as 2 nodes train together" in output
    assert not processes_naming(nodes.training.run.folder)


def test_a_stop_while_waiting_for_the_other_node_exits_75_at_once(nodes: TwoNodes) -> None:
    meeting = {"LORRY_NODES": "2", "LORRY_RENDEZVOUS": f"127.0.0.1:{free_port()}"}
    for rank, waiting in enumerate(("waits for node 1 at 127.0.0.1:", "waits for node 0")):
        process = nodes.training.start(**meeting, LORRY_NODE_RANK=str(rank))
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any(waiting in line for line in lines)
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        codes, output = ended([process])
        assert codes == [75], output
        assert "stopped by SIGTERM" in output
    assert not processes_naming(nodes.training.run.folder)


@pytest.mark.long
def test_a_node_without_its_partner_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Job of Kubernetes starts it again, and its GPUs do not idle until then."""
    monkeypatch.setattr(torchrun, "MEET_SECONDS", 2)
    command = torchrun.torchrun_command(tmp_path / "jobs", 1, Node(0, 2, f"127.0.0.1:{free_port()}"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "1/2 clients joined" in done.stderr


def test_it_says_whom_it_waits_for() -> None:
    assert (
        torchrun._whom_it_waits_for(Node(0, 2, "node-0:29500")) == "waits for node 1 at node-0:29500, up to 5 minutes"
    )
    assert "waits for nodes 0, 2 and 3 at" in torchrun._whom_it_waits_for(Node(1, 4, "node-0:29500"))


def test_nodes_are_still_there_when_a_job_starts_node_0_again() -> None:
    """After at most ten minutes, the longest pause of Kubernetes' Job controller."""
    assert torchrun.JOIN_SECONDS > 600 > torchrun.MEET_SECONDS


@pytest.mark.parametrize("rank", [0, 1])
def test_only_node_0_notes_how_long_it_took(tmp_path: Path, rank: int) -> None:
    """What another wrote into its folder while it removed that made it fail."""
    work, adapter = tmp_path / "work", tmp_path / "adapter"
    work.mkdir()
    with record_seconds(work, adapter, Node(rank, 2, "127.0.0.1:1")):
        pass
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json")}
    assert written == (set() if rank else {"work/seconds.json", "adapter/timing.json"})


def test_force_cannot_be_agreed_on(nodes: TwoNodes) -> None:
    meeting = {"LORRY_NODES": "2", "LORRY_RENDEZVOUS": "127.0.0.1:1"}
    code, output = nodes.training("--force", **meeting, LORRY_NODE_RANK="0")
    assert (code, len(output.splitlines())) == (2, 1)
    assert "cannot agree when to start again" in output
