import json
import os
import time
import warnings
from pathlib import Path

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet
import pytest
from hf_rows import ROWS, write

from gradfn.errors import InputError
from gradfn.hf import (
    load_rows,
    row_names,
    tokenize,
)
from gradfn.hf.datasets import load_split

KINDS = ["jsonl", "json", "csv", "parquet", "arrow", "arrow file", "txt", "disk", "disk dict"]


@pytest.fixture
def lines(tmp_path):
    return write("jsonl", tmp_path)


def everything_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("as_path", [str, Path])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(kind, as_path, tmp_path):
    rows = load_rows(as_path(write(kind, tmp_path)))
    assert rows["text"][:] == [row["text"] for row in ROWS]
    if kind != "txt":
        assert rows["id"][:] == [row["id"] for row in ROWS]


@pytest.mark.parametrize("kind", KINDS)
def test_loading_leaves_nothing_behind_and_says_nothing(kind, tmp_path, monkeypatch, capfd):
    write(kind, tmp_path)
    name = next(tmp_path.iterdir()).name
    for folder in ("temporary", "cache"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    before = everything_under(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = load_rows(name, "train[2:4]")
        assert rows["text"][:] == [row["text"] for row in ROWS[2:4]]
    assert everything_under(tmp_path) == before
    assert capfd.readouterr() == ("", "")
    assert not caught


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt"])
def test_a_changed_file_is_read_anew(kind, tmp_path):
    path = write(kind, tmp_path)
    before = os.stat(path)
    assert load_rows(path)[0]["text"] == "Row 0 of ten, é."
    changed = [{"id": row["id"], "text": row["text"].replace("Row", "Wor")} for row in ROWS]
    write(kind, tmp_path, changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times would
    assert load_rows(path)[0]["text"] == "Wor 0 of ten, é."


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*b.jsonl", "a?.jsonl", "a b.JSONL", "{a,b}.jsonl"])
def test_a_name_stands_for_itself(name, lines, tmp_path):
    path = lines.rename(tmp_path / name)
    (tmp_path / "a1.jsonl").write_text('{"text": "another"}\n')
    assert len(load_rows(path)) == 10


def test_a_link_to_a_file(lines, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(lines)
    assert len(load_rows(tmp_path / "link.jsonl")) == 10


def test_home_is_expanded(lines, monkeypatch):
    monkeypatch.setenv("HOME", str(lines.parent))
    assert len(load_rows("~/rows.jsonl")) == 10


def test_a_folder_of_files(tmp_path):
    (tmp_path / "data").mkdir()
    write("parquet", tmp_path / "data").rename(tmp_path / "data" / "train-00000-of-00001.parquet")
    assert load_rows(tmp_path)["text"][:] == [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train", range(10)),
        ("train[:3]", range(3)),
        ("train[7:]", range(7, 10)),
        ("train[-2:]", range(8, 10)),
        ("train[:20%]", range(2)),
        ("train[:100]", range(10)),
        ("train[:2]+train[8:]", [0, 1, 8, 9]),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "disk", "disk dict"])
def test_slices(kind, split, numbers, tmp_path):
    assert load_rows(write(kind, tmp_path), split)["id"][:] == [f"r{i}" for i in numbers]


def test_splits_of_a_saved_dict(tmp_path):
    path = write("disk dict", tmp_path)
    assert len(load_rows(path, "test")) == 2
    assert len(load_rows(path, "train[:1]+test")) == 3


def test_a_saved_dataset_answers_to_its_own_split(tmp_path):
    write("disk dict", tmp_path)
    datasets.load_from_disk(tmp_path / "rows.disk dict")["test"].save_to_disk(tmp_path / "one")
    rows = datasets.Dataset.from_list(ROWS[:2], split="test")
    rows.save_to_disk(tmp_path / "two")
    assert len(load_rows(tmp_path / "two", "test")) == len(load_rows(tmp_path / "two")) == 2


def test_csv_texts_that_look_missing(tmp_path):
    (tmp_path / "a.csv").write_text("n,text\n1,NA\n2,None\n,null\n3,\n")
    rows = load_rows(tmp_path / "a.csv")
    assert rows["text"][:] == ["NA", "None", "null", None]
    assert rows["n"][:] == [1, 2, None, 3]


def test_ids_of_csv_are_the_texts_that_they_are(tmp_path, tokenizers):
    table = "id,source,text\n007,1,a\n,,b\n1e3,01,c\n"
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "rows.csv", tmp_path / "folder" / "rows.csv"):
        path.write_text(table)
    for path in (tmp_path / "rows.csv", tmp_path / "folder"):
        rows = load_rows(path)
        assert tokenize(rows, tokenizers["nothing"]).ids == row_names(rows) == ["007", "1", "1e3"]
        assert list(rows["source"]) == ["1", None, "01"]


def test_a_folder_of_csv_is_read_as_its_file_is(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\nNA,1\nNone,\n")
    assert list(load_rows(tmp_path)["text"]) == ["NA", "None"]


DATED = [{"id": "2020-01-01", "text": "1879-03-14", "at": {"day": "2020-01-01 10:00:00"}, "n": 1},
         {"id": "2020-01-02T10:00:00Z", "text": None, "at": {"day": "2021-01-01"}, "n": 2}]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("folder", [False, True])
def test_json_texts_that_look_like_times(tmp_path, tokenizers, kind, folder):
    path = write(kind, tmp_path, DATED)
    rows = load_rows(tmp_path if folder else path)
    assert list(rows) == DATED
    assert rows.column_names == list(DATED[0])
    docs = tokenize(rows, tokenizers["nothing"])
    assert (docs.ids, docs.texts) == ([row["id"] for row in DATED], ["1879-03-14", ""])


def test_json_ids_of_several_types(tmp_path, tokenizers):
    rows = [{"id": "doc-1", "text": "a"}, {"id": 2, "text": "b"}, {"text": "c"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = load_rows(tmp_path / "rows.jsonl")
    assert tokenize(rows, tokenizers["nothing"]).ids == row_names(rows) == ["doc-1", "2", "2"]


def test_blank_lines_of_a_text_file_are_empty_rows(tmp_path, tokenizers):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    rows = load_rows(tmp_path / "a.txt")
    assert rows["text"][:] == ["one", "", "two"]
    assert tokenize(rows, tokenizers["nothing"]).lengths[1] == 0


@pytest.mark.parametrize("split", ["test", "train[", "train[a:b]", "", "train[:200%]", "train]"])
@pytest.mark.parametrize("kind", ["jsonl", "disk dict"])
def test_a_split_that_is_not_there(kind, split, tmp_path):
    if (kind, split) == ("disk dict", "test"):
        split = "validation"
    with pytest.raises(
        InputError, match=r"has no split '.*': it has train.*; a slice is written as train\[:100\]"
    ):
        load_rows(write(kind, tmp_path), split)


@pytest.mark.parametrize("split", ["train[5:5]", "train[20:]", "train[:0]"])
def test_an_empty_slice(lines, split):
    with pytest.raises(InputError, match="has no rows in split"):
        load_rows(lines, split)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow", "txt"])
def test_an_empty_file(kind, tmp_path):
    (tmp_path / f"a.{kind}").touch()
    with pytest.raises(InputError, match=rf"a\.{kind}' is an empty file: give one with rows"):
        load_rows(tmp_path / f"a.{kind}")


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", "[]"), ("a.csv", "id,text\n"), ("a.jsonl", "\n\n"), ("a.json", "{}")]
)
def test_a_file_without_rows(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=r"has no rows|cannot be read"):
        load_rows(tmp_path / name)


def test_a_parquet_file_without_rows(tmp_path):
    pa.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet' (has no rows|cannot be read)"):
        load_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n'),
        ("a.json", b"[{]"),
        ("a.parquet", b"PAR1 and then nothing"),
        ("a.arrow", b"not arrow"),
        ("a.txt", b"\xff\xfe\x00"),
        ("a.csv", b'text,n\n"open'),
    ],
)
def test_a_broken_file(name, content, tmp_path, capfd):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}' cannot be read \(.+\): check it") as caught:
        load_rows(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_broken_saved_dataset(tmp_path):
    path = write("disk", tmp_path)
    next(path.glob("*.arrow")).write_bytes(b"cut")
    with pytest.raises(InputError, match="cannot be read"):
        load_rows(path)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.xyz").write_text("text")
    with pytest.raises(
        InputError, match=r"one of .jsonl, .ndjson, .json, .csv, .parquet, .arrow, .txt, .* or a folder"
    ):
        load_rows(tmp_path / "a.xyz")


def test_a_folder_without_rows(tmp_path, capfd):
    with pytest.raises(InputError, match="cannot be read"):
        load_rows(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "path", ["a.jsonl", "b.csv", "./nowhere", "/no/where", "~/nowhere", "a/b/c", Path("gpt2")]
)
def test_a_path_that_does_not_exist(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gradfn.hf.datasets.hub_answers", lambda: pytest.fail("asked the hub"))
    with pytest.raises(
        InputError, match=r"no dataset '.*': no file or folder here has this name; check the path"
    ):
        load_rows(path)


@pytest.mark.parametrize(
    "path", ["gradfn-tests/no-such-dataset", "no-such-dataset", "gradfn-tests/none:english"]
)
def test_a_hub_name_without_a_hub(path, no_hub, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    start = time.perf_counter()
    with pytest.raises(
        InputError, match=r"not among the cached downloads, and the hub does not answer: give"
    ):
        load_rows(path)
    assert time.perf_counter() - start < 5
    assert before == (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    assert capfd.readouterr() == ("", "")
    assert everything_under(tmp_path) == []


def test_a_hub_name_with_a_configuration_and_a_revision(monkeypatch):
    asked, rows = [], datasets.Dataset.from_dict({"text": [*"abc"]})
    read = {"train": rows, "test": rows.select([2])}
    monkeypatch.setattr("gradfn.hf.datasets.hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **how: asked.append((args, how)) or read)
    assert load_rows("owner/name:english", "test[:5]", revision="v2")["text"] == ["c"]
    assert len(load_rows("owner/name")) == 3
    assert asked == [
        (("owner/name", "english"), {"revision": "v2"}),
        (("owner/name", None), {"revision": None}),
    ]


def test_a_split_that_is_not_named(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]}, split="test")
    rows.save_to_disk(str(tmp_path / "one"))
    assert len(load_rows(tmp_path / "one", None)) == len(load_rows(tmp_path / "one")) == 2
    datasets.DatasetDict(test=rows).save_to_disk(str(tmp_path / "only"))
    assert len(load_rows(tmp_path / "only", None)) == 2
    datasets.DatasetDict(test=rows, train=rows.select([1])).save_to_disk(str(tmp_path / "two"))
    assert load_split(tmp_path / "two", "train")[1] == ["test", "train"]
    with pytest.raises(InputError, match="has the splits test, train: say which is meant with `split`"):
        load_rows(tmp_path / "two", None)


def test_a_place_on_this_machine_has_no_revisions(tmp_path):
    (tmp_path / "r.txt").write_text("a")
    with pytest.raises(
        InputError, match="has no revisions, which only the hub has: leave out the revision 'v2'"
    ):
        load_rows(tmp_path / "r.txt", revision="v2")


def test_what_the_hub_refuses_is_one_sentence(monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("Config name is missing.\nPlease pick one")

    monkeypatch.setattr("gradfn.hf.datasets.hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        InputError, match=r"hub \(Config name is missing\): check the name, written as name or name:"
    ):
        load_rows("owner/name")


def test_a_folder_of_many_files_that_are_no_rows_is_refused_before_all_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("gradfn.hf.datasets._CRAWLED", 8)
    for number in range(9):
        (tmp_path / f"{number}.bin").touch()
    with pytest.raises(InputError, match="holds 8 files or more, most of them no rows: give the folder of a"):
        load_rows(tmp_path)
