import copy
import json
import os
import time
import warnings
from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers as tokenizers_library
from transformers import PreTrainedTokenizerFast

from gradfn.data import make_documents
from gradfn.errors import InputError
from gradfn.hf.datasets import (
    check_vocabulary,
    load_rows,
    row_names,
    text_pair,
    text_query,
    tokenize,
    tokenize_pairs,
    with_labels,
    with_weights,
)

ROWS = [{"id": f"r{i}", "text": f"Row {i} of ten, é."} for i in range(10)]


def write(kind, folder, rows=ROWS):
    """The rows as a file or folder of that kind."""
    path = folder / f"rows.{kind}"
    table = pa.Table.from_pylist(rows)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "csv":
        table.to_pandas().to_csv(path, index=False)
    elif kind == "parquet":
        pa.parquet.write_table(table, path)
    elif kind == "arrow":
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    elif kind == "arrow file":
        path = folder / "rows.arrow"
        with pa.ipc.new_file(path, table.schema) as stream:
            stream.write_table(table)
    elif kind == "txt":
        path.write_text("".join(row["text"] + "\n" for row in rows))
    elif kind == "disk":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif kind == "disk dict":
        datasets.DatasetDict(
            train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:2])
        ).save_to_disk(path)
    return path


KINDS = ["jsonl", "json", "csv", "parquet", "arrow", "arrow file", "txt", "disk", "disk dict"]


@pytest.fixture
def lines(tmp_path):
    return write("jsonl", tmp_path)


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that refuses connections, whatever this machine can reach."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


