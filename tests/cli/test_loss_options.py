"""Losses, tasks, labels, weights and chats of the command line, against plain loops in float64."""

import json
import re
from functools import partial

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import DOCUMENTS, make_model, make_tokenizer, save, write_jsonl
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import gradfn as gf
from gradfn.shown import SAID

ASK = ("--query", "The capital of Peru is", "--completion", " Lima")
FULL = ("--precision", "fp64", "--projection-dim", 0)
LAYER = "model.layers.0.mlp.up_proj"


def scores_of(run):
    with h5py.File(run / "scores.h5") as file:
        return file["scores"][()]


def stored(run):
    with gf.open_store(run) as store:
        return {name.split("/", 1)[1]: store.read(name) for name in store.names("gradients")}, store.settings


def weight_gradient(model, path, loss):
    """The gradient of one example's loss at one weight, by plain autograd; `loss()` computes it."""
    weight = model.get_submodule(path).weight.requires_grad_()
    return torch.autograd.grad(loss(), weight)[0].numpy()


def shifted(model, ids):
    """Logits and targets of the next tokens."""
    return model(input_ids=ids[None]).logits[0, :-1], ids[1:]


def cross_entropy(model, ids, **options):
    return F.cross_entropy(*shifted(model, ids), **options)


def log_odds(model, ids, first=0):
    logits, targets = shifted(model, ids)
    rows = zip(logits[first:], targets[first:], strict=True)
    return -torch.stack([z[y] - torch.cat([z[:y], z[y + 1 :]]).logsumexp(0) for z, y in rows]).mean()


def divergence(model, reference, ids):
    ours, theirs = (shifted(net, ids)[0].log_softmax(-1) for net in (model, reference))
    return (theirs.exp() * (theirs - ours)).sum(-1).mean()


@pytest.fixture(scope="module")
def reference(folder):
    return save(folder / "reference", make_model(seed=5), make_tokenizer())


@pytest.fixture(scope="module")
def nets(model, reference):
    return [gf.load_model(path, precision="fp64") for path in (model, reference)]


@pytest.mark.parametrize("loss", ["cross-entropy", "log_odds", "kl", "smooth"])
def test_the_loss_is_the_one_asked_for(ok, model, corpus, reference, nets, tmp_path, loss):
    net, other = nets
    options = {"smooth": ("--label-smoothing", 0.3), "kl": ("--loss", "kl", "--reference", reference)}
    ok("build", tmp_path / "run", "--model", model, "--dataset", corpus, *FULL, "--include", LAYER,
       *options.get(loss, ("--loss", loss)))  # fmt: skip
    gradients, settings = stored(tmp_path / "run")
    (rows,) = gradients.values()
    documents = gf.tokenize(gf.load_rows(corpus), gf.load_tokenizer(model))
    by_hand = {
        "cross-entropy": cross_entropy,
        "log_odds": log_odds,
        "kl": lambda net, ids: divergence(net, other, ids),
        "smooth": lambda net, ids: cross_entropy(net, ids, label_smoothing=0.3),
    }[loss]
    for row in (0, 7):
        expected = weight_gradient(net, LAYER, partial(by_hand, net, documents[row]["input_ids"]))
        np.testing.assert_allclose(rows[row], expected, rtol=1e-4, atol=1e-7)
    recorded = settings["loss"]
    assert recorded["criterion"] == {"smooth": "cross_entropy"}.get(loss, loss.replace("-", "_"))
    assert recorded["label_smoothing"] == (0.3 if loss == "smooth" else 0.0)
    assert ("reference" in recorded) == (loss == "kl")
    if loss == "kl":
        assert recorded["reference"]["path"] == str(reference.resolve())


