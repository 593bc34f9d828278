"""The short form of `benchmarks.parity`: the loop on packs against PEFT and transformers alone, with a random model."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.parity import load_adapted, make_job, sequences, train_alone, train_packed
from stages.train.samples import Facts, Samples, write_samples
from tests.train.test_small_jobs import write_model


def test_losses_and_weights_are_those_of_one_sample_at_a_time(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    job = make_job(tmp_path, 10)
    job = replace(job, model=tmp_path / "model", settings=job.settings.model_copy(update={"learning_rate": 1e-3}))
    write_samples(tmp_path / "samples", ([one] for one in sequences(job.model)), Facts())
    samples = Samples(tmp_path / "samples")
    (losses, weights), fewest = train_packed(job, samples)
    other_losses, other_weights = train_alone(job, samples)
    assert fewest == 8 and losses == pytest.approx(other_losses, abs=1e-5)
    assert weights.keys() == other_weights.keys()
    assert max(float((weight.detach() - other_weights[name]).abs().max()) for name, weight in weights.items()) < 1e-5
    before = dict(load_adapted(job).named_parameters())
    moved = (
        weight.detach() - before[name.replace(".weight", ".default.weight")].detach()
        for name, weight in weights.items()
    )
    assert min(float(one.abs().max()) for one in moved) > 1e-3
