"""Rows with classes, scored against themselves."""

import json

import torch
from tiny import DOCUMENTS, make_tokenizer, save, write_jsonl
from transformers import BertConfig, BertForSequenceClassification

import gradfn as gf

NAMES = {"far": 0, "near": 1, "nowhere": 2}


def test_rows_against_themselves_show_their_class_and_the_models_own(ok, folder, tmp_path):
    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = BertConfig(
        **sizes, num_attention_heads=2, num_labels=3, label2id=NAMES, initializer_range=0.5,
        id2label={number: name for name, number in NAMES.items()},
    )  # fmt: skip
    path = save(folder / "own-classes", BertForSequenceClassification(config).eval(), make_tokenizer())
    rows = [{"text": d["text"], "kind": list(NAMES)[i % 3]} for i, d in enumerate(DOCUMENTS)]
    labelled = write_jsonl(tmp_path / "labelled.jsonl", rows)
    base = ("--model", path, "--dataset", labelled, "--task", "classification", "--label-column", "kind")
    out = ok("score", *base, "--self", "--top", 12, "--jsonl", tmp_path / "t.jsonl")
    net, names = gf.load_model(path, "classification"), list(NAMES)
    documents = gf.tokenize(gf.load_rows(labelled), gf.load_tokenizer(path))
    table = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert len(table) == 12
    others = 0
    for line in table:
        said = names[int(net(input_ids=documents[line["row"]]["input_ids"][None]).logits.argmax())]
        assert (line["label"], line["predicted"]) == (names[line["row"] % 3], said)
        others += said != line["label"]
        assert said == line["label"] or f"[the model: {said}] " in out
    assert 0 < others < 12
    ok("score", *base, "--query", labelled, "--top", 2, "--jsonl", tmp_path / "q.jsonl")
    assert "label" not in json.loads((tmp_path / "q.jsonl").read_text().splitlines()[0])
