"""What ms-swift knows about model types and templates, read from its files: importing ms-swift takes seconds.

ms-swift 4 lists the names as class attributes in swift/model/constant.py and swift/template/constant.py, and says in
swift/model/models/*.py which architectures a type has: `ModelMeta(LLMModelType.llama, ..., architectures=[...])`.
"""

import ast
import difflib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError
from stages.contract.files import read_json
from stages.contract.recipe import Model

EARLIER_TYPES = ("mgm",)
"""Model types of recipes of earlier versions, which are not used any more."""

EARLIER_TEMPLATES = ("llava_chatml", "llava_vicuna", "mgm")
"""Templates of recipes of earlier versions, which are not used any more."""


def refuse_wrong_names(names: Model, model: Path | None) -> None:
    """Raise UsageError, with a line for each wrong name, if ms-swift does not know the recipe's model type or template,
    or if the type is for models of another architecture than that of the folder `model`. None: that is not checked.

    Nothing is checked if ms-swift is not installed here, or keeps its names elsewhere.
    """
    spec = importlib.util.find_spec("swift")
    if spec is None or not spec.submodule_search_locations:
        return
    swift = Path(spec.submodule_search_locations[0])
    faults = [
        _unknown_name("swift_type", names.swift_type, swift / "model" / "constant.py", EARLIER_TYPES)
        or _other_architecture(names.swift_type, model, swift),
        _unknown_name("swift_template", names.swift_template, swift / "template" / "constant.py", EARLIER_TEMPLATES),
    ]
    if any(faults):
        raise UsageError("\n".join(fault for fault in faults if fault))


def _unknown_name(key: str, name: str | None, file: Path, earlier: tuple[str, ...]) -> str:
    """What is wrong with a name that is neither in ms-swift's file nor in `earlier`; else empty, as without a name."""
    known = names_in_file(file)
    if name is None or not known or name in known or name in earlier:
        return ""
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.7)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see ms-swift's list of models"
    return f"model.{key}: ms-swift has no {name!r}; {hint}"


def _other_architecture(name: str | None, model: Path | None, swift: Path) -> str:
    """What is wrong with a model type for another architecture than the model's; empty if nothing is, or if one of the
    two is not known or there is no name."""
    config: dict[str, Any] = (read_json(model / "config.json") if model else None) or {}
    own = next(iter(config.get("architectures") or []), None)
    if own is None or name is None:
        return ""
    known = architectures_by_type(swift)
    fitting = sorted(kind for kind, found in known.items() if own in found)
    if not fitting or name in fitting or not known.get(name):
        return ""
    best = [kind for kind in fitting if kind == config.get("model_type")] or fitting[:3]
    return (
        f"model.swift_type: {name!r} is for {' or '.join(known[name])}, but {model} is a {own}; set it to"
        f" {' or '.join(best)}"
    )


def names_in_file(path: Path) -> set[str]:
    """The texts that the classes of a Python file assign to their attributes; empty if there is no such file."""
    if not path.is_file():
        return set()
    return {
        statement.value.value
        for one in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(one, ast.ClassDef)
        for statement in one.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    }


def architectures_by_type(swift: Path) -> dict[str, list[str]]:
    """The architectures of each model type in ms-swift's folder, as in a model's config.json. Types without any, or
    that are not described by constants, are left out."""
    return {
        kind: found
        for path in sorted((swift / "model" / "models").glob("*.py"))
        for call in _calls_of_model_meta(path)
        if call.args and isinstance(kind := getattr(call.args[0], "attr", None), str)
        if (found := _texts(next((word.value for word in call.keywords if word.arg == "architectures"), None)))
    }


def _calls_of_model_meta(path: Path) -> Iterator[ast.Call]:
    """Yield the calls of `ModelMeta` in a Python file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ModelMeta":
            yield node


def _texts(node: ast.expr | None) -> list[str]:
    """The texts in a list of constants; empty for anything else."""
    elements = node.elts if isinstance(node, ast.List) else []
    return [one.value for one in elements if isinstance(one, ast.Constant) and isinstance(one.value, str)]
