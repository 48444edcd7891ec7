import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gradfn.data import (
    Documents,
    Pairs,
    check_lengths,
    check_rows,
    collate,
    make_documents,
    offsets_of,
)
from gradfn.errors import InputError

ROWS = [[5, 6, 7], [], [8], [9, 10]]
LABELS = [[-100, 6, -100], [], [8], [-100, 10]]


@pytest.fixture
def docs():
    return make_documents(ROWS, LABELS, ids=["a", "b", "c", "d"], texts=["A", "B", "C", "D"])


def test_rows_come_back_as_they_went_in(docs):
    assert len(docs) == 4
    assert [docs[i]["input_ids"].tolist() for i in range(4)] == ROWS
    assert [docs[i]["labels"].tolist() for i in range(4)] == LABELS
    assert docs[0]["input_ids"].dtype == docs[1]["labels"].dtype == torch.int64
    assert (docs.input_ids.dtype, docs.labels.dtype, docs.offsets.dtype) == (np.int32, np.int32, np.int64)


def test_a_row_is_a_copy(docs):
    docs[0]["input_ids"][0] = 0
    assert docs.input_ids[0] == 5


def test_rows_index_like_a_list(docs):
    assert torch.equal(docs[-1]["input_ids"], docs[3]["input_ids"])
    with pytest.raises(IndexError):
        docs[4]
    assert [len(row["labels"]) for row in docs] == [3, 0, 1, 2]


def test_supervised_skips_ignored_labels_and_the_first_position(docs):
    naive = [sum(label != -100 for label in row[1:]) for row in LABELS]
    assert docs.supervised.tolist() == naive == [1, 0, 0, 1]
    assert docs.lengths.tolist() == [3, 0, 1, 2]


def test_labels_are_the_tokens_unless_given():
    docs = make_documents(ROWS)
    assert docs.labels.tolist() == docs.input_ids.tolist()
    assert docs.supervised.tolist() == [2, 0, 0, 1]
    assert docs.ids == ["0", "1", "2", "3"]
    assert docs.texts == [""] * 4


@pytest.mark.parametrize("rows", [[], [[]], [[], []]])
def test_nothing_is_supervised_in_nothing(rows):
    assert make_documents(rows).supervised.tolist() == [0] * len(rows)


@pytest.mark.parametrize(
    "rows",
    [
        [2, 0],
        [1, 1, 3],
        [],
        [-1],
        slice(1, 3),
        np.array([True, False, False, True]),
        np.array([3, 0], np.int32),
    ],
    ids=str,
)
def test_select_agrees_with_lists(docs, rows):
    picked = docs.select(rows)
    numbers = np.arange(4)[rows].tolist() if len(np.shape(rows)) == 0 or len(rows) else []
    assert [row["input_ids"].tolist() for row in picked] == [ROWS[i] for i in numbers]
    assert [row["labels"].tolist() for row in picked] == [LABELS[i] for i in numbers]
    assert picked.ids == ["abcd"[i] for i in numbers]
    assert picked.texts == ["ABCD"[i] for i in numbers]


@pytest.mark.parametrize(
    "rows",
    [np.array([]), torch.tensor([], dtype=torch.long), torch.tensor([2, 0]),
     np.array([True, False, True, False]), torch.tensor([True, False, True, False]),
     slice(1, 3), 3, np.int64(1), range(0)],
)  # fmt: skip
def test_select_takes_whatever_indexes(docs, rows):
    picked = np.atleast_1d(np.arange(4)[np.asarray(rows, int) if np.size(rows) == 0 else rows])
    assert docs.select(rows).ids == [docs.ids[row] for row in picked.tolist()]


def test_tokens_that_are_no_numbers_of_32_bits():
    for rows in ([[2**40]], None), ([[5]], [[2**40]]):
        with pytest.raises(
            InputError, match=r"^token ids and labels are whole numbers of 32 bits .*: correct the"
        ):
            make_documents(*rows)


def test_select_out_of_range(docs):
    with pytest.raises(IndexError):
        docs.select([4])


