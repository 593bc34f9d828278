"""The pages hold: links, commands, recipe keys, paths and settings exist; and each check sees what is wrong."""

import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.docs import checks

DOCS = REPOSITORY / "docs"
README = REPOSITORY / "README.md"
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted(DOCS.glob("*.md"))]
ALL = [*PAGES, REPOSITORY / "benchmarks" / "README.md", REPOSITORY / "recipes" / "data" / "README.md"]
SPEAKS_OF_STYLE = {"style.md", "recipe-reference.md"}
"""Pages that quote what is ruled out, or are written from descriptions in the code."""


@pytest.fixture(autouse=True)
def _demo_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_DATA", str(REPOSITORY / "recipes" / "data"))
    for name in ("RECIPE", "PROFILE", "RUN", "SET", "SHARD"):
        monkeypatch.delenv(f"LORRY_{name}", raising=False)


def named(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("page", ALL, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    assert checks.bad_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", ALL, ids=named)
def test_commands_parse_and_their_recipes_are_valid(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert checks.but_for_what_it_makes(checks.bad_commands(text), text) == []


@pytest.mark.parametrize("page", ALL, ids=named)
def test_recipe_keys_paths_and_settings_exist(page: Path) -> None:
    found = (checks.bad_keys, checks.bad_paths, checks.bad_settings)
    text = page.read_text(encoding="utf-8")
    assert checks.but_for_what_it_makes(checks.any_problem(found, text), text) == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_page_opens_with_a_title_and_a_sentence(page: Path) -> None:
    assert checks.bad_opening(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in SPEAKS_OF_STYLE], ids=named)
def test_lines_are_short_and_plain(page: Path) -> None:
    assert checks.bad_lines(page.read_text(encoding="utf-8")) == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"({page.name})" not in index] == []


def test_the_map_of_the_project_is_true() -> None:
    assert checks.bad_map((DOCS / "development.md").read_text(encoding="utf-8")) == []


def test_every_setting_is_on_the_settings_page() -> None:
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    assert checks.settings_read() - set(re.findall(r"`(LORRY_\w+)", text)) == set()


def test_every_benchmark_is_in_its_readme() -> None:
    text = (REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")
    modules = {path.stem for path in (REPOSITORY / "benchmarks").glob("*.py")} - {"__init__"}
    assert {
        name for name in modules if f"benchmarks.{name}`" not in text and f"benchmarks.{name} " not in text
    } == set()


def test_the_recipe_reference_is_what_the_schema_gives() -> None:
    written = (DOCS / "recipe-reference.md").read_text(encoding="utf-8")
    assert written == checks.reference().page(), "make reference"


def test_the_reference_has_sections_in_sections_and_task_settings() -> None:
    keys = checks.known_keys()
    assert {"train.adapters[].data[].fraction", "train.connector.epochs", "infer.vote", "seed", "profiles"} <= keys
    assert {"infer.passes.retries", "preprocess.samples.crop_figure", "eval.scoring.official_joint_eval"} <= keys
    text = checks.reference().page()
    assert "| `train.effective_batch` | integer from 1 | `16` |" in text
    assert "| `infer.batch_size` | integer from 1 or `auto` | `16` |" in text


# -- each check sees what is wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("see [x](gone.md)", "1: no file gone.md"),
        ("\n![x](../images/none.png)", "2: no file ../images/none.png"),
        ("[x](memory.md#no-such)", "no heading for memory.md#no-such"),
        ("# A title\n\n[x](#b-title)", "3: no heading for #b-title"),
        ("```\n# Not a heading\n```\n[x](#not-a-heading)", "4: no heading"),
    ],
)
def test_a_bad_link_is_seen(text: str, problem: str) -> None:
    (found,) = checks.bad_links(DOCS / "page.md", text)
    assert problem in found


