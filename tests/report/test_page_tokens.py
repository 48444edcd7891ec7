"""Texts whose tokens are queries."""

import pytest
import torch

from gradfn.report.page_tokens import token_groups, token_pieces, whole_of
from gradfn.shown import SAID


def test_pieces_join_to_the_text_and_each_token_has_its_own():
    words = ["<s>", "The", " end", " of", " it", "!"]
    texts = ["".join(words[:n]) + SAID + words[n] for n in (2, 3, 5)]
    assert token_pieces(texts) == [("<s>The", None), (" end", 0), (" of", 1), (" it", None), ("!", 2)]
    assert token_pieces([" one", " one" + SAID + " two"]) == [(" one", 0), (" two", 1)]


def test_tokens_that_end_inside_a_letter_leave_the_text_whole():
    texts = ["K\ufffd" + SAID + "\ufffd", "K\u00fc" + SAID + "rbis"]
    pieces = token_pieces(texts)
    assert "".join(text for text, _ in pieces) == "K\u00fcrbis"
    assert pieces[-1] == ("rbis", 1)


def test_a_text_is_shaded_by_the_row_with_the_highest_sum():
    values = torch.tensor([[1.0, -0.4], [-2.0, 2.5], [0.0, 0.3]]).numpy()
    texts = ["a" + SAID + "b", "ab" + SAID + "c", "abc" + SAID + "\x1b"]
    whole = whole_of(texts, range(5, 7), values, ["x", "y", "z"])
    assert whole.row == "x"
    assert whole.pieces == [("a", None, ""), ("b", 5, "p4"), ("c", 6, "n2"), ("\u241b", None, "")]


@pytest.mark.parametrize(("of", "groups"), [([], []), ([3, 3, 1], [range(2), range(2, 3)])])
def test_queries_of_one_text_stand_together(of, groups):
    assert token_groups(of) == groups
