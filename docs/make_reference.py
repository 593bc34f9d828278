"""Write docs/recipe-reference.md from the recipe's schema and the tasks' settings (`make reference`)."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages.contract.recipe import Section, recipe_file_schema
from stages.engines import engine_names
from stages.tasks import load_task, task_names

PAGE = Path(__file__).with_name("recipe-reference.md")

HEAD = """\
# Recipe reference

This page lists every key of a recipe with its type, default and meaning. `make reference` writes it from the schema in
`stages/contract/recipe.py` and the tasks' settings in `stages/tasks/`; do not edit it.

`--set section.key=value` overrides one key. `lorry recipe show RECIPE` prints all values as they would run, and
`lorry recipe schema` prints the JSON schema for editors. Unknown keys are refused. *name* is a text that is also a
folder's name: letters, digits, `.`, `_` and `-`, up to 64 characters. `[]` stands for each entry of a list.
"""

TASK_SETTINGS = {"preprocess.samples": "Samples", "infer.passes": "Passes", "eval.scoring": "Scoring"}
"""Sections whose keys a task defines, and the class in the task's module that has them."""

Schema = Mapping[str, Any]


class Row(NamedTuple):
    """One row of a table: a key of a recipe, with type, default and description as text."""

    key: str
    type: str
    default: str
    description: str


class Table(NamedTuple):
    """The table of one section of a recipe."""

    title: str
    """Key of the section; empty for the recipe's own keys."""
    about: str
    """Text above the table; empty: none."""
    rows: list[Row]


def recipe_tables() -> list[Table]:
    """The tables of the recipe's sections, each before those of the sections inside it."""
    schema = recipe_file_schema(engine_names())
    return list(_tables(schema, "", schema["$defs"], about=""))


def task_tables() -> dict[str, list[Table]]:
    """The tables of each task's settings, by the task's name. A section without settings has no rows."""
    found = {}
    for name in task_names():
        task = load_task(name)
        if all(hasattr(task, kind) for kind in TASK_SETTINGS.values()):
            found[name] = [_task_table(section, getattr(task, kind)) for section, kind in TASK_SETTINGS.items()]
            if task.COMPONENTS:
                found[name].append(Table("infer.ablate", f"Components: {_code(*task.COMPONENTS)}.", []))
    return found


def all_keys() -> set[str]:
    """All dotted keys that a recipe may have, with `[]` for the entries of a list."""
    tables = [*recipe_tables(), *(table for tables in task_tables().values() for table in tables)]
    return {row.key for table in tables for row in table.rows}


def page() -> str:
    """The text of recipe-reference.md."""
    parts = [HEAD]
    for table in recipe_tables():
        depth = "##" if "." not in table.title else "###"
        parts.append(_markdown(table, f"{depth} {table.title or 'Top level'}"))
    for name, tables in task_tables().items():
        settings = [_markdown(table, f"### {table.title} of {name}") for table in tables if table.rows or table.about]
        parts.append(f"## Task {name}\n")
        parts += settings or ["It has no settings of its own.\n"]
    return "\n".join(parts)


def _task_table(section: str, kind: type[Section]) -> Table:
    """The table of a task's settings in one section."""
    schema = kind.model_json_schema()
    return next(iter(_tables(schema, section, schema.get("$defs", {}), about="")))


def _tables(schema: Schema, key: str, defs: Schema, about: str) -> Iterator[Table]:
    """Yield the table of an object in a JSON schema, then those of the objects in it."""
    required, rows, inner = schema.get("required", ()), [], []
    for name, value in schema.get("properties", {}).items():
        path = f"{key}.{name}" if key else name
        default = "required" if name in required else _default_text(value)
        rows.append(Row(path, _type_text(value, defs), default, " ".join(value.get("description", "").split())))
        inner += [(f"{path}{suffix}", section) for suffix, section in _sections(value, defs)]
    yield Table(key, about, rows)
    for path, section in inner:
        paragraph = section.get("description", "").split("\n\n")[0]
        yield from _tables(section, path, defs, " ".join(paragraph.split()))


def _resolve_reference(value: Schema, defs: Schema) -> Schema:
    """The schema that a `$ref` names; any other schema itself."""
    return defs[value["$ref"].rpartition("/")[2]] if "$ref" in value else value


def _sections(value: Schema, defs: Schema) -> Iterator[tuple[str, Schema]]:
    """Yield the objects with keys that a value may be or hold, each with the suffix of its key: `[]` in a list."""
    value = _resolve_reference(value, defs)
    if "properties" in value:
        yield "", value
    for one in value.get("anyOf", ()):
        yield from _sections(one, defs)
    if "items" in value:
        yield from ((f"[]{suffix}", section) for suffix, section in _sections(value["items"], defs))


def _type_text(value: Schema, defs: Schema) -> str:
    """The type of a value, in words."""
    value = _resolve_reference(value, defs)
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_type_text(one, defs) for one in value["anyOf"]))
    if "const" in value or "enum" in value:
        return _code(*value.get("enum", [value.get("const")]))
    if "properties" in value:
        return "section"
    kind = value.get("type")
    if kind == "array":
        return f"list of {_type_text(value['items'], defs)}"
    if kind == "string" and "pattern" in value:
        return "name"
    words = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true` or `false`"}
    words |= {"null": "`null`", "object": "mapping"}
    return words[str(kind)] + _limits_text(value)


def _limits_text(value: Schema) -> str:
    """The limits of a number, such as ` from 0 below 1`; empty without limits."""
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    limits = [f"{word} {value[key]:g}" for key, word in words.items() if key in value]
    return f" {' '.join(limits)}" if limits else ""


def _default_text(value: Schema) -> str:
    """The default of a value as code; empty for a section."""
    found = value.get("default")
    if isinstance(found, dict) or "default" not in value:  # a section, whose keys have defaults of their own
        return ""
    return _code(found if isinstance(found, str) and found else json.dumps(found))


def _code(*values: Any) -> str:
    """Values in backticks, with commas between them."""
    return ", ".join(f"`{value}`" for value in values)


def _markdown(table: Table, heading: str) -> str:
    """A heading and a table as Markdown."""
    lines = [heading, ""]
    if table.about:
        lines += [table.about, ""]
    if table.rows:
        lines += ["| key | type | default | description |", "| --- | --- | --- | --- |"]
        for row in table.rows:
            cells = (f"`{row.key}`", row.type, row.default, row.description)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