def test_a_good_link_passes() -> None:
    text = (
        "# A `b.c` title, here\n\n[x](memory.md#pictures) [y](#a-bc-title-here) [z](https://a.example/b) `[n](gone.md)`"
    )
    assert checks.bad_links(DOCS / "page.md", text) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("`lorry fly`", "no command lorry fly"),
        ("`lorry-fly x`", "no command lorry-fly"),
        ("`lorry recipe forget`", "no command lorry recipe forget"),
        ("`lorry run patent-qa --profil tiny`", "lorry run: No such option"),
        (
            "```\nlorry launch fly patent-qa\n```",
            "2: lorry launch: Invalid value for '{preprocess|train|infer|eval|load}'",
        ),
        ("```\nlorry launch\n```", "lorry launch: Missing argument"),
        ("```\ncd x && lorry plan patent-qa \\\n  --gpus none\n```", "2: lorry plan: Invalid value for '--gpus'"),
        ("```\necho\nlorry run patents    # one\n```", "3: no recipe patents"),
        ("```\nlorry run patent-qa --profile huge\n```", "no profile 'huge'"),
        ("`lorry run patent-qa --set train.epoch=3`", "unknown key 'train.epoch'"),
        ("`lorry run patent-qa --set train.epochs=many`", "train.epochs"),
        ("`lorry run patent-qa --set infer.passes.refined=true`", "unknown key 'refined'"),
        ("`lorry run --run mine --set infer.votes=null`", "no recipe key infer.votes"),
        ('```\nLORRY_SET="seed=1 train.epoch=3" docker compose up infer\n```', "no recipe key train.epoch"),
        ("`make fly`", "make: no target fly"),
        ("`make train CARDS=0`", "make: no variable CARDS"),
        ("`make train RECIPE=patents`", "no recipe patents"),
        ('`make train RECIPE=patent-qa SET="train.epoch=3"`', "unknown key 'train.epoch'"),
        ("`python -m benchmarks.nothing`", "no module benchmarks.nothing"),
    ],
)
def test_a_bad_command_is_seen(text: str, problem: str) -> None:
    (found,) = checks.bad_commands(text)
    assert problem in found


@pytest.mark.parametrize(
    "text",
    [
        "`lorry launch`, `lorry launch STAGE`, `lorry --help`, `lorry recipe show RECIPE`, `lorry-<stage>`",
        "```\nlorry run patent-qa --profile tiny --set train.epochs=3   # a\nlorry-infer patent-qa --shard 0/4\n```",
        "```\nlorry run --run logic-choice --set 'infer.vote={adapters: greedy, weights: validation}'\n```",
        "`make`, `make train GPUS=0,1 RECIPE=extractive-qa`, `make .env TARGET=a800`, `lorry-train selftest`",
        '```\n{"question": "what\'s this"}\nmakes no command; lorry\'s neither\n```',
    ],
)
def test_a_good_command_passes(text: str) -> None:
    assert checks.bad_commands(text) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Set `train.effective_batches`.", "1: no recipe key train.effective_batches"),
        ("\n\nSet `infer.passes.retry`.", "3: no recipe key infer.passes.retry"),
        ("Set `infer.engine=fast`.", "infer.engine"),
        ("The profile `huge`.", "1: no profile huge"),
    ],
)
def test_a_bad_key_is_seen(text: str, problem: str) -> None:
    (found,) = checks.bad_keys(text)
    assert problem in found


def test_a_good_key_passes() -> None:
    text = (
        "`train.effective_batch`, `infer.engine=transformers`, `preprocess.classifier: rule`, `train.adapters[].data`"
    )
    assert checks.bad_keys(f"{text}, `train.jsonl`, `eval.py`, the profile `tiny`") == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("In `stages/nowhere/x.py`.", "1: no path stages/nowhere/x.py"),
        ("```\n\nkubectl apply -f k8s/gone.yaml\n```", "2: no path k8s/gone.yaml"),
        ("In `k8s/*/gone.yaml`.", "1: no path k8s/*/gone.yaml"),
        ("In `benchmarks.gone`.", "1: no module benchmarks.gone"),
    ],
)
def test_a_bad_path_is_seen(text: str, problem: str) -> None:
    assert checks.bad_paths(text) == [problem]


def test_a_good_path_passes() -> None:
    assert checks.bad_paths("`stages/tasks/`, `recipes/*.yaml`, `k8s/overlays/<target>`, `benchmarks.render`") == []


def test_bad_settings_openings_and_lines_are_seen() -> None:
    assert checks.bad_settings("`LORRY_DATE` and `LORRY_DATA`") == ["no setting LORRY_DATE"]
    assert checks.bad_opening("Text.\n\n# Title") == ["1: no title: 'Text.'"]
    assert checks.bad_opening("# Title\n\n| a | b |\n") == ["3: no sentence below the title: '| a | b |\\n'"]
    assert checks.bad_opening("# Title\n\nA sentence.\n\nMore") == []
    assert checks.bad_lines("is told\n" + "x" * 121) == ["1: 'told'", "2: 121 characters"]


def test_a_wrong_map_is_seen() -> None:
    problems = checks.bad_map("```\nMakefile     verbs\nstages/      code\n  contract/  tasks/    x\n  gone/    y\n```")
    assert problems[0] == "5: no path stages/gone"
    assert "the map lacks stages/train" in problems
    assert "the map lacks stages/contract" not in problems