def rows_of(*rows, **columns):
    return datasets.Dataset.from_list(list(rows)) if rows else datasets.Dataset.from_dict(columns)


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
        InputError, match=r"expected one of .jsonl, .json, .csv, .parquet, .arrow, .txt, or a folder"
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
        InputError, match=r"not among the cached downloads, and the hub does not answer; give"
    ):
        load_rows(path)
    assert time.perf_counter() - start < 5
    assert before == (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    assert capfd.readouterr() == ("", "")
    assert everything_under(tmp_path) == []


def test_a_hub_name_with_a_configuration(monkeypatch):
    asked = []
    monkeypatch.setattr("gradfn.hf.datasets.hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or [1])
    load_rows("owner/name:english", "test[:5]")
    load_rows("owner/name")
    assert asked == [
        (("owner/name", "english"), {"split": "test[:5]"}),
        (("owner/name", None), {"split": "train"}),
    ]


def test_what_the_hub_refuses_is_one_sentence(monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("Config name is missing.\nPlease pick one")

    monkeypatch.setattr("gradfn.hf.datasets.hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        InputError, match=r"hub \(Config name is missing\): check the name, written as name or name:"
    ):
        load_rows("owner/name")


TEXTS = ["The capital of France is Paris.", "", "Lima", "What is the\n\ncapital?  é 北京"]


def test_texts(tokenizer):
    docs = tokenize(rows_of(text=TEXTS), tokenizer)
    assert [row["input_ids"].tolist() for row in docs] == [tokenizer(text).input_ids for text in TEXTS]
    assert docs.labels.tolist() == docs.input_ids.tolist()
    assert docs.texts == TEXTS
    assert docs.ids == ["0", "1", "2", "3"]


def test_an_empty_text_is_kept(tokenizers):
    docs = tokenize(rows_of(text=["", None, "x"]), tokenizers["nothing"])
    assert docs.lengths.tolist() == [0, 0, 1]
    assert docs.texts == ["", "", "x"]
    docs = tokenize(rows_of(text=["", None]), tokenizers["bos"])
    assert docs.lengths.tolist() == [1, 1]
    assert docs.supervised.tolist() == [0, 0]


def test_ids(tokenizers):
    docs = tokenize(rows_of(text=["a", "b", "c"], id=[7, None, 9]), tokenizers["nothing"])
    assert docs.ids == ["7", "1", "9"]


def test_more_rows_than_are_tokenised_at_once(tokenizers):
    texts = [f"Row {i}" for i in range(2345)]
    docs = tokenize(rows_of(text=texts), tokenizers["bos"])
    assert docs.ids == [str(i) for i in range(2345)]
    for i in (0, 999, 1000, 2344):
        assert docs[i]["input_ids"].tolist() == tokenizers["bos"](texts[i]).input_ids
    assert docs.texts == texts


def test_selected_and_formatted_rows(tokenizers):
    rows = rows_of(text=TEXTS, id=[0, 1, 2, 3]).select([2, 0]).with_format("torch")
    docs = tokenize(rows, tokenizers["nothing"])
    assert docs.texts == [TEXTS[2], TEXTS[0]]
    assert docs.ids == ["2", "0"]


def test_no_rows_are_no_documents(tokenizers):
    assert len(tokenize(rows_of(text=["a"]).select([]), tokenizers["bos"])) == 0


PAIRS = [
    ("The capital of France is", " Paris."),
    ("The capital of France is ", "Paris."),
    ("What is the capital of Peru?", "\nLima"),
    ("", "Lima"),
    ("The capital", ""),
    ("", ""),
    ("Par", "is"),
]


def special(tokenizer):
    """The special tokens in front of a text and behind it."""
    whole, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    front = whole.index(plain[0])
    return whole[:front], whole[front + len(plain) :]


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_prompt_tokens_and_completion_tokens_are_joined(tokenizer, prompt, completion):
    front, back = special(tokenizer)
    rows = rows_of(q=[prompt], a=[completion])
    docs = tokenize(rows, tokenizer, prompt_column="q", completion_column="a")
    head = front + tokenizer(prompt, add_special_tokens=False).input_ids
    tokens, labels = docs[0]["input_ids"].tolist(), docs[0]["labels"].tolist()
    assert tokens[: len(head)] == head
    assert labels[: len(head)] == [-100] * len(head)
    assert labels[len(head) :] == tokens[len(head) :]
    body = tokens[len(head) : len(tokens) - len(back)]
    assert tokens[len(tokens) - len(back) :] == back
    assert not set(body) & {0, 1, 2}
    assert docs.texts == [prompt + completion]
    if prompt:
        assert tokenizer.decode(tokens[len(front) : len(tokens) - len(back)]) == prompt + completion


@pytest.mark.parametrize("kind", ["nothing", "bos", "bos+eos"])
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_completion_tokens_are_those_of_the_completion_alone(tokenizers, kind, prompt, completion):
    tokenizer = tokenizers[kind]
    front, back = special(tokenizer)
    docs = tokenize(rows_of(q=[prompt], a=[completion]), tokenizer, prompt_column="q", completion_column="a")
    parts = [tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, completion)]
    assert docs[0]["input_ids"].tolist() == front + parts[0] + parts[1] + back


def test_a_tokenizer_that_adds_a_space_adds_none_inside(tokenizers):
    tokenizer = tokenizers["metaspace"]
    rows = rows_of(q=["The capital of France is", "Par"], a=[" Paris.", "is"])
    docs = tokenize(rows, tokenizer, prompt_column="q", completion_column="a")
    assert docs[0]["input_ids"].tolist() == tokenizer("The capital of France is Paris.").input_ids
    assert tokenizer.decode(docs[1]["input_ids"][1:]) == "Paris"


def test_only_completions_are_supervised(tokenizers):
    rows = rows_of(q=["Lima", ""], a=[" Lima", "Lima"])
    docs = tokenize(rows, tokenizers["nothing"], prompt_column="q", completion_column="a")
    tokens = len(tokenizers["nothing"](" Lima").input_ids)
    assert docs.supervised[0] == tokens
    assert docs.supervised[1] == docs.lengths[1] - 1


@pytest.mark.parametrize("columns", [{"prompt_column": "q"}, {"completion_column": "q"}])
def test_a_lone_prompt_or_completion_column(tokenizers, columns):
    with pytest.raises(InputError, match="go together, got only 'q': name both"):
        tokenize(rows_of(q=["a"]), tokenizers["bos"], **columns)


@pytest.mark.parametrize(
    "columns",
    [{"text_column": "body"}, {"prompt_column": "q", "completion_column": "body"}],
    ids=["text", "pair"],
)
def test_a_missing_column(tokenizers, columns):
    with pytest.raises(
        InputError, match=r"no column 'body' in the dataset, which has q, n: name one with --text-col"
    ):
        tokenize(rows_of(q=["a"], n=[1]), tokenizers["bos"], **columns)


@pytest.mark.parametrize(("column", "kind"), [("n", "int64"), ("many", "List"), ("nested", "dict")])
def test_a_column_that_is_no_text(tokenizers, column, kind):
    rows = rows_of({"n": 1, "many": ["a"], "nested": {"x": "a"}})
    with pytest.raises(InputError, match=f"column '{column}' holds {kind}, not text"):
        tokenize(rows, tokenizers["bos"], text_column=column)


def test_large_strings_are_text(tokenizers):
    rows = datasets.Dataset(pa.table({"text": pa.array(["a"], pa.large_string())}))
    assert len(tokenize(rows, tokenizers["nothing"])) == 1


def test_text_needs_a_tokenizer():
    with pytest.raises(InputError, match="rows of text need a tokenizer"):
        tokenize(rows_of(text=["a"]), None)


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed"])
@pytest.mark.parametrize("width", [pa.int64(), pa.int32(), pa.uint16()])
def test_token_ids_are_used_as_they_are(kind, width):
    lists = {"list": pa.list_(width), "large_list": pa.large_list(width), "fixed": pa.list_(width, 2)}[kind]
    table = pa.table({"input_ids": pa.array([[5, 6], [7, 8], [9, 5]], lists), "id": ["a", "b", "c"]})
    docs = tokenize(datasets.Dataset(table), None)
    assert [row["input_ids"].tolist() for row in docs] == [[5, 6], [7, 8], [9, 5]]
    assert docs.labels.tolist() == docs.input_ids.tolist()
    assert docs.ids == ["a", "b", "c"]
    assert docs.texts == ["5 6", "7 8", "9 5"]


def test_labels_of_token_ids():
    rows = rows_of(input_ids=[[5, 6, 7], [], [8]], labels=[[-100, 6, -100], [], [8]])
    docs = tokenize(rows, None)
    assert [row["labels"].tolist() for row in docs] == [[-100, 6, -100], [], [8]]
    assert docs.supervised.tolist() == [1, 0, 0]


def test_token_ids_of_selected_rows():
    docs = tokenize(rows_of(input_ids=[[i] * i for i in range(5)]).select([4, 1, 3]), None)
    assert [row["input_ids"].tolist() for row in docs] == [[4] * 4, [1], [3] * 3]


def test_padding_of_token_ids_is_taken_away():
    rows = rows_of(
        input_ids=[[5, 6, 0, 0], [0, 0, 0, 0], [0, 7, 8, 9]],
        labels=[[5, 6, -100, -100], [-100] * 4, [-100, 7, 8, 9]],
        attention_mask=[[1, 1, 0, 0], [0] * 4, [0, 1, 1, 1]],
    )
    docs = tokenize(rows, None)
    assert [row["input_ids"].tolist() for row in docs] == [[5, 6], [], [7, 8, 9]]
    assert [row["labels"].tolist() for row in docs] == [[5, 6], [], [7, 8, 9]]
    assert tokenize(rows.remove_columns("labels"), None).fingerprint() == docs.fingerprint()


def test_token_ids_come_before_text_but_not_before_named_columns(tokenizers):
    tokenizer = tokenizers["nothing"]
    rows = rows_of(text=["Lima"], input_ids=[[5, 6, 7]])
    docs = tokenize(rows, tokenizer)
    assert docs[0]["input_ids"].tolist() == [5, 6, 7]
    assert docs.texts == ["Lima"]
    docs = tokenize(rows, tokenizer, prompt_column="text", completion_column="text")
    assert docs.texts == ["LimaLima"]


def test_token_ids_are_decoded_for_show(tokenizers):
    ids = tokenizers["nothing"]("The capital").input_ids
    docs = tokenize(rows_of(input_ids=[ids, ids * 500]), tokenizers["nothing"])
    assert docs.texts[0] == "The capital"
    assert docs.texts[1].startswith("The capitalThe capital")
    assert len(docs.texts[1]) < 2000


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": ["text"]}, "'input_ids' holds string, expected a list of integers a row"),
        ({"input_ids": [5]}, "'input_ids' holds int"),
        ({"input_ids": [[0.5]]}, "'input_ids' holds list<"),
        ({"input_ids": [["5"]]}, "'input_ids' holds list<"),
        ({"input_ids": [[[5]]]}, "'input_ids' holds list<"),
        ({"input_ids": [[5, None]]}, "'input_ids' has gaps"),
        ({"input_ids": [[5, -1]]}, "'input_ids' holds -1, expected 0 or more"),
        ({"input_ids": [[2**31]]}, "'input_ids' holds 2147483648"),
        ({"input_ids": [[5]], "labels": [[-101]]}, "'labels' holds -101, expected -100 or more"),
        ({"input_ids": [[5, 6]], "labels": [[5]]}, "row 0 has 2 tokens but 1 labels"),
        ({"input_ids": [[5], [6]], "labels": [[5], None]}, "row 1 has 1 tokens but 0 labels"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, "row 0 has 2 tokens but 1 mask values"),
        ({"input_ids": [[5, 6]], "token_type_ids": [[1]]}, "row 0 has 2 tokens but 1 token types"),
    ],
)
def test_token_ids_that_are_none(columns, message):
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        tokenize(rows_of(**columns), None)


