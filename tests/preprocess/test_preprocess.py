"""The command itself, with the real embedder: its output, kills, stops, full and read-only disks, bad input.

The embedder takes ten seconds to load, so most tests here start from the vectors of the one undisturbed run: the stage
saves them by the digests of model and texts, and a start that finds them loads no model.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pymupdf
import pytest

from stages.contract.files import read_jsonl
from stages.preprocess.documents import picture_folder
from tests.conftest import MINIMAL_RECIPE, MODELS, Finished, Lorry, make_data, make_pdf, remount, snapshot

SPLITS = ("train", "validation", "test")
RESULTS = ("samples", "pages", "vectors.npy", "pages.parquet")


@dataclass(frozen=True)
class Calm:
    """An undisturbed run, its mounts and its recipe."""

    lorry: Lorry
    recipe: Path
    first: Finished

    @property
    def folder(self) -> Path:
        return self.lorry.runs / "calm" / "preprocess"

    @property
    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        return manifest

    def samples(self, *splits: str) -> dict[str, dict[str, Any]]:
        rows = [row for split in splits or SPLITS for row in read_jsonl(self.folder / "samples" / f"{split}.jsonl")]
        return {row["id"]: row for row in rows}

    def give_vectors(self, run: Path) -> None:
        """Copy this run's vectors into another run's folder."""
        shutil.copytree(self.folder / "cache" / "vectors", run / "preprocess" / "cache" / "vectors")


def make_mixed_data(folder: Path) -> None:
    """Write good documents with good questions, and between them everything that must be skipped."""
    make_data(folder, documents=4)
    documents = folder / "documents"
    make_pdf(documents / "sub" / "D1.pdf", ["Part 77 is a handle."])
    make_pdf(documents / "D1.PDF", ["Part 78 is a shield."])
    make_pdf(documents / "..x..pdf", ["Part 79 is a wheel."])
    make_pdf(documents / "专 利.v2.pdf", ["部件14是踏板。", "", "部件16是铰链。"])
    make_pdf(documents / "locked.pdf", ["x"], encryption=pymupdf.PDF_ENCRYPT_AES_256, user_pw="u", owner_pw="o")
    (documents / "empty.pdf").write_bytes(b"")
    (documents / "notes.txt").write_text("no PDF")
    make_pdf(folder.parent / "elsewhere" / "in" / "D9.pdf", ["Part 80 is a clasp."])
    (documents / "linked").symlink_to("../../elsewhere")
    (documents / "round").symlink_to(".")
    (documents / "gone.pdf").symlink_to("../../nowhere.pdf")
    os.mkfifo(documents / "pipe.pdf")
    more: list[dict[str, Any] | str] = [
        {"id": "sub", "question": "What is part 77?", "document": "sub/D1.pdf", "answer": "handle"},
        {"id": "capital", "question": "What is part 78?", "document": "D1.PDF", "answer": "shield"},
        {"id": "dots", "question": "What is part 79?", "document": "..x..pdf", "answer": "wheel"},
        {"id": "linked", "question": "What is part 80?", "document": "linked/in/D9.pdf", "answer": "clasp"},
        {"id": "named", "question": "第三页中，部件16是什么？", "document": "专 利.v2.pdf", "answer": "铰链"},
        {"id": "blank", "question": "第2页中，部件14是什么？", "document": "专 利.v2.pdf", "answer": "踏板"},
        {"id": "beyond", "question": "On page 9, what is it?", "document": "专 利.v2.pdf", "answer": "踏板"},
        {"id": "locked", "question": "What is it?", "document": "locked.pdf", "answer": "x"},
        {"id": "up", "question": "What is it?", "document": "../x.pdf", "answer": "x"},
        {"id": "d1-0", "question": "Again?", "document": "D1.pdf", "answer": "x"},
        '{"id": "torn", "question": "What is',
        {"id": "silent", "question": " ", "document": "D1.pdf", "answer": "x"},
        {"id": "mute", "question": "What is part 1?", "document": "D1.pdf"},
    ]
    with (folder / "questions.jsonl").open("a", encoding="utf-8") as file:
        for record in more:
            file.write((record if isinstance(record, str) else json.dumps(record, ensure_ascii=False)) + "\n")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, embedder: Path) -> Calm:
    folder = tmp_path_factory.mktemp("calm")
    lorry = Lorry(folder / "data", embedder.parent, folder / "runs")
    make_mixed_data(lorry.data / "few")
    recipe = folder / "small.yaml"
    recipe.write_text(MINIMAL_RECIPE + "seed: 1\n")
    return Calm(lorry, recipe, lorry.preprocess(str(recipe), "--run", "calm"))


def results(folder: Path) -> dict[str, bytes]:
    """Every byte that a later stage may read."""
    return {name: content for name, content in snapshot(folder).items() if name.split("/")[0] in RESULTS}


def make_run(calm: Calm, name: str) -> Finished:
    return calm.lorry.preprocess(str(calm.recipe), "--run", name)


# -- the undisturbed run -------------------------------------------------------------------------------------------


def test_it_is_done_and_says_what_it_did(calm: Calm) -> None:
    assert calm.first.code == 0, calm.first.output
    assert calm.first.lines[-1].startswith("preprocess: done in ")
    assert "samples from 19 pages of 9 documents" in calm.first.output
    assert "skipped 3: unreadable document" in calm.first.output
    assert "skipped 1: blank page" in calm.first.output


def test_every_sample_names_the_data_set_and_validation_is_asked_without_its_answers(calm: Calm) -> None:
    learnt, asked = calm.samples("validation"), calm.samples("validation_asked")
    assert asked and set(asked) <= set(learnt)
    for sample in (*calm.samples().values(), *asked.values()):
        assert sample["meta"]["source"] == "questions"
    for sample in asked.values():
        assert not any(message["role"] == "assistant" for message in sample["messages"])
        assert sample["references"]
    assert not any("trained_on" in sample["meta"] for sample in calm.samples("test").values())


def test_every_skipped_record_is_named_with_its_reason(calm: Calm) -> None:
    skipped = {(entry["what"], entry["reason"]) for entry in calm.manifest["skipped"]}
    expected = {
        ("questions.jsonl:21", "unknown document"),
        ("questions.jsonl:22", "duplicate id"),
        ("questions.jsonl:23", "not JSON"),
        ("questions.jsonl:24", "empty question"),
        ("locked.pdf", "unreadable document"),
        ("empty.pdf", "unreadable document"),
        ("notes.txt", "unreadable document"),
        ("专 利.v2.pdf page 2", "blank page"),
        ("documents/round", "link to a folder that it is in"),
        ("documents/gone.pdf", "link to nothing"),
        ("documents/pipe.pdf", "special file"),
    }
    assert expected <= skipped
    left = {what for what, _ in skipped - expected}
    assert left <= {"locked", "mute"}, "these two only if their document is trained on"


def test_every_question_is_a_sample_or_named_as_skipped(calm: Calm) -> None:
    asked = {f"d{number}-{page}" for number in range(1, 5) for page in range(3)}
    asked |= {"sub", "capital", "dots", "linked", "named", "blank", "beyond", "locked", "mute"}
    assert set(calm.samples()) | {entry["what"] for entry in calm.manifest["skipped"]} >= asked
    counts = calm.manifest["counts"]
    assert sum(counts[split] for split in SPLITS) == len(calm.samples())
    assert counts["questions"] == len(asked)


def test_no_document_is_in_two_splits(calm: Calm) -> None:
    groups = {split: {s["meta"]["group"] for s in calm.samples(split).values()} for split in SPLITS}
    assert groups["train"]
    assert groups["test"]
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["validation"]
    assert not groups["validation"] & groups["test"]


def test_samples_end_with_the_answer_only_where_it_is_learnt(calm: Calm) -> None:
    for sample in calm.samples("train", "validation").values():
        assert sample["messages"][-1] == {"role": "assistant", "content": sample["references"][0]}
    for sample in calm.samples("test").values():
        assert sample["messages"][-1]["role"] == "user"
        assert not any(message["role"] == "assistant" for message in sample["messages"])


def test_the_right_pages_are_shown(calm: Calm) -> None:
    samples = calm.samples()
    for name, shown in {
        "named": [1, 3],
        "blank": [1, 3],
        "beyond": [1, 3],
        "sub": [1],
        "capital": [1],
        "dots": [1],
    }.items():
        assert samples[name]["meta"]["pages"] == shown, name
    assert "Part 77" in samples["sub"]["messages"][1]["content"]
    assert "Part 78" in samples["capital"]["messages"][1]["content"]
    assert calm.manifest["counts"]["named page missing"] == 2
    for sample in samples.values():
        if "error" not in sample["meta"]:
            assert all((calm.folder.parent / image).is_file() for image in sample["meta"]["page_images"])


def test_vectors_and_pages_are_stored_row_by_row(calm: Calm) -> None:
    vectors = np.load(calm.folder / "vectors.npy", allow_pickle=False)
    table = pq.read_table(calm.folder / "pages.parquet")
    assert vectors.shape == (table.num_rows, 384)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(vectors)), abs=1e-5)
    own = {(row["document"], row["page"]): index for index, row in enumerate(table.to_pylist())}
    alike = vectors @ vectors[own["D1.pdf", 1]]
    other_script = own["专 利.v2.pdf", 1]
    assert alike[own["D2.pdf", 1]] > alike[other_script], "texts that are alike have vectors that are"


def test_no_output_contains_a_path_of_this_machine(calm: Calm) -> None:
    stored = results(calm.folder)
    stored |= {name: (calm.folder.parent / name).read_bytes() for name in ("recipe.yaml", "preprocess/manifest.json")}
    for name, content in stored.items():
        for path in (calm.lorry.data, calm.lorry.runs, MODELS):
            assert str(path).encode() not in content, name


def test_a_done_stage_is_skipped_within_a_second_and_without_heavy_imports(calm: Calm) -> None:
    calm.lorry.preprocess(str(calm.recipe), "--run", "calm")  # now every input is old enough for its digest to be saved
    tries = []
    for _ in range(3):
        tries.append(calm.lorry.preprocess(str(calm.recipe), "--run", "calm"))
        assert (tries[-1].code, tries[-1].lines) == (0, ["preprocess: up to date"])
    assert min(done.seconds for done in tries) < 1.0
    listing = replace(calm.lorry, extra={"PYTHONPROFILEIMPORTTIME": "1"})
    imported = {
        line.split("|")[-1].strip().split(".")[0]
        for line in listing.preprocess(str(calm.recipe), "--run", "calm").lines
        if line.startswith("import time:")
    }
    assert "stages" in imported
    assert not imported & {"torch", "pymupdf", "pyarrow", "numpy", "sentence_transformers", "transformers", "pebble"}


def test_the_run_alone_is_enough_to_resume(calm: Calm) -> None:
    """Without a recipe, Lorry uses the run's own."""
    done = calm.lorry.preprocess("--run", "calm")
    assert (done.code, done.lines) == (0, ["preprocess: up to date"])


