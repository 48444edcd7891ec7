import pytest
from torch import nn

from gradfn.errors import InputError
from gradfn.runs.output import Output, output_of
from gradfn.runs.provenance import Provenance
from gradfn.runs.shards import Shard
from gradfn.subject import Subject


def loss(params, example):
    return params["weight"].sum() * example["x"]


def test_keywords_of_a_run_are_told_from_those_of_a_model(tmp_path):
    net, shard = nn.Linear(2, 1), Shard(1, 2)
    output, subject = output_of(
        tmp_path, net, {"loss": loss, "token_batch_size": 7, "overwrite": "unlike", "shard": shard}
    )
    assert (output.folder, output.overwrite) == (tmp_path / "shards" / "1-of-2", "unlike")
    assert (subject.model, subject.loss, subject.token_batch_size) == (net, loss, 7)
    assert output_of(tmp_path, subject, {})[1] is subject
    with pytest.raises(InputError, match="a Subject has its own token_batch_size"):
        output_of(tmp_path, Subject(net, loss), {"token_batch_size": 7})


def test_an_output_writes_its_shard_and_says_what_differs(tmp_path):
    made = Provenance.of({"data": {"fingerprint": "a"}, "request": {"command": "build"}})
    output = Output(tmp_path, shard=Shard(2, 2))
    with output.open("store", made, 3, part=(1, 3)) as writer:
        writer.write(1, 3, {"rows/id": ["b", "c"]})
        assert writer.finish() == tmp_path / "shards" / "2-of-2" / "store.h5"
    other = Provenance.of({"data": {"fingerprint": "b"}})
    beside = {"rows/id": ["a", "b", "d"]}
    with (
        pytest.raises(
            InputError, match="1 of the 2 rows there differ, first row 2, whose id is 'c' there and 'd'"
        ),
        output.open("store", other, 3, part=(1, 3), beside=beside),
    ):
        pass
