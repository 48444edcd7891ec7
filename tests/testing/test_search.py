"""How a case is found and described."""

import itertools
import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from gradfn.testing import BrokenLawError, difference
from gradfn.testing.search import describe, refute, short


@dataclass(frozen=True)
class Number:
    value: int
    rows: list


def test_the_smallest_case_is_shown_with_its_rows():
    cases = st.builds(Number, st.integers(0, 1000), st.just([{"x": torch.ones(2)}]))
    with pytest.raises(BrokenLawError) as caught:
        refute("check_it", lambda case: "too large" if case.value > 41 else "", cases)
    assert str(caught.value) == "check_it: too large\n  value: 42\n  rows 0: {x: [1.0, 1.0]}"


def test_of_many_rows_the_first_are_shown():
    case = Number(3, [{"x": torch.ones(1)}] * 41)
    assert describe(case).splitlines()[-2:] == ["  rows 11: {x: [1.0]}", "  rows: 29 more"]


def test_what_is_not_a_function_is_said():
    calls = itertools.count()
    with pytest.raises(BrokenLawError, match="not a function of its inputs: seed what is random"):
        refute("check_it", lambda case: "" if next(calls) else "bad", st.just(0))


def test_an_error_keeps_its_cause():
    with pytest.raises(BrokenLawError, match="ZeroDivisionError") as caught:
        refute("check_it", lambda n: str(1 // n) * 0, st.integers(0, 5))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_value_without_a_text_of_its_own_is_its_class():
    assert short(object()) == "object()"


def test_modules_are_short():
    layer = nn.Linear(2, 2)
    net = nn.Sequential(layer, nn.Tanh(), layer)
    assert short(net) == "Sequential(Linear(2, 2), Tanh(), Linear(2, 2) again)"


@pytest.mark.parametrize(("got", "want", "message"), [
    ({"a": torch.zeros(2, 1)}, {"b": torch.zeros(2, 1)}, r"blocks \['a'\] instead of \['b'\]"),
    (torch.zeros(2), torch.zeros(3), r"shape \[2\] instead of \[3\]"),
    (torch.zeros(2), {"a": torch.zeros(2)}, "Tensor instead of dict"),
    (torch.tensor([0.0, torch.nan]), torch.zeros(2), "in row 1 .nan instead of 0."),
    (torch.zeros(()), torch.ones(()), "0 instead of 1"),
    (torch.zeros(0, 3), torch.zeros(0, 3), "^$"),
])  # fmt: skip
def test_differences(got, want, message):
    assert re.search(message, difference(got, want))
