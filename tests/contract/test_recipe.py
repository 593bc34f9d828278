"""Recipes: what is accepted, and the message for a wrong one."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stages.contract.errors import UsageError
from stages.contract.files import digest_of
from stages.contract.recipe import (
    CHAT_TEMPLATES,
    RESULT_NEUTRAL,
    Adapter,
    Recipe,
    Source,
    dump_recipe,
    file_name,
    load_recipe,
    profile_names,
    recipe_file_schema,
    replaced_values,
)
from stages.engines import engine_names
from stages.models.chat_settings import NAMED
from tests.conftest import MINIMAL_RECIPE, REPOSITORY

RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
ALL = [(path, profile) for path in RECIPES for profile in (None, *profile_names(path))]


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path, profile: str | None = None, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(path, profile, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def minimal(**changes: object) -> Recipe:
    return Recipe.model_validate({**yaml.safe_load(MINIMAL_RECIPE), **changes})


def test_there_are_recipes_to_check() -> None:
    assert (REPOSITORY / "recipes" / "patent-qa.yaml") in RECIPES


@pytest.mark.parametrize(("path", "profile"), ALL, ids=lambda value: getattr(value, "stem", str(value)))
def test_every_recipe_is_valid_with_every_profile(path: Path, profile: str | None) -> None:
    recipe = load_recipe(path, profile)
    assert recipe.profile == profile
    assert recipe.description


@pytest.mark.parametrize(("path", "profile"), ALL, ids=lambda value: getattr(value, "stem", str(value)))
def test_the_recipe_kept_in_a_run_reads_back_as_the_same(path: Path, profile: str | None, tmp_path: Path) -> None:
    recipe = load_recipe(path, profile, ("train.learning_rate=3e-7",))
    assert load_recipe(written(tmp_path, dump_recipe(recipe))) == recipe


def test_a_resolved_recipe_holds_no_path_of_this_machine(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    stored = json.dumps(recipe.model_dump(mode="json")) + dump_recipe(recipe)
    assert str(recipe_file.parent) not in stored
    assert str(REPOSITORY) not in stored


def test_every_recipe_file_satisfies_the_exported_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    for path in RECIPES:
        jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), recipe_file_schema(engine_names()))


@pytest.mark.parametrize(
    ("old", "new", "line", "found", "nearest"),
    [
        ("task: patent_qa", "task: patent_qa\nsead: 1", 2, "'sead'", "'seed'"),
        (
            "    - name: tuned",
            "    - name: tuned\n  learnin_rate: 1.0",
            10,
            "'train.learnin_rate'",
            "'train.learning_rate'",
        ),
        ("    - name: tuned", "    - nmae: tuned", 9, "'train.adapters.0.nmae'", "'train.adapters.name'"),
        ("data: {path: few}", "data: {path: few, test_fracton: 0.5}", 3, "'data.test_fracton'", "'data.test_fraction'"),
    ],
)
def test_an_unknown_key_is_named_with_its_line_and_the_nearest_known(
    tmp_path: Path, old: str, new: str, line: int, found: str, nearest: str
) -> None:
    path = written(tmp_path, MINIMAL_RECIPE.replace(old, new))
    message = refused(path)
    assert f"{path}:{line}: unknown key {found}; did you mean {nearest}?" in message


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("epochs=3", "epochs", "'train.epochs' or 'train.connector.epochs'"),
        ("epoch=3", "epoch", "'train.epochs' or 'train.connector.epochs'"),
        ("learning-rate=1e-4", "learning-rate", "'train.learning_rate' or 'train.connector.learning_rate'"),
        ("rank=4", "rank", "'train.rank'"),
        ("embedder=x", "embedder", "'preprocess.retrieval.embedder'"),
        ("top_k=3", "top_k", "'preprocess.retrieval.top_k'"),
        ("model_path=x", "model_path", "'model.path'"),
        ("engine=vllm", "engine", "'infer.engine'"),
        ("infer.rank=4", "infer.rank", "'train.rank'"),
        ("train.epoch=3", "train.epoch", "'train.epochs'"),
        ("train.batch_size=3", "train.batch_size", "'infer.batch_size' or 'preprocess.retrieval.batch_size'"),
        ("trian.epochs=3", "trian", "'train'"),
        ("refine=false", "refine", "'infer.passes.refine'"),  # a setting of the task, which this recipe has
    ],
)
def test_a_key_without_its_section_is_found_in_all_sections(
    tmp_path: Path, override: str, key: str, meant: str
) -> None:
    path = written(tmp_path, MINIMAL_RECIPE + "infer:\n  passes: {refine: true}\n")
    message = refused(path, None, override)
    assert message == f"--set {override}: unknown key {key!r}; did you mean {meant}?"


def test_an_override_of_a_sound_key_is_not_blamed_for_a_wrong_one_in_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL_RECIPE.replace("few}", "few, test_fracton: 0.5}"))
    assert refused(path, None, "data.path=x", "train.rank=4").startswith(f"{path}:3: unknown key 'data.test_fracton'")


def test_an_unknown_key_like_no_other_lists_the_known_ones(tmp_path: Path) -> None:
    message = refused(written(tmp_path, MINIMAL_RECIPE.replace("{path: few}", "{path: few, zzz: 1}")))
    assert "known keys: path, test_fraction, validation_fraction" in message


def test_an_unknown_key_in_a_profile_is_found_on_the_profiles_line(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL_RECIPE + "profiles:\n  big:\n    train:\n      epoch: 3\n")
    load_recipe(path)
    assert f"{path}:13: unknown key 'train.epoch'; did you mean 'train.epochs'?" in refused(path, "big")


def test_a_key_that_was_replaced_is_ignored_with_one_line(tmp_path: Path) -> None:
    path = written(
        tmp_path, MINIMAL_RECIPE + "eval:\n  worst: 3\n  bootstrap: 500\nprofiles:\n  big: {eval: {bootstrap: 900}}\n"
    )
    assert "bootstrap" not in dump_recipe(load_recipe(path)) + dump_recipe(load_recipe(path, "big"))
    lines: list[str] = []

    def say(section: str, line: str) -> None:
        lines.append(line)
        assert section == line.partition("'")[2].partition(".")[0]

    recipe = load_recipe(path, say=say)
    cure = "is ignored: intervals are computed without resamples (docs/runs.md#intervals); remove it"
    assert lines == [f"{path}:12: 'eval.bootstrap' {cure}"]
    assert recipe == load_recipe(written(tmp_path, MINIMAL_RECIPE), overrides=("eval.worst=3",))
    path = written(tmp_path, MINIMAL_RECIPE)
    lines.clear()
    assert load_recipe(path, overrides=("eval.bootstrap=200",), say=say) == load_recipe(path)
    assert lines == [f"--set eval.bootstrap=200: 'eval.bootstrap' {cure}"]
    assert "unknown key 'eval.bootstrab'" in refused(path, None, "eval.bootstrab=200")


REPLACED_IN_TRAIN = """\
train:
  adapters: [{name: tuned}]
  micro_batch: 4
  exact_batch: true
  connector: {effective_batch: 8, micro_batch: 2}
