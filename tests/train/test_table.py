import pytest
import torch
from train_problems import SETTINGS, sequences, vectors

from gradfn.errors import InputError
from gradfn.train import (
    make_trainer,
    table_of,
)


def test_a_table_takes_no_more_padding_than_its_rows_need():
    table = table_of(sequences())
    assert table.take(torch.tensor([0, 4]))["input_ids"].shape == (2, 3)
    assert table.take(torch.tensor([[0, 3]]))["labels"].tolist()[0][0][3:] == [-100] * 3


@pytest.mark.parametrize(("row", "says"), [
    (0, "row 0 has no 'y', which row 1 has"), (4, "row 4 has no 'y', which row 0 has"),
])  # fmt: skip
def test_rows_that_lack_a_key_are_named(row, says):
    data = vectors()
    del data[row]["y"]
    with pytest.raises(InputError, match=says):
        table_of(data)


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="no rows"):
        make_trainer({"w": torch.ones(1)}, lambda p, e: p["w"].sum(), [], SETTINGS["sgd"])
