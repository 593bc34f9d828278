"""Checks pages: links, commands, recipe keys, paths, settings, form. Each check returns its problems."""

import importlib.util
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click

from entrypoints.lorry import main
from stages.contract.errors import LorryError
from stages.contract.recipe import load_recipe, profile_names
from stages.contract.roots import Roots
from stages.engines import engine_kind
from stages.tasks import settle_recipe
from tests.conftest import REPOSITORY

RECIPES = REPOSITORY / "recipes"
STAGES = ("preprocess", "train", "infer", "eval")
FOLDERS = (
    "stages",
    "entrypoints",
    "recipes",
    "images",
    "compose",
    "k8s",
    "benchmarks",
    "docs",
    "tests",
    "requirements",
)
FILES = ("json", "jsonl", "yaml", "toml", "py", "md", "html", "txt", "log", "npy", "parquet")
READERS = ("stages/**/*.py", "entrypoints/*.py", "compose*/*", "compose.yaml", "k8s/**/*", "images/**/*", "Makefile")
"""Files of the project that read settings from the environment."""
PLACEHOLDER = re.compile(r"[A-Z][A-Z/]*|.*[<…].*")
"""Stands in a command for what the reader puts there: RECIPE, I/N, <run>."""


class Code(NamedTuple):
    """A piece of code in a page, with its line."""

    line: int
    """1-based line that it begins at."""
    text: str
    block: bool
    """Whether it is a fenced block, else it is inline."""


def code_of(text: str) -> list[Code]:
    """All code of a page: its fenced blocks and inline code."""
    found, prose, fence, number = [], [], 0, 0
    block: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if line.startswith("```"):
            if fence:
                found.append(Code(fence + 1, "\n".join(block), True))
            fence, block = (0 if fence else number), []
        elif fence:
            block.append(line)
        elif line.strip():
            prose.append(line)
            continue
        found += _inline("\n".join(prose), number - len(prose))
        prose = []
    return found


def _inline(paragraph: str, first: int) -> Iterator[Code]:
    for match in re.finditer(r"`([^`]+)`", paragraph):
        yield Code(first + paragraph.count("\n", 0, match.start()), " ".join(match[1].split()), False)


def without_blocks(text: str) -> str:
    """The page without its fenced blocks; lines keep their numbers."""
    return re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)


# -- links ---------------------------------------------------------------------------------------------------------


def bad_links(page: Path, text: str) -> list[str]:
    """Problems: relative links and images without a file, and anchors without a heading."""
    problems = []
    prose = re.sub(r"`[^`\n]*`", "", without_blocks(text))
    for match in re.finditer(r"\[[^\]]*\]\(([^)\s]+)\)", prose):
        where, (name, _, anchor) = _line(prose, match.start()), match[1].partition("#")
        if re.match(r"[a-z]+:", name):
            continue
        target = (page.parent / name).resolve() if name else page
        if name and not target.exists():
            problems.append(f"{where}: no file {match[1]}")
        elif anchor and anchor not in anchors(text if target == page else target.read_text(encoding="utf-8")):
            problems.append(f"{where}: no heading for {match[1]}")
    return problems


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub forms them."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(text), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


# -- commands ------------------------------------------------------------------------------------------------------


def bad_commands(text: str) -> list[str]:
    """Commands of Lorry that click does not know or that do not parse, make targets, modules and recipes that are not
    there."""
    problems = []
    for code in code_of(text):
        for line, words in _commands(code):
            problems += [f"{line}: {problem}" for problem in _problems(words, complete=code.block)]
    return problems


