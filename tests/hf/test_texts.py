import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers as tokenizers_library
from hf_rows import CLASSES
from transformers import PreTrainedTokenizerFast

from gradfn.data import make_documents
from gradfn.errors import InputError
from gradfn.hf import (
    check_vocabulary,
    row_names,
    text_pair,
    text_query,
    tokenize,
    tokenize_pairs,
    with_labels,
)
from gradfn.shown import SAID


def rows_of(*rows, **columns):
    return datasets.Dataset.from_list(list(rows)) if rows else datasets.Dataset.from_dict(columns)


TEXTS = ["The capital of France is Paris.", "", "Lima", "What is the\n\ncapital?  é 北京"]


def test_texts(tokenizer):
    docs = tokenize(rows_of(text=TEXTS), tokenizer)
    assert [row["input_ids"].tolist() for row in docs] == [tokenizer(text).input_ids for text in TEXTS]
    assert docs.labels.tolist() == docs.input_ids.tolist()
    assert docs.texts == TEXTS
    assert docs.ids == ["0", "1", "2", "3"]
    with pytest.raises(TypeError, match="text_colum"):
        tokenize(rows_of(text=TEXTS), tokenizer, text_colum="text")


def test_an_empty_text_is_a_row(tokenizers):
    docs = tokenize(rows_of(text=["", None, "x"]), tokenizers["nothing"])
    assert docs.lengths.tolist() == [0, 0, 1]
    assert docs.texts == ["", "", "x"]
    docs = tokenize(rows_of(text=["", None]), tokenizers["bos"])
    assert docs.lengths.tolist() == [1, 1]
    assert docs.supervised.tolist() == [0, 0]


def test_ids(tokenizers):
    docs = tokenize(rows_of(text=["a", "b", "c"], id=[7, None, 9]), tokenizers["nothing"])
    assert docs.ids == ["7", "1", "9"]


def test_more_rows_than_are_tokenised_at_once(tokenizers):
    texts = [f"Row {i}" for i in range(2345)]
    docs = tokenize(rows_of(text=texts), tokenizers["bos"])
    assert docs.ids == [str(i) for i in range(2345)]
    for i in (0, 999, 1000, 2344):
        assert docs[i]["input_ids"].tolist() == tokenizers["bos"](texts[i]).input_ids
    assert docs.texts == texts


def test_selected_and_formatted_rows(tokenizers):
    rows = rows_of(text=TEXTS, id=[0, 1, 2, 3]).select([2, 0]).with_format("torch")
    docs = tokenize(rows, tokenizers["nothing"])
    assert docs.texts == [TEXTS[2], TEXTS[0]]
    assert docs.ids == ["2", "0"]


def test_no_rows_are_no_documents(tokenizers):
    assert len(tokenize(rows_of(text=["a"]).select([]), tokenizers["bos"])) == 0


PAIRS = [
    ("The capital of France is", " Paris."),
    ("The capital of France is ", "Paris."),
    ("What is the capital of Peru?", "\nLima"),
    ("", "Lima"),
    ("The capital", ""),
    ("", ""),
    ("Par", "is"),
]


def special(tokenizer):
    """The special tokens in front of a text and behind it."""
    whole, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    front = whole.index(plain[0])
    return whole[:front], whole[front + len(plain) :]


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_prompt_tokens_and_completion_tokens_are_joined(tokenizer, prompt, completion):
    front, back = special(tokenizer)
    rows = rows_of(q=[prompt], a=[completion])
    docs = tokenize(rows, tokenizer, prompt_column="q", completion_column="a")
    head = front + tokenizer(prompt, add_special_tokens=False).input_ids
    tokens, labels = docs[0]["input_ids"].tolist(), docs[0]["labels"].tolist()
    assert tokens[: len(head)] == head
    assert labels[: len(head)] == [-100] * len(head)
    assert labels[len(head) :] == tokens[len(head) :]
    body = tokens[len(head) : len(tokens) - len(back)]
    assert tokens[len(tokens) - len(back) :] == back
    assert not set(body) & {0, 1, 2}
    both = prompt and completion
    assert docs.texts == [f"{prompt}{SAID}{completion.strip()}" if both else prompt + completion]
    if prompt:
        assert tokenizer.decode(tokens[len(front) : len(tokens) - len(back)]) == prompt + completion


