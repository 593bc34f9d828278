"""Writes a recipe for a user to keep and edit: the keys that matter first, each with its reason."""

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from stages.host.tune.values import Value

SECTIONS = ("model", "data", "train", "infer", "eval", "preprocess")
"""The sections of the recipe, in the order in which a reader wants them."""


def recipe_text(name: str, title: str, values: Sequence[Value]) -> str:
    """The recipe with these values as YAML with comments. `name` is its file's, `title` says what it does."""
    head = [
        f"# {title}",
        "#",
        f"#   lorry run {name}       # as it ran: a second start says that all is up to date",
        f"#   lorry plan {name}      # does it fit? --target and --gpus name other cards",
        "#",
        "# Edit what you like: each key says why it has its value, and docs/recipe-reference.md lists all others.",
    ]
    nested: dict[str, Any] = {section: {} for section in SECTIONS}
    for value in values:
        section, *inner = value.key.split(".")
        place = nested.setdefault(section, {}) if inner else nested
        for part in inner[:-1]:
            place = place.setdefault(part, {})
        place[inner[-1] if inner else section] = value
    nested = {key: value for key, value in nested.items() if value or key == "preprocess"}  # which a recipe must have
    return "\n".join([*head, *_lines(nested, 0)]) + "\n"


def _lines(values: dict[str, Any], depth: int) -> Iterator[str]:
    """The lines of a mapping of keys to values or to further mappings. A section without keys is `{}`."""
    plain = {key: value for key, value in values.items() if isinstance(value, Value)}
    texts = {key: f"{'  ' * depth}{key}: {yaml_text(value.value)}" for key, value in plain.items()}
    width = min(max(map(len, texts.values()), default=0), 44)
    yield from (f"{text.ljust(width)}  # {plain[key].why}" if plain[key].why else text for key, text in texts.items())
    for key, value in values.items():
        if key in plain:
            continue
        if depth == 0:
            yield ""
        yield f"{'  ' * depth}{key}:" if value else f"{key}: {{}}"
        yield from _lines(value, depth + 1)


def yaml_text(value: Any) -> str:
    """A value in one line of YAML, as `--set` takes it."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