# -- in shards -----------------------------------------------------------------------------------------------------


def shard(calm: Calm, name: str, which: str) -> "subprocess.Popen[str]":
    return calm.lorry.start("entrypoints.preprocess", str(calm.recipe), "--run", name, "--shard", which)


@pytest.mark.kill
def test_two_shards_at_once_one_of_them_killed_merge_to_the_bytes_of_one_run(calm: Calm) -> None:
    """The embedder is loaded for real in each shard, and not at all by the merge."""
    run = calm.lorry.runs / "sharded"
    both = [shard(calm, "sharded", f"{index}/2") for index in range(2)]
    deadline = time.monotonic() + 60
    folder = run / "shards" / "preprocess" / "1-of-2"
    while not finished_pages(folder):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    both[1].kill()
    both[1].communicate()
    known = finished_pages(folder)
    again = shard(calm, "sharded", "1/2")
    for process in (both[0], again):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    after = finished_pages(folder)
    assert {path: after[path] for path in known} == known, "finished pages are not rendered again"
    assert {path.name for path in run.iterdir()} == {"recipe.yaml", "shards"}

    without_embedder = replace(calm.lorry, extra={"PYTHONPROFILEIMPORTTIME": "1"})
    merged = without_embedder.preprocess(str(calm.recipe), "--run", "sharded")
    assert merged.code == 0, merged.output
    log = (run / "preprocess" / "log.txt").read_text()
    assert "stages.preprocess.embed" in log
    assert "sentence_transformers" not in log
    assert results(run / "preprocess") == results(calm.folder)
    manifest = json.loads((run / "preprocess" / "manifest.json").read_text())
    for part in ("key", "inputs", "counts", "skipped"):
        assert manifest[part] == calm.manifest[part], part
    assert {name: entry["sha256"] for name, entry in manifest["outputs"].items()}.items() >= {
        (name, entry["sha256"]) for name, entry in calm.manifest["outputs"].items() if name != "questions.parquet"
    }
    assert [made["value"] for made in manifest["decisions"]] == ["0/2, 1/2"]
    assert calm.lorry.preprocess("--run", "sharded", "--shard", "0/2").lines == ["preprocess 0/2: up to date"]


