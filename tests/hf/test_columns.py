import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hf_rows import CLASSES

from gradfn.errors import InputError
from gradfn.hf import (
    tokenize,
    tokenize_pairs,
    with_labels,
    with_weights,
)
from gradfn.shown import SAID


def labelled(column, **columns):
    rows = datasets.Dataset.from_dict({"text": ["a b", "c d", "e"], column: [0, 0, 0], **columns})
    return rows


@pytest.mark.parametrize("values", [[1, 0, 1], ["good", "bad", "good"], [True, False, True]])
def test_labels_are_class_numbers_or_names(tokenizers, values):
    rows = labelled("label", label=values)
    docs = with_labels(tokenize(rows, tokenizers["bos"]), rows, "label", CLASSES)
    assert docs.extras["labels"].tolist() == [1, 0, 1]
    assert docs.extras["labels"].dtype == np.int64
    assert docs[0]["attention_mask"].tolist() == [1] * docs.lengths[0]


@pytest.mark.parametrize("value", ["fine", 2, -1, None, 0.5])
def test_labels_that_are_no_class(tokenizers, value):
    rows = labelled("label", label=pa.array([value] * 3).to_pylist())
    docs = tokenize(rows, tokenizers["bos"])
    words = rf"row 0 has the label {value!r}, expected a number from 0 to 1 or one of bad, good: correct it"
    with pytest.raises(InputError, match=words):
        with_labels(docs, rows, "label", CLASSES)


def test_names_of_classes_come_before_their_numbers(tokenizers):
    rows = labelled("label", label=[1, 0, 1]).cast_column("label", datasets.ClassLabel(names=["good", "bad"]))
    docs = tokenize(rows, tokenizers["bos"])
    named = with_labels(docs, rows, "label", CLASSES)
    assert named.extras["labels"].tolist() == [0, 1, 0]
    assert named.texts == [f"a b{SAID}bad", f"c d{SAID}good", f"e{SAID}bad"]
    unnamed = with_labels(docs, rows, "label", {"LABEL_0": 0, "LABEL_1": 1})
    assert unnamed.extras["labels"].tolist() == [1, 0, 1]
    assert unnamed.texts == named.texts
    words = "row 0 has the label 'bad', expected a number from 0 to 1 or one of poor, good"
    with pytest.raises(InputError, match=words):
        with_labels(docs, rows, "label", {"poor": 0, "good": 1})


def test_labels_of_a_regression_are_numbers(tokenizers):
    rows = labelled("y", y=[0.5, -1.0, 2.0])
    docs = with_labels(tokenize(rows, tokenizers["bos"]), rows, "y", None)
    assert docs.extras["labels"].tolist() == [0.5, -1.0, 2.0]
    assert docs.texts == [f"a b{SAID}0.5", f"c d{SAID}-1", f"e{SAID}2"]
    for values, shown in (([1.0, None, 2.0], "None"), ([1.0, float("nan"), 2.0], "nan"), (["x"] * 3, "'x'")):
        rows = labelled("y", y=values)
        with pytest.raises(InputError, match=rf"row \d has {shown} in column 'y', expected a number"):
            with_labels(tokenize(rows, tokenizers["bos"]), rows, "y", None)
    with pytest.raises(InputError, match=r"no column 'z' in the dataset, .*: give another label_column"):
        with_labels(tokenize(rows, tokenizers["bos"]), rows, "z", None)


def test_a_row_to_classify_has_tokens(tokenizers):
    rows = datasets.Dataset.from_dict({"text": ["a", ""], "label": [0, 1]})
    with pytest.raises(InputError, match=r"row 1 \(id '1'\) has no tokens: leave it out"):
        with_labels(tokenize(rows, tokenizers["nothing"]), rows, "label", CLASSES)


def test_rewards_are_compared_within_a_prompt(tokenizers):
    rows = datasets.Dataset.from_dict(
        {
            "text": list("abcd"),
            "prompt": ["p", "q", "p", "p"],
            "reward": [1, 5, 2, 6],
            "advantage": [1, 2, 3, 4],
            "huge": [1e13, 0.0, 0.0, 0.0],
        }
    )
    docs = tokenize(rows, tokenizers["bos"])
    of_rewards = with_weights(docs, rows, reward_column="reward", prompt_column="prompt")
    assert of_rewards.extras["weight"].tolist() == [-2.0, 0.0, -1.0, 3.0]
    given = with_weights(docs, rows, advantage_column="advantage")
    assert given[3]["weight"].item() == 4.0
    pairs = tokenize_pairs(rows, tokenizers["bos"], prompt_column="prompt", completion_column="text")
    assert with_weights(pairs, rows, advantage_column="advantage")[3]["weight"].item() == 4.0
    for columns, words in (
        (
            {"reward_column": "reward"},
            "a reward is compared with other rewards of its prompt, but these rows have no prompts: give",
        ),
        (
            {"reward_column": "text", "prompt_column": "prompt"},
            "row 0 has 'a' in column 'text', expected a num",
        ),
        ({"advantage_column": "none"}, "no column 'none' in the dataset"),
        (
            {"reward_column": "reward", "advantage_column": "advantage"},
            "give either advantage_column or reward_column",
        ),
        ({}, "give either advantage_column or reward_column"),
        (
            {"advantage_column": "huge"},
            "row 0 has the weight 1e.13, and gradients in float32 hold 1e.12 at most",
        ),
        (
            {"reward_column": "huge", "prompt_column": "prompt"},
            r"row 0 has the weight .*scale the column down",
        ),
    ):
        with pytest.raises(InputError, match=words):
            with_weights(docs, rows, **columns)
