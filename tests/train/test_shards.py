"""Training in shards: by adapter, merged without training anything."""

import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import snapshot
from tests.train.conftest import Training

COUNTS = {"samples": 24, "steps": 6}


@pytest.mark.kill
def test_two_shards_at_once_one_of_them_killed_merge_to_the_bytes_of_one_run(
    training: Training, tmp_path: Path
) -> None:
    overrides = ("train.adapters=[{name: one}, {name: two}]", "train.checkpoint_every=2", "train.epochs=1")
    sharded = Training(training.lorry, (*training.overrides, *overrides))
    shards = [sharded.start("--shard", f"{index}/2") for index in range(2)]
    checkpoints = sharded.run.folder / "shards" / "train" / "1-of-2" / "checkpoints" / "two"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*/complete.json")):
        assert shards[1].poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    shards[1].send_signal(signal.SIGKILL)
    shards[1].communicate()
    resumed = sharded.start("--shard", "1/2")
    for process in (shards[0], resumed):
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    assert "train 1/2: train two: 24 samples, resuming from checkpoint-" in output
    code, surplus = sharded("--shard", "2/3")
    assert code == 0
    assert "shard 2/3 has nothing to do, as there are only 2 adapters" in surplus

    code, merged = sharded()
    assert code == 0, merged
    assert "shards taken over: 0/2, 1/2, 2/3" in merged
    assert "precision" not in merged, "nothing is planned where nothing is trained"
    manifest = sharded.manifest()
    made = [(decision["what"], decision["why"].rpartition("; ")[2]) for decision in manifest["decisions"]]
    assert ("precision", "shard 0/2") in made and ("resumed", "shard 1/2") in made

    # without shards; trained on the same samples, all three adapters are the same but for their names
    whole = Training(
        replace(sharded.lorry, runs=tmp_path / "whole"), (*sharded.overrides, "train.adapters=[{name: one}]")
    )
    code, output = whole.with_samples()()
    assert code == 0, output
    theirs = snapshot(whole.run.path("train", "adapters", "one"))
    del theirs["timing.json"]
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "made.json", "training.json"]
    assert sorted(theirs) == files
    for name in ("one", "two"):
        mine = snapshot(sharded.run.path("train", "adapters", name))
        assert mine.pop("timing.json") and mine == theirs
    log = whole.run.path("train", "metrics.jsonl").read_text()
    assert sharded.run.path("train", "metrics.jsonl").read_text() == log + log.replace('"one"', '"two"')
    assert manifest["counts"] == {f"{name} {what}": n for name in ("one", "two") for what, n in COUNTS.items()}
    assert list(manifest["outputs"])[-1] == "metrics.jsonl"