@pytest.mark.parametrize("kind", ["nothing", "bos", "bos+eos"])
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_completion_tokens_are_those_of_the_completion_alone(tokenizers, kind, prompt, completion):
    tokenizer = tokenizers[kind]
    front, back = special(tokenizer)
    docs = tokenize(rows_of(q=[prompt], a=[completion]), tokenizer, prompt_column="q", completion_column="a")
    parts = [tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, completion)]
    assert docs[0]["input_ids"].tolist() == front + parts[0] + parts[1] + back


def test_a_tokenizer_that_adds_a_space_adds_none_inside(tokenizers):
    tokenizer = tokenizers["metaspace"]
    rows = rows_of(q=["The capital of France is", "Par"], a=[" Paris.", "is"])
    docs = tokenize(rows, tokenizer, prompt_column="q", completion_column="a")
    assert docs[0]["input_ids"].tolist() == tokenizer("The capital of France is Paris.").input_ids
    assert tokenizer.decode(docs[1]["input_ids"][1:]) == "Paris"


def test_only_completions_are_supervised(tokenizers):
    rows = rows_of(q=["Lima", ""], a=[" Lima", "Lima"])
    docs = tokenize(rows, tokenizers["nothing"], prompt_column="q", completion_column="a")
    tokens = len(tokenizers["nothing"](" Lima").input_ids)
    assert docs.supervised[0] == tokens
    assert docs.supervised[1] == docs.lengths[1] - 1


@pytest.mark.parametrize("columns", [{"prompt_column": "q"}, {"completion_column": "q"}])
def test_a_lone_prompt_or_completion_column(tokenizers, columns):
    with pytest.raises(InputError, match="go together, got only 'q': name both"):
        tokenize(rows_of(q=["a"]), tokenizers["bos"], **columns)


@pytest.mark.parametrize(
    "columns",
    [{"text_column": "body"}, {"prompt_column": "q", "completion_column": "body"}],
    ids=["text", "pair"],
)
def test_a_missing_column(tokenizers, columns):
    with pytest.raises(
        InputError, match=r"no column 'body' in the dataset, which has q, n: give another text_column"
    ):
        tokenize(rows_of(q=["a"], n=[1]), tokenizers["bos"], **columns)


@pytest.mark.parametrize(("column", "kind"), [("n", "int64"), ("many", "List"), ("nested", "dict")])
def test_a_column_that_is_no_text(tokenizers, column, kind):
    rows = rows_of({"n": 1, "many": ["a"], "nested": {"x": "a"}})
    with pytest.raises(InputError, match=f"column '{column}' holds {kind}, not text"):
        tokenize(rows, tokenizers["bos"], text_column=column)


def test_large_strings_are_text(tokenizers):
    rows = datasets.Dataset(pa.table({"text": pa.array(["a"], pa.large_string())}))
    assert len(tokenize(rows, tokenizers["nothing"])) == 1


def test_what_is_no_dataset(tokenizer):
    rows = [{"text": "a b"}]
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    pairs = {"prompt_column": "text", "completion_column": "text"}
    for what, name in ((rows, "list"), (splits, "DatasetDict"), (stream, "IterableDataset")):
        for call in (tokenize, lambda rows, _: row_names(rows),
                     lambda rows, tokenizer: tokenize_pairs(rows, tokenizer, **pairs)):  # fmt: skip
            with pytest.raises(InputError, match=f"this is a {name}: give what gf.load_rows returns"):
                call(what, tokenizer)


def test_text_needs_a_tokenizer():
    with pytest.raises(InputError, match="rows of text need a tokenizer"):
        tokenize(rows_of(text=["a"]), None)


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed"])
@pytest.mark.parametrize("width", [pa.int64(), pa.int32(), pa.uint16()])
def test_token_ids_are_used_as_they_are(kind, width):
    lists = {"list": pa.list_(width), "large_list": pa.large_list(width), "fixed": pa.list_(width, 2)}[kind]
    table = pa.table({"input_ids": pa.array([[5, 6], [7, 8], [9, 5]], lists), "id": ["a", "b", "c"]})
    docs = tokenize(datasets.Dataset(table), None)
    assert [row["input_ids"].tolist() for row in docs] == [[5, 6], [7, 8], [9, 5]]
    assert docs.labels.tolist() == docs.input_ids.tolist()
    assert docs.ids == ["a", "b", "c"]
    assert docs.texts == ["5 6", "7 8", "9 5"]


