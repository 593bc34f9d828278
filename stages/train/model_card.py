"""The README.md of a finished adapter and of what `lorry export` writes, in the form of the hubs' model cards."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from stages.contract.files import digest_of, read_json
from stages.contract.recipe import Recipe
from stages.contract.records import BASE
from stages.contract.run import STAGES
from stages.engines import engine_kind
from stages.engines.vllm_options import supported_rank
from stages.results.run_reader import DamagedError, RunReader
from stages.results.uncertainty import interval_text

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""A model's name on a hub: OWNER/NAME. `lorry fetch` puts the model into the folder of this name."""

LICENCE_KEYS = ("license", "license_name", "license_link")
"""What a model card's front matter says of the licence."""


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
    """The README.md of an adapter in its run.

    `name` is the base's, `config` that of adapter_config.json. `has_connector`: the base got a trained connector.
    """
    kind = _auto_class(model)
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
not find that name, name the base yourself, or let `lorry export` write a folder that they can load as it is:

```python
from peft import PeftModel
from transformers import {kind}

model = PeftModel.from_pretrained({kind}.from_pretrained("BASE"), "THIS FOLDER")
```

```bash
vllm serve BASE --enable-lora --max-lora-rank {supported_rank(int(config["r"]))} --lora-modules tuned="THIS FOLDER"
```
"""


@dataclass(frozen=True)
class Export:
    """What `lorry export` writes into one folder."""

    reader: RunReader
    """The run that trained the adapter."""
    adapter: str
    """The adapter's name."""
    merged: bool
    """Whether it is the base with the adapter merged into it, or the adapter alone."""
    model: Path
    """The folder of the base."""
    base: str
    """The base's name for libraries: on a hub, or its folder."""
    config: Mapping[str, Any]
    """The adapter's adapter_config.json."""
    notes: tuple[str, ...] = ()
    """Sentences on what the reader has to know."""

    @property
    def name(self) -> str:
        """A name for the result."""
        return f"{self.reader.run.name}-{self.adapter}"

    def commands(self, folder: str) -> dict[str, str]:
        """The command with which each program uses the result, by what it does. `folder` is where the result is.

        A program that cannot use it has none.
        """
        place, base, name = shlex.quote(folder), shlex.quote(self.base), shlex.quote(self.name)
        found: dict[str, str] = {}
        trust = " --trust-remote-code" if self.reader.run.recipe.model.trust_remote_code else ""
        if (read_json(self.model / "config.json") or {}).get("model_type") not in engine_kind("vllm").cannot_serve:
            found["serve with vLLM"] = f"vllm serve {place}{trust}"
            if not self.merged:
                rank = supported_rank(int(self.config["r"]))
                found["serve with vLLM"] = (
                    f"vllm serve {base}{trust} --enable-lora --max-lora-rank {rank} --lora-modules {name}={place}"
                )
        if self.merged:
            found["convert for llama.cpp"] = f"python convert_hf_to_gguf.py {place} --outfile {name}.gguf"
            found["import into Ollama"] = f"ollama create {name.lower()} -f {shlex.quote(f'{folder}/{MODELFILE}')}"
        else:
            given = "--base" if Path(self.base).is_dir() else "--base-model-id"
            found["convert for llama.cpp"] = (
                f"python convert_lora_to_gguf.py {place} {given} {base} --outfile {name}.gguf"
            )
        found["upload to a hub"] = f"hf upload OWNER/{name} {place}"
        return found


MODELFILE = "Modelfile"
"""Name of Ollama's file beside a merged model."""

MODELFILE_TEXT = "FROM .\n"


