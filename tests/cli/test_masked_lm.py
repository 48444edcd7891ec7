"""Masked language models on the command line: which tokens are masked, and the numbers of a plain loop."""

import json
import re

import h5py
import numpy as np
import pytest
import torch
import transformers as hf
from tiny import CAPITALS, DOCUMENTS, make_tokenizer, save, write_jsonl

import gradfn as gf
from gradfn.hf import load_rows, tokenize
from gradfn.hf.masking import mask_tokens
from gradfn.random import choice
from gradfn.testing.models import randomize

TASK = ("--task", "masked-lm")
FULL = ("--precision", "fp64", "--projection-dim", 0)
MASK = 300


@pytest.fixture(scope="module")
def bert(folder):
    """A tiny BERT whose tokenizer has a mask token."""
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=MASK + 1, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    assert tokenizer.mask_token_id == MASK
    return save(folder / "bert", randomize(hf.BertForMaskedLM(config), 0, scale=0.3).float(), tokenizer)


@pytest.fixture(scope="module")
def texts(folder):
    rows = [{"id": row["id"], "text": row["text"]} for row in DOCUMENTS]
    return write_jsonl(folder / "texts.jsonl", rows)


@pytest.fixture(scope="module")
def answers(folder):
    """Two queries with an answer, and one without."""
    rows = [{"id": f"q-{c}", "prompt": f"The capital of {c} is", "completion": f" {CAPITALS[c]}"}
            for c in ("Peru", "Kenya")]  # fmt: skip
    return write_jsonl(folder / "answers.jsonl", rows)


def drawn(count, seed, row):
    """The masked ones of a row's tokens, the first token of which is special."""
    return [1 + int(place) for place in choice(max(1, int(0.15 * count + 0.5)), count, seed, "masked", row)]


def naive_rows(bert, rows, seed=0):
    """Gradients of all linear layers but the head, of one unpadded row after the other, in float64."""
    net = hf.AutoModelForMaskedLM.from_pretrained(bert, dtype=torch.float64).eval()
    tokenizer, grads = hf.AutoTokenizer.from_pretrained(bert), []
    layers = {name: m for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)}
    weights = [p for name, m in layers.items() if "decoder" not in name for p in m.parameters()]
    for number, row in enumerate(rows):
        if "text" in row:
            ids = tokenizer(row["text"])["input_ids"]
            places = drawn(len(ids) - 1, seed, number)
        else:
            before = tokenizer(row["prompt"])["input_ids"]
            ids = before + tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            places = list(range(len(before), len(ids)))
        ids = torch.tensor(ids)
        read = ids.clone()
        read[places] = MASK
        logits = net(input_ids=read[None]).logits[0]
        loss = sum(logits[t].logsumexp(0) - logits[t, ids[t]] for t in places) / len(places)
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(grads)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def close(got, want, tolerance=1e-9):
    want = np.asarray(want)
    assert np.abs(np.asarray(got) - want).max() <= tolerance * np.abs(want).max()


def gradients_of(run):
    with h5py.File(run / "store.h5") as file:
        length = file["rows/length"][()]
    with gf.open_store(run) as store:
        blocks = [store.read(name).reshape(len(length), -1) for name in store.names("gradients")]
        return np.concatenate(blocks, 1), store.settings


@pytest.mark.parametrize("batch", [1, 4096])
def test_scores_equal_a_plain_loop(ok, bert, texts, answers, tmp_path, batch):
    table = tmp_path / "table.jsonl"
    out = ok("score", *TASK, "--model", bert, "--dataset", texts, "--query", answers, "--seed", 3, *FULL,
             "--token-batch-size", batch, "--top", 20, "--jsonl", table)  # fmt: skip
    assert "The capital of Peru is → Lima" in out
    want = naive_rows(bert, read(texts), 3) @ naive_rows(bert, read(answers), 3).T
    lines = read(table)
    assert len(lines) == want.numel()
    names = ["q-Peru", "q-Kenya"]
    close(
        [line["score"] for line in lines], [want[line["row"], names.index(line["query"])] for line in lines]
    )


def test_a_text_as_a_query_is_masked_like_a_row(ok, bert, texts, tmp_path):
    table, text = tmp_path / "table.jsonl", DOCUMENTS[2]["text"]
    ask = ("score", *TASK, "--model", bert, "--dataset", texts, *FULL, "--top", 20, "--jsonl", table)
    ok(*ask, "--query", text)
    want = naive_rows(bert, read(texts)) @ naive_rows(bert, [{"text": text}])[0]
    close([line["score"] for line in read(table)], [want[line["row"]] for line in read(table)])
    ok(*ask, "--overwrite", "--query", DOCUMENTS[1]["prompt"], "--completion", DOCUMENTS[1]["completion"])
    asked = {key: DOCUMENTS[1][key] for key in ("prompt", "completion")}
    want = naive_rows(bert, read(texts)) @ naive_rows(bert, [asked])[0]
    close([line["score"] for line in read(table)], [want[line["row"]] for line in read(table)])


