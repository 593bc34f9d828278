"""Which tokens end an answer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.contract.errors import UsageError
from stages.contract.files import write_json
from stages.models.end_tokens import end_tokens


@pytest.mark.parametrize(
    ("own", "generation", "config", "ends"),
    [
        (2, None, {}, [2]),
        (1, {"eos_token_id": [1, 106]}, {"eos_token_id": 1}, [1, 106]),  # Gemma
        (32000, {"eos_token_id": [32000, 32001, 32007]}, {}, [32000, 32001, 32007]),  # Phi-3
        (None, {"eos_token_id": 7}, {}, [7]),
        (2, {}, {"eos_token_id": 5}, [2]),
        (2, None, {"eos_token_id": 5}, [2, 5]),
        (2, None, {"text_config": {"eos_token_id": [5, 6]}}, [2, 5, 6]),
    ],
)
def test_they_stand_in_tokenizer_and_generation_config(
    tmp_path: Path, own: int | None, generation: Any, config: Any, ends: list[int]
) -> None:
    write_json(tmp_path / "config.json", config)
    if generation is not None:
        write_json(tmp_path / "generation_config.json", generation)
    assert end_tokens(tmp_path, SimpleNamespace(eos_token_id=own)) == ends


def test_a_model_without_one_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    with pytest.raises(UsageError, match=r"names an end token.*; set eos_token_id in generation_config\.json"):
        end_tokens(tmp_path, SimpleNamespace(eos_token_id=None))