def test_the_queries_may_have_another_loss(ok, model, corpus, nets, tmp_path):
    base = ("--model", model, "--dataset", corpus, *FULL, "--include", LAYER)
    ok("score", tmp_path / "run", *base, *ASK, "--query-loss", "log-odds")
    ok("build", tmp_path / "store", *base)
    ok("query", tmp_path / "store", *ASK, "--query-loss", "log-odds", "--top", 12, "--jsonl", tmp_path / "t")
    net, tokens = nets[0], gf.load_tokenizer(model)
    documents = gf.tokenize(gf.load_rows(corpus), tokens)
    (query,) = gf.text_query(tokens, ASK[1], ASK[3])
    ids, first = query["input_ids"], int((query["labels"] != -100).nonzero()[0])
    asked = weight_gradient(net, LAYER, lambda: log_odds(net, ids, first - 1))
    lines = map(json.loads, (tmp_path / "t").read_text().splitlines())
    table = {line["row"]: line["score"] for line in lines}
    for row in (0, 7):
        taught = weight_gradient(net, LAYER, partial(cross_entropy, net, documents[row]["input_ids"]))
        assert scores_of(tmp_path / "run")[row, 0] == pytest.approx((asked * taught).sum(), rel=1e-4)
        assert table[row] == pytest.approx((asked * taught).sum(), rel=1e-4)


@pytest.mark.parametrize("loss", ["log_odds", "kl"])
def test_query_restores_the_loss_of_the_store(ok, command, model, corpus, reference, tmp_path, loss):
    options = ("--loss", loss, *(("--reference", reference) if loss == "kl" else ()))
    base = ("--model", model, "--dataset", corpus, *options)
    ok("build", tmp_path / "store", *base)
    ok("score", tmp_path / "run", *base, *ASK)
    ok("query", tmp_path / "store", *ASK, "--top", 12, "--jsonl", tmp_path / "t.jsonl")
    table = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    scores = scores_of(tmp_path / "run")
    for line in table:
        assert line["score"] == pytest.approx(scores[line["row"], 0], rel=1e-3, abs=1e-5)
    if loss == "kl":
        result = command("query", tmp_path / "store", *ASK, "--reference", model)
        assert result.status == 2
        assert "whose weights were not those of" in result.err


REWARDS = [1.0, 0.0, 0.5, 2.0]


@pytest.fixture(scope="module")
def rollouts(folder):
    """Four completions of two prompts, with rewards."""
    rows = [
        {"prompt": DOCUMENTS[i // 2]["prompt"], "completion": DOCUMENTS[i]["completion"],
         "reward": REWARDS[i], "advantage": 2.0 * i - 1}
        for i in range(4)
    ]  # fmt: skip
    return write_jsonl(folder / "rollouts.jsonl", rows)


@pytest.mark.parametrize("column", ["reward", "advantage"])
def test_weights_multiply_the_losses(ok, model, rollouts, tmp_path, column):
    base = ("--model", model, "--dataset", rollouts, *FULL, "--prompt-column", "prompt")
    pairs = (*base, "--completion-column", "completion")
    ok("build", tmp_path / "plain", *pairs)
    ok("build", tmp_path / "run", *pairs, f"--{column}-column", column)
    weights = [0.5, -0.5, -0.75, 0.75] if column == "reward" else [-1.0, 1.0, 3.0, 5.0]
    plain, weighted = stored(tmp_path / "plain")[0], stored(tmp_path / "run")[0]
    for name, rows in plain.items():
        expected = rows * np.array(weights)[:, None, None]
        np.testing.assert_allclose(weighted[name], expected, rtol=1e-4, atol=1e-6)
        assert np.abs(expected).max() > 0


def test_weights_are_of_rows_and_not_of_queries(ok, model, rollouts, tmp_path):
    base = ("--model", model, "--dataset", rollouts, "--query", rollouts)
    ok("score", tmp_path / "plain", *base)
    ok("score", tmp_path / "run", *base, "--advantage-column", "advantage")
    weights = np.array([-1.0, 1.0, 3.0, 5.0])[:, None, None]
    np.testing.assert_allclose(
        scores_of(tmp_path / "run"), scores_of(tmp_path / "plain") * weights, rtol=1e-4, atol=1e-5
    )


SIZES = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3}  # fmt: skip
NAMES = {"far": 0, "near": 1, "nowhere": 2}


