"""Training with the locked wheels of the image v100-gptq: torch 2.2, transformers 4, no DeepSpeed, Triton 2."""

import os
import subprocess

import pytest

from tests.conftest import REPOSITORY

PYTHON = REPOSITORY / ".venv" / "v100-gptq" / "bin" / "python"
"""Where `make kill-test` installs them."""
FILES = (
    "tests/train/v100_wheels_gptq.py",
    "tests/train/test_lora.py",
    "tests/train/test_small_jobs.py::test_packs_train_as_one_at_a_time_and_a_resume_ends_in_the_same_bytes",
    "tests/train/test_small_jobs.py::test_an_adapter_trained_after_others_has_the_bytes_of_one_trained_alone[one]",
)


@pytest.mark.long
def test_the_loop_trains_with_them() -> None:
    assert PYTHON.exists(), "no wheels of v100-gptq; `make kill-test` installs them"
    command = [PYTHON, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-m", "", *FILES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
