"""Says in a finished adapter's folder which base it belongs to, and how to load both outside Lorry."""

import re
from pathlib import Path
from typing import Any

from stages.contract.files import read_json
from stages.engines.vllm_engine import supported_rank


def base_name(model: Path, path: str) -> tuple[str, str | None]:
    """The name by which libraries find a base, and its revision.

    If the model's folder is, or links into, the hub's cache (`models--<owner>--<name>/snapshots/<revision>`), this is
    the name on the hub. Otherwise it is `path`, the recipe's `model.path`, and the revision is None.
    """
    for place in (model.resolve(), (model / "config.json").resolve()):
        found = re.search(r"/models--([^/]+)--([^/]+)/(?:snapshots/([^/]+))?", f"{place}/")
        if found:
            return f"{found[1]}/{found[2]}", found[3]
    return path, None


def adapter_card(name: str, config: dict[str, Any], model: Path, has_connector: bool) -> str:
    """The README.md of an adapter, in the form of the hub's model cards.

    `name` is the base's, `config` that of adapter_config.json. `has_connector`: the base got a trained connector.
    """
    sees = (read_json(model / "config.json") or {}).get("vision_config")
    kind = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    connector = (
        "\nThe base has the connector of the same run (`train/connector/connector.safetensors`). `infer.merged: true`"
        "\nmakes Lorry serve both as one model.\n"
        if has_connector
        else ""
    )
    return f"""---
base_model: {name}
library_name: peft
---

# LoRA adapter of {name}

Rank {config["r"]}, alpha {config["lora_alpha"]}, trained by Lorry. `training.json` has its losses.
{connector}
`BASE` is the base's folder or its name on a hub. `adapter_config.json` names it `{name}`: that is the recipe's
`model.path`, below the folder LORRY_MODELS, or the hub's name if the base lies in the hub's cache. Where libraries do
not find that name, name the base yourself:

```python
from peft import PeftModel
from transformers import {kind}

model = PeftModel.from_pretrained({kind}.from_pretrained("BASE"), "THIS FOLDER")
```

```bash
vllm serve BASE --enable-lora --max-lora-rank {supported_rank(int(config["r"]))} --lora-modules tuned="THIS FOLDER"
```
"""