def export_card(export: Export) -> str:
    """The README.md of an export: front matter as hubs read it, use, scores, data, training and recipe.

    It names no path of this machine unless the base has no other name.
    """
    run = export.reader.run
    kind = "model" if export.merged else "LoRA adapter"
    what = "The base with the adapter merged into it" if export.merged else "A LoRA adapter in PEFT's format"
    title = f"# {export.name}\n\n{what}. Base: `{_shown(export.base)}`. Adapter `{export.adapter}` of the run"
    title += f" `{run.name}`, trained by Lorry {_version(export.reader)}."
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(export), sort_keys=False, allow_unicode=True)}---",
        title,
        *(f"- {note}" for note in export.notes),
        f"## Use\n\n`FOLDER` is the folder of this {kind}.\n\n" + _loading(export),
        "\n".join(f"- To {what}: `{command}`" for what, command in export.commands("FOLDER").items()),
        "Ollama writes prompts by its own template, which it guesses from the chat template: compare `ollama show"
        f" {export.name.lower()} --template` with `chat_template.jinja`."
        if export.merged
        else "Ollama imports merged models: `lorry export --merged`.",
        f"## Scores\n\n{_scores(export)}",
        f"## Data\n\n{_data(export)}",
        f"## Training\n\n{_training(export)}",
        f"## Recipe\n\n```yaml\n{_recipe_text(run.recipe)}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(export: Export) -> dict[str, Any]:
    """The card's front matter. A base without a name on a hub is left out: hubs refuse a path."""
    sees = _auto_class(export.model) != "AutoModelForCausalLM"
    named = HUB_NAME.fullmatch(export.base) and not Path(export.base).is_absolute()
    return {
        **(
            {"base_model": export.base, "base_model_relation": "finetune" if export.merged else "adapter"}
            if named
            else {}
        ),
        "library_name": "transformers" if export.merged else "peft",
        **_licence(export.model),
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        "tags": ["lorry", "lora", export.reader.run.recipe.task.replace("_", "-")],
    }


def _licence(model: Path) -> dict[str, Any]:
    """What the base's own card says of its licence; empty if it has no card, or none that says it."""
    try:
        text = (model / "README.md").read_text(encoding="utf-8")
        found = re.match(r"---\r?\n(.*?)\r?\n---\s", text, re.DOTALL)
        values = yaml.safe_load(found[1]) if found else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return {key: values[key] for key in LICENCE_KEYS if key in values} if isinstance(values, dict) else {}


def _auto_class(model: Path) -> str:
    """The class of transformers that loads a base."""
    sees = (read_json(model / "config.json") or {}).get("vision_config")
    return "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"


def _loading(export: Export) -> str:
    """Python that loads an export."""
    kind = _auto_class(export.model)
    if export.merged:
        lines = [f"from transformers import {kind}, AutoTokenizer", ""]
        lines += [f'model = {kind}.from_pretrained("FOLDER", dtype="auto")']
        lines += ['tokenizer = AutoTokenizer.from_pretrained("FOLDER")']
    else:
        lines = ["from peft import PeftModel", f"from transformers import {kind}", ""]
        lines += [f'base = {kind}.from_pretrained("{_shown(export.base)}", dtype="auto")']
        lines += ['model = PeftModel.from_pretrained(base, "FOLDER")']
    return "\n".join(["```python", *lines, "```"])


def _scores(export: Export) -> str:
    """A table of the scores of base and adapter with their intervals, or why there is none."""
    reader = export.reader
    trouble = next((reader.troubles[stage] for stage in STAGES if stage in reader.troubles), None)
    try:
        figures = None if trouble else reader.read_output("eval", "scores.json")
        gains = None if trouble else reader.read_output("eval", "differences.json")
        held_out = None if trouble else _held_out(export)
    except DamagedError as error:
        trouble, figures, gains, held_out = str(error), None, None, None
    own = (figures or {}).get(export.adapter) or {}
    if not own and not held_out:
        return f"Not scored: {trouble or 'eval has no scores of this adapter'}."
    rows = ["| metric | base | tuned | gain | test samples |", "| --- | --- | --- | --- | --- |"]
    for metric, figure in own.items():
        gain = ((gains or {}).get(export.adapter) or {}).get(metric)
        beside = (gain or {}).get("beside") or (figures or {}).get(BASE, {}).get(metric)
        cells = [metric, _figure(beside), _figure(figure), _figure(gain, "+"), str(figure.get("n", ""))]
        rows.append(f"| {' | '.join(cells)} |")
    rows += [held_out] if held_out else []
    on_training = reader.run.recipe.data.evaluate_on_training
    seen = "\n\nThe test samples are samples that the adapter was trained on." if on_training else ""
    units = "\n\nPercent and points with 95% intervals" + ("; the loss in nats per token." if held_out else ".")
    return "\n".join(rows) + units + seen