def test_types_of_tokens_come_with_them():
    rows = rows_of(
        input_ids=[[1, 5, 6, 0], [1, 7]] * 600, token_type_ids=[[0, 0, 1, 0], [0, 1]] * 600,
        attention_mask=[[1, 1, 1, 0], [1, 1]] * 600,
    )  # fmt: skip
    docs = tokenize(rows, None)
    assert [docs[row]["token_type_ids"].tolist() for row in (0, 1199)] == [[0, 0, 1], [0, 1]]
    cut = tokenize(rows, None, max_length=2, truncation=True)
    assert [cut[row]["token_type_ids"].tolist() for row in (0, 1)] == [[0, 0], [0, 1]]
    late = rows_of(input_ids=[[1, 5]] * 1001, token_type_ids=[[0, 0]] * 1000 + [[0, 1]])
    assert [tokenize(late, None)[row]["token_type_ids"].tolist() for row in (0, 1000)] == [[0, 0], [0, 1]]
    none = rows_of(input_ids=[[1, 5]], token_type_ids=[[0, 0]])
    bare = rows_of(input_ids=[[1, 5]])
    assert "token_type_ids" not in tokenize(none, None)[0]
    assert tokenize(none, None).fingerprint() == tokenize(bare, None).fingerprint()


def test_labels_of_rows_are_not_those_of_tokens():
    rows = rows_of(input_ids=[[5, 6], [7]], labels=[1, 0])
    docs = tokenize(rows, None)
    assert docs.labels.tolist() == docs.input_ids.tolist() == [5, 6, 7]
    assert with_labels(docs, rows, "labels", CLASSES).extras["labels"].tolist() == [1, 0]
    assert with_labels(docs, rows, "labels", None).extras["labels"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("labels", "said"), [(None, "token 9"), ([[5, -100], [7, 9], [1]], "label 9")])