def test_labels_of_token_ids():
    rows = rows_of(input_ids=[[5, 6, 7], [], [8]], labels=[[-100, 6, -100], [], [8]])
    docs = tokenize(rows, None)
    assert [row["labels"].tolist() for row in docs] == [[-100, 6, -100], [], [8]]
    assert docs.supervised.tolist() == [1, 0, 0]
    assert docs.texts == ["5 6 7", "", "8"]


@pytest.mark.parametrize(
    ("said", "asked", "start"),
    [({*range(80, 100)}, range(16, 80), 80), ({2, 98, 99}, range(34, 98), 98), ({*range(1, 100)}, (), 0)],
)
def test_of_token_ids_is_shown_where_the_last_part_begins_that_is_supervised(said, asked, start):
    labels = [token if token in said else -100 for token in range(100)]
    (shown,) = tokenize(rows_of(input_ids=[list(range(100))], labels=[labels]), None).texts
    answer = " ".join(map(str, range(start, 100)))
    assert shown == (f"{' '.join(map(str, asked))}{SAID}{answer}" if asked else answer)


def test_token_ids_of_selected_rows():
    docs = tokenize(rows_of(input_ids=[[i] * i for i in range(5)]).select([4, 1, 3]), None)
    assert [row["input_ids"].tolist() for row in docs] == [[4] * 4, [1], [3] * 3]


def test_padding_of_token_ids_is_taken_away():
    rows = rows_of(
        input_ids=[[5, 6, 0, 0], [0, 0, 0, 0], [0, 7, 8, 9]],
        labels=[[5, 6, -100, -100], [-100] * 4, [-100, 7, 8, 9]],
        attention_mask=[[1, 1, 0, 0], [0] * 4, [0, 1, 1, 1]],
    )
    docs = tokenize(rows, None)
    assert [row["input_ids"].tolist() for row in docs] == [[5, 6], [], [7, 8, 9]]
    assert [row["labels"].tolist() for row in docs] == [[5, 6], [], [7, 8, 9]]
    assert tokenize(rows.remove_columns("labels"), None).fingerprint() == docs.fingerprint()


def test_token_ids_come_before_text_but_not_before_named_columns(tokenizers):
    tokenizer = tokenizers["nothing"]
    rows = rows_of(text=["Lima"], input_ids=[[5, 6, 7]])
    docs = tokenize(rows, tokenizer)
    assert docs[0]["input_ids"].tolist() == [5, 6, 7]
    assert docs.texts == ["Lima"]
    docs = tokenize(rows, tokenizer, prompt_column="text", completion_column="text")
    assert docs.texts == [f"Lima{SAID}Lima"]


def test_token_ids_are_decoded_for_show(tokenizers):
    ids = tokenizers["nothing"]("The capital").input_ids
    docs = tokenize(rows_of(input_ids=[ids, ids * 500]), tokenizers["nothing"])
    assert docs.texts[0] == "The capital"
    assert docs.texts[1].startswith("The capitalThe capital")
    assert len(docs.texts[1]) < 2000


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": ["text"]}, "'input_ids' holds string, expected a list of integers a row"),
        ({"input_ids": [5]}, "'input_ids' holds int"),
        ({"input_ids": [[0.5]]}, "'input_ids' holds list<"),
        ({"input_ids": [["5"]]}, "'input_ids' holds list<"),
        ({"input_ids": [[[5]]]}, "'input_ids' holds list<"),
        ({"input_ids": [[5, None]]}, "'input_ids' has gaps"),
        ({"input_ids": [[5, -1]]}, "'input_ids' holds -1, expected 0 or more"),
        ({"input_ids": [[2**31]]}, "'input_ids' holds 2147483648"),
        ({"input_ids": [[5]], "labels": [[-101]]}, "'labels' holds -101, expected -100 or more"),
        ({"input_ids": [[5, 6]], "labels": [[5]]}, "row 0 has 2 tokens but 1 labels"),
        ({"input_ids": [[5], [6]], "labels": [[5], None]}, "row 1 has 1 tokens but 0 labels"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, "row 0 has 2 tokens but 1 mask values"),
        ({"input_ids": [[5, 6]], "token_type_ids": [[1]]}, "row 0 has 2 tokens but 1 token types"),
    ],
)
def test_token_ids_that_are_none(columns, message):
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        tokenize(rows_of(**columns), None)


