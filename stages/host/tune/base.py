"""Finds what a model's folder says about it: chat template, context, size. Nothing is loaded."""

from dataclasses import dataclass
from pathlib import Path

from stages.contract.errors import UsageError
from stages.contract.files import read_json
from stages.contract.roots import Roots
from stages.host.hubs import is_hub_name
from stages.models.chat_settings import PLAIN, ChatSettings, read_template
from stages.models.chat_template import ChatTemplate
from stages.models.shape import ModelShape, UnknownShapeError, read_shape

IM_END = "<|im_end|>"
"""The word that ends a turn in ChatML."""


@dataclass(frozen=True)
class Base:
    """What a model's folder says."""

    path: str
    """The recipe's `model.path`."""
    folder: Path
    chat_template: str | None
    """`model.chat_template` for a model without a chat template of its own; None: it has one."""
    may_think: bool
    """Whether the chat template's variable enable_thinking decides if the model thinks, as with Qwen3."""
    context: int | None
    """Tokens of the longest text that it was made for; None if its config does not say."""
    sees: bool
    """Whether it has a vision tower."""
    shape: ModelShape | None
    """None if Lorry cannot read it from the config."""


def find_model(name: str, roots: Roots) -> str | None:
    """The recipe's `model.path` for a model as a user names it: a folder, or a name below the models mount.

    None for a name on a hub that is not here yet. Raises UsageError for anything else that is not here.
    """
    here = Path(name)
    inside = not here.is_absolute() and ".." not in here.parts
    if inside and (roots.models / here / "config.json").is_file():
        return str(here)
    if here.is_dir():
        for folder, mount in ((here.absolute(), roots.models), (here.resolve(), roots.models.resolve())):
            if folder.is_relative_to(mount) and folder != mount:
                return str(folder.relative_to(mount))
        return str(here.absolute())
    if is_hub_name(name) and not here.parent.is_dir() and here.parts[0] != roots.models.name:
        return None
    models = sorted(one.parent.name for one in roots.models.glob("*/config.json"))
    has = f", which has {', '.join(models[:8])}{' and others' if models[8:] else ''}" if models else ""
    raise UsageError(
        f"--model {name}: no such folder, neither here nor in {roots.models}{has}; name one of them, or a model on a"
        " hub as OWNER/NAME"
    )


def read_base(path: str, roots: Roots) -> Base:
    """What the folder of `model.path` says.

    Raises UsageError if it is not a model's folder, is damaged, or has a chat template that is not Jinja.
    """
    folder = roots.models / path
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise UsageError(f"--model {path}: {folder} has no config.json; name the folder of a Hugging Face model")
    try:
        shape = read_shape(folder)
    except UnknownShapeError:
        shape = None
    config = read_json(folder / "config.json") or {}
    text = {**config, **(config.get("text_config") or {})}
    context = text.get("max_position_embeddings")
    return Base(
        path,
        folder,
        _template_for(folder),
        _may_think(folder),
        context if isinstance(context, int) and context > 0 else None,
        any(name in config for name in ("vision_config", "mm_vision_tower")),
        shape,
    )


def _template_for(folder: Path) -> str | None:
    """The value of `model.chat_template` that a model needs; None if it has a chat template of its own."""
    if read_template(folder) is not None:
        return None
    words = ChatTemplate(folder, ChatSettings(template=PLAIN, named=True)).added_words.values()
    return "chatml" if IM_END in words else "plain"


def _may_think(folder: Path) -> bool:
    """Whether a model's own chat template writes other prompts with either value of enable_thinking."""
    source = read_template(folder)
    if source is None or "enable_thinking" not in source:
        return False
    try:
        ChatTemplate(folder, ChatSettings(enable_thinking=False)).check()
    except UsageError:  # it ignores the value, or preprocess reports what is wrong with the template
        return False
    return True