def test_tokens_that_a_model_does_not_have(labels, said):
    ids = [[5, 6], [7, 9 if labels is None else 8], [1]]
    docs = make_documents(ids, labels, ids=["a", "b", "c"])
    check_vocabulary(docs, 10)
    words = (
        rf"row 1 \(id 'b'\) has {said}, and the model has 9 tokens, numbered from 0: tokenise the rows with"
    )
    with pytest.raises(InputError, match=words):
        check_vocabulary(docs, 9)


def test_a_null_row_of_token_ids_is_empty():
    assert tokenize(rows_of(input_ids=[[5], None]), None).lengths.tolist() == [1, 0]


def test_a_long_row_is_refused(tokenizers):
    rows = rows_of(text=["x"] * 1001 + ["x x x x"], id=[f"r{i}" for i in range(1002)])
    with pytest.raises(
        InputError, match=r"row 1001 \(id 'r1001'\) has 7 tokens, .* limit of 4: .* --truncation"
    ):
        tokenize(rows, tokenizers["nothing"], max_length=4)
    assert tokenize(rows, tokenizers["nothing"], max_length=7).lengths.max() == 7


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_truncation_cuts_tokens_and_labels(tokenizer, limit):
    pairs = rows_of(q=[prompt for prompt, _ in PAIRS], a=[completion for _, completion in PAIRS])
    columns = {"prompt_column": "q", "completion_column": "a"}
    whole = tokenize(pairs, tokenizer, **columns)
    cut = tokenize(pairs, tokenizer, **columns, max_length=limit, truncation=True)
    for before, after in zip(whole, cut, strict=True):
        assert after["input_ids"].tolist() == before["input_ids"][:limit].tolist()
        assert after["labels"].tolist() == before["labels"][:limit].tolist()
    assert cut.texts == whole.texts