def _commands(code: Code) -> Iterator[tuple[int, list[str]]]:
    """Yield the words of each simple command in a piece of code, with its line."""
    number = code.line
    for logical in re.sub(r"\\\n", "\x00", code.text).split("\n"):
        plain = re.sub(r"(^|\s)#(\s.*)?$", "", logical.replace("\x00", " "))
        lexer = shlex.shlex(plain, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, lexer.commenters = True, ""
        try:
            words = list(lexer)
        except ValueError:  # prose, or a quotation mark of another language
            words = []
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set(";&|"):
                yield number, command
                command = []
            else:
                command.append(word)
        number += 1 + logical.count("\x00")


def _problems(words: Sequence[str], complete: bool) -> Iterator[str]:
    """Problems of one command. `complete` says whether all required arguments must be given."""
    words = list(words)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        if name == "LORRY_SET":
            yield from _unknown_keys(value.split())
    if not words or PLACEHOLDER.fullmatch(words[0]):
        return
    name, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if name == "make":
        yield from _make(arguments)
    elif re.fullmatch(r"lorry(-[a-z]+)?", name):
        yield from _click(name, arguments, complete)
    elif name.startswith("python") and arguments[:1] == ["-m"]:
        yield from (f"no module {module}" for module in arguments[1:2] if _no_module(module))


def _click(name: str, arguments: list[str], complete: bool) -> Iterator[str]:
    command = _command(name)
    if command is None:
        yield f"no command {name}"
        return
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        name, command = f"{name} {arguments[0]}", command.commands.get(arguments[0])
        arguments = arguments[1:]
    if command is None:
        yield f"no command {name}"
        return
    if isinstance(command, click.Group) and not arguments and not complete:
        return  # names the command
    try:
        with command.make_context(name, list(arguments)) as context:
            values = dict(context.params)
    except click.exceptions.Exit:  # --help
        return
    except click.MissingParameter as error:
        if complete:
            yield f"{name}: {error.format_message()}"
        return
    except click.UsageError as error:
        if not any(PLACEHOLDER.fullmatch(argument) for argument in arguments):
            yield f"{name}: {error.format_message()}"
        return
    if isinstance(values.get("recipe"), str) or values.get("overrides"):
        yield from _recipe(values.get("recipe"), values.get("profile"), values.get("overrides") or ())


@cache
def _command(name: str) -> click.Command | None:
    if name == "lorry":
        return main
    stage = name.removeprefix("lorry-")
    if stage not in (*STAGES, "serve", "chat"):
        return None
    found: click.Command = importlib.import_module(f"entrypoints.{stage}").main
    return found


def _recipe(name: str | None, profile: str | None, overrides: Sequence[str]) -> Iterator[str]:
    """Problems of a recipe with its profile and overrides, also in the task's settings."""
    if name is None or PLACEHOLDER.fullmatch(name) or name == "selftest" or name.endswith(".yaml"):
        yield from _unknown_keys(overrides)
        return
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        yield f"no recipe {name}"
        return
    if profile and PLACEHOLDER.fullmatch(profile):
        profile = None
    try:
        data = Roots.from_environment().data
        recipe = load_recipe(path, profile, tuple(overrides))
        engine_kind(recipe.infer.engine)
        settle_recipe(recipe, name, data)
    except LorryError as error:
        yield str(error)


def _make(arguments: Sequence[str]) -> Iterator[str]:
    values = dict(word.split("=", 1) for word in arguments if "=" in word)
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    scripts = (REPOSITORY / "images").glob("*.*")
    readers = makefile + "".join(path.read_text(encoding="utf-8") for path in scripts)
    for word in arguments:
        if "=" not in word and word not in make_targets(makefile) and not PLACEHOLDER.fullmatch(word):
            yield f"make: no target {word}"
    for name in values:
        if not re.search(rf"\b{name}\b", readers):
            yield f"make: no variable {name}"
    yield from _recipe(values.get("RECIPE"), values.get("PROFILE"), values.get("SET", "").split())


def make_targets(makefile: str) -> set[str]:
    """The targets that a Makefile has rules for."""
    rules = re.findall(r"^([\w.][\w. /-]*):(?!=)", makefile, flags=re.M)
    return {name for rule in rules for name in rule.split()} - {".PHONY"}


def _no_module(name: str) -> bool:
    """Whether a module would belong to the project, but does not exist."""
    path = REPOSITORY.joinpath(*name.split("."))
    if name.partition(".")[0] not in FOLDERS:
        return False
    return not (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file())


# -- recipe keys and profiles --------------------------------------------------------------------------------------


@cache
def reference() -> ModuleType:
    """The module docs/make_reference.py."""
    spec = importlib.util.spec_from_file_location("make_reference", REPOSITORY / "docs" / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def known_keys() -> set[str]:
    """All dotted keys that a recipe may have, with and without `[]` for entries of a list."""
    keys: set[str] = reference().all_keys()
    return keys | {key.replace("[]", "") for key in keys}


def _unknown_keys(settings: Sequence[str]) -> Iterator[str]:
    for setting in settings:
        key = setting.partition("=")[0]
        if key not in known_keys() and not PLACEHOLDER.fullmatch(key):
            yield f"no recipe key {key}"


def bad_keys(text: str) -> list[str]:
    """Problems: recipe keys in inline code that do not exist, values that they cannot have, and unknown profiles."""
    problems = []
    sections = "|".join(("model", "data", *STAGES))
    for code in code_of(text):
        match = re.fullmatch(rf"((?:{sections})\.[a-z0-9_.\[\]]+)(?:(=|: )(.+))?", code.text)
        if code.block or match is None or match[1].rpartition(".")[2] in FILES:
            continue
        if match[1] not in known_keys():
            problems.append(f"{code.line}: no recipe key {match[1]}")
        elif match[2] == "=":
            try:
                engine_kind(load_recipe(RECIPES / "patent-qa.yaml", None, (code.text,)).infer.engine)
            except LorryError as error:
                problems.append(f"{code.line}: {error}")
    prose = without_blocks(text)
    known = {name for path in RECIPES.glob("*.yaml") for name in profile_names(path)}
    for match in re.finditer(r"\bprofile `([^`]+)`", prose):
        if match[1] not in known:
            problems.append(f"{_line(prose, match.start())}: no profile {match[1]}")
    return problems


# -- paths and settings --------------------------------------------------------------------------------------------


def bad_paths(text: str) -> list[str]:
    """Problems: paths and modules of the project in code that do not exist."""
    problems = []
    for code in code_of(text):
        for word in code.text.split():
            path = word.strip("\"',:;()").removeprefix("./")
            if re.fullmatch(rf"({'|'.join(FOLDERS)}|\.ci)/[^<>=…{{}}]*", path):
                if not any(REPOSITORY.glob(path.rstrip("/") or path)):
                    problems.append(f"{code.line}: no path {path}")
            elif not code.block and re.fullmatch(r"(benchmarks|stages|entrypoints)(\.\w+)+", path) and _no_module(path):
                problems.append(f"{code.line}: no module {path}")
    return problems


@cache
def settings_read() -> set[str]:
    """Names of the LORRY_ variables in the project's files."""
    files = [path for pattern in READERS for path in REPOSITORY.glob(pattern) if path.is_file()]
    texts = (path.read_text(encoding="utf-8") for path in files if "__pycache__" not in path.parts)
    return {name for text in texts for name in re.findall(r"LORRY_[A-Z_]*[A-Z]", text)}


def bad_settings(text: str) -> list[str]:
    """Problems: LORRY_ variables that no file of the project names."""
    found = sorted(set(re.findall(r"LORRY_[A-Z_]*[A-Z]", text)) - settings_read())
    return [f"no setting {name}" for name in found]


# -- form ----------------------------------------------------------------------------------------------------------


def bad_opening(text: str) -> list[str]:
    """Problems: a page that does not open with a title and a sentence."""
    title, *rest = [part for part in text.split("\n\n") if part.strip()]
    if not re.fullmatch(r"# .+", title.strip()):
        return [f"1: no title: {title[:60]!r}"]
    if not rest or not re.match(r"[A-Z`].*[.:]$", rest[0].strip(), flags=re.S):
        return [f"3: no sentence below the title: {rest[0][:60]!r}" if rest else "3: no sentence below the title"]
    return []


def bad_lines(text: str, most: int = 120) -> list[str]:
    """Problems: lines that are too long, except in tables, and words that the style page rules out."""
    problems = []
    for number, line in enumerate(text.splitlines(), start=1):
        if len(line) > most and not line.startswith("|"):
            problems.append(f"{number}: {len(line)} characters")
        problems += [f"{number}: {word!r}" for word in re.findall(r"\b(told|anew|obeyed)\b", line)]
    return problems


def bad_map(text: str) -> list[str]:
    """Problems of the project's map: places that do not exist, and rooms of stages/ that it lacks.

    The map is the block that begins with Makefile.
    """
    (house,) = [code for code in code_of(text) if code.block and code.text.startswith("Makefile")]
    problems, folder, named = [], REPOSITORY, set()
    for number, line in enumerate(house.text.splitlines(), start=house.line):
        names = re.match(r"( {0,2})(\S+(?:,? {1,2}\S+)*?)(?: {2,}(?=[^\s/]+ )| {4,}|$)", line)
        if names is None:
            continue
        inside = names[1] == "  "
        for name in re.split(r",? +", names[2]):
            path = (folder if inside else REPOSITORY) / name
            if not path.exists():
                problems.append(f"{number}: no path {path.relative_to(REPOSITORY)}")
            named.add(path)
        if not inside:
            folder = REPOSITORY / names[2].split()[0]
    rooms = {path.parent for path in (REPOSITORY / "stages").glob("*/__init__.py")}
    return problems + [f"the map lacks {path.relative_to(REPOSITORY)}" for path in sorted(rooms - named)]


def made_by(text: str) -> set[str]:
    """What a page has its reader make: the files whose text it gives or that its commands write, their folders, and
    recipes by name."""
    shown = re.findall(r"^`([\w./-]+)`:$", text, flags=re.M)
    written = [name for code in code_of(text) if code.block for name in re.findall(r" > ([\w./-]+)$", code.text, re.M)]
    paths = [Path(name) for name in shown + written]
    folders = {f"{folder}{end}" for path in paths for folder in path.parents for end in ("", "/")}
    recipes = {path.stem for path in paths if path.parent == Path("recipes")}
    return {str(path) for path in paths} | folders | recipes


def but_for_what_it_makes(problems: Sequence[str], text: str) -> list[str]:
    """The problems that remain once a reader has made the files that the page describes."""
    made = made_by(text)
    return [problem for problem in problems if problem.rpartition(" ")[2] not in made]


def any_problem(checks: Sequence[Any], text: str) -> list[str]:
    """All problems that these checks find."""
    return [problem for check in checks for problem in check(text)]
