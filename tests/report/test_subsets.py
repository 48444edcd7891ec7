"""Subsets are written so that what is read again is what was chosen, in every format."""

import errno

import datasets
import pytest
import torch
from datasets import Dataset

from gradfn.errors import InputError, StorageError
from gradfn.hf.datasets import load_rows
from gradfn.report import subsets
from gradfn.report.subsets import check_subset, with_ranks, write_subset
from gradfn.selection import Selection

PLAIN = {
    "id": ["007", "b", "c"],
    "text": ['a "quoted", text\nof two lines', "é 🎈 \u2028 \x1b[2J", "NA"],
    "number": [1, -2, 3],
    "share": [0.1, 1e-300, -2.5],
    "right": [True, False, True],
}
NESTED = {
    **PLAIN,
    "messages": [[{"role": "user", "content": "hi"}], [], [{"role": "assistant", "content": "x"}]],
    "tokens": [[1, 2], [], [3]],
}
CHOSEN = Selection(torch.tensor([0, 2]), torch.tensor([0.1, 2.0]), torch.tensor([2, 1]))


@pytest.mark.parametrize("name", ["s.jsonl", "s.ndjson", "s.json", "s.csv", "s.parquet", "s.arrow", "s"])
def test_what_is_written_is_read_again(tmp_path, name):
    path = tmp_path / name
    columns = PLAIN if name == "s.csv" else NESTED
    kept = with_ranks(Dataset.from_dict(columns), CHOSEN)
    check_subset(path)
    write_subset(kept, path)
    again = load_rows(path)
    for one, other in zip(again, kept, strict=True):  # a .json file is read with ten digits
        close = {"gradfn_score": pytest.approx(other["gradfn_score"], rel=1e-9)} if name == "s.json" else {}
        assert one == {**other, **close}
    assert again["gradfn_row"][:] == [0, 2]
    assert [one.name for one in tmp_path.iterdir()] == [name]


def test_columns_of_an_earlier_selection_are_replaced():
    once = with_ranks(Dataset.from_dict(PLAIN), CHOSEN)
    again = with_ranks(once, CHOSEN._replace(rows=torch.tensor([0, 1]), queries=torch.tensor([1, 0])), "ab")
    assert again.column_names == [*PLAIN, "gradfn_row", "gradfn_score", "gradfn_rank", "gradfn_query"]
    assert (again["gradfn_row"][:], again["gradfn_query"][:]) == ([0, 1], ["b", "a"])


def test_no_spreadsheet_runs_a_cell_or_a_name(tmp_path):
    write_subset(Dataset.from_dict({"=a": ["=1+1", "-2"]}), tmp_path / "s.csv")
    assert (tmp_path / "s.csv").read_text() == "'=a\n'=1+1\n-2\n"


@pytest.mark.parametrize(
    ("columns", "name", "words"),
    [
        ({"tokens": [[1]]}, "s.csv", "column 'tokens' holds List"),
        ({"m": [{"a": 1}]}, "s.csv", "column 'm' holds dict, which a .csv file cannot hold"),
        ({"b": [b"\0"]}, "s.jsonl", "column 'b' holds Value binary, which a .jsonl file cannot hold: write"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, columns, name, words):
    with pytest.raises(InputError, match=words):
        write_subset(Dataset.from_dict(columns), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_images_are_refused_in_text_and_kept_in_parquet(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    image = Dataset.from_dict({"image": [{"bytes": b"no image", "path": None}]}, features=features)
    with pytest.raises(InputError, match="column 'image' holds Image"):
        write_subset(image, tmp_path / "s.json")
    write_subset(image, tmp_path / "s.parquet")
    assert load_rows(tmp_path / "s.parquet").features == features


def test_places_where_nothing_can_be_written_are_refused(tmp_path):
    there, other = tmp_path / "there.jsonl", tmp_path / "folder"
    there.write_text("{}")
    other.mkdir()
    for path, how, words in (
        (tmp_path / "s.xlsx", {}, "has no ending of a dataset: give one of .jsonl, .ndjson"),
        (tmp_path / "no" / "s.csv", {}, "cannot write"),
        (there, {}, "exists: give another name"),
        (there, {"source": there, "overwrite": True}, "is the dataset itself, which stays"),
        (other, {"overwrite": True}, "is no subset that could be replaced"),
    ):
        with pytest.raises(InputError, match=words):
            check_subset(path, **how)
    check_subset(there, overwrite=True)


def test_what_was_there_stays_where_writing_fails(tmp_path, monkeypatch):
    path, rows = tmp_path / "s.jsonl", Dataset.from_dict({"a": [1, 2]})
    path.write_text("old")

    def fail(rows, path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(subsets.WRITERS, ".jsonl", fail)
    with pytest.raises(StorageError, match="could not write"):
        write_subset(rows, path)
    assert [one.name for one in tmp_path.iterdir()] == ["s.jsonl"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["s", "s.parquet"])
def test_a_subset_is_replaced(tmp_path, name):
    for value in (1, 2):
        path = tmp_path / name
        check_subset(path, overwrite=True)
        write_subset(Dataset.from_dict({"a": [value]}), path)
        assert load_rows(path)["a"][:] == [value]
    assert [one.name for one in tmp_path.iterdir()] == [name]