def test_truncation_cuts_token_ids():
    rows = rows_of(input_ids=[[5, 6, 7], [], [8]], labels=[[-100, 6, 7], [], [8]])
    docs = tokenize(rows, None, max_length=2, truncation=True)
    assert [row["input_ids"].tolist() for row in docs] == [[5, 6], [], [8]]
    assert [row["labels"].tolist() for row in docs] == [[-100, 6], [], [8]]


def test_a_limit_without_room(tokenizers):
    with pytest.raises(InputError, match="at least 1 token, got 0"):
        tokenize(rows_of(text=["a"]), tokenizers["bos"], max_length=0)


def test_long_texts_are_tokenised_in_silence(tokenizers, capfd, caplog):
    tokenizer = tokenizers["bos"]
    before, tokenizer.model_max_length = tokenizer.model_max_length, 4
    tokenize(rows_of(text=["x " * 50]), tokenizer)
    tokenizer.model_max_length = before
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_text_query_is_a_row_of_text(tokenizer):
    query = text_query(tokenizer, "The capital of Peru")
    assert query.fingerprint() == tokenize(rows_of(text=["The capital of Peru"]), tokenizer).fingerprint()
    assert (len(query), query.ids, query.texts) == (1, ["0"], ["The capital of Peru"])


def test_a_query_with_completion_is_a_pair(tokenizer):
    query = text_query(tokenizer, "The capital of Peru is", " Lima")
    rows = rows_of(q=["The capital of Peru is"], a=[" Lima"])
    expected = tokenize(rows, tokenizer, prompt_column="q", completion_column="a")
    assert query.fingerprint() == expected.fingerprint()
    assert query.texts == expected.texts


@pytest.mark.parametrize("query", [("",), (" \n",), ("a prompt", ""), ("a prompt", "  ")])
def test_an_empty_query(tokenizer, query):
    with pytest.raises(InputError, match="the query is empty: give a text, in quotes"):
        text_query(tokenizer, *query)


def test_a_query_with_nothing_to_predict(tokenizers):
    with pytest.raises(InputError, match="the query 'x' is 1 token long and leaves nothing to predict"):
        text_query(tokenizers["nothing"], "x")
    assert text_query(tokenizers["bos"], "x").supervised.tolist() == [1]
    with pytest.raises(InputError, match="nothing to predict"):
        text_query(tokenizers["bos"], "The capital of Peru is", " Lima", max_length=2, truncation=True)


def test_a_long_query(tokenizers):
    with pytest.raises(InputError, match=r"has 7 tokens, more than the limit of 4"):
        text_query(tokenizers["nothing"], "x x x x", max_length=4)
    assert text_query(tokenizers["nothing"], "x x x x", max_length=4, truncation=True).lengths.tolist() == [4]


def test_types(tokenizers):
    docs = tokenize(rows_of(text=TEXTS), tokenizers["bos"])
    assert (docs.input_ids.dtype, docs.labels.dtype, docs.offsets.dtype) == (np.int32, np.int32, np.int64)


