"""What training reads of samples, without a run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stages.contract.files import write_jsonl
from stages.contract.recipe import Adapter, Model, Train
from stages.models.chat_settings import ChatSettings
from stages.models.rendering import Renderer
from stages.train.encoding import encode_samples, read_encoded
from stages.train.samples import Samples


def encoded(folder: Path, model: Path, samples: list[dict[str, Any]], max_length: int) -> Samples:
    """The samples as the training process encodes them for a model."""
    file = folder / "in.jsonl"
    write_jsonl(file, samples)
    settings = Train(adapters=[Adapter(name="tuned")], max_length=max_length)
    job: Any = SimpleNamespace(
        **{"work": folder, "run": folder, "model": model, "model_settings": Model(path=str(model)), "seed": 0},
        **{"train": [file], "validation": [file], "mix": Adapter(name="all"), "settings": settings},
        chat=ChatSettings(),
    )
    encode_samples(job, Renderer(model))
    return read_encoded(job)[0]