def test_a_shard_without_work_is_done_at_once_and_the_merge_does_the_work_of_a_missing_one(calm: Calm) -> None:
    run = calm.lorry.runs / "gaps"
    for index in (1, 30):
        shutil.copytree(
            calm.folder / "cache" / "vectors", run / "shards" / "preprocess" / f"{index}-of-31" / "cache" / "vectors"
        )
        output, _ = (process := shard(calm, "gaps", f"{index}/31")).communicate(timeout=60)
        assert process.returncode == 0, output
    assert "shard 30/31 has nothing to do, as there are only 12 documents" in output
    calm.give_vectors(run)
    merged = make_run(calm, "gaps")
    assert merged.code == 0
    assert "shards taken over: 1/31, 30/31" in merged.output
    assert results(run / "preprocess") == results(calm.folder)


# -- killed and stopped --------------------------------------------------------------------------------------------


def finished_pages(folder: Path) -> dict[str, int]:
    """Pictures of finished ranges, and when each was written."""
    times = {}
    for kept in folder.glob("cache/pages/*/*.json"):
        for record in json.loads(kept.read_text())["records"]:
            if record["status"] == "ok":
                picture = folder / "pages" / picture_folder(record["document"]) / f"{record['page']}.jpg"
                times[str(picture)] = picture.stat().st_mtime_ns
    return times


