import pytest

from gradfn.runs.processes import Processes, started
from gradfn.runs.shards import Shard


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, None), ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
     ({"RANK": "3", "WORLD_SIZE": "4"}, None),  # of a launcher that is not torchrun
     ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Processes(3, 4, 1))],
)  # fmt: skip
def test_torchrun_says_which_process_this_is(given, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert started() == expected


def test_a_process_does_the_part_of_its_rank():
    assert [Processes(rank, 3, 0).shard for rank in range(3)] == [Shard(n, 3) for n in (1, 2, 3)]