def test_fingerprint_is_of_tokens_labels_and_offsets(docs):
    same = make_documents(ROWS, LABELS, ids=["x"] * 4)
    assert docs.fingerprint() == same.fingerprint()
    assert len(docs.fingerprint()) == 16
    int(docs.fingerprint(), 16)
    others = [
        make_documents(ROWS),
        make_documents([[5, 6], [7], [8], [9, 10]], [[-100, 6], [-100], [8], [-100, 10]]),
        make_documents([[5, 6, 8], [], [8], [9, 10]], LABELS),
        docs.select([0, 2, 3]),
    ]
    assert len({other.fingerprint() for other in [docs, *others]}) == 5


def test_fingerprint_of_a_known_document():
    assert make_documents([[1, 2, 3], [4]]).fingerprint() == "f8fc2d64905da675"


def test_a_repr_is_short(docs):
    assert repr(docs) == "Documents(4 rows, 6 tokens)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": ["a"]}, "2 rows of 3 tokens came with 1 ids, 2 texts and 3 labels"),
        ({"texts": []}, "0 texts"),
        ({"offsets": np.array([0, 2, 4])}, "rise from 0 to the 3 tokens"),
        ({"offsets": np.array([1, 2, 3])}, "rise from 0"),
        ({"offsets": np.array([0, 4, 3])}, "rise from 0"),
    ],
)
def test_fields_that_disagree_are_refused(changes, message):
    fields = {
        "input_ids": np.arange(3, dtype=np.int32),
        "labels": np.arange(3, dtype=np.int32),
        "offsets": np.array([0, 2, 3]),
        "ids": ["a", "b"],
        "texts": ["", ""],
    }
    Documents(**fields)
    with pytest.raises(InputError, match=message):
        Documents(**fields | changes)


def test_labels_of_another_length_are_refused():
    # By us, or by the checks of shapes that run under pytest.
    with pytest.raises((InputError, TypeError), match="labels"):
        Documents(np.zeros(3, np.int32), np.zeros(2, np.int32), np.array([0, 3]), ["a"], [""])


def test_labels_that_do_not_pair_with_tokens_are_refused():
    with pytest.raises(InputError, match="row 1 has 1 tokens but 2 labels: give one a token"):
        make_documents([[1], [2]], [[1], [2, 3]])
    with pytest.raises(InputError, match="2 rows have labels for 1"):
        make_documents([[1], [2]], [[1]])
    with pytest.raises(InputError, match="masks"):
        check_lengths(np.array([1]), np.array([2]), "masks")


def test_offsets_of_nothing():
    assert offsets_of(np.zeros(0, np.int64)).tolist() == [0]


def test_collate_pads_on_the_right(docs):
    batch = collate(list(docs))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 0], [8, 0, 0], [9, 10, 0]]
    assert batch["labels"].tolist() == [[-100, 6, -100], [-100] * 3, [8, -100, -100], [-100, 10, -100]]


def test_a_batch_of_empty_rows_has_one_position(docs):
    batch = collate([docs[1], docs[1]])
    assert batch["input_ids"].tolist() == [[0], [0]]
    assert batch["labels"].tolist() == [[-100], [-100]]
    assert batch["labels"].dtype == torch.int64


def test_collate_stacks_what_is_no_sequence():
    examples = [
        {"x": torch.full((2,), float(i)), "y": torch.tensor(i), "z": torch.ones(2, 3)} for i in range(3)
    ]
    batch = collate(examples)
    assert batch["x"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert batch["y"].tolist() == [0, 1, 2]
    assert batch["z"].shape == (3, 2, 3)


def test_collate_keeps_types_and_pads_floats_with_zero():
    batch = collate([{"x": torch.ones(2, dtype=torch.float64)}, {"x": torch.ones(1, dtype=torch.float64)}])
    assert batch["x"].dtype == torch.float64
    assert batch["x"].tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "at least one example"),
        ([{"x": torch.ones(1)}, {"y": torch.ones(1)}], r"\['x'\] and \['y'\]"),
        ([{"x": torch.ones(1, 2)}, {"x": torch.ones(2, 2)}], r"'x' has shapes \[1, 2\], \[2, 2\]"),
        ([{"x": torch.ones(())}, {"x": torch.ones(2)}], r"'x' has shapes"),
    ],
)
def test_examples_that_do_not_stack_are_refused(examples, message):
    with pytest.raises(InputError, match=message):
        collate(examples)


