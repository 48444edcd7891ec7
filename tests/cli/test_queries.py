"""What --query names: a dataset, which must be there, or a text."""

import pytest

from gradfn.cli.options import QueryOptions
from gradfn.cli.queries import is_dataset, query_rows_of
from gradfn.errors import InputError

PATHS = ["missing.jsonl", "missing.jsonl.gz", "a b.tsv", "x.zst", "x.bz2", "X.NDJSON", "x.xlsx", "dir/rows",
         "./rows", "/abs/rows", "~nouser/rows", "owner/name", "owner/name:config"]  # fmt: skip
TEXTS = ["The capital of France is", "What is 2/3 of 9?", "C/C=C/C", "Hello.", "12 7 30", "Zip it as a .zip",
         "/no_think Who are you?", "U.S.", "3.14"]  # fmt: skip


@pytest.mark.parametrize("query", PATHS)
def test_what_looks_like_a_path_is_no_text(query):
    assert is_dataset(query)
    with pytest.raises(InputError, match=r"no dataset|cannot be looked for|cannot be read from the hub"):
        query_rows_of(QueryOptions(query=query))


@pytest.mark.parametrize("query", TEXTS)
def test_texts(query):
    assert query_rows_of(QueryOptions(query=query)) is None