@pytest.mark.kill
def test_killed_again_and_again_it_ends_with_the_same_bytes_and_renders_no_finished_page_twice(calm: Calm) -> None:
    """SIGKILL at random moments; the embedder is loaded for real here, so that its vectors are compared too."""
    folder = calm.lorry.runs / "killed" / "preprocess"
    chance = random.Random(2)
    known: dict[str, int] = {}
    killed = 0
    for longest in (0.6, 1.0, 1.4, 1.8, 2.2, 9.0):
        process = calm.lorry.start("entrypoints.preprocess", str(calm.recipe), "--run", "killed")
        try:
            process.wait(chance.uniform(0.4, longest))
        except subprocess.TimeoutExpired:
            killed += 1
            os.kill(process.pid, signal.SIGKILL)  # the stage alone: its workers must end by themselves
        process.communicate()
        before, known = known, finished_pages(folder) if folder.exists() else {}
        assert {path: known[path] for path in before} == before
    assert killed >= 5
    done = make_run(calm, "killed")
    assert done.code == 0, done.output
    after = finished_pages(folder)
    assert {path: after[path] for path in known} == known
    assert results(folder) == results(calm.folder)


def test_a_stop_of_the_whole_group_while_rendering_exits_75_and_loses_no_page(calm: Calm) -> None:
    run = calm.lorry.runs / "stopped"
    calm.give_vectors(run)
    process = calm.lorry.start("entrypoints.preprocess", str(calm.recipe), "--run", "stopped")
    deadline = time.monotonic() + 30
    while not (run / "preprocess" / "pages").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=50)  # less than the minute that workers wait for a lost lock
    assert process.returncode == 75, output
    assert "stopped by SIGTERM" in output.strip().splitlines()[-1]
    assert make_run(calm, "stopped").code == 0
    assert results(run / "preprocess") == results(calm.folder)


# -- full and read-only disks --------------------------------------------------------------------------------------


