import copy
import json

import datasets
import pyarrow.parquet
import pytest
from hf_rows import said, write

from gradfn.data import make_documents
from gradfn.errors import InputError
from gradfn.hf import (
    load_rows,
    tokenize,
    with_weights,
)
from gradfn.report.tables import excerpt
from gradfn.shown import SAID


def test_rewards_of_chats_are_compared_within_what_was_asked(tokenizers):
    longer = [*said("p", "x"), *said("q", "y")]
    chats = [said("p", "x"), said("q", "x"), said("p", "y"), longer, [*said("p", "z"), longer[0]]]
    rows = datasets.Dataset.from_dict({"messages": chats, "reward": [1.0, 5.0, 2.0, 7.0, 6.0]})
    docs = make_documents([[1]] * 5)
    weights = with_weights(docs, rows, reward_column="reward", messages_column="messages").extras["weight"]
    assert weights.tolist() == [-2.0, 0.0, -1.0, 0.0, 3.0]


def test_chats_whose_messages_differ_in_keys(tmp_path, tokenizers):
    tokenizer = copy.deepcopy(tokenizers["bos"])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}{% if m.name is defined %} {{ m.name }}{% endif %}]"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chats = [said("p", "x"), [{"role": "user", "content": "1879-03-14", "name": "Bob"}, said("", "y")[1]]]
    for rows in (chats, chats[1:], [said("1879-03-14", "1879-03-14")] * 2):
        path = write("jsonl", tmp_path, [{"messages": chat, "reward": 1} for chat in rows])
        docs = tokenize(load_rows(path), tokenizer, messages_column="messages")
        asked, answers = ([chat[number]["content"] for chat in rows] for number in (0, 1))
        assert docs.texts == [f"user: {p}{SAID}{x}" for p, x in zip(asked, answers, strict=True)]
        for number, chat in enumerate(rows):
            own = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
            assert docs[number]["input_ids"].tolist() == own
        given = with_weights(docs, load_rows(path), reward_column="reward", messages_column="messages")
        assert given.extras["weight"].tolist() == [0.0] * len(rows)


def test_a_chat_is_shown_as_it_is_read_with_its_last_answer_behind_an_arrow(tmp_path, tokenizers):
    tokenizer = copy.deepcopy(tokenizers["bos"])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
    )
    parts, calls = [{"type": "text", "text": "And Peru?"}], [{"function": {"name": "look_up"}}]
    chat = [
        {"role": "system", "content": "Be brief."},
        *said("Kenya?", "Nairobi"),
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "user", "content": "Thanks"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": part}) + "\n" for part in (chat, chat[:3])))
    docs = tokenize(load_rows(path), tokenizer, messages_column="messages")
    first = "system: Be brief.\nuser: Kenya?"
    assert docs.texts == [
        f"{first}\nassistant: Nairobi\nuser: And Peru?{SAID}{json.dumps(calls)}", f"{first}{SAID}Nairobi"
    ]  # fmt: skip
    assert excerpt(docs.texts[1], 26).endswith(" user: Kenya? → Nairobi")


def test_keys_that_a_table_fills_with_null_change_no_tokens(tmp_path, tokenizers):
    tokenizer = copy.deepcopy(tokenizers["bos"])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}{% if m.name is defined %} {{ m.name }}{% endif %}"
        "{% for c in m.tools or [] %}{% for k, v in c.items() %} {{ k }}={{ v }}{% endfor %}{% endfor %}]"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    named = {"role": "user", "content": "p", "name": "Bob", "tools": [{"a": 1}, {"b": 2}]}
    chats = [said("p", "x"), [named, said("", "y")[1]]]
    prints = set()
    for kind in ("jsonl", "parquet"):
        path = tmp_path / f"rows.{kind}"
        if kind == "jsonl":
            write(kind, tmp_path, [{"messages": chat} for chat in chats])
        else:
            table = pyarrow.table({"messages": chats})
            assert table["messages"].to_pylist()[0][0]["name"] is None
            pyarrow.parquet.write_table(table, path)
        docs = tokenize(load_rows(path), tokenizer, messages_column="messages")
        for number, chat in enumerate(chats):
            own = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
            assert docs[number]["input_ids"].tolist() == own
        prints.add(docs.fingerprint())
    assert len(prints) == 1


def test_prompts_and_completions_of_messages(tmp_path, tokenizers):
    tokenizer = copy.deepcopy(tokenizers["bos"])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chats = [said("p", "x"), said("what is it?", "a long answer")]
    rows = [{"prompt": chat[:-1], "completion": chat[-1:], "reward": 1.0} for chat in chats]
    rows[1]["prompt"][0]["name"] = "Bob"
    path = write("jsonl", tmp_path, rows)
    columns = {"prompt_column": "prompt", "completion_column": "completion"}
    docs = tokenize(load_rows(path), tokenizer, **columns)
    whole = write("jsonl", tmp_path, [{"messages": chat} for chat in chats])
    want = tokenize(load_rows(whole), tokenizer, messages_column="messages")
    assert docs.fingerprint() == want.fingerprint()
    assert docs.texts == want.texts == [f"user: p{SAID}x", f"user: what is it?{SAID}a long answer"]
    path = write("jsonl", tmp_path, rows)
    weights = with_weights(docs, load_rows(path), reward_column="reward", prompt_column="prompt")
    assert weights.extras["weight"].tolist() == [0.0, 0.0]
    bare = copy.deepcopy(tokenizers["bos"])
    with pytest.raises(InputError, match="chats need a tokenizer with a chat template"):
        tokenize(load_rows(path), bare, **columns)