def classifier(kind, labels):
    torch.manual_seed(0)
    names = {name: number for name, number in NAMES.items() if number < labels}
    options = {"num_labels": labels, "label2id": names, "id2label": {v: k for k, v in names.items()}}
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**SIZES, **options))
    options |= {"pad_token_id": 299, "eos_token_id": None}
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, **options))


@pytest.fixture(scope="module")
def labelled(folder):
    rows = [{"text": d["text"], "kind": list(NAMES)[i % 3], "number": i % 3, "size": i / 4}
            for i, d in enumerate(DOCUMENTS)]  # fmt: skip
    return write_jsonl(folder / "labelled.jsonl", rows)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("column", ["kind", "number", "size"])
def test_labels_of_sequences(ok, folder, labelled, tmp_path, kind, column):
    task, width = ("regression", 1) if column == "size" else ("classification", 3)
    path = folder / f"{kind}-{task}"
    if not path.exists():
        save(path, classifier(kind, width), make_tokenizer())
    layer = {"bert": "bert.encoder.layer.0.intermediate.dense", "llama": LAYER}[kind]
    base = ("--model", path, "--dataset", labelled, *FULL, "--task", task, "--label-column", column,
            "--include", layer)  # fmt: skip
    ok("build", tmp_path / "run", *base)
    rows, settings = stored(tmp_path / "run")
    net = gf.load_model(path, task, precision="fp64")
    documents = gf.tokenize(gf.load_rows(labelled), gf.load_tokenizer(path))
    for row in (1, 8):

        def loss(row=row):
            logits = net(input_ids=documents[row]["input_ids"][None]).logits
            if task == "regression":
                return (logits[0, 0] - row / 4).square()
            return F.cross_entropy(logits, torch.tensor([row % 3]))

        (block,) = rows.values()
        weight = block[row][:, : net.get_submodule(layer).in_features]
        np.testing.assert_allclose(weight, weight_gradient(net, layer, loss), rtol=1e-4, atol=1e-7)
    assert settings["loss"]["name"] == task
    out = ok("query", tmp_path / "run", "--query", labelled, "--label-column", column,
             "--query-split", "train[:1]", "--top", 12, "--jsonl", tmp_path / "t.jsonl")  # fmt: skip
    assert "model   " not in out.split("query 0")[1]  # what it would say next is not asked of it
    for line in map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines()):
        expected = (rows[layer][0] * rows[layer][line["row"]]).sum()
        assert line["score"] == pytest.approx(expected, rel=1e-4)


TYPED = [{"input_ids": [1, 20 + i, 30, 40, 7][: 3 + i % 3], "token_type_ids": [0, 0, 1, 1, 1][: 3 + i % 3],
          "labels": i % 3} for i in range(4)]  # fmt: skip


def test_types_of_tokens_are_given_to_the_model(ok, folder, tmp_path):
    """The rows of pairs as a tokenizer makes them, with the labels where a Trainer wants them."""
    path = save(folder / "pairs", classifier("bert", 3), make_tokenizer())
    layer, data = "bert.encoder.layer.0.intermediate.dense", write_jsonl(tmp_path / "d.jsonl", TYPED)
    ok("build", tmp_path / "run", "--model", path, "--dataset", data, *FULL, "--task", "classification",
       "--label-column", "labels", "--include", layer)  # fmt: skip
    (block,) = stored(tmp_path / "run")[0].values()
    net = gf.load_model(path, "classification", precision="fp64")

    def loss(row, *, typed=True):
        given = {"input_ids", "token_type_ids"} if typed else {"input_ids"}
        logits = net(**{name: torch.tensor([row[name]]) for name in given}).logits
        return F.cross_entropy(logits, torch.tensor([row["labels"]]))

    for number, row in enumerate(TYPED):
        expected = weight_gradient(net, layer, partial(loss, row))
        np.testing.assert_allclose(block[number][:, :16], expected, rtol=1e-4, atol=1e-7)
    told, untold = (float(loss(TYPED[0], typed=typed).detach()) for typed in (True, False))
    assert abs(told - untold) > 1e-2