def blocks(path: Path) -> int:
    """KiB of a file on a tmpfs, whose pages are 4 KiB; 0 for a folder."""
    return -(-path.stat().st_size // 4096) * 4 if path.is_file() else 0


def test_a_disk_full_at_any_point_is_one_line_and_the_same_command_resumes_when_there_is_room(
    calm: Calm, small_disk: Path
) -> None:
    lorry = replace(calm.lorry, runs=small_disk)
    calm.give_vectors(small_disk / "r")
    given = sum(blocks(path) for path in small_disk.rglob("*"))
    needed = sum(blocks(path) for path in calm.folder.rglob("*"))
    full = 0
    for share in (0.02, 0.2, 0.5, 0.7, 0.8, 0.9, 0.97):
        remount(small_disk, f"size={given + int((needed - given) * share)}k")
        done = lorry.preprocess(str(calm.recipe), "--run", "r")
        if done.code == 0:
            break
        full += 1
        assert done.code == 4, f"{share}: {done.output}"
        shown = [line for line in done.lines if "the disk is full" in line]
        assert shown == done.lines[-1:], f"{share}: {done.output}"
        assert "run the same command again" in shown[0]
        assert "Traceback" not in done.output
    assert full >= 4
    remount(small_disk, "size=8m")
    assert lorry.preprocess(str(calm.recipe), "--run", "r").code == 0
    assert results(small_disk / "r" / "preprocess") == results(calm.folder)


def test_a_read_only_run_folder_is_one_line(calm: Calm, small_disk: Path) -> None:
    (small_disk / "r").mkdir()
    remount(small_disk, "ro")
    done = replace(calm.lorry, runs=small_disk).preprocess(str(calm.recipe), "--run", "r")
    assert done.code == 2
    assert len(done.lines) == 1, done.output
    assert f"{small_disk}/r/preprocess: not permitted (Read-only file system)" in done.output


# -- unusable input -----------------------------------------------------------------------------------------------


def refused(lorry: Lorry, *arguments: str) -> tuple[int, str]:
    """Return the exit code and the one line of a command that is refused."""
    done = lorry.preprocess(*arguments)
    assert len(done.lines) == 1, done.output
    return done.code, done.output


def test_an_empty_data_folder(lorry: Lorry, recipe_file: Path) -> None:
    (lorry.data / "few").mkdir()
    code, line = refused(lorry, str(recipe_file))
    assert code == 3
    assert f"{lorry.data}/few/documents: no documents; put the PDFs there" in line


def test_no_questions(lorry: Lorry, recipe_file: Path, few: Path) -> None:
    (few / "questions.jsonl").rename(few / "questions.csv")
    code, line = refused(lorry, str(recipe_file))
    assert code == 3
    assert "no questions, found documents, questions.csv; put questions.jsonl there, or train.jsonl and" in line


def test_questions_of_another_form_are_refused_with_the_commonest_reason_and_the_log_has_each(
    lorry: Lorry, recipe_file: Path, few: Path
) -> None:
    other = {"instruction": "What is part 1?", "input": "D1.pdf", "output": "gear"}
    lines = [json.dumps(other)] * 2 + ["What is part 1?,D1.pdf,gear"]
    (few / "questions.jsonl").write_text("\n".join(lines))
    done = lorry.preprocess(str(recipe_file), "--run", "r")
    *shown, line = done.lines
    assert (done.code, [one[: one.index(" (")] for one in shown]) == (
        3,
        [
            "preprocess: skipped questions.jsonl:1: no question",
            "preprocess: skipped questions.jsonl:2: no question",
            "preprocess: skipped questions.jsonl:3: not JSON",
        ],
    )
    assert "few: no usable question in questions.jsonl; 2 of 3 skipped: no question, first questions.jsonl:1" in line
    assert "(found the keys instruction, input, output); correct them" in line
    log = (lorry.runs / "r" / "preprocess" / "log.txt").read_text(encoding="utf-8")
    for number, reason in ((1, "no question"), (2, "no question"), (3, "not JSON")):
        assert f"skipped questions.jsonl:{number}: {reason}" in log
    assert "found 'What is part 1?,D1.pdf,gear'" in log


def test_questions_on_one_document_only(lorry: Lorry, recipe_file: Path, few: Path) -> None:
    one = [line for line in (few / "questions.jsonl").read_text().splitlines() if '"D1.pdf"' in line]
    (few / "questions.jsonl").write_text("\n".join(one))
    code, line = refused(lorry, str(recipe_file))
    assert code == 3, "and at once, not after the pages are rendered"
    assert "both need at least one" in line


def test_no_data_folder_and_no_model(lorry: Lorry, recipe_file: Path, few: Path, tmp_path: Path) -> None:
    code, line = refused(lorry, str(recipe_file), "--set", "data.path=nowhere")
    assert (code, "nowhere: no such data folder" in line) == (2, True)
    code, line = refused(lorry, str(recipe_file), "--set", "preprocess.retrieval.embedder=nothing")
    assert (code, "nothing: no such model folder" in line) == (2, True)
    code, line = refused(replace(lorry, models=tmp_path), str(recipe_file))
    assert (code, f"below LORRY_MODELS ({tmp_path})" in line) == (2, True)


def test_a_wrong_recipe_or_option(lorry: Lorry, recipe_file: Path) -> None:
    for arguments, expected in {
        ("no-such-recipe",): "patent-qa",
        (): "name a RECIPE",
        ("--run", "never-made"): "no such run",
        (
            str(recipe_file),
            "--run",
            "../up",
        ): "--run ../up: not a name for one folder; choose a name with letters or digits and",
        (str(recipe_file), "--profile", "tiny"): "no profile 'tiny'",
        (str(recipe_file), "--set", "train.rnk=2"): "did you mean 'train.rank'?",
        (
            str(recipe_file),
            "--set",
            "task=patent",
        ): "no task 'patent'; did you mean 'patent_qa'? known tasks: articulation, better_synth, chat, extractive_qa",
    }.items():
        code, line = refused(lorry, *arguments)
        assert code == 2, arguments
        assert expected in line, arguments
    assert list(lorry.runs.iterdir()) == [], "a command that is wrong leaves no run behind"