def with_extras():
    docs = make_documents([[5, 6, 7], [8], [9, 9]], ids=["a", "b", "c"])
    return dataclasses.replace(docs, extras={"weight": np.array([1.0, -2.0, 0.5])})


def test_extras_come_with_their_rows():
    docs = with_extras()
    assert docs[1].keys() == {"input_ids", "labels", "weight"}
    assert docs[1]["weight"].item() == -2.0
    assert docs.select([2, 0])[0]["weight"].item() == 0.5
    batch = collate([docs[row] for row in range(3)])
    assert batch["weight"].tolist() == [1.0, -2.0, 0.5]


def test_a_label_of_a_row_stands_in_for_those_of_its_tokens():
    docs = dataclasses.replace(with_extras(), extras={"labels": np.array([2, 0, 1])})
    batch = collate([docs[row] for row in range(3)])
    assert batch["labels"].tolist() == [2, 0, 1]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert docs.supervised.tolist() == [1, 1, 1]


def test_extras_enter_the_fingerprint():
    docs = with_extras()
    changed = dataclasses.replace(docs, extras={"weight": np.array([1.0, -2.0, 0.25])})
    renamed = dataclasses.replace(docs, extras={"labels": docs.extras["weight"]})
    bare = dataclasses.replace(docs, extras={})
    assert len({each.fingerprint() for each in (docs, changed, renamed, bare)}) == 4
    assert docs.fingerprint() == with_extras().fingerprint()


def test_types_of_tokens_come_with_their_rows():
    types = np.array([0, 0, 1, 0, 0, 1], np.int32)
    docs = dataclasses.replace(with_extras(), token_types=types)
    assert docs[0]["token_type_ids"].tolist() == [0, 0, 1]
    assert docs.select([2, 0])[0]["token_type_ids"].tolist() == [0, 1]
    batch = collate([docs[row] for row in range(3)])
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert docs.select([1]).fingerprint() != with_extras().select([1]).fingerprint() != docs.fingerprint()
    assert docs.fingerprint() != dataclasses.replace(docs, token_types=types[::-1].copy()).fingerprint()


def test_extras_are_one_a_row():
    with pytest.raises(
        InputError, match=r"'weight' has shape \[2\], expected a number for each of the 3 rows"
    ):
        dataclasses.replace(with_extras(), extras={"weight": np.zeros(2)})


def test_pairs_are_an_input_and_an_output():
    inputs = with_extras()
    pairs = Pairs(inputs, make_documents([[1], [2, 3, 4], [5, 6]], texts=["x", "y", "z"]))
    assert pairs.lengths.tolist() == [3, 3, 2]
    assert pairs.supervised.tolist() == [1, 3, 2]
    batch = collate([pairs[row] for row in range(3)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [9, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["labels"].tolist() == [[1, -100, -100], [2, 3, 4], [5, 6, -100]]
    assert batch["weight"].tolist() == [1.0, -2.0, 0.5]
    chosen = pairs.select([2, 0])
    assert (chosen.ids, chosen.texts) == (["c", "a"], ["z", "x"])
    assert chosen[0]["labels"].tolist() == [5, 6]
    assert chosen.fingerprint() != pairs.fingerprint() == pairs.select([0, 1, 2]).fingerprint()
    with pytest.raises(InputError, match="3 inputs came with 1 outputs: give one for each"):
        Pairs(inputs, make_documents([[1]]))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (TensorDataset(torch.ones(2, 3), torch.ones(2)), "row 0 is a tuple: give each example as a dict"),
        (DataLoader(TensorDataset(torch.ones(2, 3))), "a DataLoader, of batches: give the dataset in it"),
        ({"x": torch.ones(2, 3)}, "the data is a dict: give a sequence of examples"),
        (torch.ones(2, 3), "the data is a Tensor: give a sequence of examples"),
        ("corpus.jsonl", "the data is a str: give a sequence of examples"),
        ((row for row in [{"x": torch.ones(3)}]), "the data is a generator: give a sequence of examples"),
        ({1, 2}, "the data is a set: give a sequence of examples"),
        ([torch.ones(3)], "row 0 is a Tensor: give each example as a dict of tensors"),
    ],
)
def test_what_is_no_sequence_of_examples(data, words):
    with pytest.raises(InputError, match=words):
        check_rows(data)
