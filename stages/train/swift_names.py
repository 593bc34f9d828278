"""The names that ms-swift knows for model types and templates, read without importing ms-swift, which takes seconds.

ms-swift 4 lists them as class attributes in two files, swift/model/constant.py and swift/template/constant.py.
`tests/train/test_swift_names.py` compares them with what the installed ms-swift registers.
"""

import ast
import difflib
import importlib.util
from pathlib import Path

from stages.contract.errors import UsageError
from stages.contract.recipe import Model

OWN_TYPES = ("mgm",)
"""Model types that Lorry registers with ms-swift (mgm_swift.py)."""

OWN_TEMPLATES = ("llava_chatml", "llava_vicuna", "mgm")
"""Templates that Lorry registers with ms-swift (llava_templates.py, mgm_swift.py)."""


def refuse_unknown_names(model: Model) -> None:
    """Raise UsageError, with all wrong names, if ms-swift does not know the recipe's model type or template.

    Nothing is checked if ms-swift is not installed here, or keeps its names elsewhere.
    """
    spec = importlib.util.find_spec("swift")
    if spec is None or not spec.submodule_search_locations:
        return
    swift = Path(spec.submodule_search_locations[0])
    faults = []
    for key, name, folder, own in (
        ("swift_type", model.swift_type, "model", OWN_TYPES),
        ("swift_template", model.swift_template, "template", OWN_TEMPLATES),
    ):
        known = names_in_file(swift / folder / "constant.py")
        if known and name not in (known := known | set(own)):
            near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.7)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see ms-swift's list of models"
            faults.append(f"model.{key}: ms-swift has no {name!r}; {hint}")
    if faults:
        raise UsageError("\n".join(faults))


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