def test_types_of_tokens_come_with_them():
    rows = rows_of(
        input_ids=[[1, 5, 6, 0], [1, 7]] * 600, token_type_ids=[[0, 0, 1, 0], [0, 1]] * 600,
        attention_mask=[[1, 1, 1, 0], [1, 1]] * 600,
    )  # fmt: skip
    docs = tokenize(rows, None)
    assert [docs[row]["token_type_ids"].tolist() for row in (0, 1199)] == [[0, 0, 1], [0, 1]]
    cut = tokenize(rows, None, max_length=2, truncation=True)
    assert [cut[row]["token_type_ids"].tolist() for row in (0, 1)] == [[0, 0], [0, 1]]
    late = rows_of(input_ids=[[1, 5]] * 1001, token_type_ids=[[0, 0]] * 1000 + [[0, 1]])
    assert [tokenize(late, None)[row]["token_type_ids"].tolist() for row in (0, 1000)] == [[0, 0], [0, 1]]
    none = rows_of(input_ids=[[1, 5]], token_type_ids=[[0, 0]])
    bare = rows_of(input_ids=[[1, 5]])
    assert "token_type_ids" not in tokenize(none, None)[0]
    assert tokenize(none, None).fingerprint() == tokenize(bare, None).fingerprint()


def test_labels_of_rows_are_not_those_of_tokens():
    rows = rows_of(input_ids=[[5, 6], [7]], labels=[1, 0])
    docs = tokenize(rows, None)
    assert docs.labels.tolist() == docs.input_ids.tolist() == [5, 6, 7]
    assert with_labels(docs, rows, "labels", CLASSES).extras["labels"].tolist() == [1, 0]
    assert with_labels(docs, rows, "labels", None).extras["labels"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("labels", "said"), [(None, "token 9"), ([[5, -100], [7, 9], [1]], "label 9")])
def test_tokens_that_a_model_does_not_have(labels, said):
    ids = [[5, 6], [7, 9 if labels is None else 8], [1]]
    docs = make_documents(ids, labels, ids=["a", "b", "c"])
    check_vocabulary(docs, 10)
    words = (
        rf"row 1 \(id 'b'\) has {said}, but the model has 9 tokens, numbered from 0: tokenise the rows with"
    )
    with pytest.raises(InputError, match=words):
        check_vocabulary(docs, 9)


def test_a_null_row_of_token_ids_is_empty():
    assert tokenize(rows_of(input_ids=[[5], None]), None).lengths.tolist() == [1, 0]


def test_a_long_row_is_refused(tokenizers):
    rows = rows_of(text=["x"] * 1001 + ["x x x x"], id=[f"r{i}" for i in range(1002)])
    with pytest.raises(
        InputError, match=r"row 1001 \(id 'r1001'\) has 7 tokens, .* limit of 4: .* truncation=True"
    ):
        tokenize(rows, tokenizers["nothing"], max_length=4)
    assert tokenize(rows, tokenizers["nothing"], max_length=7).lengths.max() == 7


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_truncation_cuts_tokens_and_labels(tokenizer, limit):
    pairs = rows_of(q=[prompt for prompt, _ in PAIRS], a=[completion for _, completion in PAIRS])
    columns = {"prompt_column": "q", "completion_column": "a"}
    whole = tokenize(pairs, tokenizer, **columns)
    cut = tokenize(pairs, tokenizer, **columns, max_length=limit, truncation=True)
    for before, after in zip(whole, cut, strict=True):
        assert after["input_ids"].tolist() == before["input_ids"][:limit].tolist()
        assert after["labels"].tolist() == before["labels"][:limit].tolist()
    assert cut.texts == whole.texts


def test_truncation_cuts_token_ids():
    rows = rows_of(input_ids=[[5, 6, 7], [], [8]], labels=[[-100, 6, 7], [], [8]])
    docs = tokenize(rows, None, max_length=2, truncation=True)
    assert [row["input_ids"].tolist() for row in docs] == [[5, 6], [], [8]]
    assert [row["labels"].tolist() for row in docs] == [[-100, 6], [], [8]]


