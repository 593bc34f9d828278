"""Lines of the training code, and where it reaches into other libraries, at two revisions.

    python -m benchmarks.size [BEFORE [AFTER]]

Counted are all Python files of stages/train and of MORE, where training code lies in other rooms. A reach is, in one
place of the code:

* private: an import or an attribute whose name begins with one underscore and that no counted file defines; also as a
  text in getattr, hasattr or setattr
* assigned: an assignment, setattr or patch that changes an attribute that no counted file defines: of a library's
  module, class or object
* applied: a call of Liger's `apply_*`

Names are compared, not types: an attribute of a library with the name of one of ours is missed, and an attribute of
another room of ours counts.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.rows import write_rows

MORE = ("stages/hardware/batch.py", "stages/hardware/step.py", "stages/hardware/peaks.py", "stages/models/gptq.py")
DEFINES = ("stages/contract/errors.py",)
"""Files whose names are ours too, and which are not counted."""
BEFORE, AFTER = "da6deed", "HEAD"
OWN = ("self", "cls")


def git(*words: str) -> str:
    """The output of a git command."""
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout


def files_of(revision: str) -> dict[str, str]:
    """The text of each counted file at a revision, and of those in DEFINES."""
    there = git("ls-tree", "-r", "--name-only", revision).splitlines()
    wanted = [
        name
        for name in there
        if name.endswith(".py") and (name.startswith("stages/train/") or name in (*MORE, *DEFINES))
    ]
    return {name: git("show", f"{revision}:{name}") for name in wanted if name.endswith(".py")}


def defined_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a file defines: functions, classes, variables, and attributes of its own objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            yield node.attr


def _is_own(value: ast.expr) -> bool:
    """Whether an expression is the object that a method belongs to."""
    return isinstance(value, ast.Name) and value.id in OWN


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


def reaches(tree: ast.AST, own: set[str]) -> Iterator[tuple[str, int, str]]:
    """Yield the reaches of a file: kind, line and name. `own` has the names that counted files define."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = (getattr(node, "module", None) or "").split(".")
            for alias in node.names:
                for part in [*(module if module[0] != "stages" else []), *alias.name.split(".")]:
                    if is_private(part) and part not in own:
                        yield "private", node.lineno, part
        elif isinstance(node, ast.Attribute):
            yield from _of_attribute(node, own)
        elif isinstance(node, ast.Call):
            yield from _of_call(node, own)


def _of_attribute(node: ast.Attribute, own: set[str]) -> Iterator[tuple[str, int, str]]:
    """Yield the reaches of an attribute that is read or assigned."""
    if _is_own(node.value) or ast.unparse(node) == "os.environ":
        return
    if isinstance(node.ctx, ast.Store | ast.Del):
        if node.attr not in own or node.attr.startswith("__"):
            yield "assigned", node.lineno, node.attr
    elif is_private(node.attr) and node.attr not in own:
        yield "private", node.lineno, node.attr


def _of_call(node: ast.Call, own: set[str]) -> Iterator[tuple[str, int, str]]:
    """Yield the reaches of a call: getattr with a private name, setattr, patch, and Liger's functions."""
    called = ast.unparse(node.func)
    if called.rpartition(".")[2].startswith("apply_liger"):
        yield "applied", node.lineno, called
    texts = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    if called in ("getattr", "hasattr"):
        for text in texts:
            if is_private(text) and text not in own:
                yield "private", node.lineno, text
    elif called in ("setattr", "patch", "patch.object", "mock.patch", "mock.patch.object", "patch.multiple"):
        name = texts[-1].rpartition(".")[2] if texts else "?"
        if name not in own or "patch" in called:
            yield "assigned", node.lineno, name


def count(revision: str) -> dict[str, object]:
    """The row of a revision."""
    files = files_of(revision)
    trees = {name: ast.parse(text) for name, text in files.items()}
    own = {name for tree in trees.values() for name in defined_names(tree)}
    for name in DEFINES:
        del files[name], trees[name]
    found = [(path, *one) for path, tree in trees.items() for one in reaches(tree, own)]
    lines = {name: len(text.splitlines()) for name, text in files.items()}
    train = sum(number for name, number in lines.items() if name.startswith("stages/train/"))
    return {
        "revision": git("rev-parse", "--short", revision).strip(),
        "lines of stages/train": train,
        "lines elsewhere": {name: number for name, number in lines.items() if not name.startswith("stages/train/")},
        "lines": sum(lines.values()),
        "reaches": len(found),
        **{kind: sum(one[1] == kind for one in found) for kind in ("private", "assigned", "applied")},
        "where": [f"{path}:{line} {kind} {name}" for path, kind, line, name in sorted(found)],
    }


def main() -> None:
    """Count at both revisions, and write the rows."""
    before, after = (*sys.argv[1:], *(BEFORE, AFTER)[len(sys.argv) - 1 :])[:2]
    rows = [{"when": when, **count(revision)} for when, revision in (("before", before), ("after", after))]
    write_rows("size", rows, f"python -m benchmarks.size {before} {after}")


if __name__ == "__main__":
    main()
