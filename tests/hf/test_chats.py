import copy

import datasets
from hf_rows import said, write

from gradfn.data import make_documents
from gradfn.hf import (
    load_rows,
    tokenize,
    with_weights,
)


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
        assert docs.texts == [tokenizer.apply_chat_template(chat, tokenize=False) for chat in rows]
        given = with_weights(docs, load_rows(path), reward_column="reward", messages_column="messages")
        assert given.extras["weight"].tolist() == [0.0] * len(rows)