"""


def test_what_packed_passes_replaced_is_ignored_with_a_line_for_each_key(tmp_path: Path) -> None:
    text, _, _ = MINIMAL_RECIPE.partition("train:")
    path = written(tmp_path, text + REPLACED_IN_TRAIN)
    lines: list[str] = []
    recipe = load_recipe(path, say=lambda section, line: lines.append(f"{section} {line}"))
    first = len(text.splitlines()) + 1
    tokens = "is ignored: a pass holds as many tokens as memory allows (docs/memory.md); remove it"
    assert lines == [
        f"train {path}:{first + 2}: 'train.micro_batch' {tokens}",
        f"train {path}:{first + 4}: 'train.connector.micro_batch' {tokens}",
        f"train {path}:{first + 3}: 'train.exact_batch' is ignored: a step has exactly train.effective_batch samples"
        " on any number of GPUs; remove it",
    ]
    assert recipe.train.connector is not None and recipe.train.connector.effective_batch == 8
    assert "micro_batch" not in dump_recipe(recipe) and "exact_batch" not in dump_recipe(recipe)
    lines.clear()
    plain = written(tmp_path, MINIMAL_RECIPE)
    given = "train.connector={micro_batch: 2}"
    load_recipe(plain, overrides=(given,), say=lambda _, line: lines.append(line))
    assert lines == [f"--set {given}: 'train.connector.micro_batch' {tokens}"]


def test_a_value_that_was_replaced_is_read_as_another_with_a_line(tmp_path: Path) -> None:
    text, _, _ = MINIMAL_RECIPE.partition("train:")
    path = written(tmp_path, f"{text}train:\n  adapters: [{{name: tuned}}]\n  sharding: zero2\n")
    lines: list[str] = []
    assert load_recipe(path, say=lambda section, line: lines.append(f"{section} {line}")).train.sharding == "auto"
    cure = "is read as auto: Lorry shards the base (zero3) or nothing; set it to auto"
    assert lines == [f"train {path}:{len(text.splitlines()) + 3}: 'train.sharding' zero2 {cure}"]
    lines.clear()
    given = "train.sharding=zero2"
    plain = written(tmp_path, MINIMAL_RECIPE)
    assert load_recipe(plain, overrides=(given,), say=lambda _, line: lines.append(line)) == load_recipe(plain)
    assert lines == [f"--set {given}: 'train.sharding' zero2 {cure}"]


def test_a_finished_adapter_of_a_recipe_with_replaced_keys_stays_valid(tmp_path: Path) -> None:
    """Digests as the version before computed them, in which these keys never counted."""
    text, _, _ = MINIMAL_RECIPE.partition("train:")
    path = written(tmp_path, text + REPLACED_IN_TRAIN)
    recipe = load_recipe(path)
    before = "9f902dd2936f9e31fa33791cd06676dbe1708aa6f68f6fba64aa1f528901ad84"
    assert recipe.digest("seed", "train") == before
    assert recipe.digest("seed", "train", replaced=replaced_values(path)) == before


def test_a_wrong_type_is_reported_with_line_and_value(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL_RECIPE + "  rank: eight\n")
    message = refused(path)
    assert f"{path}:10: train.rank:" in message
    assert "'eight'" in message


def test_a_text_is_no_number_even_if_it_looks_like_one(tmp_path: Path) -> None:
    assert "train.rank" in refused(written(tmp_path, MINIMAL_RECIPE + "  rank: '8'\n"))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert "'data.path' is missing" in refused(written(tmp_path, MINIMAL_RECIPE.replace("{path: few}", "{}")))


def test_many_problems_are_reported_in_one_line(tmp_path: Path) -> None:
    text = MINIMAL_RECIPE + "  rank: 0\n  alpha: 0\n  epochs: 0\n  log_every: 0\n"
    assert refused(written(tmp_path, text)).endswith("; and 1 more")


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("seed: 1\nseed: 2\n" + MINIMAL_RECIPE, "seed", 2),
        (MINIMAL_RECIPE + "  rank: 1\n  rank: 2\n", "rank", 11),
    ],
)
def test_a_key_that_is_given_twice_is_refused(tmp_path: Path, text: str, key: str, line: int) -> None:
    message = refused(written(tmp_path, text))
    assert f"found key {key!r} twice" in message
    assert f"line {line}" in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a\n- b\n",
        "just text",
        "a: [1\n",
        "a: *b\n",
        "? [a, b]\n: 1\n",
        "? {a: b}\n: 1\n",
        "1: 2\n",
        "\0",
        "profiles: 3",
    ],
)
def test_what_is_no_recipe_is_refused_with_the_files_name(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    assert refused(path).startswith(str(path))


def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x80")
    assert "cannot read the recipe" in refused(path)
    assert "cannot read the recipe" in refused(tmp_path / "nowhere.yaml")


def test_an_unknown_profile_lists_the_known(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL_RECIPE + "profiles: {tiny: {seed: 1}, large: {}}\n")
    assert "no profile 'tny'; known profiles: tiny, large" in refused(path, "tny")
    assert load_recipe(path, "large").profile == "large"
    assert "known profiles: none" in refused(written(tmp_path, MINIMAL_RECIPE), "tiny")


def test_a_profile_overrides_only_what_it_names(tmp_path: Path) -> None:
    text = MINIMAL_RECIPE + "  rank: 4\nprofiles: {tiny: {train: {alpha: 3}, data: {path: other}}}\n"
    recipe = load_recipe(written(tmp_path, text), "tiny")
    assert (recipe.train.rank, recipe.train.alpha, recipe.data.path) == (4, 3, "other")
    assert [adapter.name for adapter in recipe.train.adapters] == ["tuned"]


# -- --set ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["2e-4", "2E-4", "+2e-4", "0.2e-3", "2.e-4", "0.0002", ".0002", "20e-5"])
def test_numbers_are_read_as_people_write_them(recipe_file: Path, tmp_path: Path, number: str) -> None:
    assert load_recipe(recipe_file, overrides=(f"train.learning_rate={number}",)).train.learning_rate == 2e-4
    in_file = written(tmp_path, MINIMAL_RECIPE + f"  learning_rate: {number}\n")
    assert load_recipe(in_file).train.learning_rate == 2e-4


@given(st.floats(min_value=1e-300, max_value=1e300, allow_nan=False))
def test_any_number_that_python_prints_is_read_back(number: float) -> None:
    path = REPOSITORY / "recipes" / "patent-qa.yaml"
    assert load_recipe(path, None, (f"train.learning_rate={number!r}",)).train.learning_rate == number


def test_overrides_reach_lists_nested_mappings_and_null(recipe_file: Path) -> None:
    overrides = (
        "train.adapters=[{name: a}, {name: b}]",
        "train.target_modules=[q_proj, v_proj]",
        "preprocess.pages={max_pixels: 784}",
        "train.lora_plus_ratio=16",
        "train.lora_plus_ratio=null",
        "description=x=y",
    )
    recipe = load_recipe(recipe_file, overrides=overrides)
    assert [adapter.name for adapter in recipe.train.adapters] == ["a", "b"]
    assert recipe.train.target_modules == ["q_proj", "v_proj"]
    assert recipe.preprocess.pages.max_pixels == 784
    assert recipe.preprocess.pages.jpeg_quality == 90, "a mapping is merged, not replaced"
    assert recipe.train.lora_plus_ratio is None
    assert recipe.description == "x=y"


def test_an_override_wins_over_the_profile(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL_RECIPE + "  rank: 4\nprofiles: {tiny: {train: {rank: 2}}}\n")
    assert load_recipe(path, "tiny", ("train.rank=16",)).train.rank == 16


@pytest.mark.parametrize("override", ["train.rank", "=3", "train..rank=3", ".rank=3", "train.=3", ""])
def test_an_override_in_the_wrong_form_says_how_to_write_it(recipe_file: Path, override: str) -> None:
    assert f"--set {override}: not section.key=value" in refused(recipe_file, None, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.rank=[1", "is not a YAML value"),
        ("train.rnk=3", "did you mean 'train.rank'?"),
        ("train.rank.deep=3", "train.rank"),
        ("train.adapters.0.name=x", "train.adapters"),
        ("train=3", "train"),
        ("profiles.tiny={}", "unknown key 'profiles'"),
        ("train.learning_rate=.inf", "train.learning_rate"),
        ("train.learning_rate=.nan", "train.learning_rate"),
        ("train.learning_rate=-1e-4", "train.learning_rate"),
        ("data.test_fraction=1", "data.test_fraction"),
        ("preprocess.pages.max_pixels=783", "preprocess.pages.max_pixels"),
        ("preprocess.pages.max_pixels=1e6", "preprocess.pages.max_pixels"),
        (
            "infer.max_new_tokens=100000",
            "infer.max_new_tokens 100000: leaves no room for a prompt, as infer.max_length is",
        ),
    ],
)
def test_a_bad_override_is_reported_in_one_line(recipe_file: Path, override: str, message: str) -> None:
    assert message in refused(recipe_file, None, override)


# -- adapters ------------------------------------------------------------------------------------------------------


def test_adapters_have_names_of_their_own(recipe_file: Path) -> None:
    base = refused(recipe_file, None, "train.adapters=[{name: base}]")
    assert "train.adapters.0.name: 'base' is the untuned model in every table; choose another name" in base
    twice = refused(recipe_file, None, "train.adapters=[{name: a}, {name: b}, {name: a}]")
    assert "train.adapters: several are named a; give each a name of its own" in twice
    assert "train.adapters: lists none; list one" in refused(recipe_file, None, "train.adapters=[]")


@pytest.mark.parametrize("name", ["../up", ".hidden", "a/b", "", "名", "x" * 65, "a b"])
def test_an_adapters_name_must_do_as_a_folders(recipe_file: Path, name: str) -> None:
    assert "train.adapters.0.name" in refused(recipe_file, None, f"train.adapters=[{{name: {json.dumps(name)}}}]")


# -- data mixes ----------------------------------------------------------------------------------------------------


def mix(recipe_file: Path, parts: str) -> list[Source]:
    (adapter,) = load_recipe(recipe_file, overrides=(f"train.adapters=[{{name: a, data: {parts}}}]",)).train.adapters
    return adapter.data


@pytest.mark.parametrize(
    ("parts", "read"),
    [
        ("[]", []),
        ("[train]", [{"source": "train"}]),
        ("['more#100', train]", [{"source": "more", "count": 100}, {"source": "train"}]),
        ("[{source: train, fraction: 0.8, seed: 5}]", [{"source": "train", "fraction": 0.8, "seed": 5}]),
        ("[{source: more, count: 7, draw: first}]", [{"source": "more", "count": 7, "draw": "first"}]),
        ("[{source: train, fraction: 2.5}]", [{"source": "train", "fraction": 2.5}]),
        ("['a#b#3', 'c d']", [{"source": "a#b", "count": 3}, {"source": "c d"}]),
        ("[{source: 'a#b'}]", [{"source": "a#b"}]),
    ],
)
def test_a_mix_is_read_from_names_and_mappings(recipe_file: Path, parts: str, read: list[dict[str, Any]]) -> None:
    assert mix(recipe_file, parts) == [Source(**part) for part in read]


def test_a_mix_may_stand_in_the_file_and_is_kept_in_the_run(tmp_path: Path) -> None:
    text = MINIMAL_RECIPE.replace("- name: tuned", "- {name: tuned, data: [train, more#100]}")
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.train.adapters[0].mix == "train, more#100"
    assert load_recipe(written(tmp_path, dump_recipe(recipe))) == recipe


WRITE_A_PART = "write a data set's name, or name#100 for 100 of its samples"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("['more#']", f"train.adapters.0.data.0.source: found 'more#'; {WRITE_A_PART}"),
        ("['more#many']", f"train.adapters.0.data.0.source: found 'more#many'; {WRITE_A_PART}"),
        ("['more#-1']", f"train.adapters.0.data.0.source: found 'more#-1'; {WRITE_A_PART}"),
        ("['more#0']", "train.adapters.0.data.0.count: found 0; it must be greater than or equal to 1"),
        ("['#5']", "train.adapters.0.data.0.source: found ''; it must have at least 1 character"),
        ("[train, '']", "train.adapters.0.data.1.source: found ''; it must have at least 1 character"),
        (
            "[{source: train, count: 3, fraction: 0.5}]",
            "train.adapters.0.data.0.count 3: fraction 0.5 is set too; remove one of the two",
        ),
        ("[{source: train, fraction: 0}]", "train.adapters.0.data.0.fraction: found 0; it must be greater than 0"),
        ("[{source: train, draw: last}]", "train.adapters.0.data.0.draw: found 'last'; it must be 'random' or 'first'"),
        (
            "[{source: train, cuont: 3}]",
            "unknown key 'train.adapters.0.data.0.cuont'; did you mean 'train.adapters.data.count'?",
        ),
        ("[{count: 3}]", "'train.adapters.0.data.0.source' is missing"),
        ("[3]", "train.adapters.0.data.0"),
        ("train", "train.adapters.0.data: found 'train'; it must be a valid list"),
    ],
)
def test_a_wrong_mix_is_reported_in_one_line(recipe_file: Path, parts: str, message: str) -> None:
    assert message in refused(recipe_file, None, f"train.adapters=[{{name: a, data: {parts}}}]")


def test_a_wrong_mix_in_the_file_is_reported_with_its_line(tmp_path: Path) -> None:
    text = MINIMAL_RECIPE + "      data:\n        - train\n        - {source: more, cuont: 3}\n"
    path = written(tmp_path, text)
    assert f"{path}:12: unknown key 'train.adapters.0.data.1.cuont'" in refused(path)


@pytest.mark.parametrize(
    ("name", "read"),
    [("harbour", "harbour"), ("a.b-c_1", "a.b-c_1"), ("a b", "a-b-"), ("名", "data-"), ("base", "base-")],
)
def test_any_data_set_gives_an_adapter_a_name(name: str, read: str) -> None:
    made = file_name(name)
    assert made == read or (made.startswith(read) and made != name)
    assert Adapter(name=made).name == made
    assert file_name(name + " ") != made, "names do not fall together"


# -- votes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vote", ["{}", "{adapters: greedy}", "{adapters: [tuned], weights: validation}"])
def test_ways_to_vote(recipe_file: Path, vote: str) -> None:
    assert load_recipe(recipe_file, overrides=(f"infer.vote={vote}",)).infer.vote is not None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("infer.vote={adapters: []}",), "infer.vote.adapters: lists none; list at least one, or write all or greedy"),
        (
            ("infer.vote={adapters: [tuned, tuned]}",),
            "infer.vote.adapters: lists 'tuned' twice; list it once",
        ),
        (
            ("infer.vote={adapters: [tuned, other]}",),
            "infer.vote.adapters: found other, which train.adapters lacks; list adapters that are trained",
        ),
        (
            ("infer.vote={adapters: some}",),
            "infer.vote.adapters: found 'some'; it must be 'all' or 'greedy', or be a valid list",
        ),
        (("infer.vote={wieghts: uniform}",), "unknown key 'infer.vote.wieghts'; did you mean 'infer.vote.weights'?"),
        (
            ("infer.vote={}", "infer.answers=own sources"),
            "infer.answers own sources: adapters that answer different samples cannot vote together; set it to all, or",
        ),
        (
            ("train.adapters=[{name: vote}]",),
            "train.adapters.0.name: 'vote' is the common answer in every table; choose another name",
        ),
    ],
)
def test_a_wrong_vote_is_reported_in_one_line(recipe_file: Path, overrides: tuple[str, ...], message: str) -> None:
    assert message in refused(recipe_file, None, *overrides)


# -- digest --------------------------------------------------------------------------------------------------------


def test_the_digest_leaves_out_what_changes_no_result(tmp_path: Path) -> None:
    plain = load_recipe(written(tmp_path, MINIMAL_RECIPE))
    lines = MINIMAL_RECIPE.splitlines()
    reordered = "\n".join(["description: other words", *lines[1:3], lines[0], *lines[3:], "profiles: {same: {}}"])
    other = load_recipe(written(tmp_path, reordered), "same")
    assert other.description != plain.description
    assert other.digest() == plain.digest()


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("train.micro_batch=2", True),
        ("train.gradient_checkpointing=true", True),
        ("train.sharding=zero3", True),
        ("train.least_max_length=64", True),
        ("train.keep_checkpoints=5", True),
        ("train.exact_batch=true", True),
        ("train.effective_batch=8", False),
        ("train.max_length=512", False),
        ("train.precision=float32", False),
        ("train.load_in_4bit=true", False),
    ],
)
def test_settings_that_only_change_memory_may_change_and_the_run_resumes(
    tmp_path: Path, override: str, same: bool
) -> None:
    path = written(tmp_path, MINIMAL_RECIPE)
    assert (load_recipe(path).digest("train") == load_recipe(path, None, (override,)).digest("train")) is same


def test_a_default_written_out_is_the_same_recipe() -> None:
    assert minimal(seed=42).digest() == minimal().digest()


@pytest.mark.parametrize(
    ("override", "section"),
    [
        ("seed=1", "seed"),
        ("train.rank=3", "train"),
        ("data.path=x", "data"),
        ("preprocess.retrieval.top_k=1", "preprocess"),
    ],
)
def test_the_digest_of_a_section_follows_that_section_alone(recipe_file: Path, override: str, section: str) -> None:
    before, after = load_recipe(recipe_file), load_recipe(recipe_file, overrides=(override,))
    assert before.digest() != after.digest()
    changed = {name for name in ("seed", "train", "data", "preprocess") if before.digest(name) != after.digest(name)}
    assert changed == {section}


# -- keys that recipes of earlier runs lack --------------------------------------------------------------------------


def test_a_new_key_at_null_leaves_the_digests_of_earlier_runs(recipe_file: Path) -> None:
    """The values are those that a version without the keys computes from the same recipe."""
    recipe = load_recipe(recipe_file)
    earlier = {"path": "SmolLM2-135M-Instruct", "swift_type": "llama", "swift_template": "chatml"}
    assert recipe.digest("model") == digest_of({"model": earlier})
    changed = load_recipe(recipe_file, None, ("model.enable_thinking=false",))
    assert changed.digest("model") == digest_of({"model": {**earlier, "enable_thinking": False}})
    assert changed.digest() != recipe.digest()


def test_what_is_learnt_of_a_conversation_counts_in_digests_unless_it_is_as_before(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    earlier = recipe.model_dump(mode="json", exclude={"train": {*RESULT_NEUTRAL, "learn", "too_long"}})["train"]
    assert recipe.digest("train") == digest_of({"train": earlier})
    assert recipe.digest("seed", "train.learn", "train.too_long") == recipe.digest("seed")
    cut = load_recipe(recipe_file, None, ("train.too_long=cut",))
    assert cut.digest("train") == digest_of({"train": {**earlier, "too_long": "cut"}})
    assert cut.digest("seed", "train.too_long") != recipe.digest("seed", "train.too_long")
    last = load_recipe(recipe_file, None, ("train.learn=last",))
    assert len({one.digest("train.learn", "train.rank") for one in (recipe, cut, last)}) == 2


def test_a_chat_template_is_a_known_name_or_a_file(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, None, ("model.chat_template=a/b.jinja",)).model.chat_template == "a/b.jinja"
    assert set(NAMED) == set(CHAT_TEMPLATES)
    with pytest.raises(UsageError, match=r"model.chat_template: found 'llama3'; set it to chatml, plain or the"):
        load_recipe(recipe_file, None, ("model.chat_template=llama3",))