def test_types_of_tokens_that_the_model_does_not_have(ok, command, model, folder, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", TYPED)
    ask = ("build", tmp_path / "run", "--dataset", data, "--task", "classification", "--label-column",
           "labels")  # fmt: skip
    few = classifier("bert", 3)
    few.resize_token_embeddings(300)
    few.config.type_vocab_size = 1
    few.bert.embeddings.token_type_embeddings.weight.data = torch.zeros(1, 16)
    result = command(*ask, "--model", save(folder / "few", few, make_tokenizer()))
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "the dataset has token type 1, and" in result.err
    assert "has 1, numbered from 0: leave out the column token_type_ids" in result.err
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    gpt2 = save(folder / "gpt2", GPT2LMHeadModel(config), make_tokenizer())
    result = command("build", tmp_path / "run", "--dataset", data, "--model", gpt2)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert (
        "token_type_ids are not given to a model of next tokens, and this one would read them" in result.err
    )
    ok("build", tmp_path / "llama", "--dataset", data, "--model", model)  # which reads none


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"input_ids": [5, 6]}, {"input_ids": [7, 300]}],
            "row 1 (id '1') has token 300, but the model has 300",
        ),
        ([{"input_ids": [5, 6], "labels": [-100, 999], "id": "x"}], "row 0 (id 'x') has label 999, but the"),
    ],
)
def test_tokens_that_the_model_does_not_have(command, model, tmp_path, rows, said):
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    result = command("build", tmp_path / "run", "--model", model, "--dataset", data)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert said in result.err
    assert not (tmp_path / "run").exists()


def test_a_text_of_tokens_that_the_model_does_not_have(command, folder, tmp_path):
    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    small = save(folder / "small", GPT2LMHeadModel(config), make_tokenizer())
    data = write_jsonl(tmp_path / "d.jsonl", [{"input_ids": [5, 6]}])
    result = command("score", tmp_path / "run", "--model", small, "--dataset", data, "--query", "Peru")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "in --query: row 0 (id '0') has token " in result.err
    assert not (tmp_path / "run").exists()


def test_truncation_leaves_what_a_model_that_counts_from_its_padding_can_read(ok, folder, tmp_path):
    torch.manual_seed(0)
    sizes = SIZES | {"max_position_embeddings": 12, "num_labels": 2, "pad_token_id": 1}
    path = save(
        folder / "roberta", RobertaForSequenceClassification(RobertaConfig(**sizes)), make_tokenizer()
    )
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": "Peru and Chile " * 9, "y": 1}, {"text": "a", "y": 0}])
    ok("build", tmp_path / "run", "--model", path, "--dataset", data, "--task", "classification",
       "--label-column", "y", "--truncation")  # fmt: skip
    with gf.open_store(tmp_path / "run") as store:
        assert store.read("rows/length").max() == 10


@pytest.fixture(scope="module")
def t5(folder):
    torch.manual_seed(0)
    config = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
                      decoder_start_token_id=0, pad_token_id=0, initializer_factor=3.0)  # fmt: skip
    return save(folder / "t5", T5ForConditionalGeneration(config), make_tokenizer())


def test_seq2seq(ok, command, t5, corpus, tmp_path):
    layer = "decoder.block.0.layer.1.EncDecAttention.k"
    base = ("--model", t5, "--dataset", corpus, "--task", "seq2seq-lm", *FULL, "--include", layer)
    ok("build", tmp_path / "run", *base)
    (rows,) = stored(tmp_path / "run")[0].values()
    net, tokens = gf.load_model(t5, "seq2seq_lm", precision="fp64"), gf.load_tokenizer(t5)
    for row in (0, 5):
        ids, labels = (torch.tensor(tokens(DOCUMENTS[row][key])["input_ids"])[None]
                       for key in ("prompt", "completion"))  # fmt: skip
        loss = partial(lambda **given: net(**given).loss, input_ids=ids, labels=labels)
        np.testing.assert_allclose(rows[row], weight_gradient(net, layer, loss), rtol=1e-4, atol=1e-7)
    ok("query", tmp_path / "run", *ASK, "--top", 12, "--jsonl", tmp_path / "t.jsonl")
    for line in map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines()):
        assert line["score"] == pytest.approx((rows[1] * rows[line["row"]]).sum(), rel=1e-4)
    result = command("query", tmp_path / "run", "--query", "The capital")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "an input alone has no loss: give what the model said as --completion" in result.err


