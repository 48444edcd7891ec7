"""Names of rows as JSON spells them, and rows that readers of tables would change or crash on."""

import gzip
import json
import re

import pyarrow.parquet
import pytest

from gradfn.errors import InputError
from gradfn.hf import load_rows, row_names


def spelled(folder, ids, name="rows.jsonl"):
    lines = [f'{{"id": {one}, "text": "a", "source": {one}, "x": 0.1}}' for one in ids]
    text = "[" + ",\n".join(lines) + "]" if name.endswith(".json") else "\n".join(lines)
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("ids", [
    ["9223372036854775809", "9223372036855775809"],
    ["17", "9223372036854775808", "18"],
    ["18446744073709551617", "18446744073709551618"],
    ["9007199254740993", "1.50", "1e3"],
    ["-9223372036854775809", "-5"],
    ["17", "18"],
])  # fmt: skip
def test_names_are_the_digits_of_the_file(tmp_path, name, ids):
    rows = load_rows(spelled(tmp_path, ids, name))
    assert row_names(rows) == ids
    assert list(rows["source"]) == ids
    assert list(rows["x"]) == [0.1] * len(ids)
    assert rows.column_names == ["id", "text", "source", "x"]


def test_names_of_a_folder_of_files(tmp_path):
    spelled(tmp_path, ["1", "2"], "train.jsonl")
    spelled(tmp_path, ["9223372036854775809", '"t"'], "test.jsonl")
    assert row_names(load_rows(tmp_path)) == ["1", "2"]
    assert row_names(load_rows(tmp_path, "test")) == ["9223372036854775809", "t"]


def test_a_row_without_a_name_has_its_number(tmp_path):
    lines = [{"text": "a", "id": 2**70}, {"text": "b"}, {"text": "c", "id": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert row_names(load_rows(tmp_path / "a.jsonl")) == [str(2**70), "1", "2"]


@pytest.mark.parametrize(("text", "words"), [
    ("null", r"row 0 of .* is null, expected an object such as"),
    ('{"text": "a"}\nnull\n{"text": "b"}', r"row 1 of .* is null, expected an object"),
    ('{"text": "a"}\n[1]', r"row 1 of .* is \[1\], expected an object"),
    ('[{"text": "a"}, 5]', r"row 1 of .* is 5, expected an object"),
    ('{"text": ' + "[" * 50_000 + "]" * 50_000 + "}", "values nested too deeply: give rows of plain values"),
    ('{"text": "a"}\n{"text": ', r"cannot be read \(Expecting value: line 2"),
    (b'{"text": "\xff"}', r"cannot be read \('utf-8' codec can't decode byte 0xff"),
])  # fmt: skip
def test_what_is_no_row_is_refused(tmp_path, text, words):
    (tmp_path / "a.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words):
        load_rows(tmp_path / "a.jsonl")


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("text", "words"), [
    (GOOD * 3 + b'{"text": b}\n' + GOOD, "(Expecting value: line 4 column 10 of {})"),
    (GOOD * 3 + b'{"text":\n' + GOOD, "line 6 column 1 of {}, in the row that begins in line 4)"),
    (b"\n" + GOOD + b"\n\n5\n", "row 1 of {} (line 5) is 5, expected an object"),
    (GOOD * 2 + b'{"text": "\xff"}\n', "byte 0xff: line 3 of {} is not UTF-8"),
])  # fmt: skip
def test_a_bad_line_is_named_with_its_file(tmp_path, text, words, packed):
    file = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    file.write_bytes(gzip.compress(text) if packed else text)
    with pytest.raises(InputError, match=re.escape(words.format(file))):
        load_rows(file)
    if packed:
        return
    (tmp_path / "more.jsonl").write_bytes(GOOD)
    with pytest.raises(InputError, match=re.escape(words.format(file))):
        load_rows(tmp_path)


def test_names_of_a_table_stay(tmp_path):
    table = pyarrow.table({"id": pyarrow.array([2**63 + 1], pyarrow.uint64()), "text": ["a"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert row_names(load_rows(tmp_path / "a.parquet")) == [str(2**63 + 1)]
