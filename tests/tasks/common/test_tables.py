"""Data sets on disk: every form, the place of each record, and what is lost by a damaged one."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import feather

from stages.contract.errors import DataError
from stages.tasks.common.tables import Row, data_set_name, names_a_split, read_rows

RECORDS = [{"id": f"r{n}", "text": f'line one\n"two" {{[{n}]}}, 中文\u2028'} for n in range(4)]


def rows(path: Path, content: str | bytes | None = None) -> list[Row]:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_rows(path))


def good(found: list[Row]) -> list[Any]:
    return [row.record for row in found if row.bad is None]


def bad(found: list[Row]) -> list[tuple[str, str]]:
    json.dumps([row.bad for row in found if row.bad], ensure_ascii=False).encode()  # it can be stored and printed
    return [(row.where, row.bad[0]) for row in found if row.bad is not None]


# -- text --------------------------------------------------------------------------------------------------------


def lines(records: list[Any], between: str = "\n") -> str:
    return between.join(json.dumps(record, ensure_ascii=False) for record in records)


ARRAYS = {
    "on one line": lambda records: json.dumps(records, ensure_ascii=False),
    "a record a line": lambda records: "[\n" + lines(records, ",\n") + "\n]\n",
    "begun on the first line": lambda records: "[" + lines(records, ",\n ") + "]",
    "indented": lambda records: json.dumps(records, ensure_ascii=False, indent=4),
    "without spaces": lambda records: json.dumps(records, separators=(",", ":")),
}


@pytest.mark.parametrize("write", ARRAYS.values(), ids=ARRAYS.keys())
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_an_array_under_either_name(tmp_path: Path, name: str, write: Any) -> None:
    found = rows(tmp_path / name, b"\xef\xbb\xbf" + write(RECORDS).encode())
    assert good(found) == RECORDS and not bad(found)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "A.JSONL"])
def test_lines_under_either_name(tmp_path: Path, name: str) -> None:
    text = "\ufeff\n" + lines(RECORDS[:2]) + "\r\n  \r\n\n" + lines(RECORDS[2:])
    found = rows(tmp_path / name, text)
    assert good(found) == RECORDS
    assert [row.where for row in found] == [f"{name}:{number}" for number in (2, 3, 6, 7)]


def test_a_record_of_an_array_has_the_line_on_which_it_begins(tmp_path: Path) -> None:
    found = rows(tmp_path / "a.json", '[\n  {\n    "id": 1\n  },\n\n  {"id": 2}, {"id": 3},\n  {"id": 4}\n]')
    assert [(row.number, row.where) for row in found] == [
        *((2, "a.json:2"), (6, "a.json:6"), (6, "a.json:6 record 3"), (7, "a.json:7")),
    ]
    assert [row.place for row in found] == ["2", "6", "6-3", "7"]


def test_records_on_one_line_are_numbered(tmp_path: Path) -> None:
    found = rows(tmp_path / "a.json", '[{"id": 1}, {"id": x}, {"id": 3}]')
    assert [row.where for row in found] == ["a.json:1", "a.json:1 record 2", "a.json:1 record 3"]
    assert [row.place for row in found] == ["1", "1-2", "1-3"]


def test_the_records_of_squads_own_files_are_in_data(tmp_path: Path) -> None:
    articles = [{"title": f"t{n}", "paragraphs": []} for n in range(3)]
    for name, table in {"a": {"data": articles, "version": "1.1"}, "b": {"version": "v2.0", "data": articles}}.items():
        for indent in (None, 1):
            assert good(rows(tmp_path / f"{name}.json", json.dumps(table, indent=indent))) == articles


def test_lines_that_hold_lists_are_lines(tmp_path: Path) -> None:
    assert good(rows(tmp_path / "a.jsonl", '[1]\n{"id": 2}')) == [[1], {"id": 2}]


def test_one_object_over_several_lines_is_one_record(tmp_path: Path) -> None:
    assert good(rows(tmp_path / "a.json", json.dumps(RECORDS[0], indent=2))) == RECORDS[:1]


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    for name, text in {
        "a.json": "",
        "b.jsonl": "\n \n",
        "c.json": "[]",
        "d.json": "[\n]\n",
        "e.json": "\ufeff",
    }.items():
        assert rows(tmp_path / name, text) == []


WHOLE = json.dumps({"id": "r9", "text": "x", "list": [{"a": 1}, {"a": 2}]})
BROKEN = {
    "a comma too many": WHOLE[:-1] + ",}",
    "a comma missing": WHOLE.replace(', "text"', ' "text"'),
    "a bare word": WHOLE.replace('"x"', "x"),
    "Python's None": WHOLE.replace('"x"', "None"),
    "infinity": WHOLE.replace('"x"', "Infinity"),
    "quotation marks within": WHOLE.replace('"x"', '"say "x" twice"'),
    "one quotation mark within": WHOLE.replace('"x"', '"6" wide"'),
    "a text without end": WHOLE.replace('"x"', '"x'),
    "a bracket missing": WHOLE[:-2] + "}",
    "the brace missing": WHOLE[:-1],
    "another bracket": WHOLE[:-1] + "]",
    "a line's end in a text": WHOLE.replace('"x"', '"x\ny"'),
    "a wrong escape": WHOLE.replace('"x"', '"\\x"'),
    "half a character": WHOLE.replace('"x"', '"\\ud83d"'),
    "too deep": WHOLE.replace('"x"', "[" * 100_000 + "]" * 100_000),
    "too long a number": WHOLE.replace('"x"', "9" * 5000),
}


@pytest.mark.parametrize("write", [ARRAYS[n] for n in ("on one line", "a record a line", "indented")])
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_broken_record_of_an_array_affects_no_other(tmp_path: Path, write: Any, broken: str, place: int) -> None:
    records = [*RECORDS[:place], "broken", *RECORDS[place:]]
    text = write(records)
    line = text[: text.index('"broken"')].count("\n") + 1
    found = rows(tmp_path / "a.json", text.replace('"broken"', broken))
    assert good(found) == RECORDS
    ((where, reason),) = bad(found)
    assert where == (f"a.json:1 record {place + 1}" if line == 1 and place else f"a.json:{line}")
    assert reason == ("not UTF-8" if "ud83d" in broken else "not JSON")


def test_each_of_two_broken_records_is_reported(tmp_path: Path) -> None:
    parts = [json.dumps(RECORDS[0]), BROKEN["the brace missing"], json.dumps(RECORDS[1]), BROKEN["a bare word"]]
    found = rows(tmp_path / "a.json", "[\n" + ",\n".join(parts) + "\n]")
    assert good(found) == RECORDS[:2]
    assert bad(found) == [("a.json:3", "not JSON"), ("a.json:5", "not JSON")]


@pytest.mark.parametrize("write", ARRAYS.values(), ids=ARRAYS.keys())
def test_an_array_that_is_cut_off_anywhere_keeps_its_complete_records(tmp_path: Path, write: Any) -> None:
    text = write(RECORDS).rstrip()
    for length in range(1, len(text)):
        found = rows(tmp_path / "a.json", text[:length])
        whole = good(found)
        assert whole == RECORDS[: len(whole)]
        assert [reason for _, reason in bad(found)] == ["cut off"] or text[:length].endswith(("]", "}"))
        assert len(bad(found)) == 1, text[:length]
    assert len(whole) == len(RECORDS), "without the last bracket"


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_line_affects_no_other(tmp_path: Path, broken: str) -> None:
    text = lines(RECORDS[:2]) + f"\n{broken}\n" + lines(RECORDS[2:])
    found = rows(tmp_path / "a.jsonl", text)
    assert good(found) == RECORDS
    assert {where for where, _ in bad(found)} <= {"a.jsonl:3", "a.jsonl:4"}
    again = rows(tmp_path / "a.json", text)
    assert good(again) == RECORDS and [where for where, _ in bad(again)] == ["a.json:3"]


def test_a_record_with_bytes_that_are_not_utf_8_is_bad(tmp_path: Path) -> None:
    parts = [b'{"id": 1}', b'{"id": "\xff\xfe"}', b'{"id": 3}']
    for name, text in {"a.jsonl": b"\n".join(parts), "a.json": b"[" + b",\n".join(parts) + b"]"}.items():
        found = rows(tmp_path / name, text)
        assert good(found) == [{"id": 1}, {"id": 3}]
        assert bad(found) == [(f"{name}:2", "not UTF-8")]


def test_not_a_number_is_null(tmp_path: Path) -> None:
    """Python writes it for a missing value."""
    for name, text in {"a.jsonl": '{"id": 1, "x": NaN}', "a.json": '[{"id": 1, "x": NaN}]'}.items():
        assert good(rows(tmp_path / name, text)) == [{"id": 1, "x": None}]


CHINESE = [{"id": n, "text": f"第{n}个部件的名称是什么？它位于壳体的上方，与弹簧座相连接。"} for n in range(20)]


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("write", ["lines", *ARRAYS])
def test_other_encodings_are_read(tmp_path: Path, encoding: str, write: str) -> None:
    text = lines(CHINESE, "\r\n") if write == "lines" else ARRAYS[write](CHINESE)
    found = rows(tmp_path / "a.jsonl", text.encode(encoding))
    assert good(found) == CHINESE and not bad(found)


@pytest.mark.parametrize("encoding", ["gbk", "utf-16"])
def test_a_broken_line_in_another_encoding_affects_no_other(tmp_path: Path, encoding: str) -> None:
    text = lines(CHINESE[:2]) + '\n{"id": 7, "text": "部件\n' + lines(CHINESE[2:])
    found = rows(tmp_path / "a.jsonl", text.encode(encoding))
    assert good(found) == CHINESE and bad(found) == [("a.jsonl:3", "not JSON")]


def test_a_damaged_utf_8_file_is_not_taken_for_gbk(tmp_path: Path) -> None:
    text = lines(CHINESE).encode()
    found = rows(tmp_path / "a.jsonl", text.replace("部件".encode(), "部件".encode()[:-1], 1))
    assert good(found) == CHINESE[1:] and bad(found) == [("a.jsonl:1", "not UTF-8")]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("第一個部件的名稱是什麼？它位於殼體的上方，與彈簧座相連接。", "big5"),
        ("部品の名前は何ですか。それはケースの上にあります。", "shift_jis"),
        ("Où est la pièce numérotée ? Elle est à côté.", "latin-1"),
        ("Größe: Überprüfung der Häuser", "latin-1"),
    ],
)
def test_text_in_an_encoding_that_is_not_known_is_not_misread(tmp_path: Path, text: str, encoding: str) -> None:
    content = json.dumps({"text": text}, ensure_ascii=False).encode(encoding)
    found = rows(tmp_path / "a.jsonl", content)
    assert good(found) == [] and {reason for _, reason in bad(found)} <= {"not UTF-8", "not JSON"}


def test_a_second_record_on_a_line_is_reported(tmp_path: Path) -> None:
    assert bad(rows(tmp_path / "a.jsonl", '{"id": 1} {"id": 2}\n{"id": 3}')) == [("a.jsonl:1", "not JSON")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab{[\"'\\\n", max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(records=st.lists(st.dictionaries(st.sampled_from("abc"), JSON, min_size=1, max_size=3), max_size=5))
def test_all_that_json_writes_is_read(tmp_path_factory: pytest.TempPathFactory, records: list[Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    for text in (json.dumps(records), json.dumps(records, indent=1, ensure_ascii=False), lines(records)):
        assert good(rows(path, text)) == records


@given(text=st.text('{}[]",:\\n 1a\n', max_size=40), records=st.integers(0, 2))
def test_reading_ends_whatever_a_file_contains(
    tmp_path_factory: pytest.TempPathFactory, text: str, records: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.json"
    found = rows(path, "[" + '{"id": 1},' * records + text)
    assert len(good(found)) >= records
    assert all(row.number <= text.count("\n") + 1 for row in found)


# -- tables ------------------------------------------------------------------------------------------------------

TABLE = pa.Table.from_pylist(
    [{"id": n, "question": f"q{n}", "answers": {"text": [f"a{n}"], "answer_start": [n]}} for n in range(5)]
)


def write_stream(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=2)


def write_file(path: Path) -> None:
    feather.write_feather(TABLE, path, chunksize=2)


def write_parquet(path: Path) -> None:
    pq.write_table(TABLE, path, row_group_size=2)


WRITERS = [("t.parquet", write_parquet), ("t.arrow", write_stream), ("f.arrow", write_file)]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_tables(tmp_path: Path, name: str, write: Any) -> None:
    write(tmp_path / name)
    found = rows(tmp_path / name)
    assert good(found) == TABLE.to_pylist()
    assert [row.where for row in found] == [f"{name} row {n}" for n in range(1, 6)]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_a_file_that_is_not_a_table_is_reported(tmp_path: Path, name: str, write: Any) -> None:
    assert bad(rows(tmp_path / name, b"no table at all, but long enough to be looked at")) == [
        (f"{name} row 1", "unreadable file")
    ]
    assert len(bad(rows(tmp_path / name, b""))) == 1


@pytest.mark.parametrize(("name", "write"), [("t.parquet", pq.write_table), ("t.arrow", feather.write_feather)])
def test_a_row_that_is_not_utf_8_affects_no_other(tmp_path: Path, name: str, write: Any) -> None:
    texts = pa.array([b"a", b"\xff", "灯".encode()]).view(pa.string())
    write(pa.table({"text": texts}), tmp_path / name)
    found = rows(tmp_path / name)
    assert good(found) == [{"text": "a"}, {"text": "灯"}]
    assert bad(found) == [(f"{name} row 2", "not UTF-8")]


def test_a_damaged_row_group_affects_no_other(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_parquet(path)
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 8] = b"\xff" * 8
    found = rows(path, bytes(content))
    assert [record["id"] for record in good(found)] == [0, 1, 4]
    assert bad(found) == [("t.parquet rows 3 to 4", "unreadable rows")]


def test_a_stream_that_is_cut_off_keeps_its_complete_batches(tmp_path: Path) -> None:
    path = tmp_path / "t.arrow"
    write_stream(path)
    found = rows(path, path.read_bytes()[:-200])
    assert [record["id"] for record in good(found)] == [0, 1, 2, 3]
    assert bad(found) == [("t.arrow row 5", "cut off")]


# -- folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("train-00000-of-00002.parquet", "train"),
        ("my_test_v2.json", "test"),
        ("validation.jsonl", "validation"),
        ("dev-v1.1.json", "validation"),
        ("data/train/0.jsonl", "train"),
        ("test/train.jsonl", "train"),
        ("training/all.jsonl", "train"),
        ("trainers.jsonl", None),
        ("latest.jsonl", None),
        ("all.jsonl", None),
    ],
)
def test_names_that_state_a_split(tmp_path: Path, name: str, split: str | None) -> None:
    path = tmp_path / "set" / name
    path.parent.mkdir(parents=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{"id": 1}]), path)
    else:
        path.write_text('{"id": 1}')
    (row,) = rows(tmp_path / "set")
    assert (row.split, row.file, row.record) == (split, f"set/{name}", {"id": 1})


def test_only_the_data_files_of_a_folder_are_read_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name in ("b.jsonl", "a.jsonl", ".git/x.json", "README.md", "dataset_infos.json", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"name": name}))
    assert [row.record["name"] for row in rows(folder)] == ["a.jsonl", "b.jsonl"]


def test_folders_saved_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(TABLE.to_pylist(), split="train")
    one.save_to_disk(tmp_path / "one", num_shards=2)
    one.filter(lambda row: row["id"] % 2 == 0).save_to_disk(tmp_path / "filtered")
    datasets.DatasetDict({"train": one, "test": one.select([3]), "easy": one.select([])}).save_to_disk(tmp_path / "all")
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"left by map")
    assert good(rows(tmp_path / "one")) == TABLE.to_pylist()
    assert {row.split for row in rows(tmp_path / "one")} == {None}
    assert [record["id"] for record in good(rows(tmp_path / "filtered"))] == [0, 2, 4]
    found = rows(tmp_path / "all")
    assert [(row.split, row.record["id"]) for row in found] == [*[("train", n) for n in range(5)], ("test", 3)]
    assert found[-1].where == "all/test/data-00000-of-00001.arrow row 1"

    next((tmp_path / "one").glob("data-00001*")).unlink()
    with pytest.raises(DataError, match="missing, but listed by the data set's metadata; copy the whole folder"):
        rows(tmp_path / "one")


def test_names_of_data_sets(tmp_path: Path) -> None:
    for name in ("a.json", "b.v2.jsonl", "C.PARQUET", "d.csv", "README.md", "e/train.jsonl", "f/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    names = {path.name: data_set_name(path) for path in tmp_path.iterdir()}
    assert names == {
        **{"a.json": "a", "b.v2.jsonl": "b.v2", "C.PARQUET": "C", "d.csv": "d", "e": "e"},
        **{"README.md": None, "f": None},
    }


# -- cells -------------------------------------------------------------------------------------------------------

CELLS = ["a", "", " b ", 'say "x"', "one\ntwo\r\nthree", "1,5;2", "\t", "中文的字有很多\u2028\x0b"]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "|"), ("a.TSV", "\t")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_cells_are_read_as_they_are(tmp_path: Path, name: str, separator: str, encoding: str) -> None:
    records = [{"x": cell, "y": other} for cell, other in zip(CELLS, CELLS[::-1], strict=True)] * 5
    with (tmp_path / name).open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, ["x", "y"], delimiter=separator)
        writer.writeheader()
        writer.writerows(records)
    found = rows(tmp_path / name)
    assert good(found) == records and not bad(found)


def test_a_row_has_the_line_on_which_it_begins(tmp_path: Path) -> None:
    found = rows(tmp_path / "a.csv", 'x,y\n1,"a\nb"\n\n2,c\n"d"e,f\n3\n4,"open\n')
    assert [row.where for row in found] == [f"a.csv:{number}" for number in (2, 5, 6, 7, 8)]
    assert bad(found) == [
        ("a.csv:6", "not CSV"), ("a.csv:7", "not one cell for each column"), ("a.csv:8", "not CSV"),
    ]  # fmt: skip


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    found = rows(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}\n{"a": 3}\n')
    assert [row.record for row in found if row.bad is None] == [{"a": 1}, {"a": 3}]
    assert found[1].bad == ("not JSON", 'the key \'c\' comes twice, found \'{"a": 1, "b": {"c": 1, "c": 2}}\'')
    assert rows(tmp_path / "b.csv", "a,b,a\n1,2,3\n")[0].bad == ("a column that comes twice", "a")


def test_names_of_splits() -> None:
    assert all(map(names_a_split, ["train", "Test", "validation", "train-00000-of-00012"]))
    assert not any(map(names_a_split, ["law-test", "train-2", "trains", "test-of"]))
