"""What a training process makes of samples before it trains, told as JSON; in a process of its own, for it changes the
libraries that it loads.

    python -m tests.train.encoding '{"model", "run", "samples", "overrides", "profile"}'
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from stages.contract.errors import LorryError
from stages.contract.files import read_jsonl
from stages.contract.recipe import Adapter, load_recipe
from stages.contract.stop import StopRequest
from tests.conftest import REPOSITORY


def told(model: Path, run: Path, samples: list[dict[str, Any]], overrides: tuple[str, ...]) -> dict[str, Any]:
    """Which samples are kept, how long each is, and the sizes of its pictures in patches."""
    from stages.models.chat_settings import ChatSettings
    from stages.models.pictures import Picture
    from stages.models.remote_code import settle_remote_code
    from stages.train.job import Job, Progress
    from stages.train.swift_sft import LorrySft
    from stages.train.together import Together
    from stages.train.worker import _arguments

    recipe = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny-vlm", overrides)
    work, nothing = run / "work", os.open(os.devnull, os.O_WRONLY)
    places = {"model": model, "work": work, "scratch": work, "adapter": run / "adapter", "run": run}
    batch = {"micro_batch": 1, "accumulation": 1, "processes": 1, "eval_micro_batch": 1}
    job = Job(
        **places,
        **batch,
        key="",
        mix=Adapter(name="tuned"),
        train=[],
        validation=[],
        seed=0,
        dtype="float32",
        sharding="none",
        evaluate=False,
        use_cpu=True,
        cards=[],
        model_settings=recipe.model,
        settings=recipe.train,
        progress=nothing,
        chat=ChatSettings(enable_thinking=recipe.model.enable_thinking),
    )
    settle_remote_code(model, trusted=False)  # as the training process does
    sft = LorrySft(_arguments(job, work, None), job, Progress(nothing), StopRequest(), Together(1, True, "none"))
    read: list[Path] = []
    load = Picture.load
    Picture.load = lambda picture: read.append(picture.path) or load(picture)  # type: ignore[method-assign, func-returns-value]
    try:
        kept, left_out = sft.fitting_samples(samples)
    except LorryError as error:
        return {"error": str(error)}
    finally:
        before, read = len(read), []
    rows = []
    for row in kept:
        images = list(row.get("images", []))
        encoded = sft.template.encode(row)
        grids = encoded["image_grid_thw"].tolist() if "image_grid_thw" in encoded else []
        rows.append({"length": len(encoded["input_ids"]), "grids": grids, "images": images, "read": len(read)})
        rows[-1] |= {"tokens": list(encoded["input_ids"]), "labels": list(encoded["labels"])}
        read.clear()
    Picture.load = load  # type: ignore[method-assign]
    return {
        "rows": rows,
        "left_out": left_out,
        "read before": before,
        "said": list(map(dict, getattr(sft, "said", []))),
    }


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    from stages.train.without_torchvision import patch_missing_torchvision

    patch_missing_torchvision()
    found = [
        told(Path(ask["model"]), Path(ask["run"]), read_jsonl(Path(ask["samples"])), tuple(ask["overrides"]))
        for ask in json.loads(sys.argv[1])
    ]
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