CLASSES = {"bad": 0, "good": 1}


def labelled(column, **columns):
    rows = datasets.Dataset.from_dict({"text": ["a b", "c d", "e"], column: [0, 0, 0], **columns})
    return rows


@pytest.mark.parametrize("values", [[1, 0, 1], ["good", "bad", "good"], [True, False, True]])
def test_labels_are_class_numbers_or_names(tokenizers, values):
    rows = labelled("label", label=values)
    docs = with_labels(tokenize(rows, tokenizers["bos"]), rows, "label", CLASSES)
    assert docs.extras["labels"].tolist() == [1, 0, 1]
    assert docs.extras["labels"].dtype == np.int64
    assert docs[0]["attention_mask"].tolist() == [1] * docs.lengths[0]


@pytest.mark.parametrize("value", ["fine", 2, -1, None, 0.5])
def test_labels_that_are_no_class(tokenizers, value):
    rows = labelled("label", label=pa.array([value] * 3).to_pylist())
    docs = tokenize(rows, tokenizers["bos"])
    words = rf"row 0 has the label {value!r}, expected a number from 0 to 1 or one of bad, good: mend it"
    with pytest.raises(InputError, match=words):
        with_labels(docs, rows, "label", CLASSES)


def test_names_of_classes_come_before_their_numbers(tokenizers):
    rows = labelled("label", label=[1, 0, 1]).cast_column("label", datasets.ClassLabel(names=["good", "bad"]))
    docs = tokenize(rows, tokenizers["bos"])
    assert with_labels(docs, rows, "label", CLASSES).extras["labels"].tolist() == [0, 1, 0]
    unnamed = {"LABEL_0": 0, "LABEL_1": 1}
    assert with_labels(docs, rows, "label", unnamed).extras["labels"].tolist() == [1, 0, 1]
    words = "row 0 has the label 'bad', expected a number from 0 to 1 or one of poor, good"
    with pytest.raises(InputError, match=words):
        with_labels(docs, rows, "label", {"poor": 0, "good": 1})


def test_labels_of_a_regression_are_numbers(tokenizers):
    rows = labelled("y", y=[0.5, -1.0, 2.0])
    docs = with_labels(tokenize(rows, tokenizers["bos"]), rows, "y", None)
    assert docs.extras["labels"].tolist() == [0.5, -1.0, 2.0]
    for values, shown in (([1.0, None, 2.0], "None"), ([1.0, float("nan"), 2.0], "nan"), (["x"] * 3, "'x'")):
        rows = labelled("y", y=values)
        with pytest.raises(InputError, match=rf"row \d has {shown} in column 'y', expected a number"):
            with_labels(tokenize(rows, tokenizers["bos"]), rows, "y", None)
    with pytest.raises(
        InputError, match=r"no column 'z' in the dataset, .*: name another with --label-column"
    ):
        with_labels(tokenize(rows, tokenizers["bos"]), rows, "z", None)


def test_a_row_to_classify_has_tokens(tokenizers):
    rows = datasets.Dataset.from_dict({"text": ["a", ""], "label": [0, 1]})
    with pytest.raises(InputError, match=r"row 1 \(id '1'\) has no tokens to read: leave it out"):
        with_labels(tokenize(rows, tokenizers["nothing"]), rows, "label", CLASSES)


def test_rewards_are_compared_within_a_prompt(tokenizers):
    rows = datasets.Dataset.from_dict(
        {
            "text": list("abcd"),
            "prompt": ["p", "q", "p", "p"],
            "reward": [1, 5, 2, 6],
            "advantage": [1, 2, 3, 4],
        }
    )
    docs = tokenize(rows, tokenizers["bos"])
    of_rewards = with_weights(docs, rows, reward_column="reward", prompt_column="prompt")
    assert of_rewards.extras["weight"].tolist() == [-2.0, 0.0, -1.0, 3.0]
    given = with_weights(docs, rows, advantage_column="advantage")
    assert given[3]["weight"].item() == 4.0
    pairs = tokenize_pairs(rows, tokenizers["bos"], prompt_column="prompt", completion_column="text")
    assert with_weights(pairs, rows, advantage_column="advantage")[3]["weight"].item() == 4.0
    for columns, words in (
        (
            {"reward_column": "reward"},
            "a reward is compared with others of its prompt, and these rows have none: give prompts and",
        ),
        (
            {"reward_column": "text", "prompt_column": "prompt"},
            "row 0 has 'a' in column 'text', expected a num",
        ),
        ({"advantage_column": "none"}, "no column 'none' in the dataset"),
        ({"reward_column": "reward", "advantage_column": "advantage"}, "name one of the two columns"),
        ({}, "name one of the two columns"),
    ):
        with pytest.raises(InputError, match=words):
            with_weights(docs, rows, **columns)