def test_a_store_keeps_its_seed_and_is_not_compared_with_another(ok, command, bert, texts, answers, tmp_path):
    data = ("--model", bert, "--dataset", texts, *TASK, *FULL)
    ok("build", tmp_path / "rows", *data, "--seed", 1)
    rows, settings = gradients_of(tmp_path / "rows")
    assert settings["masking"] == {"share": 0.15, "token": MASK, "seed": 1}
    want = naive_rows(bert, read(texts), 1)
    close((rows**2).sum(1), want.square().sum(1), 1e-5)
    table = tmp_path / "table.jsonl"
    ok("query", tmp_path / "rows", "--query", DOCUMENTS[0]["text"], "--top", 20, "--jsonl", table)
    scores = want @ naive_rows(bert, [DOCUMENTS[0]], 1)[0]
    close([line["score"] for line in read(table)], [scores[line["row"]] for line in read(table)], 1e-5)
    other = command("score", *data, "--query-path", tmp_path / "rows", "--seed", 2)
    assert re.search(r"made differently.*masking.seed is 1 there and 2 here", other.err), other.err
    again = command("build", tmp_path / "rows", *data, "--seed", 2)
    assert (again.status, again.err.count("\n")) == (2, 1)
    assert "masking" in again.err, again.err
    ok("score", tmp_path / "run", *data, "--query-path", tmp_path / "rows", "--seed", 1)


def test_a_store_that_does_not_say_how_it_was_masked_is_refused(command, bert, texts, tmp_path):
    net, tokenizer = gf.load_model(bert, task="masked_lm"), hf.AutoTokenizer.from_pretrained(bert)
    docs = mask_tokens(tokenize(load_rows(texts), tokenizer), MASK, tokenizer.all_special_ids, 0)
    gf.build(tmp_path / "rows", net, docs, gf.project(4), loss=gf.model_loss(net, "masked_lm"),
             settings={"model": {"path": str(bert)}})  # fmt: skip
    result = command("query", tmp_path / "rows", "--query", "a b c")
    assert "does not say how its tokens were masked: make it again with gradfn build" in result.err


def test_tokens_are_masked_whatever_the_batch_but_never_special_ones(bert, texts):
    tokenizer = hf.AutoTokenizer.from_pretrained(bert)
    docs = tokenize(load_rows(texts), tokenizer)
    masked = mask_tokens(docs, MASK, tokenizer.all_special_ids, 0)
    for row in range(len(docs)):
        ids, example = docs[row]["input_ids"], masked[row]
        at = (example["input_ids"] == MASK).nonzero()[:, 0].tolist()
        assert at == drawn(len(ids) - 1, 0, row)
        assert example["labels"][at].tolist() == ids[at].tolist()
        assert int((example["labels"] != -100).sum()) == len(at) == masked.supervised[row]
    assert masked.fingerprint() != mask_tokens(docs, MASK, tokenizer.all_special_ids, 1).fingerprint()
    assert masked.select([3, 1])[0]["input_ids"].tolist() == masked[3]["input_ids"].tolist()


def test_all_tokens_are_masked_as_often(bert):
    docs = gf.make_documents([list(range(20))] * 2000)
    at = np.stack([row["labels"].numpy() for row in mask_tokens(docs, MASK, [0], 0)]) != -100
    assert (at.sum(1) == 3).all()  # of 19, that are not special
    assert at[:, 0].sum() == 0
    share = at[:, 1:].mean(0)
    assert np.abs(share - 3 / 19).max() < 5 * np.sqrt(3 / 19 * 16 / 19 / 2000)


def test_every_command_takes_masked_rows(ok, bert, texts, answers, tmp_path):
    data = (*TASK, "--model", bert, "--dataset", texts)
    ok("hessian", tmp_path / "hessian", *data, "--method", "ekfac", "--labels", "model")
    ok("score", tmp_path / "run", *data, "--query", answers, "--hessian-path", tmp_path / "hessian")
    ok("retrain", tmp_path / "truth", *data, "--query", answers, "--subsets", 4, "--epochs", 1, "--seeds", 1,
       "--batch-size", 4)  # fmt: skip
    assert "4 subsets x 1 shared seed" in ok("evaluate", "lds", tmp_path / "truth", tmp_path / "run")
    assert "equal to" in ok("check", bert, *TASK, "--dataset", texts)


def test_what_has_no_masks_is_refused(command, model, bert, corpus, texts, folder):
    ask = ("score", *TASK, "--dataset", texts, "--self", "--model")
    causal = command(*ask, model)
    assert causal.status == 2
    assert causal.err.count("\n") == 1
    bare = save(folder / "bare", hf.AutoModelForMaskedLM.from_pretrained(bert), make_tokenizer())
    assert "has no mask token, which masked-lm puts in the place of tokens" in command(*ask, bare).err
    chat = command(*ask, bert, "--messages-column", "messages")
    assert "--messages-column stands alone" in chat.err
