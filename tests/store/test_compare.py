"""Which leaves of settings differ."""

import pytest
from stored import ROWS, one_sentence, write

from gradfn.errors import InputError
from gradfn.store import MISSING, differing, open_writer


def test_differing_names_leaves_by_dotted_key():
    a = {"x": {"y": [1, {"z": 2}], "same": None}, "nan": float("nan"), "only_a": {}}
    b = {"x": {"y": [1, {"z": 3}, 4], "same": None}, "nan": float("nan"), "only_b": None}
    assert differing(a, b) == {
        "x.y.1.z": (2, 3),
        "x.y.2": (MISSING, 4),
        "only_a": ({}, MISSING),
        "only_b": (MISSING, None),
    }
    assert differing(a, a) == {}


def test_long_settings_keep_the_message_short(tmp_path):
    write(tmp_path, settings={str(i): "a" * 10_000 for i in range(50)})
    with (
        pytest.raises(InputError) as error,
        open_writer(tmp_path, "store", {str(i): "b" for i in range(50)}, ROWS),
    ):
        pass
    assert len(one_sentence(error, "and 42 more settings differ")) < 2000