def _held_out(export: Export) -> str | None:
    """The table's row of the held-out loss of base and adapter; None if eval has none. Raises DamagedError."""
    own = (export.reader.read_output("eval", "losses.json") or {}).get(export.adapter)
    if not own or "over_base" not in own:
        return None
    over = own["over_base"]
    cells = [_loss(over["beside"]["loss"]), _loss(own["loss"]), _loss(over["loss"], "+"), str(own["n"])]
    return f"| held-out loss | {' | '.join(cells)} |"


def _loss(figure: Mapping[str, Any], sign: str = "") -> str:
    """A loss with its interval."""
    if figure["low"] is None:
        return f"{figure['value']:{sign}.3f} [too few]"
    return f"{figure['value']:{sign}.3f} [{figure['low']:{sign}.3f}, {figure['high']:{sign}.3f}]"


def _figure(figure: Mapping[str, Any] | None, sign: str = "") -> str:
    """A figure of eval with its interval; empty for None."""
    return interval_text(figure["value"], figure.get("low"), figure.get("high"), sign) if figure else ""


def _data(export: Export) -> str:
    """The data's digest, the samples of each split, and what the adapter learnt from."""
    made = export.reader.manifests.get("preprocess") or {}
    inputs = {name: digest for name, digest in made.get("inputs", {}).items() if name.startswith("data/")}
    lines = [f"- Task: {export.reader.run.recipe.task.replace('_', '-')}."]
    if inputs:
        lines.append(f"- Input: {len(inputs)} files; sha256 over their names and digests `{digest_of(inputs)}`.")
    for split in ("train", "validation", "test"):
        entry = made.get("outputs", {}).get(f"samples/{split}.jsonl")
        if entry:
            count = "" if entry.get("records") is None else f"{entry['records']:,} samples, "
            lines.append(f"- {split.capitalize()}: {count}sha256 `{entry['sha256']}`.")
    training = _training_facts(export)
    if training:
        count, left = training["samples"]["train"], len((training.get("left_out") or {}).get("train", []))
        lines.append(
            f"- Learnt from: {count:,} samples ({training['mix']})" + (f", {left:,} left out." if left else ".")
        )
    return "\n".join(lines)


def _training_facts(export: Export) -> dict[str, Any]:
    """The adapter's training.json."""
    return read_json(export.reader.run.path("train", "adapters", export.adapter, "training.json")) or {}


def _training(export: Export) -> str:
    """Settings and losses of the training in words."""
    training = _training_facts(export)
    losses = [entry["loss"] for entry in training.get("log", []) if "loss" in entry]
    held = [entry["eval_loss"] for entry in training.get("log", []) if "eval_loss" in entry]
    text = f"LoRA of rank {export.config['r']} and alpha {export.config['lora_alpha']}"
    text += f", {training['steps']:,} steps" if "steps" in training else ""
    text += f", loss {losses[0]:.3f} at the first entry and {losses[-1]:.3f} at the last" if losses else ""
    text += f", validation loss {held[-1]:.3f}" if held else ""
    return text + "."


def _version(reader: RunReader) -> str:
    """The version of Lorry that trained."""
    return str((reader.manifests.get("train") or {}).get("version", ""))


def _shown(name: str) -> str:
    """A base's name without the folders of this machine."""
    return PurePath(name).name if Path(name).is_absolute() else name


def _recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML, without the folders of this machine and the values that are the defaults."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    for section in ("model", "data"):
        values[section]["path"] = _shown(values[section]["path"])
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
