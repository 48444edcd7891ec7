"""What is shown of rows: letters of several tokens, and shares that are read once."""

import json
from collections import Counter

import numpy as np
import pytest

from gradfn.report.rows import TokenRows
from gradfn.store import Store


class Bytes:
    """A tokenizer of which each byte is a token."""

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


def cells(text, row):
    tokens = np.frombuffer(text.encode(), np.uint8)
    rows = TokenRows(["d"], np.array([0, len(tokens)]), lambda start, stop: tokens[start:stop], Bytes())
    found = rows.cells(row)
    return found["text"].replace("…", ""), found["token"]


def test_a_letter_of_several_tokens_is_shown_at_the_one_that_completes_it():
    assert cells("aéb", 2) == ("a»é«b", "é")
    assert cells("a😀b", 4) == ("a»😀«b", "😀")
    assert cells("aéb", 3) == ("aé»b«", "b")


@pytest.mark.parametrize("row", [1, 2, 3])
def test_a_part_of_a_letter_is_shown_as_such(row):
    assert cells("a😀b", row) == ("a»\ufffd«😀b", "\ufffd")


def test_a_replacement_that_is_in_the_data_stays():
    assert cells("a\ufffdb", 4) == ("a\ufffd»b«", "b")
    assert cells("a\ufffdb", 3) == ("a»\ufffd«b", "\ufffd")


@pytest.mark.parametrize("by", ["module", "head"])
def test_a_row_is_read_once_for_all_blocks_and_queries(ok, model, corpus, queries, tmp_path, monkeypatch, by):
    opened, read = [], Counter()
    stored, verify = Store._stored, Store.verify

    def counted(self, names, start, stop):
        if any(name.startswith(("scores_by/", "gradients/")) for name in names) and stop - start == 1:
            read[start] += 1
        return stored(self, names, start, stop)

    monkeypatch.setattr(Store, "_stored", counted)
    monkeypatch.setattr(Store, "verify", lambda self: (opened.append(self.path), verify(self)))
    base, built = ("--model", model, "--dataset", corpus), ("--by", "head") if by == "head" else ()
    table = ("--query", queries, "--by", by, "--top", 12, "--jsonl", tmp_path / "t.jsonl")
    ok("build", tmp_path / "store", *base, *built)
    for command in (("score", tmp_path / "run", *base), ("query", tmp_path / "store")):
        opened.clear()
        read.clear()
        ok(*command, *table, "--overwrite")
        lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
        assert read == dict.fromkeys({line["row"] for line in lines}, 1)
        assert len({(line["query"], line["row"]) for line in lines}) > 2 * len(read)
        assert len(opened) <= 4