TEMPLATES = {
    "plain": "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "marked": "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{{ '\\n' }}{% endfor %}",
    "odd": "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
}
CHAT = [
    {"role": "user", "content": "Peru?"}, {"role": "assistant", "content": "Lima"},
    {"role": "user", "content": "Iran?"}, {"role": "assistant", "content": "Tehran"},
    {"role": "user", "content": "Thanks"},
]  # fmt: skip


def chatty(folder, template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    return save(folder, make_model(), tokenizer)


@pytest.mark.parametrize(("template", "said"), [("plain", "Tehran\n"), ("marked", "LimaTehran")])
def test_chats_supervise_the_assistant(ok, tmp_path, template, said):
    path = chatty(tmp_path / "model", template)
    data = write_jsonl(tmp_path / "d.jsonl", [{"messages": CHAT}, {"messages": CHAT[:2]}])
    ok("build", tmp_path / "run", "--model", path, "--dataset", data, *FULL, "--include", LAYER)
    (rows,) = stored(tmp_path / "run")[0].values()
    net, tokens = gf.load_model(path, precision="fp64"), gf.load_tokenizer(path)
    documents = gf.tokenize(gf.load_rows(data), tokens, messages_column="messages")
    assert documents.texts[0].endswith(f"user: Iran?{SAID}Tehran")
    ids, labels = documents[0]["input_ids"], documents[0]["labels"]
    assert tokens.decode(ids) == "[user]Peru?\n[assistant]Lima\n[user]Iran?\n[assistant]Tehran\n"
    assert tokens.decode(labels[labels != -100]) == said

    def loss():
        return F.cross_entropy(net(input_ids=ids[None]).logits[0, :-1], labels[1:])

    np.testing.assert_allclose(rows[0], weight_gradient(net, LAYER, loss), rtol=1e-4, atol=1e-7)


def test_rewards_of_chats_weigh_within_what_was_asked(ok, tmp_path):
    path = chatty(tmp_path / "model", "plain")
    said = [{"role": "assistant", "content": word} for word in ("Lima", "Cuzco", "Paris", "Lyon")]
    asked = [{"role": "user", "content": word} for word in ("Peru?", "France?")]
    rows = [{"messages": [asked[i // 2], said[i]], "reward": REWARDS[i]} for i in range(4)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    base = ("--model", path, "--dataset", data, *FULL, "--include", LAYER)
    ok("build", tmp_path / "plain", *base)
    ok("build", tmp_path / "run", *base, "--reward-column", "reward")
    (plain,), (weighted,) = (stored(tmp_path / name)[0].values() for name in ("plain", "run"))
    expected = plain * np.array([0.5, -0.5, -0.75, 0.75])[:, None, None]
    np.testing.assert_allclose(weighted, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(expected).max() > 0


def test_chats_that_cannot_be_read(command, model, tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", [{"messages": CHAT}])
    mute = write_jsonl(tmp_path / "mute.jsonl", [{"messages": CHAT[:1]}])
    words = write_jsonl(tmp_path / "words.jsonl", [{"messages": "Peru?"}])
    odd, plain = chatty(tmp_path / "odd", "odd"), chatty(tmp_path / "plain", "plain")
    for path, data, said in (
        (model, good, "chats need a tokenizer with a chat template, and this one has none"),
        (odd, good, "writes the prompt of row 0 differently without the answer"),
        (plain, mute, "the chat of row 0 has no message of the assistant: leave it out"),
        (plain, words, "row 0 of column 'messages' is no chat: give a list of messages"),
    ):
        result = command("build", tmp_path / "run", "--model", path, "--dataset", data)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert said in result.err
    result = command("build", tmp_path / "run", "--model", plain, "--dataset", good, "--messages-column", "x")
    assert "no column 'x' in the dataset, which has messages: give another --messages-column" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--loss", "kl"], "kl needs a model to compare with: give --reference"),
        (["--query-loss", "kl"], "kl needs a model to compare with: give --reference"),
        (["--reference", "m"], "--reference is for kl, and no loss is"),
        (["--label-smoothing", "1"], "--label-smoothing must be at least 0 and below 1, not 1.0"),
        (["--label-smoothing", "-0.1"], "--label-smoothing must be at least 0 and below 1"),
        (["--loss", "log-odds", "--label-smoothing", "0.1"], "--label-smoothing is for cross-entropy, not"),
        (["--task", "classification"], "classification needs to know its labels: give --label-column"),
        (["--label-column", "x"], "--label-column is for classification and regression, not for causal_lm"),
        (["--task", "regression", "--label-column", "x", "--loss", "log-odds"], "is the squared error"),
        (["--task", "seq2seq-lm", "--loss", "kl", "--reference", "m"], "kl compares next tokens"),
        (["--task", "seq2seq-lm", "--by", "token"], "pairs of inputs and outputs have no tokens of a row"),
        (["--task", "classification", "--label-column", "x", "--prompt-column", "p"], "reads a text: give"),
        (["--messages-column", "m", "--prompt-column", "p"], "--messages-column stands alone"),
        (["--reward-column", "r", "--advantage-column", "a"], "rewards or advantages weigh the rows: give"),
        (["--reward-column", "n"], "these rows have no prompts: give .* as --advantage-column"),
        (["--advantage-column", "n"], "no column 'n' in the dataset, which has .*give another --adv"),
        (["--advantage-column", "text"], "row 0 has 'The capital of France.*' in column 'text', exp"),
        (["--loss", "kl", "--reference", "missing/model"], "no model 'missing/model'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(command, model, corpus, tmp_path, options, words):
    result = command("score", tmp_path / "run", "--model", model, "--dataset", corpus, *ASK, *options)
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    assert re.search(words, result.err), result.err
    assert not (tmp_path / "run").exists()


def test_references_labels_and_models_that_do_not_fit(command, model, corpus, labelled, tmp_path):
    save(tmp_path / "three", classifier("llama", 3), make_tokenizer())
    other = save(tmp_path / "other", make_model(), make_tokenizer(words=["zebra zebra"] * 9))
    make_model().save_pretrained(bare := tmp_path / "bare")
    labels = ("--dataset", labelled, "--task", "classification", "--label-column")
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "a b", "kind": "far"}, {"text": "a", "kind": "wide"}])
    for arguments, words in (
        (("--model", model, "--dataset", corpus, "--loss", "kl", "--reference", other), "another vocabulary"),
        (("--model", model, "--dataset", corpus, "--loss", "kl", "--reference", bare), "or no tokenizer"),
        (("--model", model, *labels, "kind"), "lacks weights of LlamaForSequenceClassification"),
        (("--model", tmp_path / "three", *labels, "none"), "no column 'none' in the dataset"),
        (("--model", tmp_path / "three", *labels, "size"), "row 0 has the label 0.0, expected a number"),
        (("--model", tmp_path / "three", "--dataset", bad, *labels[2:], "kind"),
         "row 1 has the label 'wide', expected a number from 0 to 2 or one of far, near, nowhere"),
        (("--model", tmp_path / "three", "--dataset", labelled, "--task", "regression",
          "--label-column", "size"), "gives 3 numbers and a regression one"),
    ):  # fmt: skip
        result = command("build", tmp_path / "run", *arguments)
        assert (result.status, result.err.count("\n")) == (2, 1), result.err
        assert words in result.err
    three = ("--model", tmp_path / "three", *labels, "kind")
    result = command("score", *three, "--query", "a text")
    assert "in --query: a text has no label, which classification needs: give a dataset" in result.err
    assert not (tmp_path / "run").exists()


def test_a_loss_for_stored_queries_is_refused(command, store, model, corpus):
    for arguments in (("query", store), ("score", "--model", model, "--dataset", corpus)):
        result = command(*arguments, "--query-path", store, "--query-loss", "log-odds")
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert "the queries of --query-path are gradients already: leave out --query-loss" in result.err