def said(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def test_rewards_of_chats_are_compared_within_what_was_asked(tokenizers):
    longer = [*said("p", "x"), *said("q", "y")]
    chats = [said("p", "x"), said("q", "x"), said("p", "y"), longer, [*said("p", "z"), longer[0]]]
    rows = datasets.Dataset.from_dict({"messages": chats, "reward": [1.0, 5.0, 2.0, 7.0, 6.0]})
    docs = make_documents([[1]] * 5)
    weights = with_weights(docs, rows, reward_column="reward", messages_column="messages").extras["weight"]
    assert weights.tolist() == [-2.0, 0.0, -1.0, 0.0, 3.0]


def test_chats_whose_messages_differ_in_keys(tmp_path, tokenizers):
    tokenizer = copy.deepcopy(tokenizers["bos"])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}{% if m.name is defined %} {{ m.name }}{% endif %}]"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chats = [said("p", "x"), [{"role": "user", "content": "1879-03-14", "name": "Bob"}, said("", "y")[1]]]
    for rows in (chats, chats[1:], [said("1879-03-14", "1879-03-14")] * 2):
        path = write("jsonl", tmp_path, [{"messages": chat, "reward": 1} for chat in rows])
        docs = tokenize(load_rows(path), tokenizer, messages_column="messages")
        assert docs.texts == [tokenizer.apply_chat_template(chat, tokenize=False) for chat in rows]
        given = with_weights(docs, load_rows(path), reward_column="reward", messages_column="messages")
        assert given.extras["weight"].tolist() == [0.0] * len(rows)


def test_the_end_goes_behind_the_completion_whatever_the_alphabet():
    known = {"<s>": 0, "</s>": 1, "A": 2, "C": 3, "G": 4, "T": 5}
    backend = tokenizers_library.Tokenizer(tokenizers_library.models.BPE(vocab=known, merges=[]))
    backend.post_processor = tokenizers_library.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    rows = rows_of(p=["ACG", ""], c=["TT", "A"])
    docs = tokenize(rows, tokenizer, prompt_column="p", completion_column="c")
    assert [row["input_ids"].tolist() for row in docs] == [[0, 2, 3, 4, 5, 5, 1], [0, 2, 1]]
    assert docs.supervised.tolist() == [3, 2]


def test_pairs_have_special_tokens_on_both_sides(tokenizers):
    rows = datasets.Dataset.from_dict({"id": ["x", "y"], "prompt": ["a b", "c"], "completion": ["d", "e f"]})
    tokenizer = tokenizers["bos+eos"]
    pairs = tokenize_pairs(rows, tokenizer, prompt_column="prompt", completion_column="completion")
    for row in range(2):
        assert pairs[row]["input_ids"].tolist() == tokenizer(rows[row]["prompt"])["input_ids"]
        assert pairs[row]["labels"].tolist() == tokenizer(rows[row]["completion"])["input_ids"]
    assert (pairs.ids, pairs.texts) == (["x", "y"], ["a b → d", "c → e f"])
    one = text_pair(tokenizer, "c", "e f")
    assert one[0]["labels"].tolist() == pairs[1]["labels"].tolist()
    with pytest.raises(InputError, match=r"row 0 .* more than the limit of 2: cut such rows"):
        tokenize_pairs(rows, tokenizer, prompt_column="prompt", completion_column="completion", max_length=2)