def test_a_limit_without_room(tokenizers):
    with pytest.raises(InputError, match="at least 1 token, got 0"):
        tokenize(rows_of(text=["a"]), tokenizers["bos"], max_length=0)


def test_long_texts_are_tokenised_in_silence(tokenizers, capfd, caplog):
    tokenizer = tokenizers["bos"]
    before, tokenizer.model_max_length = tokenizer.model_max_length, 4
    tokenize(rows_of(text=["x " * 50]), tokenizer)
    tokenizer.model_max_length = before
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_text_query_is_a_row_of_text(tokenizer):
    query = text_query(tokenizer, "The capital of Peru")
    assert query.fingerprint() == tokenize(rows_of(text=["The capital of Peru"]), tokenizer).fingerprint()
    assert (len(query), query.ids, query.texts) == (1, ["0"], ["The capital of Peru"])


def test_a_query_with_completion_is_a_pair(tokenizer):
    query = text_query(tokenizer, "The capital of Peru is", " Lima")
    rows = rows_of(q=["The capital of Peru is"], a=[" Lima"])
    expected = tokenize(rows, tokenizer, prompt_column="q", completion_column="a")
    assert query.fingerprint() == expected.fingerprint()
    assert query.texts == expected.texts


@pytest.mark.parametrize("query", [("",), (" \n",), ("a prompt", ""), ("a prompt", "  ")])
def test_an_empty_query(tokenizer, query):
    with pytest.raises(InputError, match="the query is empty: give a text, in quotes"):
        text_query(tokenizer, *query)


def test_a_query_with_nothing_to_predict(tokenizers):
    with pytest.raises(InputError, match="the query 'x' leaves nothing to predict"):
        text_query(tokenizers["nothing"], "x")
    assert text_query(tokenizers["bos"], "x").supervised.tolist() == [1]
    with pytest.raises(InputError, match="nothing to predict"):
        text_query(tokenizers["bos"], "The capital of Peru is", " Lima", max_length=2, truncation=True)


def test_a_long_query(tokenizers):
    with pytest.raises(InputError, match=r"has 7 tokens, more than the limit of 4"):
        text_query(tokenizers["nothing"], "x x x x", max_length=4)
    assert text_query(tokenizers["nothing"], "x x x x", max_length=4, truncation=True).lengths.tolist() == [4]


def test_types(tokenizers):
    docs = tokenize(rows_of(text=TEXTS), tokenizers["bos"])
    assert (docs.input_ids.dtype, docs.labels.dtype, docs.offsets.dtype) == (np.int32, np.int32, np.int64)


def test_the_end_goes_behind_the_completion_whatever_the_alphabet():
    known = {"<s>": 0, "</s>": 1, "A": 2, "C": 3, "G": 4, "T": 5}
    backend = tokenizers_library.Tokenizer(tokenizers_library.models.BPE(vocab=known, merges=[]))
    backend.post_processor = tokenizers_library.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    rows = rows_of(p=["ACG", ""], c=["TT", "A"])
    docs = tokenize(rows, tokenizer, prompt_column="p", completion_column="c")
    assert [row["input_ids"].tolist() for row in docs] == [[0, 2, 3, 4, 5, 5, 1], [0, 2, 1]]
    assert docs.supervised.tolist() == [3, 2]


def test_pairs_have_special_tokens_on_both_sides(tokenizers):
    rows = datasets.Dataset.from_dict({"id": ["x", "y"], "prompt": ["a b", "c"], "completion": ["d", "e f"]})
    tokenizer = tokenizers["bos+eos"]
    pairs = tokenize_pairs(rows, tokenizer, prompt_column="prompt", completion_column="completion")
    for row in range(2):
        assert pairs[row]["input_ids"].tolist() == tokenizer(rows[row]["prompt"])["input_ids"]
        assert pairs[row]["labels"].tolist() == tokenizer(rows[row]["completion"])["input_ids"]
    assert (pairs.ids, pairs.texts) == (["x", "y"], [f"a b{SAID}d", f"c{SAID}e f"])
    one = text_pair(tokenizer, "c", "e f")
    assert one[0]["labels"].tolist() == pairs[1]["labels"].tolist()
    with pytest.raises(InputError, match=r"row 0 .* more than the limit of 2: cut such rows"):
        tokenize_pairs(rows, tokenizer, prompt_column="prompt", completion_column="completion", max_length=2)
